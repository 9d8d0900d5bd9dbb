"""How the losses that a Trainer reports of micro-batches make the mean of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from .attacks import TrainPass
from .engine.dropout import random_state_kept
from .engine.running_pass import RunningPass
from .perturbation.batches import copied
from .perturbation.lookups import eval_mode


def is_the_models_own(trainer: Any) -> bool:
    """Whether a Trainer's loss is what the model computes."""
    stock = type(trainer).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
    return stock and getattr(trainer, "compute_loss_func", None) is None and trainer.label_smoother is None


class LossReduction:
    """What reported losses are multiplied by, so that their mean over the micro-batches of all processes is the step's.

    `Trainer` divides a loss by the number of micro-batches, or leaves that to a model that takes `num_items_in_batch`,
    the items of the whole step. Some models take it and leave it alone (transformers#47688): their losses are means
    already, times the number of processes. Which it is the first batch shows, where the loss is the model's own.

    Args:
        trainer: the Trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        # Whether the Trainer divides; None as long as that is not known.
        self._divides: bool | None = None
        # What makes a mean of the model's loss, None where that is a part of the step's; empty as long as it is not
        # known.
        self._of_model: list[float | None] = []

    @property
    def micro_batches(self) -> int:
        """How many micro-batches this optimizer step has."""
        accumulation = self._trainer.args.gradient_accumulation_steps
        return int(getattr(self._trainer, "current_gradient_accumulation_steps", accumulation))

    def of(self, model: nn.Module, batch: Any, passes: Sequence[RunningPass] = ()) -> float:
        """The factor in this optimizer step.

        Args:
            model: inside every wrapper.
            batch: the micro-batch.
            passes: of the micro-batch, where it was attacked.
        """
        trainer, number = self._trainer, self.micro_batches
        if (number == 1 and trainer.accelerator.num_processes == 1) or not is_the_models_own(trainer):
            return number
        if not self._of_model:
            self._of_model = self._found(model, batch)
        if self._divides is None and number > 1 and passes:
            # One of a divergence alone has another loss.
            one = next(each for each in passes if isinstance(each.request, TrainPass) and each.request.weight)
            self._divides = bool(one.loss.abs() > one.unweighted.abs() * (1 + number) / 2)
        mean = self._of_model[0] if self._of_model else None
        divides = self._divides
        if divides is None:
            divides = not getattr(trainer, "model_accepts_loss_kwargs", False)
        return (number if divides else 1) * (number if mean is None else mean)

    def _found(self, model: nn.Module, batch: Any) -> list[float | None]:
        trainer = self._trainer
        with torch.no_grad(), random_state_kept(trainer.args.device), eval_mode(model):
            # Of one item, of two, and without a number of items.
            one, two, mean = (
                trainer.compute_loss(model, trainer._prepare_inputs(copied(batch)), num_items_in_batch=number)
                for number in (1, 2, None)
            )
        says = bool(one.isfinite() and one != 0)
        ratio = float(mean / one) if says and torch.allclose(one, two, rtol=1e-3) else 0.0
        # Together: where weights are spread, all processes must make equally many forward passes.
        found = torch.tensor([says, ratio != 0, ratio], dtype=torch.float32, device=one.device)
        known, means, ratios = trainer.accelerator.reduce(found, "sum").tolist()
        # A batch without a label says nothing.
        return [] if not known else [ratios / means if means else None]
