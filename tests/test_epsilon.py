"""The curve over epsilon, against a slow loop, and what is suggested by it."""

import copy
import json
import math
import random
import warnings

import numpy
import pytest
import reference
import torch
from models import AdversarialInOrder, batches, padded_data, tiny, train
from torch import nn
from torch.utils.data import IterableDataset

from fgm_trainer import AWP, FGM, PGD, R3F, SMART, VAT, FreeLB, Noise, TokenAware
from fgm_trainer.attacks import ATTACKS
from fgm_trainer.perturbation.lookups import mean_embedding_norm
from fgm_trainer.robustness.epsilon import EpsilonCurve, choose_batches, find_epsilon, suggest

GRID = (0.05, 0.2, 0.8)


def taught(size=16, wrong_every=5, **settings):
    """A tiny BERT that is sure of its answers, and data of which it gets all but every fifth right."""
    model = tiny("bert", **settings)
    with torch.no_grad():
        model.classifier.weight.mul_(8.0)
    data = padded_data(model, size=size)
    for number, (example, batch) in enumerate(zip(data, batches(data, 1), strict=True)):
        example["labels"] = (model(**batch).logits.argmax().item() + (number % wrong_every == wrong_every - 1)) % 3
    return model, data


def quietly(model, data, attack, epsilons=GRID, batch=8, **settings):
    """The curve, whatever is suggested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No epsilon is suggested", UserWarning)
        return find_epsilon(model, batches(data, batch), attack, epsilons, progress=False, **settings)


def plain_loop(model, data, attack, scope, size, epsilon):
    """(loss, accuracy, mean length), batch by batch."""
    losses, right, lengths = [], [], []
    for batch in batches(data, size):
        place = reference.AtInput(model, scope)
        delta = attack(place, batch, epsilon, "l2")
        inputs = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        embeds = model.get_input_embeddings()(batch["input_ids"]) + place.moved(batch, delta)
        output = model(inputs_embeds=embeds, **inputs)
        losses.append(output.loss.item())
        right += (output.logits.argmax(1) == batch["labels"]).tolist()
        lengths += place.lengths(batch, delta).tolist()
    return sum(losses) / len(losses), sum(right) / len(right), sum(lengths) / len(lengths)


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
@pytest.mark.parametrize(("attack", "plain"), [(FGM, reference.fgm), (PGD, reference.pgd)], ids=["fgm", "pgd"])
def test_equals_a_plain_loop(attack, plain, scope):
    model, data = taught()
    curve = quietly(model, data, attack(scope=scope))
    assert curve.epsilons == GRID
    assert curve.examples == len(data)
    for i, epsilon in enumerate(GRID):
        found = curve.loss[i], curve.accuracy[i], curve.delta_norm[i]
        assert found == pytest.approx(plain_loop(model, data, plain, scope, 8, epsilon), abs=1e-9)
    clean = plain_loop(model, data, lambda place, batch, epsilon, norm: place.zero(batch), scope, 8, 0.0)
    assert (curve.clean_loss, curve.clean_accuracy) == pytest.approx(clean[:2], abs=1e-9)
    assert len(set(curve.accuracy)) > 1, "the curve is flat, so the test shows little"


def test_the_scope_is_that_of_training():
    model, data = taught()
    assert quietly(model, data, FGM()) == quietly(model, data, FGM(scope="vocabulary"))
    assert quietly(model, data, FreeLB()) == quietly(model, data, FreeLB(scope="example"))
    halves = quietly(model, data, FGM(), batch=4)
    assert all(h > whole for h, whole in zip(halves.delta_norm, quietly(model, data, FGM()).delta_norm, strict=True))
    of_examples = [quietly(model, data, FGM(scope="example"), batch=size) for size in (4, 8)]
    assert of_examples[0].loss == pytest.approx(of_examples[1].loss, abs=1e-9)


@pytest.mark.parametrize("attack", [FreeLB(), Noise(), PGD(random_start=True), R3F(), SMART(), TokenAware(), VAT()])
def test_every_method(attack):
    model, data = taught()
    curve = quietly(model, data, attack)
    assert all(map(math.isfinite, curve.loss))
    assert all(length > 0 for length in curve.delta_norm)
    assert curve == quietly(model, data, attack)


def test_no_method_is_left_out():
    for kind in set(ATTACKS.values()) - {AWP}:
        if kind.__module__.startswith("fgm_trainer"):
            model, data = taught(size=4)
            assert len(quietly(model, data, kind()).loss) == len(GRID)


def test_the_given_step_size_stays_and_epsilon_varies():
    model, data = taught()
    curve = quietly(model, data, PGD(steps=1, step_size=0.1, scope="example"), (0.05, 0.1, 0.2, 0.4))
    assert curve.delta_norm == pytest.approx((0.05, 0.1, 0.1, 0.1))


def test_targeted():
    model, data = taught()
    for example in data:
        example["towards"] = (example["labels"] + 1) % 3
    towards = quietly(model, data, FGM(targeted="towards"))
    plain = [{k: v for k, v in example.items() if k != "towards"} for example in data]
    assert towards.clean_loss == quietly(model, plain, FGM()).clean_loss
    assert towards.loss != quietly(model, plain, FGM()).loss
    assert quietly(model, plain, FGM(targeted="least_likely")).loss != towards.loss


def test_clipped():
    model, data = taught()
    for example, batch in zip(data, batches(data, 1), strict=True):
        example["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])[0].tolist()
        del example["input_ids"]
    low, high = torch.tensor(-0.5).double(), torch.tensor(0.5).double()
    settings = {"target": "inputs_embeds"}
    data = [
        {k: torch.tensor(v).double().clamp(-0.5, 0.5).tolist() if k == "inputs_embeds" else v for k, v in e.items()}
        for e in data
    ]
    cut = [{k: v.double() if k == "inputs_embeds" else v for k, v in b.items()} for b in batches(data, 8)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        free = find_epsilon(model, cut, FGM(), GRID, progress=False, **settings)
        held = find_epsilon(model, cut, FGM(), GRID, clip=(low, high), progress=False, **settings)
    assert all(h < f for h, f in zip(held.delta_norm, free.delta_norm, strict=True))


def test_units_of_the_embedding_scale_the_grid_alone():
    model, data = taught()
    unit = mean_embedding_norm(model)
    in_units = quietly(model, data, FGM(), [e / unit for e in GRID], epsilon_unit="embedding")
    absolute = quietly(model, data, FGM())
    assert in_units.unit == "embedding"
    assert in_units.epsilons == pytest.approx([e / unit for e in GRID])
    for name in ("loss", "accuracy", "delta_norm"):
        assert getattr(in_units, name) == pytest.approx(getattr(absolute, name), rel=1e-9)
    sized = PGD(step_size=0.1 / unit)
    in_units = quietly(model, data, sized, [e / unit for e in GRID], epsilon_unit="embedding")
    assert in_units.loss == pytest.approx(quietly(model, data, PGD(step_size=0.1)).loss, rel=1e-9)


def test_regression():
    model = tiny("bert", classes=1)
    data = padded_data(model, regression=True)
    for example in data:
        example["labels"] *= 3
    curve = quietly(model, data, FGM())
    assert curve.accuracy is None
    assert curve.clean_accuracy is None
    labels = torch.tensor([example["labels"] for example in data])
    assert curve.guess_loss == pytest.approx(labels.var(correction=0).item(), rel=1e-5)
    assert list(curve.loss) == sorted(curve.loss)
    assert curve.loss[0] > curve.clean_loss


def test_a_label_for_every_position_gives_a_loss_alone():
    model = tiny("t5")
    curve = quietly(model, padded_data(model), FGM())
    assert curve.accuracy is None
    assert len(curve.loss) == len(GRID)
    assert 0 < curve.guess_loss < math.log(30)


def test_several_labels_an_example():
    model = tiny("bert", problem_type="multi_label_classification")
    data = padded_data(model)
    for number, example in enumerate(data):
        example["labels"] = [float(number % 2), float(number % 4 == 0), 1.0]
    curve = quietly(model, data, FGM())
    assert curve.accuracy is None
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert curve.guess_loss == pytest.approx((math.log(2) + quarter + 0.0) / 3)


# The suggestion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ((0.3, 0.8, 0.9, 2.0), 2.0),
        ((0.3, 0.8, 1.0, 2.0), 1.0),  # on the line is not below it
        ((0.3, 1.1, 0.4, 2.0), 0.5),  # a dip behind the line does not count
        ((0.3, 0.8, math.nan, 0.5), 1.0),
    ],
)
@pytest.mark.filterwarnings("ignore:The loss is not finite")
def test_the_rule(loss, expected):
    assert suggest((0.5, 1.0, 2.0, 4.0), loss, clean_loss=0.3, guess_loss=0.7) == expected


@pytest.mark.parametrize(
    ("loss", "clean", "guess", "why"),
    [
        ((0.3, 0.4), 0.2, 0.7, "not lost even at 2. Pass larger epsilons."),
        ((1.3, 1.4), 0.2, 0.7, "lost already at 1. Pass smaller epsilons."),
        ((0.8, 1.4), 0.7, 0.7, "the loss is 0.7 without attack, and 0.7 by guessing. Train the model first."),
        ((0.3, 1.4), 0.2, 0.0, "all labels are the same"),
        ((0.3, 1.4), 0.2, None, "not known"),
    ],
)
def test_where_there_is_no_suggestion(loss, clean, guess, why):
    with pytest.warns(UserWarning, match=f"No epsilon is suggested: .*{why}"):
        assert suggest((1.0, 2.0), loss, clean, guess) is None


def test_a_suggestion_on_a_real_curve():
    model, data = taught(wrong_every=50)
    curve = find_epsilon(model, batches(data, 8), FGM(scope="example"), progress=False)
    assert len(curve.epsilons) == 20
    assert curve.epsilons[0] == pytest.approx(0.01)
    assert curve.epsilons[-1] == pytest.approx(100)
    i = curve.epsilons.index(curve.suggestion)
    assert curve.loss[i] < curve.clean_loss + curve.guess_loss <= curve.loss[i + 1]
    counts = torch.tensor([e["labels"] for e in data]).bincount().double() / len(data)
    assert curve.guess_loss == pytest.approx(-(counts * counts.log()).sum().item())


def test_a_loss_that_is_not_finite_is_said():
    model, data = taught(wrong_every=50)

    def loss_of(model, batch):
        outputs = model(**batch)
        return torch.where(outputs.loss > 1.5, torch.inf, outputs.loss), outputs

    with pytest.warns(UserWarning, match=r"The loss is not finite at epsilon .*: taken for a lost model"):
        curve = find_epsilon(model, batches(data, 8), FGM(scope="example"), loss_of=loss_of, progress=False)
    assert math.isinf(curve.loss[-1])
    assert curve.suggestion is not None


# What is left, and what is refused ------------------------------------------------------------------------------------


def fingerprint(model):
    return (
        {n: p.detach().clone() for n, p in model.state_dict().items()},
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        {"rng": torch.get_rng_state(), "numpy": torch.tensor(numpy.random.get_state()[1].astype("int64"))},
        {
            n: torch.tensor([m.training, len(m._forward_hooks), len(m._forward_pre_hooks)])
            for n, m in model.named_modules()
        },
        {"random": torch.tensor(random.getstate()[1])},
    )


def unchanged(before, after):
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(before, after, strict=True)
    )


def in_the_middle_of_something():
    model, data = taught(hidden_dropout_prob=0.3)
    model.train()
    model.bert.encoder.layer[0].eval()
    model(**batches(data, 4)[0]).loss.backward()
    model.bert.register_forward_hook(lambda module, args, output: None)
    return model, data


@pytest.mark.parametrize("attack", [FGM(), PGD(random_start=True), SMART(), TokenAware()])
def test_nothing_is_left_behind(attack):
    model, data = in_the_middle_of_something()
    before = fingerprint(model)
    quietly(model, data, attack)
    assert unchanged(before, fingerprint(model))
    torch.rand(1)
    assert not unchanged(before, fingerprint(model)), "the check can't fail"


def test_nothing_is_left_behind_by_an_exception():
    model, data = in_the_middle_of_something()
    before = fingerprint(model)
    calls = []

    def loss_of(model, batch):
        calls.append(torch.rand(1) + random.random() + numpy.random.rand())
        if len(calls) == 5:
            raise KeyboardInterrupt
        outputs = model(**batch)
        return outputs.loss, outputs

    with pytest.raises(KeyboardInterrupt):
        quietly(model, data, FGM(), loss_of=loss_of)
    assert unchanged(before, fingerprint(model))


def test_chosen_by_seed_and_a_collator_that_draws():
    data = list(range(100))
    state = torch.get_rng_state()

    def collate(examples):
        return {"x": torch.tensor(examples) + torch.rand(()) + random.random() + numpy.random.rand()}

    def chosen(**settings):
        return torch.cat([batch["x"] for batch in choose_batches(data, collate, 8, **settings)])

    assert len(chosen()) == 32
    assert torch.equal(chosen(seed=3), chosen(seed=3))
    assert not torch.equal(chosen(seed=3), chosen(seed=4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(b["x"]) for b in choose_batches(data[:10], collate, 8)] == [8, 2]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(100))


def test_of_a_stream_the_first_ones():
    assert choose_batches(Stream(), list, 4, batches=2) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_errors():
    model, data = taught(size=8)
    for epsilons in ([], [0.0], [-1.0, 1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="epsilons must be finite numbers above 0, at least one; found"):
            quietly(model, data, FGM(), epsilons)
    with pytest.raises(ValueError, match=r"awp perturbs weights, not inputs\. .* found \[0.0\]\. there is no batch\."):
        find_epsilon(model, [], AWP(), [0.0])
    with pytest.raises(ValueError, match=r"fgm on 'weights' .* perturbs weights"):
        quietly(model, data, FGM(), target="weights")
    with pytest.raises(ValueError, match="epsilon_unit must be one of"):
        quietly(model, data, FGM(), epsilon_unit="metres")
    unlabelled = [{k: v for k, v in example.items() if k != "labels"} for example in data]
    with pytest.raises(ValueError, match="returned no loss for a batch of: input_ids, attention_mask"):
        quietly(model, unlabelled, FGM())
    for number in (0, 1.5):
        with pytest.raises(ValueError, match="batches must be a whole number, 1 or more"):
            choose_batches(data, list, 4, batches=number)
    with pytest.raises(ValueError, match="the data set is empty"):
        choose_batches([], list, 4)
    broken = copy.deepcopy(model)
    nn.init.constant_(broken.classifier.bias, math.nan)
    with pytest.raises(ValueError, match="The loss without attack is nan"):
        quietly(broken, data, FGM())


def test_a_progress_bar(capsys):
    model, data = taught(size=8)
    with pytest.warns(UserWarning, match="No epsilon is suggested"):
        find_epsilon(model, batches(data, 8), FGM(), [0.001, 0.002])
    assert "2/2" in capsys.readouterr().err


# From the Trainer -----------------------------------------------------------------------------------------------------


def trained(**flags):
    model, data = taught(size=32, wrong_every=50)
    return train(model, data, trainer=AdversarialInOrder, lr=1e-4, adv_epsilon=0.01, **flags), data


def test_the_trainer_gives_the_same_curve(tmp_path):
    trainer, data = trained(adv_method="pgd", adv_scope="example", adv_epsilon_unit="embedding")
    before = fingerprint(trainer.model)
    curve = trainer.find_epsilon(batches=3, plot=tmp_path / "curve.png")
    assert unchanged(before, fingerprint(trainer.model))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    chosen = batches([data[i] for i in order[:12]], 4)
    settings = {"epsilon_unit": "embedding", "progress": False}
    alone = find_epsilon(trainer.model, chosen, trainer.attack, **settings)
    assert alone.loss == pytest.approx(curve.loss, rel=1e-9)
    assert (alone.epsilons, alone.accuracy, alone.suggestion) == (curve.epsilons, curve.accuracy, curve.suggestion)
    assert curve.unit == "embedding"
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    own = trainer.find_epsilon(data[:8], epsilons=[4.0, 0.001, 1.0], batches=1)
    assert own.epsilons == (0.001, 1.0, 4.0)
    assert own.examples == 4


class Doubled(AdversarialInOrder):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        return (2 * loss, outputs) if return_outputs else 2 * loss


@pytest.mark.filterwarnings("ignore:No epsilon is suggested")
def test_the_loss_is_the_trainers():
    model, data = taught(size=32)
    trainer, twice = (
        train(copy.deepcopy(model), data, trainer=k, lr=0.0, adv_epsilon=0.1) for k in (AdversarialInOrder, Doubled)
    )
    once, doubled = trainer.find_epsilon(epsilons=GRID), twice.find_epsilon(epsilons=GRID)
    assert doubled.loss == pytest.approx([2 * loss for loss in once.loss])
    assert doubled.accuracy == once.accuracy


def test_columns_that_the_model_does_not_take_are_left_out():
    trainer, data = trained(adv_scope="example")
    more = [{**example, "text": "a film"} for example in data]
    assert trainer.find_epsilon(more) == trainer.find_epsilon(data)


def test_training_goes_on_as_if_nothing_had_been_measured():
    first, second = (trained(max_steps=4)[0] for _ in range(2))
    first.find_epsilon()
    for trainer in (first, second):
        trainer.train()
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_without_a_data_set():
    trainer, _ = trained(max_steps=1)
    trainer.train_dataset = None
    with pytest.raises(ValueError, match="find_epsilon needs a data set: pass dataset here or train_dataset"):
        trainer.find_epsilon()


def test_plain_data_and_a_picture(tmp_path):
    curve = EpsilonCurve((0.1, 1.0), (0.5, 1.5), (0.8, 0.2), (0.1, 1.0), 0.3, 0.9, 0.7, 0.1, "absolute", 64)
    assert json.loads(json.dumps(curve.to_dict()))["suggestion"] == 0.1
    figure = curve.plot(tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 5000
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "accuracy"]
    assert figure.axes[0].get_xscale() == "log"
    assert "suggestion 0.1" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
    without = EpsilonCurve((0.1, 1.0), (0.5, 1.5), None, (0.1, 1.0), 0.3, None, None, None, "embedding", 64)
    assert [axis.get_ylabel() for axis in without.plot().axes] == ["loss"]
