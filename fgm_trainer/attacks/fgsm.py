"""Fast gradient sign method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .fgm import FGM
from .registry import register


@register("fgsm")
@dataclass(frozen=True, kw_only=True)
class FGSM(FGM):
    """FGSM: FGM in the geometry of the largest entry, one step along the sign of the gradient.

    Idea: every entry of the input moves by the same small amount, in the direction that raises the loss.

    Equation (Goodfellow et al. 2015, section 4): delta = epsilon * sign(g), g = dL/dx.

    Cost: 2 full passes.

    Defaults: epsilon `auto`. Published: 0.25 on MNIST's pixels in [0, 1] and 0.1 on CIFAR-10; for embeddings nothing.
    0.005 in every entry is about 0.5 in length for 32 tokens of 384 numbers.

    Limits: the length grows with the square root of the number of entries, so long texts are moved further. One step
    can be learned by heart ("catastrophic overfitting"): check with `pgd` whether the robustness is real.

    Citation: I. Goodfellow, J. Shlens, C. Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv
    1412.6572.
    """

    norm: str = "linf"
    default_scope: ClassVar[str] = "example"
