"""What the log says of a run: the attack's figures, and whether the run has collapsed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .schedule import Schedule

logger = logging.get_logger(__name__)


# How many micro-batches' figures are kept before they become one.
_KEPT = 1024


class LogWindow:
    """What the steps since the last log line add up to, on the device: nothing is read before the line is written.

    A step puts its figures down; they are added up when the line is written, so that a step costs no more than that.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._steps = 0
        # Of each step the largest entry of its gradients: not finite where one of them is not; None where it took none.
        self._largest: list[Tensor | None] = []
        self._losses: list[Tensor] = []
        self._norms: list[tuple[Tensor, Tensor]] = []
        self._older_sums: list[Tensor] = []
        self._older_bad: list[Tensor] = []

    def begin(self, first: bool) -> None:
        """A micro-batch is attacked; `first` where it is the first of its optimizer step."""
        if first or not self._steps:
            if len(self._losses) >= _KEPT:
                self._fold()
            self._steps += 1
            self._largest.append(None)

    def gradient(self, gradient: Tensor) -> None:
        """A gradient arrived; its step counts as skipped where an entry is not finite."""
        largest = torch.linalg.vector_norm(gradient, math.inf)
        known = self._largest[-1]
        self._largest[-1] = largest if known is None else torch.maximum(known, largest)

    def perturbed(self, loss: Tensor, norms: tuple[Tensor, Tensor] | None) -> None:
        """A perturbed pass: its loss; of the last one the row norms of tensor and perturbation, (rows,) both, too."""
        self._losses.append(loss)
        if norms is not None:
            self._norms.append(norms)

    def close(self, accelerator: Any) -> dict[str, float]:
        """The figures of the window, over all processes; nothing where no step was attacked."""
        if not self._losses and not self._older_sums:
            return {}
        if self._losses:
            self._fold()
        sums = accelerator.reduce(torch.cat([sum(self._older_sums[1:], self._older_sums[0]), *self._older_bad]), "sum")
        loss, delta, ratio, count, *bad = sums.tolist()
        figures = {
            "adv_loss": loss / self._steps / accelerator.num_processes,
            "adv_delta_norm": delta / max(count, 1),
            "adv_delta_ratio": ratio / max(count, 1),
            "adv_skipped": float(sum(b > 0 for b in bad)),
        }
        self._clear()
        return figures

    def _fold(self) -> None:
        """Makes sums of what is kept one by one."""
        losses = torch.stack([loss.sum().float() for loss in self._losses])
        values, deltas = (torch.cat(norms) for norms in zip(*self._norms, strict=True))
        ratios = torch.where(values > 0, deltas / values, 0.0)
        rows = losses.new_tensor(float(len(deltas)))
        self._older_sums.append(torch.stack([losses.sum(), deltas.sum(), ratios.sum(), rows]))
        largest = [value for value in self._largest if value is not None]
        if largest:
            self._older_bad.append((~torch.isfinite(torch.stack(largest))).float())
        self._losses, self._norms, self._largest = [], [], []


class CollapseWatch:
    """Says aloud, once, that a run does not learn: its clean loss is where it was in the first window.

    A window is a logging window, or as many of them as make a twentieth of training: a single step's loss is noise.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._losses: list[float] = []
        self._since: int | None = None
        self._said = False

    def see(self, loss: float, step: int, schedule: Schedule, total: int) -> None:
        self._losses.append(loss)
        if self._since is not None and step - self._since < total / 20:
            return
        loss, self._losses, self._since = sum(self._losses) / len(self._losses), [], step
        if self._first is None:
            self._first = loss
            return
        # Before half of training a slow start looks the same.
        settled = step > max(schedule.warm(total), total / 2)
        if self._said or not settled or loss < 0.95 * self._first:
            return
        self._said = True
        logger.warning(
            f"Collapse? After {step} of {total} steps the clean loss is {loss:.4g}, and it was {self._first:.4g} in "
            "the first logging window: the model has not learned yet. A perturbation that is too large from the start "
            "does this. Try a smaller adv_epsilon, a rise over adv_warmup=0.5 of training, or a smaller learning rate."
        )
