"""An attack as a coroutine, and `run`, which goes through it.

An attack yields a request where it wants the gradient, is sent a `PassResult`, and returns the last request to train
on. It knows nothing of Trainer, accelerate or mixed precision: `engine.driver` makes the passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..perturbation import geometry
from ..perturbation.geometry import NORMS, SCOPES
from .requests import ForwardPass, GradientPass, Memory, Passes, PassResult, Request, Step, TrainPass

# The epsilon that is found while training (`engine.controller`).
AUTO = "auto"


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
        """Whether weights must not be spread over processes, whatever the target."""
        return False

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
    if not isinstance(last, TrainPass):
        raise TypeError(
            f"The last pass of {type(attack).__name__}.passes must train, with a weight above 0; found {last!r}."
        )
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


# Their names in 0.1.
Train, Look, Glance, Answer = TrainPass, GradientPass, ForwardPass, PassResult
