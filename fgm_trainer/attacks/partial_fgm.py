"""FGM on a part of every batch."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from .base import Attack
from .registry import register
from .requests import GradientPass, Passes, Step, TrainPass


@register("partial_fgm")
@dataclass(frozen=True, kw_only=True)
class PartialFGM(Attack):
    """FGM on a random part of every batch, in one training pass: the rest of the batch stays clean.

    Idea: an example need not be seen clean and adversarial in the same step. The gradient is taken for the chosen
    examples alone and without weight gradients, and one full pass trains on clean and adversarial examples together.

    Equation: delta_i = epsilon * g_i / ||g_i||_2 (Miyato et al. 2017, eq. 5) for a random set of share * B of the B
    examples, 0 for the others; the loss is that of the whole batch at x + delta.

    Cost: 1 full pass, and share of a pass without weight gradients: about 1 + 2/3 share.

    Defaults: epsilon `auto`, share 0.4. No paper has it; docs/performance.md measures share and epsilon against FGM.

    Limits: clean and adversarial examples have the same weight, and `weight` is that of both. A loss that compares the
    examples of a batch with each other sees a smaller batch in the first pass. Norm `none` keeps the longer gradients
    of a mean over fewer examples.

    Citation: T. Miyato, A. M. Dai, I. Goodfellow, "Adversarial Training Methods for Semi-Supervised Text
    Classification", ICLR 2017, arXiv 1605.07725, for the perturbation; the part of the batch is this package's own.

    Args:
        share: the part of the examples that is attacked, above 0, at most 1; at least one example is.
    """

    share: float = 0.4
    looks: ClassVar[bool] = True
    default_scope: ClassVar[str] = "example"

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < self.share <= 1:
            found.append(f"share must be above 0 and at most 1; found {self.share!r}.")
        if self.clean_weight != 1:
            found.append("clean_weight must be left out: clean and adversarial examples share one pass.")
        return found

    def on_all(self) -> Attack:
        return replace(self, share=1.0)

    def passes(self, step: Step) -> Passes:
        if not step.examples:
            return TrainPass()
        draw = random.Random(step.seed)
        # Rounded up or down by chance, so that small batches have the share as well.
        count = max(1, int(step.examples * self.share + draw.random()))
        chosen = torch.tensor(draw.sample(range(step.examples), count))
        part = yield GradientPass(rows=chosen)
        return TrainPass(self.step(part, step.epsilon), rows=chosen)
