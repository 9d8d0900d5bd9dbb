"""One training run under attack: what `AdversarialTrainer` keeps from its first step to its last."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.utils import logging

from .attacks import Attack, Step
from .checkpoint import RunState
from .engine.accelerate import Engine, bare
from .engine.controller import EpsilonController
from .engine.driver import Driver, unit_of
from .engine.kept import Kept
from .engine.running_pass import RunPass, reported_loss
from .loss_reduction import LossReduction
from .metrics import RunFigures
from .perturbation.batches import examples_in, without_column
from .perturbation.targets import find_target
from .plan import Plan
from .trainer_pass import OwnFigures, StockStep, make_pass

logger = logging.get_logger(__name__)


class AttackedRun:
    """The driver of a Trainer's steps, what the run keeps between them, and the figures for the log.

    Args:
        trainer: the Trainer.
        plan: how it is attacked.

    Attributes:
        counters: what counts the attacked micro-batches of all runs, by its `value`.
    """

    counters: ClassVar[list[Any]] = []

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self._trainer, self.plan = trainer, plan
        self.driver: Driver | None = None
        self.figures = RunFigures(trainer, plan.schedule)
        self._position, self._reduction = _Position(trainer), LossReduction(trainer)
        self._checked_batch = self._attacked_any = False
        self.state = RunState(trainer, plan)

    @property
    def controller(self) -> EpsilonController | None:
        """What steers epsilon; None where it is fixed, and before the first step."""
        kept = self.state.kept
        return None if kept is None else kept.controller

    # A step -----------------------------------------------------------------------------------------------------------

    def step(self, model: nn.Module, given: dict[str, Any], stock: StockStep) -> Tensor:
        """One micro-batch: as many passes as the attack asks for, each a stock step.

        Args:
            model: as the engine wrapped it.
            given: the batch, with the columns that only the attack reads.
            stock: makes one pass.

        Returns:
            The clean loss, as `Trainer` reports it; where there is none, that of the first training pass.
        """
        inputs, progress = without_column(given, self.plan.attack.targeted), self._trainer.state
        factor = self.plan.schedule.factor(progress.global_step, progress.max_steps)
        driver, kept = self._attached(model)
        if self._position.next() == 0:
            self.state.settle(driver)
        if not self._checked_batch and (said := self.plan.schedule.remark(progress.max_steps)):
            logger.warning(said)
        if factor == 0 and self._checked_batch:
            return self._noted_clean(driver, kept, stock(model, inputs), inputs)
        run_pass = functools.partial(make_pass, self._trainer, stock, OwnFigures(self._trainer))
        try:
            with self.figures.watched(model, _labels_in(inputs, self._trainer)):
                if factor == 0:
                    loss = self._noted_clean(driver, kept, driver.check(inputs, run_pass), inputs)
                else:
                    loss = self._attacked(driver, kept, factor, inputs, given, run_pass)
            self._checked_batch = True
            return loss
        except BaseException:
            self._position.forget()
            raise

    def _attacked(
        self, driver: Driver, kept: Kept, factor: float, inputs: Any, given: Any, run_pass: RunPass
    ) -> Tensor:
        self.figures.begin(self._position.index == 0)
        controller, micro_batches = kept.controller, self._reduction.micro_batches
        epsilon: Any = factor * float(driver.attack.epsilon) if controller is None else controller.epsilon
        step = Step(epsilon, self._position.seed(), kept.memory, examples_in(inputs))
        passes = driver.run(step, inputs, run_pass, given, micro_batches)
        if controller is not None:
            labels = _labels_in(inputs, self._trainer)
            scale = self._reduction.of(driver.engine.model, inputs, passes)
            controller.observe(passes, labels, factor, of_losses=scale, of_divergences=micro_batches)
        kept.due = self._attacked_any = True
        for counter in self.counters:
            counter.value += 1
        self.figures.note(passes)
        return reported_loss(passes)

    def _noted_clean(self, driver: Driver, kept: Kept, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if kept.controller is not None:
            scale = self._reduction.of(driver.engine.model, inputs)
            kept.controller.observe_clean(loss.detach() * scale, _labels_in(inputs, self._trainer))
            kept.due = True
        return loss

    # The model --------------------------------------------------------------------------------------------------------

    def _attached(self, model: nn.Module) -> tuple[Driver, Kept]:
        """The driver for the model that is being trained, and what the run keeps."""
        driver, accelerator = self.driver, self._trainer.accelerator
        # accelerate asks the file system which engines are installed, each time: a millisecond or two.
        known = driver is not None and driver.engine.wrapped is model and driver.engine.accelerator is accelerator
        inner = driver.engine.model if driver is not None and known else bare(model, accelerator)
        if self.state.unit is None:
            self.state.unit = unit_of(self.plan.epsilon_unit, inner)
        attack = self.plan.attack.in_units(self.state.unit)
        # Another trainer may have taken the target.
        if driver is None or not known or driver.target.model is not inner:
            self.detach()
            driver = self.driver = self._new_driver(model, inner, attack)
        driver.attack = attack
        return driver, self.state.of(driver)

    def _new_driver(self, model: nn.Module, inner: nn.Module, attack: Attack) -> Driver:
        plan = self.plan
        target = find_target(plan.target, inner)
        target.attach(inner, model)
        target.clip = plan.clip or target.clip
        return Driver(
            attack,
            target,
            target.resolve_scope(attack.scope, attack.preferred_scope),
            Engine(self._trainer.accelerator, model, inner),
            same_dropout=plan.same_dropout,
            observe=lambda result: self.figures.gradient(result.gradient),
        )

    def detach(self) -> None:
        """Lets the model go."""
        if self.driver is not None:
            self.driver.target.detach()
        self.driver = None

    # What is said of it -----------------------------------------------------------------------------------------------

    def with_figures(self, logs: dict[str, float]) -> dict[str, float]:
        """A log line of training, with the attack's figures; to be called on every process."""
        if self.driver is not None:
            self.driver.check_range()
        elif self._trainer.is_in_train:
            name = type(self._trainer).__name__
            raise RuntimeError(
                f"{name} trains without the attack: its training_step never calls AdversarialTrainer's. Let it call "
                f"super().training_step, or put the mixin in front: class {name}(AdversarialTrainerMixin, YourTrainer)."
            )
        epsilon = None if self.controller is None else self.controller.epsilon.item() / (self.state.unit or 1.0)
        return self.figures.close(logs, epsilon)

    @property
    def scope(self) -> str:
        """Over which entries norms are taken."""
        trainer, attack = self._trainer, self.plan.attack
        target = find_target(self.plan.target, bare(trainer.model, trainer.accelerator))
        return target.resolve_scope(attack.scope, attack.preferred_scope)

    def end(self) -> None:
        """Training is over."""
        said_before = self.plan.schedule.remark(self._trainer.state.max_steps)
        if self.plan.attacks and self._checked_batch and not self._attacked_any and not said_before:
            logger.warning("No step was attacked: adv_start or epsilon_schedule left epsilon at 0 all the time.")
        kept = self.state.kept
        said = None if kept is None else self.plan.attack.remark(kept.memory)
        if said:
            logger.warning(said)
        if self.controller is not None and self.controller.idle:
            logger.warning(
                "adv_epsilon='auto' is as small as at the start: the model has learned nothing yet that an attack could"
                " take away, so it was hardly attacked. Train longer, or give adv_epsilon a number."
            )


def _labels_in(inputs: Mapping[str, Any], trainer: Any) -> Any:
    names: Any = trainer.label_names or ()
    return inputs.get(names[0]) if len(names) == 1 else None


class _Position:
    """Where a Trainer's run is: the optimizer step, and the micro-batch in it on this process."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.forget()

    def forget(self) -> None:
        """The micro-batch was not finished."""
        self._step, self.index = -1, 0

    def next(self) -> int:
        """A micro-batch begins; its index in its optimizer step."""
        step = self._trainer.state.global_step
        self.index = self.index + 1 if step == self._step else 0
        self._step = step
        return self.index

    def seed(self) -> int:
        """Differs by seed, step and micro-batch over all ranks: N processes draw as accumulation over N does."""
        accelerator = self._trainer.accelerator
        batch = self.index * accelerator.num_processes + accelerator.process_index
        return hash((self._trainer.args.seed, self._step, batch)) % 2**63
