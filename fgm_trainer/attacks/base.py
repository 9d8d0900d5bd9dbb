"""An attack as a coroutine, and `run`, which goes through it.

An attack yields a request where it wants the gradient, is sent a `PassResult`, and returns the last request to train
on. It knows nothing of Trainer, accelerate or mixed precision: `engine.driver` makes the passes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor, nn

from ..perturbation import geometry
from ..perturbation.calls import Draw
from ..perturbation.divergence import Against, Outputs
from ..perturbation.geometry import NORMS, SCOPES, Units

# The epsilon that is found while training (`engine.controller`).
AUTO = "auto"


@dataclass(frozen=True)
class TrainPass:
    """A full pass at this perturbation (None: the clean inputs) whose weight gradients add up.

    Args:
        delta: the perturbation, or what draws it once the shape is known.
        weight: factor of the task's loss; 0 for a pass that is measured by divergences alone.
        against: divergences from earlier outputs that are added to the loss.
        masks: passes of a step that have the same name draw the same dropout masks.
        rows: where given, the examples that a perturbation, a tensor, is of, (chosen,); the others stay clean.
        then: of a step's last pass, what is told its result; there must be no other training pass before it.
    """

    delta: Tensor | Draw | None = None
    weight: float = 1.0
    against: tuple[Against, ...] = ()
    masks: str = ""
    rows: Tensor | None = None
    then: Callable[[PassResult], None] | None = None


@dataclass(frozen=True)
class GradientPass:
    """A pass for the gradient with respect to the perturbation alone: no weight gradients, a third cheaper.

    Args:
        delta, masks: as for `TrainPass`.
        against: where given, the gradient is that of these divergences and not of the task's loss.
        label: where given, the gradient is that of the loss with this label in place of the true one.
        rows: where given, the examples of the micro-batch that are run, (chosen,); everything here and in the result is
            of these alone.
    """

    delta: Tensor | Draw | None = None
    against: tuple[Against, ...] = ()
    masks: str = ""
    label: Tensor | int | str | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass for its outputs alone: no gradient.

    Args:
        delta, masks, rows: as for `GradientPass`.
        weights: by name, what to use in place of the model's weights.
    """

    delta: Tensor | Draw | None = None
    masks: str = ""
    weights: Mapping[str, Tensor] | None = None
    rows: Tensor | None = None


Request = TrainPass | GradientPass | ForwardPass


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Args:
        gradient: d(loss)/d(delta) of this micro-batch alone, (rows, positions, dimension), in float32 at least; zero
            after a `ForwardPass`, and where there is no token.
        units: the units over which norms are taken.
        loss: what `compute_loss` returned, unweighted and detached, or the divergence where the pass has none: a mean
            over the micro-batch; where the Trainer divides by the items of the whole optimizer step
            (`num_items_in_batch`), this micro-batch's part of that.
        applied: the perturbation as it was applied: drawn, clipped; None for the clean inputs.
        outputs: the model's logits, detached, for attacks that compare outputs.
        ids: the token ids, (rows, positions), where the target is a lookup.
    """

    gradient: Tensor
    units: Units
    loss: Tensor
    applied: Tensor | None = None
    outputs: Outputs = ()
    ids: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """The perturbation as it was applied, zero for the clean inputs."""
        if self.applied is not None:
            return self.applied
        return self.gradient.new_zeros(()).expand_as(self.gradient)


Passes = Generator[Request, PassResult, TrainPass]


class Total(Protocol):
    """Sums a tensor over all processes; to be called on all of them, equally often."""

    def __call__(self, tensor: Tensor, /) -> Tensor: ...

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on each of them in the same order; likewise."""


class Memory(Protocol):
    """What an attack keeps between optimizer steps: the same on all processes, saved with a checkpoint.

    `passes` runs once for each micro-batch on each process; what it finds it hands to `step.memory`, by whatever method
    the memory has for it (`token_aware.Table.keep`). `settle` makes that the same everywhere. In an evaluation
    `step.memory` is None.
    """

    def settle(self, model: nn.Module, total: Total) -> None:
        """Before an attacked optimizer step, where one was made since the last call; also before the first of a run.

        Args:
            model: inside every wrapper.
            total: brings together what all processes have found.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was saved."""


@dataclass(frozen=True)
class Step:
    """What a step is told.

    Args:
        epsilon: this step's epsilon, which a schedule may have lowered; a scalar tensor where it is `auto`.
        seed: of whatever is random in this step.
        memory: what `Attack.new_memory` made at the start of the run; None in an evaluation.
        examples: how many examples the micro-batch has.
    """

    epsilon: Any
    seed: int = 0
    memory: Any = None
    examples: int = 0


class Trains(Protocol):
    """Runs a training pass. The result of the last one is not read and may be None."""

    def __call__(self, request: TrainPass, last: bool) -> PassResult | None: ...


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An adversarial method. Subclasses say in `passes` which passes a step takes.

    Args:
        epsilon: the size of the perturbation: the length of each unit in `norm`; for norm `none` the constant that
            multiplies the gradient. `auto` finds it while training (`engine.controller.EpsilonController`).
        scope: over which entries a norm is taken, one of `geometry.SCOPES`; None for the method's default.
        norm: one of `geometry.NORMS`.
        weight: factor of the adversarial loss.
        clean_weight: factor of the clean loss; 0 trains on adversarial examples alone.
        targeted: a label to move towards in place of moving away from the true one: a class, `least_likely` (by the
            first pass of the step), or the name of a column of the data that holds it.
    """

    epsilon: float | str = AUTO
    scope: str | None = None
    norm: str = "l2"
    weight: float = 1.0
    clean_weight: float = 1.0
    targeted: int | str | None = None

    name: ClassVar[str] = ""
    # The target and scope where none is asked for.
    default_target: ClassVar[str] = "word_embeddings"
    default_scope: ClassVar[str] = "vocabulary"
    # Whether the method yields a `GradientPass`; whether it reads outputs; whether its direction depends on labels.
    looks: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    labelled: ClassVar[bool] = True
    # The settings that are lengths, in the units of the target.
    lengths: ClassVar[tuple[str, ...]] = ("epsilon",)

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + " ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        found = [
            f"{name} must be a finite number, 0 or more{_OR_AUTO * (name == 'epsilon')}; found {value!r}."
            for name, value in (("epsilon", self.epsilon), ("weight", self.weight), ("clean_weight", self.clean_weight))
            if not (_is_size(value) or (name == "epsilon" and value == AUTO))
        ]
        if self.weight == 0:
            found.append("weight must be above 0, or the adversarial pass trains nothing; epsilon=0 turns it off.")
        if self.scope is not None and self.scope not in SCOPES:
            found.append(f"scope must be one of {', '.join(SCOPES)}; found {self.scope!r}.")
        if self.norm not in NORMS:
            found.append(f"norm must be one of {', '.join(NORMS)}; found {self.norm!r}.")
        if self.compares and self.clean_weight == 0:
            found.append("clean_weight must be above 0: this method has no other pass that learns from labels.")
        if self.targeted is not None and not self.labelled:
            found.append("targeted must be left out: this method's direction does not depend on labels.")
        if isinstance(self.targeted, bool) or (isinstance(self.targeted, int) and self.targeted < 0):
            found.append(f"targeted must be a class (0 or more), 'least_likely' or a column; found {self.targeted!r}.")
        for name in self.lengths:
            value = getattr(self, name)
            known = name in ("epsilon", "step_size") or value is None
            if not known and not _is_size(value):
                found.append(f"{name} must be a finite number, 0 or more; found {value!r}.")
        return found

    def passes(self, step: Step) -> Passes:
        """The passes of one step."""
        raise NotImplementedError

    @property
    def preferred_scope(self) -> str:
        """The scope where none is asked for, and the target has it.

        With epsilon `auto` no method shares one length over the micro-batch: what an example gets would depend on it.
        """
        own = self.default_scope
        return "example" if self.epsilon == AUTO and own == "vocabulary" else own

    @property
    def reads_outputs(self) -> bool:
        """Whether a `PassResult` must hold the model's outputs."""
        return self.compares or self.targeted == "least_likely"

    @property
    def needs_whole_weights(self) -> bool:
        """Whether weights must not be spread over processes."""
        return self.default_target == "weights"

    def new_memory(self, seed: int) -> Memory | None:
        """What the attack keeps between the optimizer steps of a run; None for nothing."""
        return None

    def remark(self, memory: Any) -> str | None:
        """What is worth saying when a run is over; None for nothing."""
        return None

    def reach(self, epsilon: float) -> float:
        """The largest length that a perturbation may have, in the attack's norm."""
        return epsilon

    def on_all(self) -> Attack:
        """The same attack, on every example: for an evaluation."""
        return self

    def in_units(self, unit: float) -> Attack:
        """The same attack, its lengths multiplied by `unit`."""
        if unit == 1:
            return self
        given = {name: getattr(self, name) for name in self.lengths}
        return replace(self, **{n: value * unit for n, value in given.items() if value not in (None, AUTO)})

    def step(self, result: PassResult, size: float) -> Tensor:
        """The perturbation of length `size` along the gradient (`geometry.steepest_ascent`)."""
        return size * geometry.steepest_ascent(result.gradient, self.norm, result.units)

    def settings(self) -> dict[str, Any]:
        """The settings by name, the method's name first: for logs and model cards."""
        return {"method": self.name or type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Iterated(Attack):
    """An attack of several ascent steps.

    Args:
        steps: how many.
        step_size: the length of one step; None for the method's own rule.
    """

    steps: int = 3
    step_size: float | None = None
    lengths: ClassVar[tuple[str, ...]] = ("epsilon", "step_size")

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.steps, int) or self.steps < 1:
            found.append(f"steps must be a whole number, 1 or more; found {self.steps!r}.")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            found.append(f"step_size must be a finite number above 0; found {self.step_size!r}.")
        return found


def run(attack: Attack, step: Step, train: Trains, other: Callable[[GradientPass | ForwardPass], PassResult]) -> None:
    """Runs the passes of one step.

    The attack's weights are multiplied in here, and a training pass whose weight becomes 0 is made as a `GradientPass`,
    which costs less. Where the attack is targeted, every gradient that it is sent leads towards the label.

    Args:
        attack: the attack.
        step: what it is told.
        train: makes a training pass; `last` is true for the one after which gradients are complete.
        other: makes a pass that trains nothing.
    """

    def ask(request: Request) -> PassResult:
        if not isinstance(request, TrainPass):
            return other(request)
        result = train(request, False)
        assert result is not None
        return result

    if attack.targeted is not None:
        ask = _Towards(attack.targeted, ask)
    passes = attack.passes(step)
    try:
        request = next(passes)
        while True:
            request = passes.send(ask(_weighted(request, attack)))
    except StopIteration as stop:
        last = _weighted(stop.value, attack)
    finally:
        passes.close()
    assert isinstance(last, TrainPass)
    train(last, True)


class _Towards:
    """Asks for a pass, and turns the gradient around: towards a label in place of away from the true one."""

    def __init__(self, label: int | str, ask: Callable[[Request], PassResult]) -> None:
        self._label: Tensor | int | str = label
        self._ask = ask

    def __call__(self, request: Request) -> PassResult:
        if isinstance(request, ForwardPass):
            return self._ask(request)
        result = self._ask(request) if isinstance(request, TrainPass) else None
        rows = None if isinstance(request, TrainPass) else request.rows
        if self._label == "least_likely":
            first = result or self._ask(ForwardPass(request.delta, masks=request.masks, rows=rows))
            self._label = first.outputs[0].argmin(-1)
        delta = request.delta if result is None else result.delta
        towards = self._ask(GradientPass(delta, masks=request.masks, label=self._label, rows=rows))
        return replace(result or towards, gradient=-towards.gradient)


def _weighted(request: Request, attack: Attack) -> Request:
    if not isinstance(request, TrainPass):
        return request
    weight = request.weight * (attack.clean_weight if request.delta is None else attack.weight)
    if weight == 0 and not request.against:
        return GradientPass(request.delta, masks=request.masks, rows=request.rows)
    if weight == request.weight and not request.against:
        return request
    against = tuple(replace(a, weight=a.weight * attack.weight) for a in request.against)
    return replace(request, weight=weight, against=against)


_OR_AUTO = ", or 'auto'"


def _is_size(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < math.inf


ATTACKS: dict[str, type[Attack]] = {}
AttackClass = TypeVar("AttackClass", bound=type[Attack])


def register(name: str) -> Callable[[AttackClass], AttackClass]:
    """Class decorator: makes the method available as `--adv_method name`."""

    def add(attack: AttackClass) -> AttackClass:
        if name in ATTACKS:
            raise ValueError(f"An attack named {name!r} is registered already: {ATTACKS[name].__qualname__}.")
        attack.name = name
        ATTACKS[name] = attack
        return attack

    return add


def attack_class(name: str) -> type[Attack]:
    """The registered method of that name. Raises ValueError that lists what there is."""
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, ATTACKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no attack {name!r}; registered are: {', '.join(sorted(ATTACKS))}.{hint}")
    return ATTACKS[name]


def own_settings(attack: type[Attack]) -> dict[str, Any]:
    """The settings that a method adds to `Attack`'s, with their defaults."""
    common = {f.name for f in fields(Attack)}
    return {f.name: None if f.default is MISSING else f.default for f in fields(attack) if f.name not in common}


# Their names in 0.1.
Train, Look, Glance, Answer = TrainPass, GradientPass, ForwardPass, PassResult
