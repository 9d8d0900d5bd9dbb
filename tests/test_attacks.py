"""What every registered attack must keep to, and the driver that runs them."""

import copy
import inspect
import itertools
import re
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from models import attack_of

from fgm_trainer import ALUM, AWP, FGM, FGSM, PGD, R3F, SMART, VAT, Attack, FreeLB, Noise, TokenAware, register
from fgm_trainer.attacks import (
    ATTACKS,
    ForwardPass,
    GradientPass,
    PassResult,
    Step,
    TrainPass,
    attack_class,
    own_settings,
    run,
)
from fgm_trainer.perturbation.calls import TargetCall
from fgm_trainer.perturbation.divergence import Against, divergence
from fgm_trainer.perturbation.geometry import NORMS, SCOPES, Units, length, shared_entries
from fgm_trainer.perturbation.weights import Segments

# awp perturbs weights: it has its own tests, and takes its place wherever a model is trained.
INPUT_ATTACKS = sorted(name for name in ATTACKS if ATTACKS[name].default_target != "weights")
EVERY = list(itertools.product(INPUT_ATTACKS, NORMS, SCOPES))
# Noise that is not aimed.
UNAIMED = {"noise", "r3f"}
# What a bad gradient leaves of these is the noise that they started from.
STARTS_AT_NOISE = {"freelb", "token_aware", "smart", "alum"}
BUILT_IN = {kind.name: kind for kind in (ALUM, AWP, FGM, FGSM, PGD, R3F, SMART, VAT, FreeLB, Noise, TokenAware)}


def test_something_was_collected():
    assert len(BUILT_IN) == 11
    assert BUILT_IN.items() <= ATTACKS.items()
    assert len(EVERY) == len(INPUT_ATTACKS) * 4 * 3 >= 120


class Bench:
    """A curved loss of one tensor, in place of a model: answers requests and keeps them."""

    def __init__(self, scope, seed=0, spoil=None):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 9, (3, 5), generator=generator)
        self.tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
        self.embeddings = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
        self.direction = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
        entries = shared_entries(self.ids, ~self.tokens, 9) if scope == "vocabulary" else None
        self.units = Units(scope, ~self.tokens, entries)
        # The row that is the first one, by its number in the batch.
        self.spoil, self.first = spoil, 0
        self.requests, self.deltas, self.lasts, self.losses = [], [], [], []

    def loss(self, delta):
        return (torch.sin(self.embeddings + delta) * self.direction).sum()

    def outputs(self, delta):
        """Logits of two classes for each row."""
        moved = torch.sin(self.embeddings + delta) * self.direction * self.tokens[:, :, None]
        return moved.sum(dim=1)[:, :2]

    def drawn(self, request):
        """The perturbation of a request, whether given or to be drawn."""
        if request.delta is None:
            return torch.zeros_like(self.embeddings)
        if isinstance(request, TrainPass) and request.rows is not None:
            return torch.zeros_like(self.embeddings).index_copy(0, request.rows, request.delta.double())
        if isinstance(request.delta, torch.Tensor):
            return request.delta.double()
        return request.delta(TargetCall(self.embeddings, self.units, self.ids, 9, 0)).double()

    def part(self, rows):
        """The bench with some of its rows, in that order."""
        part = copy.copy(self)
        part.ids, part.tokens, part.embeddings, part.direction = (
            values[rows] for values in (self.ids, self.tokens, self.embeddings, self.direction)
        )
        shared = self.units.scope == "vocabulary"
        entries = shared_entries(part.ids, ~part.tokens, 9) if shared else None
        part.units = Units(self.units.scope, ~part.tokens, entries)
        part.first = rows.tolist().index(0) if 0 in rows else None
        return part

    def answer(self, request):
        if getattr(request, "rows", None) is not None:
            part = self.part(request.rows)
            return part.answer(replace(request, rows=None))
        delta = self.drawn(request).clone().requires_grad_()
        outputs = self.outputs(delta)
        measured = getattr(request, "against", ())
        loss = divergence((outputs,), measured, torch.nn.Module(), {}) if measured else self.loss(delta)
        gradient = torch.autograd.grad(loss, delta)[0]
        if isinstance(request, ForwardPass):
            gradient = torch.zeros_like(gradient)
        elif self.spoil is not None and self.first is not None:
            gradient[self.first, 0, 0] = self.spoil
        self.losses.append(loss.item())
        gradient = self.units.only_tokens(gradient)
        return PassResult(gradient, self.units, loss.detach(), delta.detach(), (outputs.detach(),), self.ids)

    def look(self, request):
        assert isinstance(request, GradientPass | ForwardPass)
        self.requests.append(request)
        self.deltas.append(self.drawn(request))
        return self.answer(request)

    def train(self, request, last):
        assert isinstance(request, TrainPass)
        self.requests.append(request)
        self.deltas.append(self.drawn(request))
        self.lasts.append(last)
        return None if last else self.answer(request)

    def run(self, attack, epsilon=None, seed=0):
        run(attack, Step(attack.epsilon if epsilon is None else epsilon, seed, examples=3), self.train, self.look)
        return self.requests

    def moved(self):
        """The perturbations of the perturbed passes."""
        return [d for r, d in zip(self.requests, self.deltas, strict=True) if r.delta is not None]


class WeightBench(Bench):
    """A flat vector of two parts in place of weights."""

    def __init__(self):
        super().__init__("example")
        self.embeddings, self.direction = self.embeddings.flatten(), self.direction.flatten()
        self.units = Segments(sizes=(20, 40), lengths=torch.stack([v.norm() for v in self.embeddings.split((20, 40))]))

    def outputs(self, delta):
        return None

    def answer(self, request):
        delta = self.drawn(request).clone().requires_grad_()
        loss = self.loss(delta)
        return PassResult(torch.autograd.grad(loss, delta)[0], self.units, loss.detach(), delta.detach())


# Those whose published step is far below the epsilon of these tests.
STEPS = {"smart": {"step_size": 0.1, "sigma": 0.01}, "alum": {"step_size": 10.0, "sigma": 0.01}}
STEPS["partial_fgm"] = STEPS["atta"] = {"share": 1.0}


def make(name, norm, scope, epsilon=0.1):
    return ATTACKS[name](epsilon=epsilon, norm=norm, scope=scope, **STEPS.get(name, {}))


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_conformance(name, norm, scope):
    attack = make(name, norm, scope)
    bench = Bench(scope)
    random_state = torch.get_rng_state()
    bench.run(attack)
    assert torch.equal(torch.get_rng_state(), random_state), "an attack draws from its own seed"
    assert bench.lasts[-1]
    assert not any(bench.lasts[:-1])
    moved = bench.moved()
    assert moved, "nothing was perturbed"
    for delta in moved:
        assert delta.shape == bench.embeddings.shape
        assert torch.isfinite(delta).all()
        assert not delta[~bench.tokens].any()
        if norm != "none":
            assert (length(delta, norm, bench.units) <= attack.reach(attack.epsilon) * (1 + 1e-6)).all()
        if scope == "vocabulary":
            for one, other in itertools.combinations(bench.tokens.nonzero().tolist(), 2):
                if bench.ids[tuple(one)] == bench.ids[tuple(other)]:
                    assert torch.equal(delta[tuple(one)], delta[tuple(other)])
    assert moved[-1][bench.tokens].any()


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_same_seed_same_perturbation(name, norm, scope):
    first, again = Bench(scope), Bench(scope)
    for bench in (first, again):
        bench.run(make(name, norm, scope), seed=5)
    assert all(map(torch.equal, first.deltas, again.deltas))


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_the_scheduled_epsilon_counts(name, norm, scope):
    """`passes` gets this step's epsilon; the attack's own must not be used in its place."""
    attack = make(name, norm, scope, epsilon=3.0)
    lowered, plain = Bench(scope), Bench(scope)
    lowered.run(attack, epsilon=0.1)
    plain.run(replace(attack, epsilon=0.1))
    assert all(map(torch.equal, lowered.deltas, plain.deltas))


@pytest.mark.parametrize("spoil", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_a_gradient_that_is_not_finite(name, norm, scope, spoil):
    bench = Bench(scope, spoil=spoil)
    bench.run(make(name, norm, scope))
    assert all(torch.isfinite(delta).all() for delta in bench.deltas)
    last = bench.moved()[-1]
    if name not in UNAIMED | STARTS_AT_NOISE:
        # Its own unit gets nothing; the others do.
        hit = {"token": last[0, 0], "example": last[0], "vocabulary": last}[scope]
        assert not hit.any()
        assert scope == "vocabulary" or last[1:][bench.tokens[1:]].any()


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
@pytest.mark.parametrize("name", [name for name in INPUT_ATTACKS if name not in UNAIMED])
def test_an_attack_raises_what_it_measures(name, norm):
    """The loss, or how far the outputs move; by more than noise of the same length does."""
    bench, control = Bench("example"), Bench("example")
    attack = make(name, norm, "example")
    bench.run(attack)
    control.run(make("noise", norm, "example"))
    clean = bench.outputs(0).detach()

    def measured(delta):
        return (
            divergence((bench.outputs(delta),), [Against((clean,))], torch.nn.Module(), {})
            if attack.compares
            else bench.loss(delta)
        )

    # The last of FreeLB's path is one step from noise.
    attacked = measured(bench.moved()[-1])
    assert attacked > measured(0)
    assert attacked > measured(control.moved()[-1])


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_card(name):
    attack = ATTACKS[name]
    assert attack.name == name
    card = inspect.getdoc(attack)
    heads = ["Idea", "Equation", "Cost", "Defaults", "Limits", "Citation"]
    # `Equation (Miyato et al., eq. 5):` may name its source.
    places = [re.search(rf"^{head}\b[^:\n]*:", card, re.MULTILINE) for head in heads]
    assert all(places), f"{name}'s card lacks {[h for h, p in zip(heads, places, strict=True) if not p]}"
    assert [p.start() for p in places] == sorted(p.start() for p in places)
    ends = [p.start() for p in places[1:]] + [len(card)]
    for place, end in zip(places, ends, strict=True):
        assert len(card[place.end() : end].split()) >= 3, f"{name}'s card says nothing under {place.group()}"


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_cost_is_what_the_card_says(name):
    attack = attack_of(name) if name == "awp" else attack_of(name, scope="example")
    requests = (WeightBench() if name == "awp" else Bench("example")).run(attack)
    trains = sum(isinstance(r, TrainPass) for r in requests)
    glances = sum(isinstance(r, ForwardPass) for r in requests)
    looks = len(requests) - trains - glances
    cost = re.search(r"^Cost: (.*?)\n\n", inspect.getdoc(attack), re.MULTILINE | re.DOTALL).group(1)
    said = re.match(r"(\d+) full pass", cost)
    assert said, f"{name}: the cost starts with the number of full passes; it is {cost!r}"
    assert int(said.group(1)) == trains
    assert ("without weight gradients" in cost) == (looks > 0)
    assert ("forward pass" in cost) == (glances > 0)
    assert attack.looks == (looks > 0), "`looks` says whether the attack asks for `GradientPass`"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_passes_of_pgd(steps):
    kinds = [type(r) for r in Bench("example").run(PGD(epsilon=1.0, steps=steps, scope="example"))]
    assert kinds == [TrainPass, *[GradientPass] * (steps - 1), TrainPass]


@pytest.mark.parametrize("name", ["fgm", "noise"])
def test_passes_of_one_step_attacks(name):
    requests = Bench("example").run(make(name, "l2", "example"))
    assert [type(r) for r in requests] == [TrainPass, TrainPass]
    assert requests[0].delta is None


def test_one_step_of_pgd_is_fgm():
    fgm = Bench("example").run(FGM(epsilon=0.1, scope="example"))[-1].delta
    pgd = Bench("example").run(PGD(epsilon=0.1, steps=1, scope="example"))[-1].delta
    torch.testing.assert_close(fgm, pgd)


def test_weights_reach_the_requests():
    requests = Bench("example").run(FGM(epsilon=1.0, scope="example", weight=0.25, clean_weight=0.5))
    assert [r.weight for r in requests] == [0.5, 0.25]


def test_a_pass_of_weight_zero_becomes_a_look():
    requests = Bench("example").run(FGM(epsilon=1.0, scope="example", clean_weight=0.0))
    assert [type(r) for r in requests] == [GradientPass, TrainPass]
    full = Bench("example").run(FGM(epsilon=1.0, scope="example"))
    assert torch.equal(requests[-1].delta, full[-1].delta)


ENDED = []


class Closing(FGM):
    """FGM that tells when its coroutine has ended."""

    def passes(self, step):
        try:
            answer = yield TrainPass()
            answer = yield GradientPass(self.step(answer, step.epsilon))
            return TrainPass(self.step(answer, step.epsilon))
        finally:
            ENDED.append(True)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fail", ["first", "look", "last"])
def test_the_driver_closes_the_coroutine(fail, error):
    ENDED.clear()
    bench = Bench("example")

    def train(request, last):
        if fail == ("last" if last else "first"):
            raise error("injected")
        return bench.train(request, last)

    def look(request):
        if fail == "look":
            raise error("injected")
        return bench.look(request)

    with pytest.raises(error, match="injected") as caught:
        run(Closing(scope="example"), Step(1.0), train, look)
    # Closed by the driver, not by the garbage collector: the frames are alive in `caught`.
    assert ENDED == [True]
    assert caught.value.__context__ is None


class CleanLast(FGM):
    """FGM that ends with its clean pass."""

    def passes(self, step):
        answer = yield GradientPass()
        yield TrainPass(self.step(answer, step.epsilon))
        return TrainPass()


def test_the_last_pass_must_train():
    assert len(Bench("example").run(CleanLast(epsilon=1.0, scope="example"))) == 3
    with pytest.raises(TypeError, match=r"The last pass of CleanLast\.passes must train, with a weight above 0; found"):
        Bench("example").run(CleanLast(epsilon=1.0, scope="example", clean_weight=0.0))


def test_an_error_inside_an_attack_is_raised_as_it_is():
    class Broken(FGM):
        def passes(self, step):
            yield TrainPass()
            raise ZeroDivisionError("inside")

    bench = Bench("example")
    with pytest.raises(ZeroDivisionError, match="inside"):
        bench.run(Broken(scope="example"))
    assert bench.lasts == [False]


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (FGM, {"epsilon": -1.0}, "FGM: epsilon must be a finite number, 0 or more, or 'auto'; found -1.0."),
        (FGM, {"epsilon": float("nan")}, "epsilon must be a finite number, 0 or more, or 'auto'; found nan."),
        (FGM, {"weight": float("inf")}, "weight must be a finite number, 0 or more; found inf."),
        (FGM, {"weight": 0.0}, "weight must be above 0, or the adversarial pass trains nothing; epsilon=0 turns"),
        (FGM, {"clean_weight": -0.5}, "clean_weight must be a finite number, 0 or more; found -0.5."),
        (FGM, {"scope": "batch"}, "scope must be one of vocabulary, example, token; found 'batch'."),
        (FGM, {"norm": "l1"}, "norm must be one of l2, linf, max, none; found 'l1'."),
        (PGD, {"steps": 0}, "PGD: steps must be a whole number, 1 or more; found 0."),
        (PGD, {"steps": 1.5}, "steps must be a whole number, 1 or more; found 1.5."),
        (PGD, {"step_size": 0.0}, "step_size must be a finite number above 0; found 0.0."),
        (PGD, {"step_size": float("nan")}, "step_size must be a finite number above 0; found nan."),
    ],
)
def test_refused_settings(attack, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        attack(**settings)


def test_all_problems_are_said_at_once():
    with pytest.raises(ValueError, match=r"epsilon must be .* norm must be .* steps must be"):
        PGD(epsilon=-1.0, norm="l1", steps=0)


@pytest.fixture
def registry():
    before = dict(ATTACKS)
    yield ATTACKS
    ATTACKS.clear()
    ATTACKS.update(before)


def test_register(registry):
    @register("mine")
    @dataclass(frozen=True, kw_only=True)
    class Mine(FGM):
        twist: float = 0.5

    assert attack_class("mine") is Mine
    assert own_settings(Mine) == {"twist": 0.5}
    settings = Mine(epsilon=2.0).settings()
    assert next(iter(settings)) == "method"
    assert settings["method"] == "mine"
    assert settings["epsilon"] == 2.0
    assert settings["twist"] == 0.5
    with pytest.raises(ValueError, match=r"An attack named 'mine' is registered already: .*Mine\."):
        register("mine")(FGM)


def test_an_unknown_attack():
    with pytest.raises(ValueError, match=r"There is no attack 'fmg'; registered are: .*fgm.*\. Did you mean 'fgm'\?"):
        attack_class("fmg")


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_settings(name):
    attack = attack_of(name)
    assert isinstance(attack, Attack)
    assert is_dataclass(attack)
    assert attack.settings() == {"method": name} | {f.name: getattr(attack, f.name) for f in fields(attack)}
    with pytest.raises(AttributeError):
        attack.epsilon = 2.0
