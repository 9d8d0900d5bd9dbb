"""Virtual adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..perturbation.divergence import Against
from ..perturbation.geometry import sample
from .base import Attack
from .registry import register
from .requests import GradientPass, Passes, Step, TrainPass


@register("vat")
@dataclass(frozen=True, kw_only=True)
class VAT(Attack):
    """VAT: the prediction should not move in the direction in which it moves most; no label is needed for that.

    Idea: in place of the loss, attack the distance between the predictions on the clean and on the perturbed input.

    Equation (Miyato et al. 2018, eqs. 5, 10, 12): d <- normalised gradient of KL(p(clean) || p(clean + xi * d)), by
    power iteration from a random d; the loss is L + weight * KL(p(clean) || p(clean + epsilon * d)), p(clean) fixed.

    Cost: 2 full passes and `iterations` passes without weight gradients.

    Defaults: epsilon `auto`, xi = epsilon / 10, one iteration, weight 1. Published: xi 1e-6; for text (Miyato et al.
    2017) epsilon 5 on embeddings normalised to unit variance, in the public code with xi 0.1.

    Limits: near zero the divergence is quadratic, so its gradient is of the size of xi: in bfloat16 take xi near
    epsilon, or the direction is rounding. All passes of a step share their dropout masks, or the divergence would be
    that of two masks. A row whose one label is -100 is trained on its divergence alone; where each position has a
    label, those of -100 do not count.

    Citation: T. Miyato, S. Maeda, M. Koyama, S. Ishii, "Virtual Adversarial Training: A Regularization Method for
    Supervised and Semi-Supervised Learning", TPAMI 2018, arXiv 1704.03976.

    Args:
        iterations: power iterations.
        xi: the length at which the divergence is differentiated; None for epsilon / 10.
    """

    iterations: int = 1
    xi: float | None = None
    default_scope: ClassVar[str] = "example"
    looks: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    labelled: ClassVar[bool] = False
    lengths: ClassVar[tuple[str, ...]] = ("epsilon", "xi")

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.iterations, int) or self.iterations < 1:
            found.append(f"iterations must be a whole number, 1 or more; found {self.iterations!r}.")
        if self.xi == 0:
            found.append("xi must be above 0, or the divergence has no gradient.")
        return found

    def passes(self, step: Step) -> Passes:
        xi = step.epsilon / 10 if self.xi is None else self.xi
        clean = yield TrainPass(masks="one")
        moved = (Against(clean.outputs, "kl"),)
        direction = sample(clean.gradient, self.norm, clean.units, step.seed)
        for _ in range(self.iterations):
            result = yield GradientPass(xi * direction, against=moved, masks="one")
            direction = self.step(result, 1.0)
        return TrainPass(step.epsilon * direction, weight=0.0, against=moved, masks="one")
