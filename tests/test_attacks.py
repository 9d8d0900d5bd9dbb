"""What every registered attack must keep to, and the driver that runs them."""

import inspect
import itertools
import re
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch

from fgm_trainer import FGM, PGD, Attack, Noise, register
from fgm_trainer.attacks import ATTACKS, Answer, Look, Train, attack_class, own_settings, run
from fgm_trainer.geometry import NORMS, SCOPES, Units, length, shared_entries

EVERY = list(itertools.product(sorted(ATTACKS), NORMS, SCOPES))
BUILT_IN = {"fgm": FGM, "noise": Noise, "pgd": PGD}


def test_something_was_collected():
    assert BUILT_IN.items() <= ATTACKS.items()
    assert len(EVERY) == len(ATTACKS) * 4 * 3 >= 36


class Bench:
    """A curved loss of one tensor, in place of a model: answers requests and keeps them."""

    def __init__(self, scope, seed=0, spoil=None):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 9, (3, 5), generator=generator)
        self.tokens = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
        self.embeddings = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
        self.direction = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
        entries = shared_entries(self.ids, self.tokens, 9) if scope == "vocabulary" else None
        self.units = Units(scope, self.tokens, entries)
        self.spoil = spoil
        self.requests, self.lasts, self.losses = [], [], []

    def loss(self, delta):
        return (torch.sin(self.embeddings + delta) * self.direction).sum()

    def answer(self, request):
        delta = torch.zeros_like(self.embeddings) if request.delta is None else request.delta.double()
        delta = delta.clone().requires_grad_()
        loss = self.loss(delta)
        gradient = torch.autograd.grad(loss, delta)[0]
        if self.spoil is not None:
            gradient[0, 0, 0] = self.spoil
        self.losses.append(loss.item())
        return Answer(gradient, self.units, loss.detach())

    def look(self, request):
        assert isinstance(request, Look)
        self.requests.append(request)
        return self.answer(request)

    def train(self, request, last):
        assert isinstance(request, Train)
        self.requests.append(request)
        self.lasts.append(last)
        return None if last else self.answer(request)

    def run(self, attack, epsilon=None, seed=0):
        run(attack, attack.epsilon if epsilon is None else epsilon, seed, self.train, self.look)
        return self.requests


def make(name, norm, scope, epsilon=0.1):
    return ATTACKS[name](epsilon=epsilon, norm=norm, scope=scope)


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_conformance(name, norm, scope):
    attack = make(name, norm, scope)
    bench = Bench(scope)
    random_state = torch.get_rng_state()
    requests = bench.run(attack)
    assert torch.equal(torch.get_rng_state(), random_state), "an attack draws from its own seed"
    assert bench.lasts[-1]
    assert not any(bench.lasts[:-1])
    moved = [request.delta for request in requests if request.delta is not None]
    assert moved, "nothing was perturbed"
    for delta in moved:
        assert delta.shape == bench.embeddings.shape
        assert torch.isfinite(delta).all()
        assert not delta[~bench.tokens].any()
        if norm != "none":
            assert (length(delta, norm, bench.units) <= attack.epsilon * (1 + 1e-6)).all()
        if scope == "vocabulary":
            for one, other in itertools.combinations(bench.tokens.nonzero().tolist(), 2):
                if bench.ids[tuple(one)] == bench.ids[tuple(other)]:
                    assert torch.equal(delta[tuple(one)], delta[tuple(other)])
    assert moved[-1][bench.tokens].any()


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_same_seed_same_perturbation(name, norm, scope):
    first, again = (Bench(scope).run(make(name, norm, scope), seed=5) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert (one.delta is None and other.delta is None) or torch.equal(one.delta, other.delta)


@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_the_scheduled_epsilon_counts(name, norm, scope):
    """`passes` gets this step's epsilon; the attack's own must not be used in its place."""
    attack = make(name, norm, scope, epsilon=3.0)
    lowered = [r.delta for r in Bench(scope).run(attack, epsilon=0.1)]
    plain = [r.delta for r in Bench(scope).run(replace(attack, epsilon=0.1))]
    for one, other in zip(lowered, plain, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("spoil", [float("inf"), float("nan")])
@pytest.mark.parametrize(("name", "norm", "scope"), EVERY)
def test_a_gradient_that_is_not_finite(name, norm, scope, spoil):
    bench = Bench(scope, spoil=spoil)
    bench.run(make(name, norm, scope))
    assert all(torch.isfinite(r.delta).all() for r in bench.requests if r.delta is not None)
    last = bench.requests[-1].delta
    if name != "noise":
        # Its own unit gets nothing; the others do.
        hit = {"token": last[0, 0], "example": last[0], "vocabulary": last}[scope]
        assert not hit.any()
        assert scope == "vocabulary" or last[1:][bench.tokens[1:]].any()


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "none"])
@pytest.mark.parametrize("name", [name for name in sorted(ATTACKS) if name != "noise"])
def test_an_attack_raises_the_loss(name, norm):
    bench = Bench("example")
    attack = make(name, norm, "example")
    clean, attacked = bench.loss(0), bench.loss(bench.run(attack)[-1].delta)
    assert attacked > clean
    noise = Bench("example").run(make("noise", norm, "example"))[-1].delta
    assert attacked > bench.loss(noise)


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
    attack = ATTACKS[name](scope="example")
    requests = Bench("example").run(attack)
    trains = sum(isinstance(r, Train) for r in requests)
    looks = len(requests) - trains
    cost = re.search(r"^Cost: (.*?)\n\n", inspect.getdoc(attack), re.MULTILINE | re.DOTALL).group(1)
    said = re.match(r"(\d+) full pass", cost)
    assert said, f"{name}: the cost starts with the number of full passes; it is {cost!r}"
    assert int(said.group(1)) == trains
    assert ("without weight gradients" in cost) == (looks > 0)
    assert attack.looks == (looks > 0), "`looks` says whether the attack asks for `Look`"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_passes_of_pgd(steps):
    kinds = [type(r) for r in Bench("example").run(PGD(steps=steps, scope="example"))]
    assert kinds == [Train, *[Look] * (steps - 1), Train]


@pytest.mark.parametrize("name", ["fgm", "noise"])
def test_passes_of_one_step_attacks(name):
    requests = Bench("example").run(make(name, "l2", "example"))
    assert [type(r) for r in requests] == [Train, Train]
    assert requests[0].delta is None


def test_one_step_of_pgd_is_fgm():
    fgm = Bench("example").run(FGM(epsilon=0.1, scope="example"))[-1].delta
    pgd = Bench("example").run(PGD(epsilon=0.1, steps=1, scope="example"))[-1].delta
    torch.testing.assert_close(fgm, pgd)


def test_weights_reach_the_requests():
    requests = Bench("example").run(FGM(scope="example", weight=0.25, clean_weight=0.5))
    assert [r.weight for r in requests] == [0.5, 0.25]


def test_a_pass_of_weight_zero_becomes_a_look():
    requests = Bench("example").run(FGM(scope="example", clean_weight=0.0))
    assert [type(r) for r in requests] == [Look, Train]
    full = Bench("example").run(FGM(scope="example"))
    assert torch.equal(requests[-1].delta, full[-1].delta)


ENDED = []


class Closing(FGM):
    """FGM that tells when its coroutine has ended."""

    def passes(self, epsilon, seed):
        try:
            answer = yield Train()
            answer = yield Look(self.step(answer, epsilon))
            return Train(self.step(answer, epsilon))
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
        run(Closing(scope="example"), 1.0, 0, train, look)
    # Closed by the driver, not by the garbage collector: the frames are alive in `caught`.
    assert ENDED == [True]
    assert caught.value.__context__ is None


def test_an_error_inside_an_attack_is_raised_as_it_is():
    class Broken(FGM):
        def passes(self, epsilon, seed):
            yield Train()
            raise ZeroDivisionError("inside")

    bench = Bench("example")
    with pytest.raises(ZeroDivisionError, match="inside"):
        bench.run(Broken(scope="example"))
    assert bench.lasts == [False]


@pytest.mark.parametrize(
    ("attack", "settings", "message"),
    [
        (FGM, {"epsilon": -1.0}, "FGM: epsilon must be a finite number, 0 or more; found -1.0."),
        (FGM, {"epsilon": float("nan")}, "epsilon must be a finite number, 0 or more; found nan."),
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
    attack = ATTACKS[name]()
    assert isinstance(attack, Attack)
    assert is_dataclass(attack)
    assert attack.settings() == {"method": name} | {f.name: getattr(attack, f.name) for f in fields(attack)}
    with pytest.raises(AttributeError):
        attack.epsilon = 2.0
