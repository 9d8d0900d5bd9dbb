"""Adversarial weight perturbation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..perturbation.weights import Segments
from .base import Attack
from .registry import register
from .requests import Passes, Step, TrainPass


@register("awp")
@dataclass(frozen=True, kw_only=True)
class AWP(Attack):
    """AWP: the weights are perturbed in place of the inputs, each relative to its own size.

    Idea: a model whose loss stays low around its weights generalises; train it at the worst weights nearby.

    Equation (Wu et al. 2020, eqs. 8-10): v_l = epsilon * ||w_l|| * g_l / ||g_l|| for the weight matrix of each layer,
    g_l the gradient of the micro-batch; the gradient at w + v is applied to w.

    Cost: 2 full passes.

    Defaults: epsilon `auto`. Published: 5e-3 for PreAct ResNet-18; from the first step of fine-tuning on it can ruin a
    run. Kaggle's common code steps by the whole weight and clamps each entry to 1e-4 of itself, after some epochs
    without attack (`adv_start`).

    Limits: one step on clean inputs; the paper takes its gradient at adversarial ones. Holds the gradient, the
    perturbation and the moved weights, three tensors of the weights' size. Biases and norms' scales are left alone,
    as in the paper's code. One process and DDP: shards hold no whole weight. The clean pass trains as well, where
    Kaggle's code throws its gradient away (`clean_weight=0` does that).

    Citation: D. Wu, S. Xia, Y. Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, arXiv
    2004.05884.
    """

    default_target: ClassVar[str] = "weights"
    default_scope: ClassVar[str] = "tensor"
    # Epsilon is relative to each weight already.
    lengths: ClassVar[tuple[str, ...]] = ()

    def passes(self, step: Step) -> Passes:
        clean = yield TrainPass()
        if not isinstance(clean.units, Segments) or clean.units.lengths is None:
            raise ValueError("awp perturbs weights: leave adv_target out, or write adv_target='weights'.")
        return TrainPass(self.step(clean, step.epsilon) * clean.units.spread(clean.units.lengths))
