"""Robust representations through regularised finetuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..perturbation.divergence import Against
from ..perturbation.geometry import project, uniform
from .base import Attack
from .registry import register
from .requests import ForwardPass, Passes, Step, TrainPass


@register("r3f")
@dataclass(frozen=True, kw_only=True)
class R3F(Attack):
    """R3F: random noise and a symmetric divergence in place of an attack.

    Idea: what adversarial regularisers gain, noise may gain as well, without searching a direction.

    Equation (Aghajanyan et al. 2021, eq. 4): L + weight * (KL(f(x) || f(x + z)) + KL(f(x + z) || f(x))), every entry of
    z from U(-epsilon, epsilon). The gradient flows through both branches.

    Cost: 2 full passes and 1 forward pass. Both branches of a divergence are trained one after the other, each against
    the other's fixed outputs and with its own dropout masks, which is the joint gradient.

    Defaults: epsilon `auto`, weight 1. Published: epsilon 1e-5, weight 1.0 (RTE 0.7), also with normal noise. With norm
    `l2` the noise is projected onto that ball.

    Limits: not an attack. At epsilon 1e-5 the divergence is mostly that of two dropout masks. Regression compares
    squared differences, where fairseq's code drops the term.

    Citation: A. Aghajanyan et al., "Better Fine-Tuning by Reducing Representational Collapse", ICLR 2021, arXiv
    2008.03156.
    """

    norm: str = "linf"
    default_scope: ClassVar[str] = "example"
    compares: ClassVar[bool] = True
    labelled: ClassVar[bool] = False

    def passes(self, step: Step) -> Passes:
        clean = yield ForwardPass(masks="clean")
        noise = step.epsilon * uniform(clean.gradient, clean.units, step.seed)
        noise = project(noise, step.epsilon, self.norm, clean.units)
        noisy = yield TrainPass(noise, weight=0.0, against=(Against(clean.outputs),), masks="noisy")
        return TrainPass(against=(Against(noisy.outputs),), masks="clean")
