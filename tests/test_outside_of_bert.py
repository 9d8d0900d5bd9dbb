"""Models whose lookups, outputs or statistics are not where BERT has them, and runs in which nothing is attacked."""

import logging

import pytest
import torch
from test_faults import examples, flags, tiny_bert
from torch import nn
from torch.nn import functional
from transformers import IBertConfig, IBertForSequenceClassification, T5Config, T5ForConditionalGeneration

from fgm_trainer import FGM, PGD, VAT, AdversarialTrainer, PartialFGM
from fgm_trainer.attacks import Step
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.batches import rows_of
from fgm_trainer.perturbation.divergence import logits_of


def by_example(tensors):
    """The lengths by which the examples moved between two passes."""
    clean, moved = tensors
    return (moved - clean).flatten(1).norm(dim=1).tolist()


# Lookups --------------------------------------------------------------------------------------------------------------


def tiny_t5():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=40, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return T5ForConditionalGeneration(config).double()


class LooksUpItself(nn.Module):
    """As BLIP-2: looks tokens up by the shared lookup, and gives the encoder embeddings."""

    def __init__(self):
        super().__init__()
        self.language_model = tiny_t5()
        self.config = self.language_model.config

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def get_encoder(self):
        return self.language_model.get_encoder()

    def forward(self, input_ids, labels, decoder_input_ids=None):
        embeds = self.get_input_embeddings()(input_ids)
        given = {} if decoder_input_ids is None else {"decoder_input_ids": decoder_input_ids}
        return self.language_model(inputs_embeds=embeds, labels=labels, **given)


@pytest.mark.parametrize("same", [False, True], ids=["own words of the decoder", "the encoder's words once more"])
def test_tokens_that_are_looked_up_before_the_encoder(same):
    """Only what the encoder is given is perturbed, also where the decoder is given the very same ids."""
    model, ids = LooksUpItself().train(), torch.arange(1, 33).view(4, 8)
    encoded, decoded = [], []
    model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    model.language_model.get_decoder().block[0].register_forward_pre_hook(
        lambda module, args: decoded.append(args[0].detach().clone())
    )
    batch = {"input_ids": ids, "labels": ids % 30 + 1} | ({"decoder_input_ids": ids} if same else {})
    Adversary(model, FGM(epsilon=0.5, scope="example")).backward(batch)
    assert by_example(encoded) == pytest.approx([0.5] * 4)
    assert torch.equal(*decoded)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for the old name
def test_prompt_tuning_of_an_encoder_decoder():
    peft = pytest.importorskip("peft", reason="an extra of the tests")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    model, ids = peft.get_peft_model(tiny_t5(), config).double().train(), torch.arange(1, 33).view(4, 8)
    seen = []
    model.base_model.get_encoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].detach().clone()), with_kwargs=True
    )
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 30 + 1}
    Adversary(model, FGM(epsilon=0.5, scope="example")).backward(batch)
    # The prompt itself stays as it is.
    assert torch.equal(seen[0][:, :3], seen[1][:, :3])
    assert by_example(seen) == pytest.approx([0.5] * 4)


def test_a_lookup_that_returns_a_scale_as_well():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = IBertForSequenceClassification(IBertConfig(vocab_size=40, pad_token_id=1, **sizes)).train()
    seen = []
    model.ibert.embeddings.word_embeddings.register_forward_hook(lambda m, a, output: seen.append(output[0].detach()))
    ids = torch.arange(2, 34).view(4, 8)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}
    Adversary(model, FGM(epsilon=0.5, scope="example")).backward(batch)
    assert by_example(seen) == pytest.approx([0.5] * 4, rel=1e-5)


# Outputs --------------------------------------------------------------------------------------------------------------


def test_what_a_divergence_compares():
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    loss = torch.tensor(1.0)
    assert logits_of({"loss": loss, "image_embeds": one, "logits_per_text": two})[0] is two
    assert logits_of({"loss": loss, "hidden": one, "scores": two})[0] is two
    assert logits_of({"loss": loss, "prediction": one})[0] is one
    assert logits_of((loss, one, two)) == (one,)
    with pytest.raises(ValueError, match="none of the model's outputs is named so: image_embeds, last_hidden_state"):
        logits_of({"loss": loss, "image_embeds": one, "last_hidden_state": two})


def test_a_model_without_logits_is_refused_by_what_compares_them():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.lookup = nn.Embedding(40, 8)

        def get_input_embeddings(self):
            return self.lookup

        def forward(self, input_ids, labels):
            hidden = self.lookup(input_ids)
            return {"loss": hidden.square().mean(), "pooled": hidden.mean(1), "hidden": hidden}

    batch = {"input_ids": torch.arange(8).view(2, 4), "labels": torch.zeros(2)}
    with pytest.raises(ValueError, match="none of the model's outputs is named so: pooled, hidden"):
        Adversary(Embeds(), VAT(epsilon=0.1)).backward(batch)
    Adversary(Embeds(), FGM(epsilon=0.1)).backward(batch)


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.InstanceNorm1d])
@pytest.mark.parametrize("attack", [PGD(epsilon=1e-9, steps=3), VAT(epsilon=1e-9)], ids=["pgd", "vat"])
def test_running_statistics_are_those_of_the_training_passes(kind, attack):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lookup, self.head = nn.Embedding(40, 16), nn.Linear(16, 3)
            self.norm = kind(16, track_running_stats=True)

        def get_input_embeddings(self):
            return self.lookup

        def forward(self, input_ids, labels):
            logits = self.head(self.norm(self.lookup(input_ids).transpose(1, 2))[:, :, 0])
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    batch = {"input_ids": torch.arange(32).view(4, 8), "labels": torch.tensor([0, 1, 2, 0])}
    plain, attacked = Normed(), Normed()
    for _ in range(2):
        plain(**batch)["loss"].backward()
    Adversary(attacked, attack).backward(batch)
    for name, value in plain.norm.named_buffers():
        torch.testing.assert_close(attacked.norm.get_buffer(name), value, rtol=0, atol=1e-7)
    assert attacked.norm.track_running_stats
    assert attacked.norm.momentum == plain.norm.momentum


# Batches --------------------------------------------------------------------------------------------------------------


def test_a_part_of_a_batch_of_videos_is_refused():
    batch = {"input_ids": torch.zeros(4, 8), "pixel_values_videos": torch.zeros(16, 6)}
    with pytest.raises(ValueError, match="'pixel_values_videos' has 16 rows for 4 examples"):
        rows_of(batch, torch.tensor([1]), 4)


def test_a_batch_without_examples_has_no_part():
    with pytest.raises(StopIteration) as end:
        next(PartialFGM(epsilon=0.5).passes(Step(0.5, examples=0)))
    assert end.value.value.delta is None


# Runs in which nothing is attacked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "schedule", "says"),
    [
        ({"adv_start": 1000}, None, "adv_start=1000 lies beyond the end of training (4 steps): nothing is attacked."),
        ({}, lambda progress: 0.0, "No step was attacked"),
        ({"adv_warmup": 16}, None, "adv_warmup=16 lasts longer than training (4 steps): epsilon ends at 25%."),
        ({"adv_every": 4, "adv_warmup": 0}, None, "adv_every=4: of the 4 steps of training one alone is attacked."),
        ({"adv_every": 3, "adv_start": 1, "adv_warmup": 0}, None, "adv_every=3: of the 4 steps"),
        ({"adv_every": 3, "adv_warmup": 0}, None, None),
        ({"adv_start": 2, "adv_warmup": 2}, None, None),
        ({"adv_start": 3}, None, None),
    ],
)
def test_a_schedule_that_leaves_nothing_to_attack_is_said(tmp_path, caplog, settings, schedule, says):
    args = flags(tmp_path, max_steps=4, **settings)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), epsilon_schedule=schedule)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    found = [record.getMessage() for record in caplog.records if record.name.startswith("fgm_trainer")]
    # So short a run may have learned nothing.
    found = [message for message in found if not message.startswith("Collapse?")]
    if says is None:
        assert found == []
    else:
        (message,) = found
        assert message.startswith(says)
