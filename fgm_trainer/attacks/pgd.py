"""Projected gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..perturbation.geometry import project, sample
from .base import Iterated
from .registry import register
from .requests import GradientPass, Passes, PassResult, Step, TrainPass


@register("pgd")
@dataclass(frozen=True, kw_only=True)
class PGD(Iterated):
    """PGD: several smaller steps, each followed by the projection onto the ball of radius epsilon.

    Idea: FGM trusts one linearisation of the loss; PGD takes a new one after every step.

    Equation (Madry et al. 2018, eq. 3): delta <- project(delta + step_size * ascent(g(delta)), epsilon).

    Cost: 2 full passes and steps - 1 passes without weight gradients; one more with a random start.

    Defaults: epsilon `auto`, 3 steps of 2.5 * epsilon / steps (Madry et al., appendix: 2.5 * epsilon / 100 for 100).

    Limits: without a random start the first step has FGM's direction. With one it starts in a random direction at
    half of the radius, where Madry et al. start uniformly in the ball.

    Citation: A. Madry, A. Makelov, L. Schmidt, D. Tsipras, A. Vladu, "Towards Deep Learning Models Resistant to
    Adversarial Attacks", ICLR 2018, arXiv 1706.06083.

    Args:
        steps: the number of ascent steps.
        step_size: the length of one step; None for 2.5 * epsilon / steps.
        random_start: start at a random direction, at half of the radius, in place of zero.
    """

    random_start: bool = False
    looks: ClassVar[bool] = True

    def passes(self, step: Step) -> Passes:
        size = 2.5 * step.epsilon / self.steps if self.step_size is None else self.step_size
        result = yield TrainPass()
        if self.random_start:
            result = yield GradientPass(
                0.5 * step.epsilon * sample(result.gradient, self.norm, result.units, step.seed)
            )
        for _ in range(self.steps - 1):
            result = yield GradientPass(self._moved(result, size, step.epsilon))
        return TrainPass(self._moved(result, size, step.epsilon))

    def _moved(self, result: PassResult, size: float, epsilon: float) -> Tensor:
        return project(result.delta + self.step(result, size), epsilon, self.norm, result.units)
