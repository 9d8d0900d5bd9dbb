"""For loops of your own: the driver of any attack, with or without accelerate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from . import attacks
from .attacks import Memory, Step
from .engine.accelerate import AllProcesses, Engine, bare
from .engine.controller import STRENGTH, EpsilonController
from .engine.driver import Driver, unit_of
from .engine.guessing import guessing_of
from .engine.kept import Kept
from .engine.running_pass import RunningPass, model_loss, reported_loss
from .in_place import FGM, check_epsilon
from .perturbation.batches import examples_in, without_column
from .perturbation.target import Target
from .perturbation.targets import find_target
from .perturbation.weights import is_weights

__all__ = ["FGM", "Adversary"]

LossOf = Callable[[nn.Module, Mapping[str, Any]], Any]


class Adversary:
    """The driver of an attack for a loop of your own, with or without accelerate.

    ```python
    adversary = Adversary(model, FGM(epsilon=1.0), accelerator=accelerator)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = adversary.backward(batch)   # in place of: loss = model(**batch).loss; accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    ```

    Args:
        model: the model, as `accelerator.prepare` returned it.
        attack: the attack.
        target: what is perturbed, as `adv_target`.
        accelerator: the `accelerate.Accelerator`; None for a plain loop on one process.
        seed: of whatever the attack draws.
        epsilon_unit: `absolute`, or `embedding` for the mean norm of a token's embedding.
        clip: the valid range of an input tensor (`clipping.valid_range`).
        strength: with epsilon `auto`, the share of what there is to lose that the attack may add to the loss.
        recover: a fixed epsilon is lowered as `auto` does where the model can't bear it, and never exceeded.

    `memory` is what the attack keeps between steps, and `controller` what finds epsilon `auto`; None where there is
    none. Save their `state_dict()` beside your own.

    Raises:
        ValueError: the model does not have the target, or the scope does not exist there.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: attacks.Attack,
        *,
        target: str | Target | None = None,
        accelerator: Any = None,
        seed: int = 0,
        epsilon_unit: str = "absolute",
        clip: tuple[Tensor, Tensor] | None = None,
        strength: float = STRENGTH,
        recover: bool = False,
    ) -> None:
        self._model, self._attack, self._accelerator, self._seed = model, attack, accelerator, seed
        inner = bare(model, accelerator)
        target = target or attack.default_target
        self._target = find_target(target, inner)
        engine = Engine(accelerator, model, inner)
        engine.refuse_flat_weights()
        if attack.needs_whole_weights or is_weights(self._target):
            engine.refuse_spread_weights(attack.name)
        self._unit = unit_of(epsilon_unit, inner)
        self._target.attach(inner, model)
        self._target.clip = clip or self._target.clip
        scope = self._target.resolve_scope(attack.scope, attack.preferred_scope)
        in_units = attack.in_units(self._unit)
        self._driver = Driver(in_units, self._target, scope, engine)
        self._kept = Kept(in_units, self._target, seed, strength=strength, recover=recover, guessing=guessing_of(inner))
        self._steps_next, self._count = True, 0

    @property
    def memory(self) -> Memory | None:
        """What the attack keeps between steps."""
        return self._kept.memory

    @property
    def controller(self) -> EpsilonController | None:
        """What finds epsilon `auto`."""
        return self._kept.controller

    def backward(
        self,
        batch: Mapping[str, Any],
        loss_of: LossOf | None = None,
        *,
        epsilon: float | None = None,
        factor: float = 1.0,
    ) -> Tensor:
        """All passes of one micro-batch; afterwards the weights' gradients are complete.

        Args:
            batch: the model's inputs.
            loss_of: (model, batch) -> the loss, or (loss, outputs) with `logits` for an attack that compares outputs;
                None for what the model returns.
            epsilon: this step's epsilon; None for the attack's. 0 makes one stock pass.
            factor: what a schedule multiplies epsilon by, and of `auto` the strength. 0 makes one stock pass.

        Returns:
            The clean loss, detached; where there is none, that of the first training pass.
        """
        # What guessing costs is known of the model's own loss.
        labels = batch.get("labels") if loss_of is None else None
        loss_of = loss_of or model_loss
        controller = self.controller if epsilon is None else None
        if controller is None:
            epsilon = factor * (float(self._attack.epsilon) if epsilon is None else epsilon)
            check_epsilon(epsilon)
        engine = self._driver.engine

        def run_pass(running: RunningPass, model: nn.Module, inputs: Any) -> Tensor:
            loss, _ = running.measure(lambda own: loss_of(model, own), inputs)
            running.backward(loss, engine.backward)
            return loss.detach()

        inputs = without_column(batch, self._attack.targeted)
        if epsilon == 0 or factor == 0:
            result = loss_of(self._model, inputs)
            loss: Tensor = result[0] if isinstance(result, tuple) else result
            engine.backward(loss)
            return loss.detach()
        accelerator = self._accelerator
        if self._steps_next:
            self._kept.settle(engine.model, AllProcesses(accelerator))
        self._steps_next = accelerator is None or accelerator.sync_gradients
        if self._target.model is not engine.model:
            # Another loop may have taken it.
            self._target.attach(engine.model, self._model)
        given = self._attack if epsilon is None else replace(self._attack, epsilon=epsilon)
        self._driver.attack = attack = given.in_units(self._unit)
        size: Any = attack.epsilon if controller is None else controller.epsilon
        step = Step(size, self._next_seed(), self.memory, examples_in(inputs))
        passes = self._driver.run(step, inputs, run_pass, batch)
        if controller is not None:
            controller.observe(passes, labels, rise=factor)
        self._kept.due = True
        return reported_loss(passes)

    def close(self) -> None:
        """Lets the model go."""
        self._target.detach()

    def _next_seed(self) -> int:
        """Differs by micro-batch over all processes: N processes draw as accumulation over N does."""
        accelerator = self._accelerator
        rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        batch, self._count = self._count * world + rank, self._count + 1
        return hash((self._seed, batch)) % 2**63
