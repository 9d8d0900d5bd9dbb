"""Random noise, the control."""

from __future__ import annotations

from typing import ClassVar

from ..perturbation.geometry import sample
from .base import Attack
from .registry import register
from .requests import Passes, Step, TrainPass


@register("noise")
class Noise(Attack):
    """Noise: a random direction of the same length as an attack's. The control that a claim of robustness needs.

    Idea: what does a perturbation of this size do when it is not aimed?

    Equation: delta = epsilon * z / ||z||, z Gaussian.

    Cost: 2 full passes.

    Defaults: epsilon `auto`. As a control give it the epsilon of the attack that it controls.

    Limits: not an attack. In high dimension a random direction is nearly orthogonal to the gradient.

    Citation: the random perturbation baseline of Miyato et al. 2017, arXiv 1605.07725, section 4.
    """

    labelled: ClassVar[bool] = False

    def passes(self, step: Step) -> Passes:
        clean = yield TrainPass()
        return TrainPass(step.epsilon * sample(clean.gradient, self.norm, clean.units, step.seed))
