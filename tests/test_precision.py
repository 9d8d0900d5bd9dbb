"""Half precision: the perturbation is float32's, a loss scale is divided out, an overflow costs one step."""

import itertools
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from models import EPSILONS, attack_of
from test_faults import examples, flags, same, tiny_bert, weights
from test_trainer import CHECKPOINTING
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from fgm_trainer import AWP, FGM, PGD, AdversarialTrainer
from fgm_trainer.attacks import ATTACKS, Attack
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.forward_pass import PerturbedForward

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast.*:FutureWarning")  # accelerate 1.1's name

STEPS = 4
SCALE = 2.0**10
TARGET = "word_embeddings"
EMBEDDINGS = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(autouse=True)
def _state_of_accelerate():
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def added(monkeypatch):
    """Every perturbation that a target adds, in order."""
    kept, meet = [], PerturbedForward.perturb

    def keep(self, *args):
        result = meet(self, *args)
        if self._delta is not None and not self.in_backward():
            kept.append(self.calls[-1].delta.clone())
        return result

    monkeypatch.setattr(PerturbedForward, "perturb", keep)
    return kept


@pytest.fixture
def answers(monkeypatch):
    """Every answer that an attack makes a step of."""
    kept, step = [], Attack.step

    def keep(self, answer, size):
        kept.append(answer)
        return step(self, answer, size)

    monkeypatch.setattr(Attack, "step", keep)
    return kept


def bert(**settings):
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)


def scaled(accelerator, scale, autocast=False):
    """Puts the loss scale where accelerate has it on a GPU; on a CPU it makes none."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    if autocast:
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"


def decay(step):
    return 1 / (1 + step)


class Steps(TrainerCallback):
    """The weights, the learning rate and the loss scale after each step."""

    def __init__(self):
        self.weights, self.rates, self.scales = [], [], []

    def see(self, model, schedule, accelerator):
        self.weights.append(weights(model))
        self.rates.append(schedule.get_last_lr()[0])
        self.scales.append(accelerator.scaler and accelerator.scaler.get_scale())

    def on_step_end(self, *args, **kwargs):
        self.see(self.trainer.model, self.trainer.lr_scheduler, self.trainer.accelerator)

    def taken(self):
        before = [self.start, *self.weights]
        pairs = zip(before, self.weights, strict=False)
        return [any(not torch.equal(one[n], other[n]) for n in one) for one, other in pairs]


def by_trainer(path, model, attack=None, scale=None, autocast=False, steps=STEPS, target=TARGET, **settings):
    """Trains by the Trainer, the stock one where there is no attack."""
    settings = {"max_steps": steps, "max_grad_norm": 0.0} | settings
    args = flags(path, TrainingArguments, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    seen = Steps()
    common = {"model": model, "args": args, "train_dataset": examples(), "callbacks": [seen]}
    common["optimizers"] = optimizer, schedule
    trainer = Trainer(**common) if attack is None else AdversarialTrainer(**common, attack=attack, target=target)
    seen.trainer, seen.start = trainer, weights(model)
    if scale is not None:
        scaled(trainer.accelerator, scale, autocast)
    set_seed(3)
    trainer.train()
    seen.log = [h for h in trainer.state.log_history if "loss" in h]
    return seen


def batches(count):
    rows = examples(4 * count)
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    return [{name: torch.stack([torch.as_tensor(r[name]) for r in group]) for name in group[0]} for group in groups]


def by_loop(path, model, attack=None, scale=None, autocast=False, steps=STEPS, target=TARGET, data=None, **settings):
    """The same by a loop of one's own with accelerate."""
    accelerator = Accelerator(cpu=True, **settings)
    if scale is not None:
        scaled(accelerator, scale, autocast)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    seen = Steps()
    seen.start = weights(model)
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    adversary = attack and Adversary(model, attack, target=target, accelerator=accelerator)
    for batch in data or batches(steps * accelerator.gradient_accumulation_steps):
        with accelerator.accumulate(model):
            if adversary is None:
                accelerator.backward(model(**batch).loss)
            else:
                adversary.backward(batch)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            seen.see(model, schedule, accelerator)
    return seen


WAYS = pytest.mark.parametrize("train", [by_trainer, by_loop])


def movement(seen):
    """All that training changed, as one vector."""
    first, last = seen.start, seen.weights[-1]
    return torch.cat([(last[n] - first[n]).flatten().double() for n in first if first[n].is_floating_point()])


def apart(one, other):
    """The distance of two movements, relative to the second."""
    return ((one - other).norm() / other.norm()).item()


def cosine(one, other):
    return nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0).item()


def turned(kind):
    """The same attack, with the last perturbation in the opposite direction."""

    class Turned(kind):
        def passes(self, step):
            last = yield from super().passes(step)
            delta = last.delta
            # What is drawn inside of the pass is a function.
            return replace(last, delta=(lambda call: -delta(call)) if callable(delta) else -delta)

    return Turned


# Sizes at which the perturbation is seen in what half precision leaves of it.
VISIBLE = {
    "alum": {"epsilon": 0.5, "step_size": 100.0, "sigma": 0.1},
    "fgsm": {"epsilon": 0.1},
    "freelb": {"epsilon": 1.0},
    "r3f": {"epsilon": 0.5},
    "smart": {"epsilon": 0.5, "step_size": 0.5, "sigma": 0.1},
    "token_aware": {"epsilon": 1.0},
    "vat": {"epsilon": 1.0, "xi": 0.5},
}
INPUT_ATTACKS = sorted(set(ATTACKS) - {"awp"})
# In these the last pass is the perturbed one, along a gradient of the loss.
LAST = sorted(name for name in INPUT_ATTACKS if not ATTACKS[name].compares)


def make(name, scope, kind=None):
    return (kind or ATTACKS[name])(scope=scope, **{"epsilon": EPSILONS[name]} | VISIBLE.get(name, {}))


# bfloat16 --------------------------------------------------------------------------------------------------------

CLOSE = 0.06


@pytest.mark.parametrize(
    "checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "checkpointing"]
)
@pytest.mark.parametrize("scope", ["vocabulary", "example"])
@pytest.mark.parametrize("name", INPUT_ATTACKS)
def test_under_bf16_autocast_every_attack_does_what_it_does_in_float32(tmp_path, added, name, scope, checkpointing):
    attack = make(name, scope)
    settings = {"gradient_accumulation_steps": 2}
    full = by_trainer(tmp_path, bert(), attack, **settings)
    in_full = added[: len(added)]
    added.clear()
    if checkpointing:
        settings |= {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}
    half = by_trainer(tmp_path, bert(), attack, bf16=True, **settings)
    assert all(torch.isfinite(w).all() for w in half.weights[-1].values())
    assert len(added) == len(in_full)
    for one, other in zip(half.log, full.log, strict=True):
        assert one["adv_delta_norm"] == pytest.approx(other["adv_delta_norm"], rel=0.05)
    for one, other in zip(added[:2], in_full[:2], strict=True):  # later the weights differ as well
        assert cosine(one, other) > 0.99
        assert one.norm().item() == pytest.approx(other.norm().item(), rel=0.01)
    assert apart(movement(half), movement(full)) < CLOSE


def test_under_bf16_autocast_weights_are_perturbed_as_in_float32(tmp_path):
    attack = AWP(epsilon=0.05)
    full = by_trainer(tmp_path, bert(), attack, target="weights")
    half = by_trainer(tmp_path, bert(), attack, target="weights", bf16=True)
    plain = by_trainer(tmp_path, bert(), FGM(epsilon=0.0))
    assert apart(movement(half), movement(full)) < CLOSE
    assert apart(movement(plain), movement(full)) > 5 * CLOSE


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
@pytest.mark.parametrize("name", LAST)
def test_a_perturbation_of_the_wrong_sign_would_be_far_from_that(tmp_path, name, scope):
    settings = {"gradient_accumulation_steps": 2}
    full = by_trainer(tmp_path, bert(), make(name, scope), **settings)
    wrong = by_trainer(tmp_path, bert(), make(name, scope, turned(ATTACKS[name])), **settings)
    assert apart(movement(wrong), movement(full)) > 10 * CLOSE


@pytest.mark.parametrize("name", ["fgm", "noise", "pgd"])
def test_a_bf16_model_is_attacked_as_a_float32_one(tmp_path, added, name):
    attack = attack_of(name, scope="example")
    full = by_trainer(tmp_path, bert(), attack)
    in_full = added[0]
    added.clear()
    half = by_trainer(tmp_path, bert().to(torch.bfloat16), attack)
    assert added[0].dtype == half.weights[-1][EMBEDDINGS].dtype == torch.bfloat16
    assert cosine(added[0], in_full) > 0.99
    for line in half.log:
        assert line["adv_delta_norm"] == pytest.approx(1.0, rel=0.01)
    # A weight in bfloat16 has three digits, so small steps are lost in it.
    assert apart(movement(half), movement(full)) < 0.2


# float16 and its loss scale --------------------------------------------------------------------------------------

SCALED = {
    "fgm, no norm": FGM(scope="example", norm="none", epsilon=50.0),
    "fgm": FGM(epsilon=1.0),
    "pgd, no norm": PGD(scope="example", norm="none", epsilon=50.0),
    "pgd": PGD(epsilon=1.0, weight=0.5),
    "adversarial examples alone": FGM(clean_weight=0.0, norm="none", scope="example", epsilon=50.0),
}


@WAYS
@pytest.mark.parametrize("name", SCALED)
def test_a_loss_scale_is_divided_out_to_the_last_bit(tmp_path, added, answers, train, name):
    runs = []
    for scale in (None, SCALE):
        seen = train(tmp_path, bert(), SCALED[name], scale, gradient_accumulation_steps=2)
        runs.append((seen, added[:], answers[:]))
        added.clear()
        answers.clear()
    (plain, plain_added, plain_answers), (seen, seen_added, seen_answers) = runs
    assert seen.scales == [SCALE] * STEPS
    for one, other in zip(plain_added, seen_added, strict=True):
        assert one.norm() > 0
        assert torch.equal(one, other)
    for one, other in zip(plain_answers, seen_answers, strict=True):
        assert torch.equal(one.gradient, other.gradient)
        assert torch.equal(one.loss, other.loss)
    same(plain.weights[-1], seen.weights[-1])


@WAYS
@pytest.mark.parametrize("attack", [FGM(epsilon=1.0), PGD(epsilon=1.0, scope="example")], ids=lambda a: a.name)
def test_fp16_autocast_with_a_loss_scale_learns_as_float32_does(tmp_path, added, train, attack):
    full = train(tmp_path, bert(), attack)
    in_full = added[0]
    added.clear()
    half = train(tmp_path, bert(), attack, SCALE, autocast=True)
    assert half.scales == [SCALE] * STEPS
    assert cosine(added[0], in_full) > 0.999
    assert added[0].norm().item() == pytest.approx(in_full.norm().item(), rel=1e-3)
    assert apart(movement(half), movement(full)) < 0.02


@WAYS
@pytest.mark.parametrize("attack", [FGM(epsilon=1.0), PGD(epsilon=1.0)], ids=lambda a: a.name)
def test_a_gradient_that_float16_holds_only_scaled_keeps_its_direction(tmp_path, added, train, attack):
    def runs(*scale):
        model = bert()
        # Entries of about 1e-8: what a mean over many tokens leaves, and a zero in float16.
        model.register_forward_hook(lambda module, args, output: {**output, "loss": output["loss"] * 2.0**-17})
        added.clear()
        train(tmp_path, model, attack, *scale, target="bert.encoder.layer.0.output.dense", steps=1)
        return added[:]

    full, half = runs(), runs(2.0**20, True)
    assert half[0].dtype == torch.float16
    for one, other in zip(half, full, strict=True):
        assert cosine(one, other) > 0.99


def overflow(model, at, value=float("inf"), rows=slice(None), positions=slice(None)):
    """Makes the gradient behind the embeddings `value` in the forward passes `at`, counted from 0."""
    passes = itertools.count()

    def on_output(module, args, output):
        if next(passes) in at:

            def fill(gradient):
                gradient = gradient.clone()
                gradient[rows, positions] = value
                return gradient

            output.register_hook(fill)

    model.bert.embeddings.register_forward_hook(on_output)
    return model


# The passes of the second step.
PLACES = {
    "clean": (FGM(epsilon=1.0), 2),
    "adversarial": (FGM(epsilon=1.0), 3),
    "clean, pgd": (PGD(epsilon=1.0, steps=2, scope="example"), 3),
    "adversarial, pgd": (PGD(epsilon=1.0, steps=2, scope="example"), 5),
}


@WAYS
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", PLACES)
def test_an_overflow_in_a_training_pass_skips_the_step_as_in_a_stock_run(tmp_path, added, train, name, value):
    attack, at = PLACES[name]
    stock = train(tmp_path, overflow(bert(), {1}, value), None, SCALE)
    ours = train(tmp_path, overflow(bert(), {at}, value), attack, SCALE)
    assert ours.taken() == stock.taken() == [True, False, True, True]
    assert ours.scales == stock.scales == [SCALE, SCALE / 2, SCALE / 2, SCALE / 2]
    assert ours.rates == stock.rates
    assert ours.rates[0] == ours.rates[1] > ours.rates[2]
    assert all(torch.isfinite(delta).all() for delta in added)
    assert all(torch.isfinite(w).all() for w in ours.weights[-1].values())
    if train is by_trainer:
        assert [line["adv_skipped"] for line in ours.log] == [0, "clean" in name, 0, 0]


@WAYS
def test_an_overflow_in_a_look_alone_costs_its_direction_and_no_step(tmp_path, added, train):
    ours = train(tmp_path, overflow(bert(), {4}), PGD(epsilon=1.0, steps=2, scope="example"), SCALE)
    assert ours.taken() == [True] * STEPS
    assert ours.scales == [SCALE] * STEPS
    look, last = added[2:4]
    assert torch.isfinite(last).all()
    assert look.norm() > 0
    assert (look - last).abs().max() < 1e-6, "the step before the look is kept"
    if train is by_trainer:
        assert [line["adv_skipped"] for line in ours.log] == [0, 1, 0, 0]


@WAYS
@pytest.mark.parametrize("scope", ["vocabulary", "example", "token"])
def test_a_gradient_that_is_not_finite_zeroes_its_own_unit_alone(tmp_path, added, train, scope):
    attack = FGM(epsilon=1.0, scope=scope)
    settings = {"steps": 1, "gradient_accumulation_steps": 2}
    train(tmp_path, bert(), attack, SCALE, **settings)
    first, second = added
    added.clear()
    ours = train(tmp_path, overflow(bert(), {0}, rows=0, positions=2), attack, SCALE, **settings)
    unit = {"vocabulary": (slice(None),), "example": (0,), "token": (0, 2)}[scope]
    assert first[unit].norm() > 0
    first[unit] = 0
    assert torch.equal(added[0], first)
    assert torch.equal(added[1], second)
    assert second.norm() > 0
    assert ours.taken() == [False]


def test_after_an_overflow_all_is_as_if_that_batch_had_not_been():
    data = batches(4)
    whole = by_loop(None, overflow(bert(), {3}), PGD(epsilon=1.0, steps=2), SCALE, data=data)
    without = by_loop(None, bert(), PGD(epsilon=1.0, steps=2), SCALE, data=data[:1] + data[2:])
    same(whole.weights[-1], without.weights[-1])
    assert whole.rates[-1] == without.rates[-1]


@WAYS
@pytest.mark.parametrize(
    "attack", [None, FGM(epsilon=1.0), PGD(epsilon=1.0, scope="example")], ids=["stock", "fgm", "pgd"]
)
def test_a_loss_scale_too_large_for_float16_falls_until_training_goes_on(tmp_path, added, train, attack):
    ours = train(tmp_path, bert(), attack, 2.0**24, autocast=True, steps=14)
    taken = ours.taken()
    assert not taken[0]
    assert taken[-1]
    halvings = itertools.accumulate(not t for t in taken)
    assert ours.scales == [2.0**24 / 2**n for n in halvings]
    # Stock's scheduler waits as well.
    assert ours.rates == [0.05 * decay(n) for n in itertools.accumulate(taken)]
    assert all(torch.isfinite(w).all() for w in ours.weights[-1].values())
    assert all(torch.isfinite(delta).all() for delta in added)
    if attack:
        assert added[0].norm() == 0
        assert added[-1].norm() > 0
