"""What a run keeps between optimizer steps: what the attack remembers, and what steers epsilon."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..attacks import AUTO, Attack, Memory, Total
from ..perturbation.target import Target
from .controller import EpsilonController
from .guessing import GuessingLoss


class Kept:
    """The memories of a run: the same on all processes, saved with a checkpoint.

    Args:
        attack: the attack, in the units of the target.
        target: what is perturbed, attached.
        seed: of what the attack remembers.
        strength: of epsilon `auto`.
        recover: whether a fixed epsilon is lowered as `auto` is.
        guessing: knows the loss of guessing.

    Attributes:
        memory: what the attack remembers, or None.
        controller: what steers epsilon; None where it is fixed.
    """

    def __init__(
        self, attack: Attack, target: Target, seed: int, *, strength: float, recover: bool, guessing: GuessingLoss
    ) -> None:
        self.memory = attack.new_memory(seed)
        self.controller: EpsilonController | None = None
        if attack.epsilon == AUTO or recover:
            assert target.model is not None
            self.controller = EpsilonController(
                strength,
                next(target.model.parameters()).device,
                guessing,
                ceiling=target.ceiling,
                most=math.inf if attack.epsilon == AUTO else float(attack.epsilon),
            )
        # Whether anything was noted since it was last settled.
        self.due = True

    @property
    def _memories(self) -> dict[str, Memory]:
        named: dict[str, Memory | None] = {"memory": self.memory, "controller": self.controller}
        return {name: each for name, each in named.items() if each is not None}

    def settle(self, model: nn.Module, total: Total) -> None:
        """Between two optimizer steps, and before the first; `total` brings together what all have found."""
        if self.due:
            for each in self._memories.values():
                each.settle(model, total)
        self.due = False

    def state_dict(self) -> dict[str, Any]:
        """By name, what is saved; empty where nothing is remembered."""
        return {name: each.state_dict() for name, each in self._memories.items()}

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """What was saved, which was settled."""
        for name, each in self._memories.items():
            if name in states:
                each.load_state_dict(states[name])
                self.due = False
