"""Smoothness-inducing adversarial regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..perturbation.divergence import Against
from ..perturbation.geometry import gaussian, project
from .base import Iterated
from .registry import register
from .requests import ForwardPass, GradientPass, Memory, Passes, Step, Total, TrainPass


@register("smart")
@dataclass(frozen=True, kw_only=True)
class SMART(Iterated):
    """SMART: where the outputs move most within a small ball, they should not move.

    Idea: a smooth model neither overfits a small task nor drifts far in one update.

    Equation (Jiang et al. 2020, eqs. 1-5, algorithm 1): L + weight * max over ||delta|| <= epsilon of l(f(x + delta),
    f(x)), l the symmetric KL divergence (squared difference for regression), from N(0, sigma^2), by steps delta <-
    project(delta + step_size * g / ||g||_inf). With `bregman` = mu above 0, plus mu * l(f(x), f'(x)), f' the running
    mean of the weights, w' <- decay * w' + (1 - decay) * w.

    Cost: 2 full passes and 1 forward pass, and `steps` passes without weight gradients; `bregman` adds a forward pass
    and a copy of the weights.

    Defaults: epsilon `auto`, in the paper's proportions: sigma = epsilon, step_size = 100 * epsilon; 1 step, weight 1,
    mu 0. Published: epsilon 1e-5, weight among 1, 3, 5, mu 1, decay 0.99 (then 0.999).

    Limits: the public code differs from algorithm 1: its `epsilon` of 1e-6 guards a division, it ascends on the KL
    divergence of one direction, and what it ends with is not projected but, in some versions, divided by its largest
    entry, so it is about 1 a token in place of 1e-5. We follow the paper, but project the noise at the start as well.
    For the public code's size write epsilon=1.0 with scope `token`. `bregman` keeps a copy of all trainable weights:
    one process and DDP.

    Citation: H. Jiang et al., "SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through
    Principled Regularized Optimization", ACL 2020, arXiv 1911.03437.

    Args:
        steps: the number of ascent steps.
        step_size: the length of one step; None for 100 * epsilon.
        sigma: standard deviation of the noise at the start; None for epsilon.
        bregman: factor of the proximal term, mu; 0 for none.
        decay: of the running mean of the weights.
    """

    norm: str = "max"
    steps: int = 1
    sigma: float | None = None
    bregman: float = 0.0
    decay: float = 0.99
    default_scope: ClassVar[str] = "example"
    looks: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    labelled: ClassVar[bool] = False
    lengths: ClassVar[tuple[str, ...]] = ("epsilon", "step_size", "sigma")
    divergence: ClassVar[str] = "symmetric"

    def problems(self) -> list[str]:
        found = super().problems()
        if not (isinstance(self.bregman, (int, float)) and 0 <= self.bregman < float("inf")):
            found.append(f"bregman must be a finite number, 0 or more; found {self.bregman!r}.")
        if not (isinstance(self.decay, (int, float)) and 0 <= self.decay < 1):
            found.append(f"decay must be 0 or more and below 1; found {self.decay!r}.")
        return found

    @property
    def needs_whole_weights(self) -> bool:
        return self.bregman > 0

    def new_memory(self, seed: int) -> Memory | None:
        return RunningMean(self.decay) if self.bregman else None

    def ascent(self, result: Any, epsilon: float) -> Tensor:
        """One step: the gradient over its largest entry, times `step_size`."""
        return self.step(result, self._size(epsilon))

    def _size(self, epsilon: Any) -> Any:
        return 100 * epsilon if self.step_size is None else self.step_size

    def passes(self, step: Step) -> Passes:
        clean = yield ForwardPass(masks="clean")
        apart = (Against(clean.outputs, self.divergence),)
        noise = (step.epsilon if self.sigma is None else self.sigma) * gaussian(clean.gradient, clean.units, step.seed)
        delta = project(noise, step.epsilon, self.norm, clean.units)
        for _ in range(self.steps):
            result = yield GradientPass(delta, against=apart)
            delta = project(delta + self.ascent(result, step.epsilon), step.epsilon, self.norm, result.units)
        noisy = yield TrainPass(delta, weight=0.0, against=apart, masks="noisy")
        terms = [Against(noisy.outputs, self.divergence)]
        if self.bregman and step.memory is not None:
            before = yield ForwardPass(weights=step.memory.weights)
            terms.append(Against(before.outputs, self.divergence, self.bregman / self.weight))
        return TrainPass(against=tuple(terms), masks="clean")


class RunningMean:
    """The running mean of the trainable weights, renewed between optimizer steps."""

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.weights: dict[str, Tensor] = {}

    def settle(self, model: nn.Module, total: Total) -> None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not weight.requires_grad:
                    continue
                if name in self.weights:
                    self.weights[name] = self.weights[name].to(weight).lerp_(weight.detach(), 1 - self._decay)
                else:
                    self.weights[name] = weight.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return dict(self.weights)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = dict(state)
