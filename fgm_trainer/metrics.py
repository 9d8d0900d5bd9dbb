"""What the log says of an attacked run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .collapse import CollapseWatch
from .engine.running_pass import RunningPass
from .engine.schedule import Schedule

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


class RunFigures:
    """What the log says of an attacked run.

    Args:
        trainer: the Trainer.
        schedule: the attack's.

    Attributes:
        watch: says whether the run has collapsed.
    """

    def __init__(self, trainer: Any, schedule: Schedule) -> None:
        self._trainer, self._schedule = trainer, schedule
        self._window = LogWindow()
        self.watch = CollapseWatch()
        self.begin, self.gradient = self._window.begin, self._window.gradient

    def watched(self, model: nn.Module, labels: Any) -> Any:
        """A context around a step, in which the model's answers are noted."""
        args, state = self._trainer.args, self._trainer.state
        labels = None if args.logging_strategy == "no" else labels
        return self.watch.watched(model, labels, state.global_step, self._schedule, state.max_steps)

    def note(self, passes: Sequence[RunningPass]) -> None:
        """An attacked micro-batch: all of its passes, in order."""
        perturbed = [each for each in passes if each.is_training and not each.is_clean]
        losses = [each.unweighted for each in perturbed]
        loss = torch.stack(losses).mean(0) if len(losses) > 1 else losses[0]
        self._window.perturbed(loss, perturbed[-1].forward_pass.example_norms())

    def close(self, logs: dict[str, float], epsilon: float | None) -> dict[str, float]:
        """A log line of training, with the figures since the last; to be called on every process."""
        trainer, state = self._trainer, self._trainer.state
        logs = {**logs, **self._window.close(trainer.accelerator)}
        if epsilon is not None:
            logs["adv_epsilon"] = epsilon
        if "loss" in logs:
            run = state.global_step, self._schedule, state.max_steps, state.log_history, trainer.accelerator
            self.watch.see(logs["loss"], *run)
        if not math.isfinite(logs.get("adv_loss", 0.0)):
            logger.warning(f"The adversarial loss is {logs['adv_loss']} in the steps up to {state.global_step}.")
        return logs


def show(trainer: Any, logs: Mapping[str, Any]) -> None:
    """Puts the attack's figures behind the progress bar, and into TensorBoard and W&B as a group of their own, `adv`.

    Both trackers show a name up to its slash as a group, and the Trainer gives them everything as `train/`.
    """
    figures = {f"adv/{name[4:]}": value for name, value in logs.items() if name.startswith("adv_")}
    if not figures or not trainer.is_world_process_zero():
        return
    shown = {name: f"{logs[name]:.3g}" for name in ("adv_loss", "adv_epsilon") if name in logs}
    for callback in trainer.callback_handler.callbacks:
        bar, writer, wandb = (getattr(callback, name, None) for name in ("training_bar", "tb_writer", "_wandb"))
        if bar is not None:
            bar.set_postfix(shown)
        if writer is not None:
            for name, value in figures.items():
                writer.add_scalar(name, value, trainer.state.global_step)
        if wandb is not None and getattr(wandb, "run", None) is not None:
            wandb.log({**figures, "train/global_step": trainer.state.global_step})
