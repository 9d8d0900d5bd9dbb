"""Epsilon `auto`: the control law on plants that are written down, and on real runs."""

import copy
import inspect
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import AdversarialInOrder, distance, padded_data, tiny, train
from test_faults import flags
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2ForAudioFrameClassification,
)

from fgm_trainer import FGM, PGD, AdversarialTrainer
from fgm_trainer.attacks import ATTACKS, GradientPass, PartialFGM
from fgm_trainer.engine.controller import EpsilonController, losses_of
from fgm_trainer.engine.guessing import GuessingLoss, guessing_of
from fgm_trainer.loops import Adversary

HALF = torch.tensor([0, 1])
GUESS = math.log(2)
# Losses that are near to each other.
NEAR = 0.05 * GUESS


# A perturbation of length 1 is a tenth of what it is added to.
FLOOR, START, CEILING = (relative / 0.1 for relative in (1e-5, 5e-3, 0.5))


def controller(strength=1.0, size=2, **settings):
    return EpsilonController(strength, torch.device("cpu"), GuessingLoss(size), **{"ceiling": 0.5} | settings)


def note(one, clean, added, labels=HALF, relative=0.1):
    """A micro-batch of one row; epsilon is `relative` of the length of the row, times epsilon."""
    figures = (torch.tensor(float(x)) for x in (clean, added, relative * one.epsilon, 1.0))
    one.note(*figures, labels)


def steps(one, number, clean, added, labels=HALF):
    """Steps of a model whose losses are these functions: clean of the step, added of epsilon."""
    seen = []
    for step in range(number):
        note(one, clean(step), added(one.epsilon.item()), labels)
        one.settle(None, lambda x: x)
        seen.append(one.epsilon.item())
    return seen


# The law -------------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    slope=st.floats(-1.5, 2).map(lambda x: 10**x),
    power=st.floats(0.5, 2),
    strength=st.floats(0.25, 2),
    clean=st.floats(0, 0.6),
)
def test_the_loss_rises_by_the_share_asked_for_and_stays_there(slope, power, strength, clean):
    one = controller(strength)
    seen = steps(one, 250, lambda step: clean, lambda e: slope * e**power)
    target = strength * (GUESS + NEAR - clean)
    wanted = min(max((target / slope) ** (1 / power), FLOOR), CEILING)
    assert seen[-1] == pytest.approx(wanted, rel=0.02)
    # No oscillation.
    late = seen[200:]
    assert max(late) / min(late) < 1.05
    assert max(seen) < 2 * max(wanted, START)


def test_epsilon_falls_to_a_tenth_within_ten_steps_and_to_the_floor_where_a_model_gets_suddenly_worse():
    one = controller()
    before = steps(one, 150, lambda step: 0.2, lambda e: 0.2 * e)[-1]
    assert before == pytest.approx((GUESS + NEAR - 0.2) / 0.2, rel=0.01)
    # A spike of the learning rate: one class is predicted, whatever the input.
    after = steps(one, 80, lambda step: 1.5, lambda e: 0.2 * e)
    assert after[9] < 0.1 * before
    assert after[-1] == pytest.approx(FLOOR)
    assert all(later <= earlier for earlier, later in itertools.pairwise(after[2:]))
    # It learns again.
    assert steps(one, 150, lambda step: 0.2, lambda e: 0.2 * e)[-1] == pytest.approx(before, rel=0.01)


def test_all_labels_flipped_is_no_reason_to_attack():
    one = controller()
    steps(one, 100, lambda step: 0.1, lambda e: 0.2 * e)
    flipped = steps(one, 80, lambda step: 2.5, lambda e: -0.2 * e)
    assert flipped[-1] == pytest.approx(FLOOR)


@pytest.mark.parametrize("size", [0, 2])
def test_a_loss_that_is_constant_leaves_epsilon_where_it_started(size):
    one = controller(size=size)
    seen = steps(one, 300, lambda step: GUESS, lambda e: 0.0)
    assert max(seen[1:]) <= START * 1.0001


def test_epsilon_falls_where_the_adversarial_loss_reaches_that_of_guessing():
    one = controller()
    before = steps(one, 100, lambda step: 0.2, lambda e: 0.2 * e)[-1]
    seen = steps(one, 20, lambda step: 0.2, lambda e: 0.4 * e)
    assert all(later <= earlier for earlier, later in itertools.pairwise([before, *seen]))
    assert seen[-1] < 0.62 * before


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.3))
def test_noise_alone_does_not_raise_epsilon(seed, noise):
    one, draw = controller(), torch.Generator().manual_seed(seed)
    normal = lambda: noise * torch.randn((), generator=draw).item()  # noqa: E731
    # Nothing is learned, and the passes differ by their dropout.
    seen = steps(one, 400, lambda step: GUESS + abs(normal()), lambda e: normal())
    assert max(seen[20:]) < 0.05


def test_steps_without_attack_change_nothing_and_a_loss_out_of_range_halves_epsilon():
    one = controller()
    steps(one, 50, lambda step: 0.3, lambda e: 0.2 * e)
    before = copy.deepcopy(one.state_dict())
    for _ in range(20):
        one.observe_clean(torch.tensor(9.0), HALF)
        one.settle(None, lambda x: x)
    for name in ("clean", "added", "weight", "epsilon"):
        assert one.state_dict()[name] == before[name]
    for bad in (math.nan, math.inf):
        now = one.epsilon.item()
        note(one, 0.3, bad)
        one.settle(None, lambda x: x)
        assert one.epsilon.item() == pytest.approx(now / 2)
    assert all(value.isfinite().all() for value in one.state_dict().values())


@pytest.mark.parametrize("parts", [2, 4])
def test_a_step_in_parts_is_the_same_step(parts):
    whole, split = controller(), controller()
    for _ in range(30):
        note(whole, 0.3, 0.3 * whole.epsilon.item())
        for part in range(parts):
            shift = 0.1 * (part - (parts - 1) / 2)
            note(split, 0.3 + shift, 0.3 * split.epsilon.item() + shift)
        whole.settle(None, lambda x: x)
        split.settle(None, lambda x: x)
    assert whole.epsilon > 0.1
    assert split.epsilon.item() == pytest.approx(whole.epsilon.item(), rel=1e-5)


def test_an_upper_limit_is_never_exceeded_and_what_was_saved_goes_on():
    one = controller(most=0.5)
    seen = steps(one, 60, lambda step: 0.1, lambda e: 0.01 * e)
    assert max(seen) == 0.5
    other = controller(most=0.5)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert steps(one, 9, lambda s: 0.6, lambda e: e) == steps(other, 9, lambda s: 0.6, lambda e: e)


# The loss of guessing ------------------------------------------------------------------------------------------------


def guess(one, *batches):
    counts = sum(one.counts(labels, torch.zeros(())) for labels in batches)
    return one.loss(counts).item()


def test_the_loss_of_guessing_is_that_of_the_best_constant_answer():
    labels = torch.tensor([[0, 2, -100], [2, 2, 1]])
    logits = torch.tensor([1.0, 1.0, 3.0]).log()
    constant = torch.nn.functional.cross_entropy(logits.expand(6, 3), labels.flatten())
    assert guess(GuessingLoss(3), labels[:1], labels[1:]) == pytest.approx(constant.item())
    several = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    rates = torch.tensor([0.75, 0.25]).logit()
    constant = torch.nn.functional.binary_cross_entropy_with_logits(rates.expand(4, 2), several)
    assert guess(GuessingLoss(2), several) == pytest.approx(constant.item())
    numbers = torch.tensor([0.5, 2.0, 4.5])
    assert guess(GuessingLoss(1, numbers=True), numbers[:1], numbers[1:]) == pytest.approx(numbers.var(correction=0))
    assert math.isnan(guess(GuessingLoss(0), labels))
    assert math.isnan(guess(GuessingLoss(3), None))


def test_labels_that_are_not_there_count_in_no_column():
    several = torch.tensor([[1.0, -100.0], [1.0, 1.0], [0.0, 0.0], [-100.0, 0.0]])
    rates = torch.tensor([2 / 3, 1 / 3])
    entropy = -(rates * rates.log() + (1 - rates) * (1 - rates).log()).mean()
    assert guess(GuessingLoss(2), several[:2], several[2:]) == pytest.approx(entropy.item())
    assert bearable(GuessingLoss(2), several) == pytest.approx(1 / 2)
    # Labels that can't be those of so many columns say nothing.
    assert math.isnan(guess(GuessingLoss(3), torch.rand(4)))


class OwnLossForSequenceClassification(BertForSequenceClassification):
    def forward(self, labels=None, **inputs):
        return super().forward(labels=labels, **inputs)


def test_of_which_models_the_loss_of_guessing_is_known():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3)
    classes, one = torch.tensor([0, 1, 2]), torch.tensor([[0.0], [1.0]])
    model = BertForSequenceClassification(config)
    assert guess(guessing_of(model), classes) == pytest.approx(math.log(3))
    assert math.isnan(guess(guessing_of(OwnLossForSequenceClassification(config)), classes))
    config.num_labels = 1
    assert guess(guessing_of(BertForSequenceClassification(config)), one) == pytest.approx(0.25)
    config.problem_type = "multi_label_classification"
    assert guess(guessing_of(BertForSequenceClassification(config)), one) == pytest.approx(math.log(2))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    frames = Wav2Vec2ForAudioFrameClassification(Wav2Vec2Config(num_labels=3, **sizes))
    assert math.isnan(guess(guessing_of(frames), torch.eye(3)[None]))


def bearable(one, *batches):
    return one.bearable(sum(one.counts(labels, torch.zeros(())) for labels in batches)).item()


def test_what_an_attack_may_take_follows_the_odds_of_rare_labels():
    tags = torch.tensor([[0] * 6 + [1, -100], [0] * 6 + [2, 0]])
    assert bearable(GuessingLoss(3), tags[:1], tags[1:]) == pytest.approx(2 / 13)
    assert bearable(GuessingLoss(2), HALF) == bearable(GuessingLoss(3), torch.tensor([0, 1, 2])) == 1
    assert bearable(GuessingLoss(3), torch.ones(4, dtype=torch.long)) == 0
    several = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert bearable(GuessingLoss(2), several) == pytest.approx(1 / 3)
    assert bearable(GuessingLoss(2), torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(2 / 3)
    for one, labels in [(GuessingLoss(1, numbers=True), torch.tensor([0.5, 2.0])), (GuessingLoss(0), HALF)]:
        assert bearable(one, labels) == 1
    assert bearable(GuessingLoss(3), None) == 1


def test_where_most_labels_are_the_same_the_loss_rises_by_as_much_less():
    labels = torch.tensor([0] * 9 + [1])
    one = controller()
    seen = steps(one, 250, lambda step: 0.1, lambda e: 0.5 * e, labels)
    guessing = torch.distributions.Categorical(torch.tensor([0.9, 0.1])).entropy().item()
    assert seen[-1] == pytest.approx((1.05 * guessing - 0.1) / 9 / 0.5, rel=0.05)


# Real runs -----------------------------------------------------------------------------------------------------------


class Seen(AdversarialInOrder):
    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.epsilons = [*getattr(self, "epsilons", []), self._adv_run.controller.epsilon.item()]
        return loss


def learnable(size=64, length=6):
    """One token, again and again, which decides about the label."""
    tokens = [3 + i % 24 for i in range(size)]
    return [{"input_ids": [t] * length, "attention_mask": [1] * length, "labels": t % 3} for t in tokens]


def trained(batch=8, accumulate=1, size=64, **flags):
    model = tiny("bert", dtype=flags.pop("dtype", torch.float64))
    data = learnable(size)
    loss = lambda outputs, labels, num_items_in_batch=None: (  # noqa: E731
        torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / 8
    )
    extra = {"compute_loss_func": loss} | flags.pop("extra", {})
    flags = {"adv_epsilon": "auto"} | flags
    return train(model, data, trainer=Seen, batch=batch, accumulate=accumulate, extra=extra, **flags)


OTHER_SCOPES = [("fgm", "example"), ("fgm", "token"), ("freelb", "vocabulary"), ("vat", "token")]


@pytest.mark.parametrize(("method", "scope"), [*((method, None) for method in sorted(ATTACKS)), *OTHER_SCOPES])
def test_every_method_finds_an_epsilon(method, scope):
    flags = {"adv_epsilon": "auto", "adv_method": method, "adv_scope": scope, "num_train_epochs": 3, "batch": 8}
    trainer = train(tiny("bert"), learnable(120), trainer=AsItComes, lr=0.05, **flags)
    logged = [line["adv_epsilon"] for line in trainer.state.log_history if "adv_epsilon" in line]
    assert len(logged) == 45
    assert all(0 < e < math.inf for e in logged)
    assert trainer.epsilons[0] == pytest.approx(1e-4)
    assert len(set(trainer.epsilons)) > 3
    norms = [line["adv_delta_norm"] for line in trainer.state.log_history if "adv_epsilon" in line]
    assert all(math.isfinite(norm) for norm in norms)
    assert max(norms) > 0


class AsItComes(Seen):
    """With what `models.train` takes back."""

    def train(self, *args, **kwargs):
        given = inspect.signature(type(self.model).forward).parameters.values()
        self.model_accepts_loss_kwargs = any(each.kind is each.VAR_KEYWORD for each in given)
        return super().train(*args, **kwargs)


def learned(kind):
    """A model that is better than guessing, and would not be with four times its loss."""
    model, data = tiny(kind), learnable(24)
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    while (loss := model(**batch).loss) > 0.5:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss > 0.3
    return model


@pytest.mark.parametrize(
    "method",
    ["fgm", "partial_fgm", "vat", *(pytest.param(name, marks=pytest.mark.slow) for name in ("freelb", "smart"))],
)
@pytest.mark.parametrize(
    "kind", ["bert", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("distilbert", "modernbert"))]
)
def test_accumulation_changes_nothing(kind, method):
    """Some heads divide by the items of the whole step, some take their number and leave it alone."""
    logged = []
    for batch, accumulate in ((8, 1), (2, 4)):
        flags = {"adv_method": method, "adv_kwargs": {"share": 1.0} if method == "partial_fgm" else None}
        flags |= {"adv_epsilon": "auto", "adv_warmup": 0, "batch": batch, "accumulate": accumulate, "logging_steps": 1}
        model = learned(kind)
        # Nothing more is learned, so that the two runs differ by what is reported alone.
        trainer = train(model, learnable(48), trainer=AsItComes, lr=0.0, num_train_epochs=5, **flags)
        logged.append([line["adv_epsilon"] for line in trainer.state.log_history if "adv_epsilon" in line])
    # Noise is drawn by micro-batch.
    assert logged[0] == pytest.approx(logged[1], rel=0.03 if method == "smart" else 1e-3)
    assert logged[0][-1] != logged[0][-5]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_part_of_the_batch_is_measured_as_the_whole_is(kind):
    """Also where the loss is a sum over the items of the step, of which a part of the batch has a part."""
    last = {}
    for method in ("fgm", "partial_fgm"):
        # A rate at which the model learns, without which epsilon is driven to its floor.
        model, rate = (tiny(kind, dtype=torch.float32), 0.01) if kind == "gpt2" else (tiny(kind), 0.05)
        data = padded_data(model, size=64) if kind == "gpt2" else learnable(64)
        flags = {"adv_epsilon": "auto", "adv_method": method, "adv_scope": "example", "adv_warmup": 0, "batch": 8}
        last[method] = train(model, data, trainer=Seen, num_train_epochs=6, lr=rate, **flags).epsilons[-1]
    assert last["fgm"] / 4 < last["partial_fgm"] < 4 * last["fgm"]
    assert min(last.values()) > 0.02


def observed(monkeypatch, attack, times):
    """The passes of each attacked step on one batch, with an epsilon of 1e-4; and the loss without attack."""
    model, data = tiny("bert"), learnable(8)
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    seen = []
    monkeypatch.setattr(EpsilonController, "observe", lambda self, passes, *rest, **more: seen.append(passes))
    adversary = Adversary(model, attack)
    adversary.controller._state["epsilon"] = torch.tensor(1e-4)
    for _ in range(times):
        adversary.backward(batch)
    return seen, model(**batch).loss.item()


def test_what_a_part_adds_is_the_difference_of_the_losses_of_the_whole_batch(monkeypatch):
    seen, clean = observed(monkeypatch, PartialFGM(share=0.25), 1)
    found, added = losses_of(seen[0])
    # The chosen examples' loss stands for that of all, and differs from it by a few percent.
    assert added.item() == pytest.approx(2 * (seen[0][-1].unweighted.item() - clean), rel=0.1)
    assert found.item() == pytest.approx(clean, rel=1e-5)


@dataclass(frozen=True, kw_only=True)
class LooksAtAll(PartialFGM):
    """A part of the batch that is chosen after a pass of all of it, as a method of one's own may."""

    def passes(self, step):
        yield GradientPass()
        return (yield from super().passes(step))


def test_what_was_asked_before_the_part_changes_nothing():
    data = learnable(8)
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    found = []
    for kind in (PartialFGM, LooksAtAll):
        adversary = Adversary(tiny("bert"), kind())
        for _ in range(3):
            adversary.backward(batch)
        found.append(adversary.controller.epsilon.item())
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert found[0] > 0


def test_accumulation_does_not_change_epsilon():
    flags = {"adv_scope": "example", "num_train_epochs": 2}
    whole, parts = trained(8, 1, **flags), trained(2, 4, **flags)
    one, other = whole.epsilons, parts.epsilons[::4]
    assert len(one) == len(other) == 16
    assert max(one) > 2 * min(one[1:])
    assert other == pytest.approx(one, rel=1e-4)


def test_zero_strength_and_nothing_to_recover_from_are_refused():
    with pytest.raises(ValueError, match="adv_strength must be above 0"):
        trained(adv_strength=0.0)
    with pytest.raises(ValueError, match="adv_recover lowers a fixed adv_epsilon"):
        trained(adv_recover=True)


def test_a_model_that_learns_nothing_is_hardly_attacked_and_the_log_says_so(caplog):
    model = tiny("bert")
    trainer = train(model, padded_data(model, size=64), trainer=Seen, batch=8, adv_epsilon="auto", num_train_epochs=2)
    assert "it was hardly attacked" in caplog.text
    assert trainer.epsilons[-1] < 1e-2
    caplog.clear()
    trained(num_train_epochs=6)
    assert "hardly attacked" not in caplog.text


@pytest.mark.usefixtures("resumable")
def test_a_resumed_run_is_bit_equal(tmp_path):
    settings = {"adv_epsilon": "auto", "max_steps": 24, "save_strategy": "steps", "save_steps": 12}
    whole, resumed = (
        AdversarialTrainer(model=tiny("bert"), args=flags(tmp_path, **settings), train_dataset=learnable(96))
        for _ in range(2)
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    logged = [[line.get("adv_epsilon") for line in t.state.log_history[12:24]] for t in (whole, resumed)]
    assert logged[0] == logged[1]
    assert len(set(logged[0])) > 9
    assert distance(whole.model, resumed.model) == 0


def test_strength_follows_the_schedule():
    # Not so strong that the limit of epsilon decides.
    at_once = trained(num_train_epochs=6, adv_strength=0.5)
    shaped = trained(num_train_epochs=6, adv_strength=0.5, extra={"epsilon_schedule": lambda progress: 0.01})
    assert max(shaped.epsilons) < 0.4 * max(at_once.epsilons)
    rising = trained(num_train_epochs=6, adv_strength=0.5, adv_warmup=0.9)
    assert rising._adv_run.controller._rise == 1
    assert sum(rising.epsilons) < sum(at_once.epsilons)


def test_recovery_never_exceeds_the_epsilon_that_was_given():
    free, held = trained(num_train_epochs=3), trained(adv_epsilon=0.02, adv_recover=True, num_train_epochs=3)
    assert max(free.epsilons) > 0.02
    assert max(held.epsilons) == pytest.approx(0.02)
    assert held.epsilons[0] == pytest.approx(1e-4)


def test_a_loop_of_ones_own_finds_the_trainers_epsilon():
    model = tiny("bert")
    data = padded_data(model, size=64)
    trainer = train(copy.deepcopy(model), data, trainer=Seen, batch=8, adv_epsilon="auto", adv_scope="example")
    adversary = Adversary(model, FGM(scope="example"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for start in range(0, 64, 8):
        rows = [data[i] for i in range(start, start + 8)]
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        model.train()
        adversary.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        found.append(adversary.controller.epsilon.item())
    assert found == pytest.approx(trainer.epsilons, rel=1e-5)


def test_an_epsilon_of_the_call_is_used_as_it_is():
    model = tiny("bert")
    batch = {
        name: torch.stack([torch.as_tensor(row[name]) for row in padded_data(model, size=4)])
        for name in padded_data(model, size=4)[0]
    }
    adversary = Adversary(model, PGD())
    adversary.backward(batch, epsilon=0.5)
    before = adversary.controller.epsilon.item()
    adversary.backward(batch, epsilon=0.5)
    assert adversary.controller.epsilon.item() == before
