"""What the log says of a run: the attack's figures, and whether the run has collapsed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .schedule import Schedule

logger = logging.get_logger(__name__)


class LogWindow:
    """What the steps since the last log line add up to, on the device: nothing is read before the line is written."""

    def __init__(self) -> None:
        self._steps = 0
        self._rows = 0
        self._sums: Tensor | None = None
        self._bad: list[Tensor] = []
        self._older_bad: list[Tensor] = []

    def begin(self, first: bool, device: torch.device) -> None:
        """A micro-batch is attacked; `first` where it is the first of its optimizer step."""
        if self._sums is None:
            self._sums = torch.zeros(3, dtype=torch.float32, device=device)
        if first or not self._bad:
            self._steps += 1
            if len(self._bad) == 1024:
                # No log line for long: one tensor in place of many.
                self._older_bad.append(torch.stack(self._bad))
                self._bad = []
            self._bad.append(torch.zeros((), dtype=torch.float32, device=device))

    def gradient(self, gradient: Tensor) -> None:
        """A gradient arrived; it counts as bad where an entry is not finite."""
        self._bad[-1] = torch.maximum(self._bad[-1], (~torch.isfinite(gradient).all()).float())

    def perturbed(self, loss: Tensor, norms: tuple[Tensor, Tensor] | None) -> None:
        """A perturbed pass: its loss, and the row norms of tensor and perturbation where it was the last."""
        assert self._sums is not None
        self._sums[0] += loss.sum()
        if norms is not None:
            values, deltas = norms
            self._rows += len(deltas)
            self._sums[1] += deltas.sum()
            self._sums[2] += torch.where(values > 0, deltas / values, 0.0).sum()

    def close(self, accelerator: Any) -> dict[str, float]:
        """The figures of the window, over all processes; nothing where no step was attacked."""
        if self._sums is None:
            return {}
        rows = self._sums.new_tensor([float(self._rows)])
        sums = accelerator.reduce(
            torch.cat([self._sums, rows, *self._older_bad, torch.stack(self._bad)]), reduction="sum"
        )
        loss, delta, ratio, count, *bad = sums.tolist()
        figures = {
            "adv_loss": loss / self._steps / accelerator.num_processes,
            "adv_delta_norm": delta / max(count, 1),
            "adv_delta_ratio": ratio / max(count, 1),
            "adv_skipped": float(sum(b > 0 for b in bad)),
        }
        self._steps, self._rows, self._sums, self._bad, self._older_bad = 0, 0, None, [], []
        return figures


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
