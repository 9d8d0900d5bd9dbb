"""An attack as a coroutine, and the driver that runs it.

An attack yields a request where it wants the gradient, is sent an `Answer`, and returns the last request to train
on. It knows nothing of Trainer, accelerate or mixed precision: whoever owns the loop supplies `train` and `look`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Generator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, TypeVar

from torch import Tensor

from .. import geometry
from ..geometry import NORMS, SCOPES, Units


@dataclass(frozen=True)
class Train:
    """A full pass at this perturbation (None: the clean inputs) whose weight gradients add up."""

    delta: Tensor | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Look:
    """A pass for the gradient with respect to the perturbation alone: no weight gradients, a third cheaper."""

    delta: Tensor | None = None


Request = Train | Look


@dataclass(frozen=True)
class Answer:
    """What a pass gives back.

    Args:
        gradient: dL/d(delta) of this micro-batch alone, (rows, positions, dimension).
        units: the units over which norms are taken.
        loss: the loss of the pass, unweighted, detached.
    """

    gradient: Tensor
    units: Units
    loss: Tensor


Passes = Generator[Request, Answer, Train]


class Trains(Protocol):
    """Runs a training pass. The answer of the last one is not read and may be None."""

    def __call__(self, request: Train, last: bool) -> Answer | None: ...


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An adversarial method. Subclasses say in `passes` which passes a step takes.

    Args:
        epsilon: the size of the perturbation: the length of each unit in `norm`; for norm `none` the constant that
            multiplies the gradient.
        scope: over which entries a norm is taken, one of `geometry.SCOPES`; None for the method's default.
        norm: one of `geometry.NORMS`.
        weight: factor of the adversarial loss.
        clean_weight: factor of the clean loss; 0 trains on adversarial examples alone.
    """

    epsilon: float = 1.0
    scope: str | None = None
    norm: str = "l2"
    weight: float = 1.0
    clean_weight: float = 1.0

    name: ClassVar[str] = ""
    default_scope: ClassVar[str] = "vocabulary"
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ValueError(f"{type(self).__name__}: " + " ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each."""
        found = [
            f"{name} must be a finite number, 0 or more; found {value!r}."
            for name, value in (("epsilon", self.epsilon), ("weight", self.weight), ("clean_weight", self.clean_weight))
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0)
        ]
        if self.weight == 0:
            found.append("weight must be above 0, or the adversarial pass trains nothing; epsilon=0 turns it off.")
        if self.scope is not None and self.scope not in SCOPES:
            found.append(f"scope must be one of {', '.join(SCOPES)}; found {self.scope!r}.")
        if self.norm not in NORMS:
            found.append(f"norm must be one of {', '.join(NORMS)}; found {self.norm!r}.")
        return found

    def passes(self, epsilon: float, seed: int) -> Passes:
        """The passes of one step.

        Args:
            epsilon: this step's epsilon, which a schedule may have lowered.
            seed: the seed of whatever is random in this step.
        """
        raise NotImplementedError

    def step(self, answer: Answer, size: float) -> Tensor:
        """The perturbation of length `size` along the gradient (`geometry.ascent`)."""
        return size * geometry.ascent(answer.gradient, self.norm, answer.units)

    def settings(self) -> dict[str, Any]:
        """The settings by name, the method's name first: for logs and model cards."""
        return {"method": self.name or type(self).__name__} | {f.name: getattr(self, f.name) for f in fields(self)}


def run(attack: Attack, epsilon: float, seed: int, train: Trains, look: Callable[[Look], Answer]) -> None:
    """Runs the passes of one step.

    `train(request, last)` and `look(request)` do the work; the attack's weights are multiplied in here, and a training
    pass of weight 0 becomes a `Look`, which costs less. `last` is true for the pass after which gradients are complete.
    """
    passes = attack.passes(epsilon, seed)
    try:
        request = next(passes)
        while True:
            request = _weighted(request, attack)
            answer = look(request) if isinstance(request, Look) else train(request, False)
            assert answer is not None
            request = passes.send(answer)
    except StopIteration as stop:
        last = _weighted(stop.value, attack)
    finally:
        passes.close()
    assert isinstance(last, Train)
    train(last, True)


def _weighted(request: Request, attack: Attack) -> Request:
    if isinstance(request, Look):
        return request
    weight = request.weight * (attack.clean_weight if request.delta is None else attack.weight)
    return Look(request.delta) if weight == 0 else replace(request, weight=weight)


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
