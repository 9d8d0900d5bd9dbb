"""How the losses that a Trainer reports of micro-batches make the mean of an optimizer step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from .engine.dropout import random_state_kept
from .perturbation.batches import copied
from .robustness.passes import eval_mode


def is_the_models_own(trainer: Any) -> bool:
    """Whether a Trainer's loss is what the model computes."""
    stock = type(trainer).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
    return stock and getattr(trainer, "compute_loss_func", None) is None and trainer.label_smoother is None


class LossScale:
    """What reported losses are multiplied by, so that their mean over the micro-batches of all processes is the step's.

    `Trainer` divides a loss by the number of micro-batches unless the model takes `num_items_in_batch`, which divides
    by the items of the whole step. Some models take it and leave it alone (transformers#47688): their losses are whole
    means, times the number of processes. Which it is the first batch shows, where the loss is the model's own.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # Of a model that leaves the number of items alone; None for one that does not.
        self._whole: float | None = None
        self._asked = False

    @property
    def micro_batches(self) -> int:
        """How many micro-batches this optimizer step has."""
        accumulation = self._trainer.args.gradient_accumulation_steps
        return int(getattr(self._trainer, "current_gradient_accumulation_steps", accumulation))

    def of(self, model: nn.Module, batch: Any) -> float:
        """The factor, in this optimizer step."""
        if not self._asked:
            self._whole, self._asked = self._found(model, batch), True
        return self.micro_batches if self._whole is None else self._whole

    def _found(self, model: nn.Module, batch: Any) -> float | None:
        trainer = self._trainer
        single = self.micro_batches == 1 and trainer.accelerator.num_processes == 1
        takes_items = getattr(trainer, "model_accepts_loss_kwargs", False) and is_the_models_own(trainer)
        if single or not takes_items or getattr(trainer, "loss_is_scaled_for_ga", None) is not None:
            return None
        with torch.no_grad(), random_state_kept(trainer.args.device), eval_mode(model):
            # Of one item, of two, and without a number of items.
            one, two, mean = (
                trainer.compute_loss(model, trainer._prepare_inputs(copied(batch)), num_items_in_batch=number)
                for number in (1, 2, None)
            )
        return (mean / one).item() if one != 0 and torch.allclose(one, two, rtol=1e-3) else None
