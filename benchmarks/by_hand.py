"""Trainers whose steps are taken one by one, in turn with those of others, on the same weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments


def by_hand(kind: type[Trainer], model: nn.Module, batch: dict[str, Any], folder: str, **settings: Any) -> ByHand:
    """A `Trainer` of that kind on the model's own weights, in modules of its own, ready to step on the batch.

    Args:
        kind: the Trainer.
        model: whose weights; its gradients are shared too.
        batch: what every step is taken on.
        folder: where a Trainer would write.
        **settings: `bf16`, which the arguments take, and whatever else the Trainer does, such as `attack` or
            `optimizers`.
    """
    args = TrainingArguments(
        output_dir=folder,
        max_steps=1000,
        bf16=settings.pop("bf16", False),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    # The same parameters, so hooks of one trainer are not met by another.
    own = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    return ByHand(kind(model=own, args=args, **settings), batch)


class ByHand:
    """One trainer and one batch."""

    def __init__(self, trainer: Trainer, batch: dict[str, Any]) -> None:
        self.trainer, self.batch = trainer, batch
        if trainer.optimizer is None:
            trainer.create_optimizer_and_scheduler(num_training_steps=trainer.args.max_steps)
        # Autocast comes with it.
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        trainer.state.max_steps = trainer.args.max_steps
        trainer.current_gradient_accumulation_steps = 1

    def passes(self) -> None:
        """What a step does on one micro-batch."""
        self.trainer.training_step(self.trainer.model_wrapped, dict(self.batch))

    def update(self) -> None:
        """The optimizer, and gradients away."""
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()
        self.trainer.state.global_step += 1

    def times(self, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Seconds of the passes of one step, and of its update."""
        begin = now(clock)
        self.passes()
        between = now(clock)
        self.update()
        return between - begin, now(clock) - between


class Twice(ByHand):
    """A step of two micro-batches."""

    def passes(self) -> None:
        """Two."""
        super().passes()
        super().passes()


class GradientAlone(ByHand):
    """A pass for the gradient at the embeddings, without any weight's: what a first pass costs that trains nothing."""

    def passes(self) -> None:
        """Forward, and back to the lookup's output."""
        leaves: list[Tensor] = []

        def cut(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            return leaves[-1]

        model: Any = self.trainer.model_wrapped
        handle = model.train().get_input_embeddings().register_forward_hook(cut)
        try:
            with self.trainer.compute_loss_context_manager():
                loss: Any = self.trainer.compute_loss(model, dict(self.batch))
            torch.autograd.grad(loss, leaves)
        finally:
            handle.remove()


def now(clock: Callable[[], float]) -> float:
    """The clock, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()
