"""Adversarial training for large neural language models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .registry import register
from .smart import SMART


@register("alum")
@dataclass(frozen=True, kw_only=True)
class ALUM(SMART):
    """ALUM: SMART's regulariser with the raw gradient, for pre-training as well as for fine-tuning.

    Idea: the same smoothness, without normalising the gradient: where the model is flat already, it is left alone.

    Equation (Liu et al. 2020, eq. 5, algorithm 1): L + weight * max over ||delta||_inf <= epsilon of l(f(x + delta),
    f(x)), from N(0, sigma^2), by steps delta <- project(delta + step_size * g), g not normalised.

    Cost: 2 full passes and 1 forward pass, and `steps` passes without weight gradients.

    Defaults: as SMART's. Published: epsilon 1e-5, step_size 1e-3, sigma 1e-5, weight 10 in pre-training, 1 in
    fine-tuning.
    The gradient is that of one example's own divergence, so it does not shrink as the batch grows.

    Limits: the public code is SMART's, which normalises; we follow the paper. With a raw gradient the perturbation is
    often no more than the noise it started from: `adv_delta_norm` in the log tells.

    Citation: X. Liu et al., "Adversarial Training for Large Neural Language Models", 2020, arXiv 2004.08994.
    """

    def ascent(self, result: Any, epsilon: float) -> Tensor:
        # The objective is a mean over examples; the paper's gradient is one example's.
        raw: Tensor = result.units.pool(result.gradient) * result.gradient.shape[0]
        raw = raw.nan_to_num(0.0, 0.0, 0.0) * self._size(epsilon)
        return raw
