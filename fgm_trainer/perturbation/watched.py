"""Which forward calls the loss is made of.

Only they are perturbed. A call outside of the loss (a probe, a teacher after the step) goes through as it is, and so
does one without autograd inside of it (reference logits), unless it is run again in the backward pass: then it was a
part of the loss after all (gradient caching, checkpointing).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .calls import Call, SharedCalls
from .geometry import Units


class PerturbedTensor(Protocol):
    """What a pass perturbs, as one tensor."""

    def gradient(self, scales: Mapping[int, Tensor]) -> Tensor:
        """d(loss)/d(delta), in float32 at least; `scales` of each loss are divided out."""

    def delta(self) -> Tensor:
        """The perturbation as it was applied."""

    def ids(self) -> Tensor | None:
        """The ids that were looked up; None where the target is no lookup."""

    def units(self) -> Units:
        """Its units. Raises ValueError where the scope does not fit the tensor."""


class WatchedForward:
    """One forward pass of a model, and its backward pass: tells the calls that its loss is made of from all others.

    Args:
        shared: what it shares with the other passes of the micro-batch.
        gradient: whether the gradient with respect to the perturbation is wanted.
        trains: whether weights get gradients from it.

    Attributes:
        batch: what the last loss was computed on.
        losses: how many losses there were.
        calls: the target's, those without autograd too.
        masks: of the calls in progress, (rows, positions): true where there is a token; the outermost first. None where
            a call has none, `BARRIER` where those around it say nothing of its positions.
        handles: of the target's hooks, which are there for this pass alone.
    """

    def __init__(self, shared: SharedCalls, *, gradient: bool = False, trains: bool = False) -> None:
        self.shared, self.takes_gradient, self.trains = shared, gradient, trains
        self.batch: Any = None
        self.losses = 0
        self.calls: list[Call] = []
        self.masks: list[Tensor | str | None] = []
        self.handles: list[Any] = []
        self._open, self._grad_mode = False, True

    @contextmanager
    def loss_of(self, batch: Any) -> Iterator[None]:
        """Inside, a loss is computed; a pass may have several (a batch in parts)."""
        self.batch, self._open, self._grad_mode = batch, True, torch.is_grad_enabled()
        before = len(self.calls)
        try:
            yield
            self.losses += 1
        except BaseException:
            # It may be tried again.
            self.calls[before:], self.masks = [], []
            raise
        finally:
            self._open = False

    def in_loss(self) -> bool:
        """Whether a loss is being computed, or differentiated."""
        return self._open or self.in_backward()

    @staticmethod
    def in_backward() -> bool:
        """Whether autograd is on its way back."""
        return bool(torch._C._current_graph_task_id() != -1)

    def with_autograd(self) -> bool:
        """Whether the loss depends on a call that happens now."""
        return torch.is_grad_enabled() or not self._grad_mode or _in_reentrant_checkpoint()

    @property
    def of_last_loss(self) -> list[Call]:
        """The calls of the last loss."""
        return [call for call in self.calls if call.loss == self.losses - 1]

    @property
    def reached(self) -> bool:
        """Whether the target was called for the last loss."""
        return bool(self.of_last_loss)

    @property
    def reached_modules(self) -> frozenset[nn.Module]:
        """The modules that were called for the last loss."""
        return frozenset(call.key[0] for call in self.of_last_loss)

    @property
    def leaves(self) -> list[Tensor]:
        """What the gradient is read from."""
        raise NotImplementedError

    @property
    def tensor(self) -> PerturbedTensor:
        """What is perturbed, as one tensor; after the backward pass."""
        raise NotImplementedError

    def example_norms(self) -> tuple[Tensor, Tensor]:
        """The Euclidean norms of what is perturbed, and of the perturbation: of each example, or each weight."""
        raise NotImplementedError

    def end(self) -> None:
        """The pass is over, backward too. Raises RuntimeError unless every part of the perturbation was used."""


def _in_reentrant_checkpoint() -> bool:
    """Reentrant checkpointing runs a layer without autograd first; only who calls tells it from a reference's pass."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


_REENTRANT = CheckpointFunction.forward.__code__
