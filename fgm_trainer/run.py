"""One training run under attack: what `AdversarialTrainer` keeps from its first step to its last."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .attacks import AUTO, Attack, Memory, Step
from .engine.accelerate import Engine, bare
from .engine.controller import EpsilonController
from .engine.driver import Driver, RunningPass, unit_of
from .engine.guessing import GuessingLoss, guessing_of
from .engine.schedule import Schedule
from .metrics import CollapseWatch, LogWindow
from .perturbation.batches import examples_in, without_column
from .perturbation.target import Target
from .perturbation.targets import find_target

logger = logging.get_logger(__name__)

# Beside the Trainer's own files of a checkpoint.
STATE_FILE = "adversarial_state.pt"

# A stock step: (the model to call, the batch) -> its loss.
StockStep = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Plan:
    """How a run is attacked, as arguments and flags together say it.

    Args:
        attack: the attack.
        schedule: when it runs, and how epsilon (of `auto` the strength) rises.
        target: what is perturbed, as `adv_target`.
        clip: the valid range of an input tensor.
        epsilon_unit: one of `EPSILON_UNITS`.
        strength: of `auto`.
        recover: whether a fixed epsilon gives way.
        same_dropout: all passes of a step draw the same dropout masks.
    """

    attack: Attack
    schedule: Schedule
    target: str | Target
    clip: tuple[Tensor, Tensor] | None = None
    epsilon_unit: str = "absolute"
    strength: float = 1.0
    recover: bool = False
    same_dropout: bool = False

    @property
    def attacks(self) -> bool:
        """Whether there is an attack at all."""
        return self.attack.epsilon != 0

    @property
    def steers(self) -> bool:
        """Whether epsilon is found while training."""
        return self.attack.epsilon == AUTO or self.recover

    @property
    def label_column(self) -> str | None:
        """The column of the data that only a targeted attack reads."""
        label = self.attack.targeted
        return label if isinstance(label, str) and label != "least_likely" else None


class AttackedRun:
    """The driver of a Trainer's steps, what the attack remembers, what steers epsilon, and the figures for the log.

    Args:
        trainer: the Trainer.
        plan: how it is attacked.
    """

    def __init__(self, trainer: Any, plan: Plan) -> None:
        self._trainer, self.plan = trainer, plan
        self.driver: Driver | None = None
        self.watch = CollapseWatch()
        self._window = LogWindow()
        # The optimizer step, and the index of the micro-batch in it on this process.
        self._position = (-1, 0)
        self._checked_batch = False
        # What an epsilon is multiplied by; known from the first step on.
        self._unit: float | None = None
        self.forget()

    def forget(self) -> None:
        """A run starts anew."""
        # By name in the state file: what the attack remembers, and what steers epsilon. None before the first step.
        self._kept: dict[str, Memory] | None = None
        self._saved: dict[str, Any] = {}
        self._settle_due = True

    @property
    def controller(self) -> EpsilonController | None:
        """What steers epsilon."""
        return (self._kept or {}).get("controller")  # type: ignore[return-value]

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
        inputs, state = without_column(given, self.plan.label_column), self._trainer.state
        factor = self.plan.schedule.factor(state.global_step, state.max_steps)
        driver = self._attached(model)
        if self._next_position() == 0:
            self._settle()
        if factor == 0 and self._checked_batch:
            return self._observed_clean(stock(model, inputs), inputs)
        run_pass = functools.partial(self._run_pass, stock)
        try:
            with self._watched(model, inputs):
                if factor == 0:
                    loss = self._observed_clean(driver.check(inputs, run_pass), inputs)
                else:
                    loss = self._attacked(driver, factor, inputs, given, run_pass)
            self._checked_batch = True
            return loss
        except BaseException:
            self._position = (-1, 0)
            raise

    def _run_pass(self, stock: StockStep, running: RunningPass, model: nn.Module, batch: Any) -> Tensor:
        trainer = self._trainer
        trainer.running_pass = running
        try:
            with _Replaced(trainer, running):
                reported = stock(model, batch)
        finally:
            trainer.running_pass = None
        _check_pass(type(trainer).__name__, running)
        return reported

    def _attacked(self, driver: Driver, factor: float, inputs: Any, given: Any, run_pass: Any) -> Tensor:
        self._window.begin(self._position[1] == 0)
        assert self._kept is not None
        controller, micro_batches = self.controller, self._micro_batches()
        epsilon: Any = factor * float(driver.attack.epsilon) if controller is None else controller.epsilon
        step = Step(epsilon, self._seed(), self._kept.get("memory"), examples_in(inputs))
        passes = driver.run(step, inputs, run_pass, given, micro_batches)
        if controller is not None:
            controller.observe(passes, self._labels(inputs), micro_batches, rise=factor)
        self._settle_due = True
        trained = [each for each in passes if each.is_training]
        perturbed = [each for each in trained if not each.is_clean]
        losses = [each.unweighted for each in perturbed]
        mean = torch.stack(losses).mean(0) if len(losses) > 1 else losses[0]
        self._window.perturbed(mean, perturbed[-1].forward_pass.row_norms())
        clean = [each.unweighted for each in trained if each.is_clean]
        return clean[-1] if clean else losses[0]

    def _observed_clean(self, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if self.controller is not None:
            self.controller.observe_clean(loss.detach(), self._labels(inputs), self._micro_batches())
            self._settle_due = True
        return loss

    def _watched(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """A context in which `CollapseWatch` sees the model's answers."""
        trainer = self._trainer
        labels = self._labels(inputs) if trainer.args.logging_strategy != "no" else None
        return self.watch.watched(model, labels, trainer.state.global_step, self.plan.schedule, trainer.state.max_steps)

    def _labels(self, inputs: Mapping[str, Any]) -> Any:
        names: Any = self._trainer.label_names or ()
        return inputs.get(names[0]) if len(names) == 1 else None

    def _micro_batches(self) -> int:
        """How many micro-batches this optimizer step has."""
        accumulation = self._trainer.args.gradient_accumulation_steps
        return int(getattr(self._trainer, "current_gradient_accumulation_steps", accumulation))

    def _next_position(self) -> int:
        """The index of this micro-batch in its optimizer step."""
        step, index = self._position
        index = index + 1 if step == self._trainer.state.global_step else 0
        self._position = (self._trainer.state.global_step, index)
        return index

    def _seed(self) -> int:
        """Differs by seed, step and micro-batch over all ranks: N processes draw as accumulation over N does."""
        accelerator = self._trainer.accelerator
        step, index = self._position
        batch = index * accelerator.num_processes + accelerator.process_index
        return hash((self._trainer.args.seed, step, batch)) % 2**63

    # The model --------------------------------------------------------------------------------------------------------

    def _attached(self, model: nn.Module) -> Driver:
        """The driver for the model that is being trained."""
        driver, accelerator = self.driver, self._trainer.accelerator
        # accelerate asks the file system which engines are installed, each time: a millisecond or two.
        known = driver is not None and driver.engine.wrapped is model and driver.engine.accelerator is accelerator
        inner = driver.engine.model if driver is not None and known else bare(model, accelerator)
        if self._unit is None:
            self._unit = unit_of(self.plan.epsilon_unit, inner)
        attack = self.plan.attack.in_units(self._unit)
        # Another trainer may have taken the target.
        if driver is None or not known or driver.target.model is not inner:
            self.detach()
            driver = self.driver = self._new_driver(model, inner, attack)
        driver.attack = attack
        if self._kept is None:
            self._kept = self._new_kept(driver)
        return driver

    def _new_driver(self, model: nn.Module, inner: nn.Module, attack: Attack) -> Driver:
        plan = self.plan
        target = plan.target if isinstance(plan.target, Target) else find_target(plan.target, inner)
        target.attach(inner, model)
        target.clip = plan.clip or target.clip
        return Driver(
            attack,
            target,
            target.resolve_scope(attack.scope, attack.default_scope),
            Engine(self._trainer.accelerator, model, inner),
            same_dropout=plan.same_dropout,
            observe=lambda answer: self._window.gradient(answer.gradient),
        )

    def detach(self) -> None:
        """Lets the model go."""
        if self.driver is not None:
            self.driver.target.detach()
        self.driver = None

    # What is kept between steps ---------------------------------------------------------------------------------------

    def _new_kept(self, driver: Driver) -> dict[str, Memory]:
        """As it was saved where training goes on."""
        args, plan = self._trainer.args, self.plan
        kept: dict[str, Memory | None] = {"memory": driver.attack.new_memory(args.seed)}
        if plan.steers:
            most = math.inf if driver.attack.epsilon == AUTO else float(driver.attack.epsilon)
            kept["controller"] = EpsilonController(
                plan.strength, args.device, self._guessing(driver), ceiling=driver.target.ceiling, most=most
            )
        found = {name: each for name, each in kept.items() if each is not None}
        for name in found.keys() & self._saved.keys():
            found[name].load_state_dict(self._saved[name])
            self._settle_due = False
        return found

    def _guessing(self, driver: Driver) -> GuessingLoss:
        """What guessing would cost; known of the model's own loss alone."""
        trainer = self._trainer
        own = type(trainer).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
        own = own and getattr(trainer, "compute_loss_func", None) is None and trainer.label_smoother is None
        return guessing_of(driver.engine.model) if own else GuessingLoss()

    def _settle(self) -> None:
        if self._settle_due and self._kept and self.driver is not None:
            total = functools.partial(self._trainer.accelerator.reduce, reduction="sum")
            for each in self._kept.values():
                each.settle(self.driver.engine.model, total)
        self._settle_due = False

    def save(self, folder: str) -> None:
        """Writes the state file beside a checkpoint's, where there is something to keep; on every process."""
        unit = 1.0 if self._unit is None else self._unit
        if not self._kept and unit == 1.0:
            return
        self._settle()
        if self._trainer.args.should_save:
            states = {name: each.state_dict() for name, each in (self._kept or {}).items()}
            torch.save({"epsilon_unit": unit, **states}, os.path.join(folder, STATE_FILE))

    def load(self, folder: str | None) -> None:
        """Reads it, if there is one."""
        path = None if folder is None else os.path.join(folder, STATE_FILE)
        if path is not None and os.path.exists(path):
            self._saved = torch.load(path, map_location=self._trainer.args.device, weights_only=True)
            self._unit = self._saved.pop("epsilon_unit")

    # The log ----------------------------------------------------------------------------------------------------------

    def with_figures(self, logs: dict[str, float]) -> dict[str, float]:
        """A log line of training, with the attack's figures; to be called on every process."""
        trainer, state = self._trainer, self._trainer.state
        if self.driver is not None:
            self.driver.check_range()
        logs = {**logs, **self._window.close(trainer.accelerator)}
        if self.controller is not None:
            logs["adv_epsilon"] = self.controller.epsilon.item() / (self._unit or 1.0)
        self.watch.see(
            logs["loss"], state.global_step, self.plan.schedule, state.max_steps, state.log_history, trainer.accelerator
        )
        if not math.isfinite(logs.get("adv_loss", 0.0)):
            logger.warning(f"The adversarial loss is {logs['adv_loss']} in the steps up to {state.global_step}.")
        return logs

    def end(self) -> None:
        """Training is over."""
        if self.controller is not None and self.controller.idle:
            logger.warning(
                "adv_epsilon='auto' is as small as at the start: the model has learned nothing yet that an attack could"
                " take away, so it was hardly attacked. Train longer, or give adv_epsilon a number."
            )


def _check_pass(name: str, running: RunningPass) -> None:
    """Raises RuntimeError where an overridden `training_step` leaves out what a pass is made by."""
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
