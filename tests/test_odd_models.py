"""Models that are not called as BERT is: two towers, positions first, wrappers, teachers, searches."""

import functools
import types

import pytest
import torch
from models import attack_of
from test_faults import examples, flags, hooks, tiny_bart, tiny_bert
from test_precision import INPUT_ATTACKS, VISIBLE
from test_trainer import Snippet, agree, far, run
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Trainer,
    TrainingArguments,
    XLNetConfig,
    XLNetForSequenceClassification,
    set_seed,
)

from fgm_trainer import FGM, AdversarialTrainer, AdversarialTrainerMixin
from fgm_trainer.engine.schedule import in_steps
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.forward_pass import PerturbedForward
from fgm_trainer.perturbation.targets import EmbeddingOutput


@pytest.fixture
def moved(monkeypatch):
    """Every perturbation that a target adds, with the call's mask."""
    kept, meet = [], PerturbedForward.perturb

    def keep(self, module, value, *rest):
        result = meet(self, module, value, *rest)
        if self._delta is not None:
            kept.append(((result - value).detach(), self.masks[-1] if self.masks else None))
        return result

    monkeypatch.setattr(PerturbedForward, "perturb", keep)
    return kept


class TwoTowers(nn.Module):
    """One encoder, two inputs of the same length, a mask each."""

    def __init__(self):
        super().__init__()
        self.encoder = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        self.config = self.encoder.config

    def get_input_embeddings(self):
        return self.encoder.get_input_embeddings()

    def forward(self, input_ids, attention_mask, input_ids_2, attention_mask_2, labels):
        one = self.encoder.bert(input_ids, attention_mask=attention_mask)[1]
        other = self.encoder.bert(input_ids_2, attention_mask=attention_mask_2)[1]
        return {"loss": nn.functional.cross_entropy(self.encoder.classifier(one * other), labels)}


def test_every_tower_keeps_its_own_mask(tmp_path, moved):
    data = []
    for first, second in zip(examples(8), examples(8)[::-1], strict=True):
        data.append({**first, "input_ids_2": second["input_ids"].flip(0), "attention_mask_2": second["attention_mask"]})
    args = flags(tmp_path, adv_scope="token", max_steps=2)
    AdversarialTrainer(model=TwoTowers(), args=args, train_dataset=data).train()
    assert len(moved) == 4
    for delta, mask in moved:
        assert torch.equal(delta.norm(dim=-1) > 0, mask.bool())
        assert delta.norm(dim=-1)[mask.bool()].numpy() == pytest.approx(1.0)
    assert not torch.equal(moved[0][1], moved[1][1])


def xlnet():
    set_seed(0)
    config = XLNetConfig(
        vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32, dropout=0.0, summary_last_dropout=0
    )
    return XLNetForSequenceClassification(config).double()


class XLNetSnippet(Snippet):
    """XLNet's input embedding is called word_embedding."""

    def training_step(self, model, inputs, *args, **kwargs):
        named = self.model.named_parameters
        self.model.named_parameters = lambda: [
            (n.replace("word_embedding.", "word_embeddings."), p) for n, p in named()
        ]
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            del self.model.named_parameters


def test_xlnet_with_positions_first(tmp_path):
    whole = [{**e, "attention_mask": torch.ones(8, dtype=torch.long)} for e in examples()]
    # A training set whose batches have no more rows than positions would hide nothing: 4 rows, 8 positions.
    _, ours = run(AdversarialTrainer, tmp_path, xlnet(), data=whole)
    _, reference = run(XLNetSnippet, tmp_path, xlnet(), data=whole)
    agree(ours, reference)
    trainer, _ = run(AdversarialTrainer, tmp_path, xlnet(), settings={"adv_scope": "example", "adv_epsilon": 0.5})
    assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(0.5)


@pytest.mark.parametrize("target", ["transformer", "transformer.layer.0", "transformer.word_embedding"])
@pytest.mark.parametrize("length", [4, 8])
def test_xlnet_gives_examples_first_on_its_way_out(target, length):
    """As many positions as examples would hide which is which."""
    model, ids = xlnet(), torch.arange(4 * length).view(4, length) % 40 + 5
    moved = []
    model.get_submodule(target).register_forward_hook(lambda m, args, output: moved.append(first_of(output).detach()))
    adversary = Adversary(model, FGM(epsilon=0.5, scope="example"), target=target)
    adversary.backward({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0, 1])})
    clean, attacked = moved
    examples_at = 0 if target == "transformer" else 1
    norms = (attacked - clean).transpose(0, examples_at).flatten(1).norm(dim=1)
    assert norms.tolist() == pytest.approx([0.5] * 4)


def first_of(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for the old name
def test_modules_to_save_is_attacked(tmp_path):
    peft = pytest.importorskip("peft", reason="an extra of the tests")

    def adapted():
        set_seed(0)
        config = peft.LoraConfig(
            r=2, target_modules=["query"], task_type="SEQ_CLS", lora_dropout=0.0, modules_to_save=["word_embeddings"]
        )
        return peft.get_peft_model(tiny_bert().double(), config)

    class Saved(Snippet):
        def training_step(self, model, inputs, *args, **kwargs):
            named = self.model.named_parameters
            self.model.named_parameters = lambda: [(n, p) for n, p in named() if "modules_to_save.default.weight" in n]
            try:
                return super().training_step(model, inputs, *args, **kwargs)
            finally:
                del self.model.named_parameters

    settings = {"max_grad_norm": 0.0}
    _, ours = run(AdversarialTrainer, tmp_path, adapted(), settings=settings)
    _, reference = run(Saved, tmp_path, adapted(), settings=settings)
    agree(ours, reference)
    assert far(ours, run(Trainer, tmp_path, adapted(), settings=settings)[1]) > 1e-4


def test_a_teacher_without_gradient_inside_compute_loss(tmp_path):
    class Distilled(AdversarialTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with torch.no_grad():
                soft = model(**inputs).logits.softmax(-1)
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, soft)
            return (loss, outputs) if return_outputs else loss

    trainer, _ = run(Distilled, tmp_path, tiny_bert(), settings={"max_steps": 2, "adv_scope": "example"})
    assert trainer.state.log_history[0]["adv_delta_norm"] > 0


def test_r_drop_by_doubling_the_batch_keeps_the_mask(tmp_path, moved):
    class RDrop(AdversarialTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            return super().compute_loss(model, {k: torch.cat([v, v]) for k, v in inputs.items()}, return_outputs)

    data = examples()
    model = tiny_bert()
    model.config.pad_token_id = int(data[0]["input_ids"][0])  # a real token: padding may end a sentence, too
    args = flags(tmp_path, adv_scope="token", max_steps=1)
    trainer = RDrop(model=model, args=args, train_dataset=data)
    trainer.train()
    delta, mask = moved[0]
    assert len(delta) == 8
    assert torch.equal(delta.norm(dim=-1) > 0, mask.bool())


def test_bart_whose_lookups_are_not_tied(tmp_path):
    data = examples()
    for example in data:
        example["input_ids"][example["input_ids"] == 2] = 3
        example["input_ids"][4] = 2
    trainer, _ = run(AdversarialTrainer, tmp_path, tiny_bart(tie_word_embeddings=False), data=data)
    assert trainer.state.log_history[0]["adv_delta_norm"] > 0
    assert sum(hooks(trainer.model)) == 0


def test_a_position_lookup_has_no_padding(tmp_path):
    model = tiny_bert()
    settings = {"adv_target": "bert.embeddings.position_embeddings", "adv_scope": "token", "max_steps": 1}
    data = [{k: v for k, v in e.items() if k != "attention_mask"} for e in examples()]
    trainer = AdversarialTrainer(model=model, args=flags(tmp_path, **settings), train_dataset=data)
    trainer.train()
    place = EmbeddingOutput("bert.embeddings.position_embeddings")
    place.attach(model)
    assert place._padding_id is None
    place.detach()
    assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(8**0.5, rel=1e-5)


def test_a_hyperparameter_search_sets_the_attack(tmp_path):
    trainer = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path, adv_epsilon=0.1), train_dataset=examples())
    trainer.hp_search_backend = types.SimpleNamespace(value="none")
    trainer.args.adv_epsilon = 0.9
    trainer.args.adv_method = "pgd"
    trainer._hp_search_setup(None)
    assert trainer.attack.epsilon == 0.9
    trainer.args.adv_epsilon = 0.2
    trainer.train()
    assert trainer.attack.epsilon == 0.2
    assert trainer.attack.name == "pgd"


def test_an_attack_object_stays_through_training(tmp_path):
    args = flags(tmp_path, TrainingArguments, max_steps=1)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), attack=FGM(epsilon=0.3))
    trainer.train()
    assert trainer.attack == FGM(epsilon=0.3)
    assert isinstance(trainer, AdversarialTrainerMixin)


@pytest.mark.parametrize("total", [25, 50, 100, 200, 1000])
def test_fractions_of_training_are_whole_steps_where_they_can_be(total):
    for percent in range(100):
        if percent * total % 100 == 0:
            assert in_steps(percent / 100, total) == percent * total // 100


def test_a_lookup_by_its_path_in_a_model_that_names_no_input_embedding(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(50, 8), nn.Embedding(8, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids, attention_mask, labels):
            embedded = self.words(input_ids) + self.places.weight
            logits = self.head((embedded * attention_mask.unsqueeze(-1)).mean(1))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    settings = {"adv_target": "words", "adv_scope": "vocabulary", "max_steps": 2}
    trainer, _ = run(AdversarialTrainer, tmp_path, Bag(), settings=settings)
    assert trainer.state.log_history[0]["adv_delta_norm"] > 0
    with pytest.raises(ValueError, match=r"has no token lookup .* words \(50 x 8\), places \(8 x 8\)\. Name it by"):
        run(AdversarialTrainer, tmp_path, Bag())


@pytest.mark.parametrize("name", INPUT_ATTACKS)
def test_a_lookup_that_a_checkpointed_layer_repeats(tmp_path, name):
    """Whatever the passes are: moved, for the gradient, or the clean one that comes last and sends on what is owed."""
    trained = []
    for repeats in (False, True):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        calls, layer = [], model.bert.embeddings
        model.bert.embeddings.word_embeddings.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if repeats:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        attack = attack_of(name, **VISIBLE.get(name, {}))
        ran = run(AdversarialTrainer, tmp_path, model, attack=attack)
        trained.append((ran[1], len(calls)))
    (plain, once), (repeated, often) = trained
    assert often > once
    agree(plain, repeated)


class CalledTwice(nn.Module):
    """A lookup, or a layer behind it, that is called twice, with shapes of their own."""

    def __init__(self, shape):
        super().__init__()
        set_seed(0)
        self.shape = shape
        self.lookup, self.layer = nn.Embedding(50, 6), nn.Linear(6, 6)
        self.config = types.SimpleNamespace(pad_token_id=None)

    def get_input_embeddings(self):
        return self.lookup

    def forward(self, input_ids, labels):
        if self.shape == "packed":
            first, second = (self.layer(self.lookup(ids)) for ids in (input_ids.flatten(), input_ids[:, :3].flatten()))
            outputs = [first.view(len(labels), -1, 6).mean(1), second.view(len(labels), -1, 6).mean(1)]
        elif self.shape == "rows":
            outputs = [self.layer(self.lookup(ids).mean(1)) for ids in (input_ids, input_ids[:, :3])]
        else:
            grid = self.lookup(input_ids).view(len(labels), 2, -1, 6)
            outputs = [self.layer(grid).mean((1, 2)), self.layer(grid.flip(1)).square().mean((1, 2))]
        return {"loss": nn.functional.cross_entropy(outputs[0] * outputs[1], labels)}


@pytest.mark.parametrize(
    ("shape", "place", "scope"),
    [
        ("packed", None, "vocabulary"),
        ("packed", None, "token"),
        ("rows", "layer", "example"),
        ("grid", "layer", "example"),
    ],
)
def test_a_target_that_is_called_twice_in_other_shapes_than_usual(moved, shape, place, scope):
    model = CalledTwice(shape)
    ids = torch.arange(1, 33).view(4, 8)
    adversary = Adversary(model, FGM(epsilon=0.5, scope=scope), target=place)
    adversary.backward({"input_ids": ids, "labels": torch.tensor([0, 1, 2, 3])})
    first, second = steps = [delta for delta, _ in moved]
    assert first.shape[0] == {"packed": 32, "rows": 4, "grid": 4}[shape]
    assert second.shape[0] == {"packed": 12, "rows": 4, "grid": 4}[shape]
    if scope == "vocabulary":
        # An entry has one perturbation, in whatever call it stands.
        own = first.view(4, 8, 6)[:, :3].reshape(12, 6)
        torch.testing.assert_close(own, second)
        assert torch.linalg.vector_norm(first).item() == pytest.approx(0.5, rel=1e-5)
    else:
        lengths = torch.cat([torch.linalg.vector_norm(step.flatten(1), dim=1) for step in steps])
        torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5))
