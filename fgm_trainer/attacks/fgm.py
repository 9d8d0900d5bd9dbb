"""Fast gradient method."""

from __future__ import annotations

from .base import Attack
from .registry import register
from .requests import Passes, Step, TrainPass


@register("fgm")
class FGM(Attack):
    """FGM: one step along the normalised gradient of the input embeddings.

    Idea: train on the clean batch and on the batch moved to where, to first order, the loss is largest.

    Equation (Miyato et al. 2017, eq. 5): delta = epsilon * g / ||g||_2 with g = dL/de, for one example in scope
    `example`. In scope `vocabulary` the same with the rows of the lookup's weight in place of e, which is the snippet
    that circulates for BERT: delta_v = epsilon * G_v / ||G||_F.

    Cost: 2 full passes.

    Defaults: epsilon `auto`. Published: 5 on embeddings normalised to unit variance (paper); 1.0 from the first step
    on (snippet: epsilon=1.0, `adv_warmup=0`).

    Limits: epsilon in scope `vocabulary` is shared by the micro-batch, so the length that one example gets falls as
    the batch grows: `adv_delta_norm` in the log says what was applied.

    Citation: T. Miyato, A. M. Dai, I. Goodfellow, "Adversarial Training Methods for Semi-Supervised Text
    Classification", ICLR 2017, arXiv 1605.07725.
    """

    def passes(self, step: Step) -> Passes:
        clean = yield TrainPass()
        return TrainPass(self.step(clean, step.epsilon))
