"""The passes of an attack on a model that does not train: eval mode, no gradient left anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..attacks import Attack, Step
from ..engine.accelerate import Engine
from ..engine.driver import Driver
from ..engine.running_pass import RunningPass, model_loss
from ..perturbation.batches import without_column
from ..perturbation.lookups import eval_mode
from ..perturbation.target import Target

# (model, inputs) -> (loss, outputs).
LossOf = Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]]


def passes_of(
    model: nn.Module,
    place: Target,
    batch: Mapping[str, Any],
    attack: Attack,
    step: Step,
    scope: str,
    loss_of: LossOf | None = None,
) -> list[RunningPass]:
    """The passes of a step of the attack, the last of them the perturbed one that it would train on.

    Args:
        model: the model, in whatever mode it shall be.
        place: its target, attached.
        batch: the model's inputs, and the column that a targeted attack reads.
        attack: the attack.
        step: its epsilon and seed.
        scope: over which entries norms are taken.
        loss_of: (model, inputs) -> (loss, outputs); None for the model's own loss.

    Returns:
        The passes: what each reported as its loss, its outputs, and the calls of its target. No gradient is left
        anywhere.
    """

    def run_pass(running: RunningPass, called: nn.Module, inputs: Any) -> Tensor:
        loss, _ = running.measure(lambda own: (loss_of or model_loss)(called, own), inputs)
        running.backward(loss, Tensor.backward)
        return loss.detach()

    attack = attack.on_all()
    plain = replace(attack, weight=1.0) if attack.clean_weight else replace(attack, weight=1.0, clean_weight=1.0)
    driver = Driver(plain, place, scope, Engine(None, model, model), trains=False)
    return driver.run(step, without_column(batch, attack.targeted), run_pass, batch)


@contextmanager
def evaluating(model: nn.Module, place: Target, clip: tuple[Tensor, Tensor] | None = None) -> Iterator[None]:
    """Eval mode, hooks and a valid range; every module's own mode, no hooks and the target's own range afterwards."""
    before, called, own = place.model, place.called, place.clip
    attached = before is model
    with eval_mode(model):
        try:
            place.clip = own if clip is None else clip
            if not attached:
                place.attach(model)
            yield
        finally:
            place.clip = own
            if not attached:
                place.detach()
                if before is not None:
                    place.attach(before, called)
