"""What one example is, where padding is, and what a model does with what it is given: each the smallest of its kind."""

import copy

import pytest
import torch
import transformers
from models import attack_of, batches, padded_data, tiny
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_faults import flags
from test_public_reports import apart, gradients, one_step
from torch import nn
from torch.nn import functional

from fgm_trainer import FGM, FGSM, PGD, AdversarialTrainer, FreeLB, PartialFGM
from fgm_trainer.attacks import ATTACKS
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.clipping import valid_range
from fgm_trainer.perturbation.forward_pass import PerturbedForward
from fgm_trainer.robustness import evaluate_robustness


@pytest.fixture
def added(monkeypatch):
    """Every perturbation that a target adds, with the positions where there is no token."""
    kept, meet = [], PerturbedForward.perturb

    def keep(self, module, value, *rest):
        result = meet(self, module, value, *rest)
        if self._delta is not None and not self.in_backward() and self.calls[-1].delta is not None:
            kept.append(((result - value).detach(), self.calls[-1].padding))
        return result

    monkeypatch.setattr(PerturbedForward, "perturb", keep)
    return kept


# 7. A valid range that is not the data's ----------------------------------------------------------------------------


class Pixels(nn.Module):
    """A convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 4, 3)
        self.classifier = nn.Linear(4 * 36, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.classifier(torch.tanh(self.features(pixel_values)).flatten(1))
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def pixels(mean=0.0, deviation=1.0):
    torch.manual_seed(1)
    values = (torch.rand(8, 3, 8, 8) - mean) / deviation
    return [{"pixel_values": v, "labels": i % 3} for i, v in enumerate(values)]


NORMALISED = {"mean": 0.45, "deviation": 0.225}


@pytest.mark.parametrize("attack", [FGM(epsilon=0.1), PGD(epsilon=0.1), FreeLB(epsilon=0.1), PartialFGM(epsilon=0.3)])
def test_a_range_before_normalisation_on_normalised_pixels_is_refused_at_the_first_batch(tmp_path, attack):
    model = Pixels()
    before = copy.deepcopy(model.state_dict())
    args = flags(
        tmp_path, adv_epsilon=None, adv_clip=[0.0, 1.0], adv_target="pixel_values", remove_unused_columns=False
    )
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=pixels(**NORMALISED), attack=attack)
    with pytest.raises(ValueError, match=r"lie outside of the valid range, which is 0 to 1 .*processing_class"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    report = {"target": "pixel_values", "clip": valid_range((0, 1)), "progress": False}
    with pytest.raises(ValueError, match="outside of the valid range"):
        evaluate_robustness(model, pixels(**NORMALISED), [attack], **report)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_clipping_moves_no_further_than_the_attack(tmp_path, added, norm):
    """Some pixels lie a rounding error outside."""
    data = pixels()
    for row in data:
        row["pixel_values"][0, :2] = 1.0005
    args = flags(
        tmp_path,
        adv_epsilon=None,
        adv_clip=[0.0, 1.0],
        adv_target="pixel_values",
        remove_unused_columns=False,
        max_steps=1,
    )
    attack = FGM(epsilon=1e-4, norm=norm)
    AdversarialTrainer(model=Pixels(), args=args, train_dataset=data, attack=attack).train()
    (delta, _), *_ = added
    free = FGM(epsilon=1e-4, norm=norm)
    assert delta.abs().max() <= free.epsilon * 1.01
    assert delta.abs().max() > 0


def test_an_audio_processor_that_normalises_has_no_range():
    processor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    with pytest.raises(ValueError, match=r"Wav2Vec2FeatureExtractor normalises each example .*do_normalize=False"):
        valid_range((-1, 1), processor)
    low, high = valid_range((-1, 1), transformers.Wav2Vec2FeatureExtractor(do_normalize=False))
    assert (low, high) == (-1, 1)


# 9. What one example is ---------------------------------------------------------------------------------------------


def choices():
    transformers.set_seed(0)
    config = tiny("bert").config
    model = transformers.BertForMultipleChoice(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def choices_data(size=4):
    rows = padded_data(tiny("bert"), size=4 * size)
    own = [rows[4 * i : 4 * i + 4] for i in range(size)]
    return [
        {"labels": i % 4} | {k: [row[k] for row in four] for k in ("input_ids", "attention_mask")}
        for i, four in enumerate(own)
    ]


def test_the_choices_of_one_example_share_its_norm(tmp_path, added):
    data = choices_data()
    ours = one_step(AdversarialTrainer, choices(), tmp_path, data, FGM(epsilon=0.7, scope="example"))
    ((delta, _),) = added
    assert delta.shape[0] == 16
    lengths = delta.view(4, -1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.7), rtol=1e-9, atol=0)
    # By hand.
    model = choices().train()
    batch = transformers.default_data_collator(data)
    embedded = model.get_input_embeddings()(batch.pop("input_ids"))
    leaf = torch.zeros_like(embedded, requires_grad=True)
    model(inputs_embeds=embedded + leaf, **batch).loss.backward(retain_graph=True)
    gradient = leaf.grad * batch["attention_mask"].unsqueeze(-1)
    gradient = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    model(inputs_embeds=embedded + 0.7 * gradient, **batch).loss.backward()
    theirs = gradients(model)
    theirs["bert.embeddings.word_embeddings.weight"][0] = 0
    assert apart(ours, theirs) < 1e-9


@pytest.mark.parametrize("method", sorted(n for n, a in ATTACKS.items() if a.default_target != "weights"))
def test_every_method_on_multiple_choice(tmp_path, method):
    args = flags(tmp_path, adv_method=method, max_steps=2, per_device_train_batch_size=4)
    trainer = AdversarialTrainer(model=choices(), args=args, train_dataset=choices_data(8))
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert 0 < line["adv_delta_norm"] < float("inf")
    if method in ("partial_fgm", "atta"):
        assert line["adv_delta_norm"] <= 0.3


class Patches(nn.Module):
    """Qwen2-VL's way: the patches of all images in the first dimension, as many an image as its grid says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4)
        self.vision = nn.Linear(6, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, pixel_values, labels, image_grid_thw=None, sizes=None):
        parts = sizes.tolist() if image_grid_thw is None else image_grid_thw.prod(-1).tolist()
        images = torch.stack([part.mean(0) for part in torch.tanh(self.vision(pixel_values)).split(parts)])
        logits = images + self.embed(input_ids).mean(1)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def patches(grid=True):
    torch.manual_seed(0)
    sizes = torch.tensor([[1, 2, 2], [1, 2, 3], [1, 1, 2]])
    batch = {"input_ids": torch.randint(0, 10, (3, 5)), "pixel_values": torch.randn(12, 6), "labels": torch.arange(3)}
    return batch | ({"image_grid_thw": sizes} if grid else {"sizes": sizes.prod(-1)})


def test_the_patches_of_one_image_share_its_norm(added):
    adversary = Adversary(Patches(), FGM(epsilon=1.0, scope="example"), target="pixel_values")
    adversary.backward(patches())
    ((delta, _),) = added
    lengths = torch.stack([part.norm() for part in delta.split([4, 6, 2])])
    torch.testing.assert_close(lengths, torch.ones(3))


@pytest.mark.parametrize("target", ["pixel_values", "vision"])
def test_rows_that_may_belong_to_any_example_are_refused_at_the_first_batch(target):
    adversary = Adversary(Patches(), FGM(epsilon=1.0, scope="example"), target=target)
    with pytest.raises(ValueError, match="12 rows for 3 examples, and which row belongs to which example is not known"):
        adversary.backward(patches(grid=False))
    adversary.close()
    with pytest.raises(ValueError, match=r"'pixel_values' has 12 rows for 3 examples\. Choose a method"):
        Adversary(Patches(), PartialFGM(epsilon=0.3), target="pixel_values").backward(patches())


# 10. Padding behind virtual tokens ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig], ids=lambda k: k.__name__)
@pytest.mark.parametrize("scope", ["token", "vocabulary"])
def test_padding_is_no_token_under_virtual_tokens(tmp_path, added, kind, scope):
    model = tiny("bert", dtype=torch.float32)
    data = padded_data(model)
    # Another id pads than the configuration says, so that the mask alone tells.
    for row in data:
        row["input_ids"] = [i or 7 for i in row["input_ids"]]
    try:
        wrapped = get_peft_model(model, kind(task_type="SEQ_CLS", num_virtual_tokens=3))
    except TypeError as error:
        pytest.skip(f"this peft can't make it: {error}")
    args = flags(tmp_path, max_steps=1, adv_scope=scope, label_names=["labels"])
    trainer = AdversarialTrainer(model=wrapped, args=args, train_dataset=data)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    mask = batches(data, 4)[0]["attention_mask"].bool()
    ((delta, padding),) = added
    assert torch.equal(padding, ~mask)
    assert torch.equal(delta.abs().sum(-1) > 0, mask)


# 11. A model that writes to what it looked up -----------------------------------------------------------------------


def ctrl():
    transformers.set_seed(0)
    config = transformers.CTRLConfig(
        vocab_size=30, n_embd=16, n_layer=2, n_head=2, dff=24, n_positions=32, resid_pdrop=0, embd_pdrop=0, num_labels=3
    )
    config.pad_token_id = 0
    return transformers.CTRLForSequenceClassification(config).double()


@pytest.mark.parametrize("method", sorted(n for n, a in ATTACKS.items() if a.default_target != "weights"))
def test_a_model_that_scales_the_lookups_output_in_place(tmp_path, method):
    data = padded_data(ctrl(), size=8)
    lengths = [n for n in ATTACKS[method].lengths if n == "epsilon" or getattr(ATTACKS[method], n) is not None]
    attack = ATTACKS[method](**dict.fromkeys(lengths, 1e-9))
    ours = one_step(AdversarialTrainer, ctrl(), tmp_path, data, attack)
    stock = one_step(AdversarialTrainer, ctrl(), tmp_path, data, None)
    once = method in ("freelb", "token_aware", "partial_fgm", "atta", "vat", "smart", "alum", "r3f")
    assert apart(ours, {n: g if once else 2 * g for n, g in stock.items()}) < 1e-5


# 12. A loss that takes things out of its batch ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "partial_fgm", "smart"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_loss_that_pops_from_its_batch(method, nested):
    model = tiny("bert")
    batch = batches(padded_data(model, size=6), 6)[0]
    given = {"inputs": batch} if nested else dict(batch)

    def loss_of(model, batch):
        batch = batch.pop("inputs") if nested else batch
        labels = batch.pop("labels")
        logits = model(**batch).logits
        return functional.cross_entropy(logits, labels), {"logits": logits}

    before = {k: v.clone() for k, v in batch.items()}
    adversary = Adversary(model, attack_of(method, scope="example"))
    adversary.backward(given, loss_of)
    assert batch.keys() == before.keys()
    popped = gradients(model)
    model.zero_grad()
    again = Adversary(model, attack_of(method, scope="example"))
    again.backward(batch, lambda model, batch: (lambda out: (out.loss, out))(model(**batch)))
    assert apart(popped, gradients(model)) < 1e-12


# 13. Inputs that are asked for gradients, layers that are left out --------------------------------------------------


def speech(name="Wav2Vec2", **settings):
    transformers.set_seed(0)
    config = getattr(transformers, f"{name}Config")(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        num_labels=3,
        **{"apply_spec_augment": False, "layerdrop": 0.0} | settings,
    )
    return getattr(transformers, f"{name}ForSequenceClassification")(config)


def waves(size=8):
    torch.manual_seed(0)
    return [{"input_values": torch.randn(400), "labels": i % 3} for i in range(size)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert", "WavLM"])
def test_a_wave_form(tmp_path, added, name, frozen):
    model = speech(name)
    if frozen:
        model.freeze_feature_encoder()
    args = flags(tmp_path, max_steps=2, adv_target="input_values", adv_epsilon=0.5)
    AdversarialTrainer(model=model, args=args, train_dataset=waves()).train()
    for delta, _ in added:
        torch.testing.assert_close(delta.norm(dim=1), torch.full((4,), 0.5))
    encoder = next(m for m in model.modules() if hasattr(m, "_requires_grad"))
    assert encoder._requires_grad is not frozen


@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "vat", "noise"])
@pytest.mark.parametrize("target", ["wav2vec2.encoder.layers.1", "wav2vec2.encoder.layers.*"])
def test_a_layer_that_is_left_out_by_chance(tmp_path, method, target):
    args = flags(tmp_path, max_steps=24, adv_target=target, adv_method=method, adv_epsilon=0.5, logging_steps=24)
    trainer = AdversarialTrainer(model=speech(layerdrop=0.6), args=args, train_dataset=waves(16))
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert 0 < line["adv_delta_norm"] <= 0.5 * 1.001
    assert line["adv_skipped"] == 0


class Depth(nn.Module):
    """Stochastic depth of one's own; a layer that is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lookup, self.layer, self.spare = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, labels, attention_mask=None):
        hidden = self.lookup(input_ids)
        if not self.training or torch.rand(()) < 0.5:
            hidden = hidden + torch.tanh(self.layer(hidden))
        return {"loss": functional.cross_entropy(self.head(hidden.mean(1)), labels)}


def test_a_layer_that_is_never_called_is_an_error_at_the_first_batch(tmp_path):
    data = padded_data(tiny("bert"))
    for target, steps in (("layer", 12), ("spare", 1)):
        args = flags(tmp_path, max_steps=steps, adv_target=target, remove_unused_columns=False)
        trainer = AdversarialTrainer(model=Depth(), args=args, train_dataset=data)
        if target == "layer":
            trainer.train()
            assert any(line.get("adv_delta_norm", 0) > 0 for line in trainer.state.log_history)
        else:
            with pytest.raises(RuntimeError, match="never reached the target 'spare'"):
                trainer.train()


def test_the_random_numbers_of_a_run_do_not_depend_on_the_look_for_a_layer(tmp_path):
    """Finding out whether a layer is left out by chance draws nothing from the run's stream."""
    states = []
    for probes in (False, True):
        model = Depth()
        if not probes:
            model.layer.register_forward_hook(lambda *_: None)
        torch.manual_seed(3)
        adversary = Adversary(model.train(), FGM(epsilon=0.1), target="layer")
        if not probes:
            adversary._target.stochastic = True
        batch = batches(padded_data(tiny("bert"), size=4), 4)[0]
        for _ in range(4):
            adversary.backward(batch)
        states.append(torch.get_rng_state())
        adversary.close()
    assert torch.equal(*states)


def test_fgsm_is_still_a_sign_step_per_choice(tmp_path, added):
    one_step(AdversarialTrainer, choices(), tmp_path, choices_data(), FGSM(epsilon=0.01))
    ((delta, padding),) = added
    lengths = delta[~padding].abs()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.01))
