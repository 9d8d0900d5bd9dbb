"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..geometry import project
from .base import Attack, Look, Passes, Train, register


@register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Attack):
    """PGD: several smaller steps, each followed by the projection onto the ball of radius epsilon.

    Idea: FGM trusts one linearisation of the loss; PGD takes a new one after every step.

    Equation (Madry et al. 2018, eq. 3): delta <- project(delta + step_size * ascent(g(delta)), epsilon).

    Cost: 2 full passes and steps - 1 passes without weight gradients.

    Defaults: 3 steps of size 2.5 * epsilon / steps (Madry et al., appendix: 2.5 * epsilon / 100 for 100 steps).

    Limits: starts at zero, so the first step equals FGM's direction.

    Citation: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018, arXiv 1706.06083.

    Args:
        steps: the number of ascent steps.
        step_size: the length of one step; None for 2.5 * epsilon / steps.
    """

    steps: int = 3
    step_size: float | None = None
    looks: ClassVar[bool] = True

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.steps, int) or self.steps < 1:
            found.append(f"steps must be a whole number, 1 or more; found {self.steps!r}.")
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            found.append(f"step_size must be a finite number above 0; found {self.step_size!r}.")
        return found

    def passes(self, epsilon: float, seed: int) -> Passes:
        size = 2.5 * epsilon / self.steps if self.step_size is None else self.step_size
        answer = yield Train()
        delta = project(self.step(answer, size), epsilon, self.norm, answer.units)
        for _ in range(self.steps - 1):
            answer = yield Look(delta)
            delta = project(delta + self.step(answer, size), epsilon, self.norm, answer.units)
        return Train(delta)
