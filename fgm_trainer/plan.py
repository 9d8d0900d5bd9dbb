"""How a run is attacked: what arguments and flags together say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .arguments import AdversarialArguments
from .attacks import AUTO, FGM, Attack
from .engine.controller import STRENGTH
from .engine.schedule import WARMUP, Schedule
from .perturbation.clipping import valid_range
from .perturbation.target import Target


@dataclass(frozen=True)
class Plan:
    """How a run is attacked, as arguments and flags together say it.

    Args:
        attack: the attack.
        schedule: when it runs, and how epsilon (of `auto` the strength) rises.
        target: what is perturbed, as `adv_target`.
        clip: the valid range of an input tensor.
        epsilon_unit: one of `EPSILON_UNITS`.
        strength: of `auto`.
        recover: whether a fixed epsilon gives way.
        same_dropout: all passes of a step draw the same dropout masks.
    """

    attack: Attack
    schedule: Schedule
    target: str | Target
    clip: tuple[Tensor, Tensor] | None = None
    epsilon_unit: str = "absolute"
    strength: float = STRENGTH
    recover: bool = False
    same_dropout: bool = False

    @property
    def attacks(self) -> bool:
        """Whether there is an attack at all."""
        return self.attack.epsilon != 0

    @property
    def steers(self) -> bool:
        """Whether epsilon is found while training."""
        return self.attack.epsilon == AUTO or self.recover


def make_plan(
    args: AdversarialArguments | None,
    attack: Attack | None,
    target: str | Target | None,
    epsilon_schedule: Callable[[float], float] | None,
    processor: Any = None,
) -> Plan:
    """The plan of a run.

    Args:
        args: the attack flags; None where training arguments have none.
        attack: the attack, where it was given in code.
        target: what is perturbed, where it was given in code.
        epsilon_schedule: what epsilon is multiplied by, as a function of training progress.
        processor: what made the inputs.
    """
    if args is None:
        # Without flags a fixed epsilon that was given in code is taken at its word.
        as_given = epsilon_schedule is not None or (attack is not None and attack.epsilon != AUTO)
        schedule = Schedule(warmup=0.0 if as_given else WARMUP, shape=epsilon_schedule)
        attack = attack or FGM(epsilon=1.0)
        return Plan(attack, schedule, target or attack.default_target)
    attack = attack or args.make_attack()
    return Plan(
        attack,
        args.make_schedule(epsilon_schedule),
        target or args.adv_target or attack.default_target,
        valid_range(args.adv_clip, processor) if args.adv_clip else None,
        args.adv_epsilon_unit,
        args.adv_strength,
        args.adv_recover,
        args.adv_same_dropout,
    )
