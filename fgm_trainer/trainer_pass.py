"""One pass that a Trainer makes: its `training_step`, the losses and backward passes in it those of the pass."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .engine.running_pass import RunningPass

# A stock step: (the model to call, the batch) -> its loss.
StockStep = Callable[[nn.Module, Any], Tensor]


def make_pass(
    trainer: Any, stock: StockStep, figures: OwnFigures, running: RunningPass, model: nn.Module, batch: Any
) -> Tensor:
    """Makes a pass by a stock step of the trainer; returns what that reports.

    Raises:
        RuntimeError: an overridden `training_step` leaves out what a pass is made by.
    """
    trainer.running_pass = running
    try:
        with figures, _Replaced(trainer, running):
            reported = stock(model, batch)
    finally:
        trainer.running_pass = None
    name = type(trainer).__name__
    if not running.measured:
        raise RuntimeError(
            f"{name}.training_step does not call self.compute_loss, where the loss is weighted and the "
            "perturbation checked. Let it call compute_loss, or use fgm_trainer.loops.Adversary in a loop."
        )
    if running.missed_backward:
        raise RuntimeError(
            f"{name}.training_step does not call self.accelerator.backward, where divergences are added and a pass "
            "ends that only asks for the gradient at the perturbation. Let it call that in place of "
            "loss.backward(), or choose a method whose passes all train, such as adv_method='fgm'."
        )
    return reported


class OwnFigures:
    """A context around each pass of a micro-batch: what trl's trainers collect where they compute a loss (rewards,
    entropy, numbers of tokens) is that of the first pass alone, of most methods the clean one.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = vars(trainer)
        self._collected: dict[str, Any] | None = None

    def __enter__(self) -> None:
        if self._collected is not None:
            # Figures that nobody reads.
            self._trainer |= {name: _empty(value) for name, value in self._collected.items()}

    def __exit__(self, *error: object) -> None:
        if self._collected is None:
            self._collected = {name: self._trainer[name] for name in _COLLECTED if name in self._trainer}
        self._trainer |= self._collected


_COLLECTED = ("_metrics", "_stored_metrics", "_total_train_tokens")


def _empty(collected: Any) -> Any:
    """The same without figures; as it is where it is not of trl's form: of each mode (train, eval) lists by name."""
    if not isinstance(collected, dict) or not all(isinstance(each, defaultdict) for each in collected.values()):
        return collected
    # A copy keeps what a mode that is not there yet starts with.
    return copy.copy(collected) | {mode: defaultdict(lists.default_factory) for mode, lists in collected.items()}


class _Replaced:
    """A context: inside, the losses and backward passes of the trainer are those of a pass.

    `compute_loss` and `accelerator.backward` are wrapped on the instances, so overrides above and below are all inside.
    """

    # A class: a generator takes four times as many calls, several times a step.
    def __init__(self, trainer: Any, running: RunningPass) -> None:
        self._trainer, self._running = trainer, running
        self._compute_loss: Callable[..., Any] = trainer.compute_loss
        self._backward: Callable[..., None] = trainer.accelerator.backward

    def __enter__(self) -> None:
        trainer, own = vars(self._trainer), vars(self._trainer.accelerator)
        self._before = trainer.get("compute_loss"), own.get("backward")
        trainer["compute_loss"] = wrapper = lambda *a, **k: self._measured(*a, **k)
        # Its signature is found.
        wrapper.__wrapped__ = self._compute_loss  # type: ignore[attr-defined]
        own["backward"] = lambda loss, **k: self._running.backward(loss, self._backward, **k)

    def __exit__(self, *error: object) -> None:
        for instance, name, before in (
            (self._trainer, "compute_loss", self._before[0]),
            (self._trainer.accelerator, "backward", self._before[1]),
        ):
            vars(instance).pop(name)
            if before is not None:
                vars(instance)[name] = before

    def _measured(self, *args: Any, **kwargs: Any) -> Any:
        """`compute_loss` of a pass; the Trainer's own inside of it and outside of autograd."""
        running = self._running
        if not running.takes_losses:
            return self._compute_loss(*args, **kwargs)
        asked = kwargs.get("return_outputs", False) or any(args[2:3])
        if running.reads_outputs and not asked:
            # The third argument, wherever it stands.
            args, kwargs = (*args[:2], True, *args[3:]) if len(args) > 2 else args, dict(kwargs)
            if len(args) < 3:
                kwargs["return_outputs"] = True
        if len(args) > 1:
            batch, compute = args[1], lambda b: self._compute_loss(args[0], b, *args[2:], **kwargs)
        else:
            batch = kwargs.pop("inputs")
            compute = lambda b: self._compute_loss(*args, inputs=b, **kwargs)  # noqa: E731
        loss, outputs = running.measure(compute, batch)
        return (loss, outputs) if asked else loss
