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
        **settings: `arguments`, which `TrainingArguments` take, such as `{"bf16": True}`, and what the Trainer itself
            takes, such as `attack` or `optimizers`.
    """
    args = TrainingArguments(
        output_dir=folder,
        max_steps=1000,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        **settings.pop("arguments", {}),
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
        # Autocast and a compiled model come with the first, a loss scale with the second.
        trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
        trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
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


class Bare(ByHand):
    """FGM's operations and nothing else, for this model alone: what is left where everything around them is taken away.

    No scaling of the loss, no second attack, no log, no check.
    """

    def __init__(self, trainer: Trainer, batch: dict[str, Any], shared: bool) -> None:
        super().__init__(trainer, batch)
        self._shared, self._leaf, self._delta = shared, Tensor(), None
        lookup: Any = trainer.model.get_input_embeddings()
        self._size = lookup.num_embeddings
        lookup.register_forward_hook(self._move)

    def _move(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._delta is not None:
            return output + self._delta
        self._leaf = torch.zeros_like(output).requires_grad_()
        return output + self._leaf

    def passes(self) -> None:
        """Two stock passes, the second where the first one's gradient leads."""
        self._delta = None
        super().passes()
        blank = self.batch["attention_mask"] == 0
        assert self._leaf.grad is not None
        gradient = self._leaf.grad.masked_fill(blank.unsqueeze(-1), 0.0)
        if self._shared:
            gradient, entries = self._sums(gradient, self.batch["input_ids"].masked_fill(blank, self._size).flatten())
        dims = None if self._shared else (1, 2)
        gradient = gradient / torch.linalg.vector_norm(gradient, float("inf"), dim=dims, keepdim=True)
        gradient = gradient / torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
        gradient.nan_to_num_(0.0)
        if self._shared:
            gradient = gradient.index_select(0, entries).view_as(self._leaf)
        self._delta = 1.0 * gradient
        super().passes()

    def _sums(self, gradient: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the positions of each vocabulary entry, at one of them; and for each position, which one."""
        positions = torch.arange(len(ids), device=ids.device)
        entries = positions.new_empty(self._size + 1).scatter_(0, ids, positions).gather(0, ids)
        flat = gradient.flatten(0, 1)
        return torch.zeros_like(flat).index_add_(0, entries, flat), entries


def now(clock: Callable[[], float]) -> float:
    """The clock, when the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()
