"""`AdversarialTrainer`: every pass of a step is a `super().training_step` of its own.

A batch enters `training_step`; the driver runs the attack's passes; the target carries the perturbation in and the
gradient back. Nothing of `Trainer` is copied, and no weight is written.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .arguments import AdversarialArguments, changed_attack_fields
from .attacks import AUTO, FGM, Attack, Memory, Step
from .compatibility import refuse
from .engine.accelerate import Engine
from .engine.controller import EpsilonController
from .engine.driver import Driver, RunningPass, unit_of
from .engine.guessing import GuessingLoss, guessing_of
from .engine.schedule import WARMUP, Schedule
from .metrics import CollapseWatch, LogWindow
from .perturbation.batches import examples_in, without_column
from .perturbation.clipping import valid_range
from .perturbation.target import Target
from .perturbation.targets import EmbeddingOutput, find_target

logger = logging.get_logger(__name__)

# Beside the Trainer's own files of a checkpoint.
STATE_FILE = "adversarial_state.pt"

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdversarialTrainerMixin(_Base):
    """Goes in front of a `Trainer` subclass: `class MyTrainer(AdversarialTrainerMixin, SFTTrainer)`.

    Args:
        attack: the attack, where `args` has no `adv_*` flags or leaves those of the attack at their defaults.
            Without one the flags describe it; with plain `TrainingArguments` it is `FGM(epsilon=1.0)`.
        target: what is perturbed, in place of `args.adv_target`.
        epsilon_schedule: what epsilon is multiplied by, as a function of training progress from 0 to 1; 0 for no
            attack. In place of `args.adv_start` and `args.adv_warmup`.
        *args, **kwargs: `Trainer`'s own.

    Raises:
        ValueError: `attack` and attack flags are both given.
    """

    def __init__(
        self,
        *args: Any,
        attack: Attack | None = None,
        target: str | Target | None = None,
        epsilon_schedule: Callable[[float], float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        flags = self.args if isinstance(self.args, AdversarialArguments) else None
        changed = changed_attack_fields(flags)
        if attack is not None and changed:
            raise ValueError(
                f"The attack is given twice: attack={attack!r} and, in the arguments, {', '.join(changed)}. "
                "Leave one out."
            )
        self._unwrapped: tuple[nn.Module, nn.Module] | None = None
        self._given_attack, self._given_target, self._given_schedule = attack, target, epsilon_schedule
        self._configure()
        self._driver: Driver | None = None
        # The pass that an overridden `training_step` or `compute_loss` is called for.
        self.running_pass: RunningPass | None = None
        self._begin()

    def _begin(self) -> None:
        """What a run starts with."""
        self._position = (-1, 0)
        self._checked_batch = False
        self._window = LogWindow()
        self._watch = CollapseWatch()
        self._unit, self._unit_known = 1.0, False
        self._forget()

    def _forget(self) -> None:
        # By name in the state file: what the attack remembers, and what steers epsilon. None before the first step.
        self._kept: dict[str, Memory] | None = None
        self._saved: dict[str, Any] = {}
        self._settle_due = True

    def _configure(self) -> None:
        """Reads the flags; again when training starts, since a hyperparameter search sets them one by one."""
        flags = self.args if isinstance(self.args, AdversarialArguments) else None
        self.attack: Attack = self._given_attack or (flags.make_attack() if flags else FGM(epsilon=1.0))
        self.schedule: Schedule = self._make_schedule(flags)
        asked = self._given_target or (flags.adv_target if flags else None)
        self._target: str | Target = asked or self.attack.default_target
        self._strength = flags.adv_strength if flags else 1.0
        self._epsilon_unit = flags.adv_epsilon_unit if flags else "absolute"
        self._same_dropout = flags is not None and flags.adv_same_dropout

    def _make_schedule(self, flags: AdversarialArguments | None) -> Schedule:
        shape, attack = self._given_schedule, self._given_attack
        if flags is not None:
            return flags.make_schedule(shape)
        # Without flags a fixed epsilon that was given in code is taken at its word.
        as_given = shape is not None or (attack is not None and attack.epsilon != AUTO)
        return Schedule(warmup=0.0 if as_given else WARMUP, shape=shape)

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._configure()
        self._refuse()

    def _refuse(self) -> None:
        if self.attack.epsilon != 0:
            model = None if self.model is None else self._inner(self.model)
            refuse(self, model, self.attack, self._target, self._epsilon_unit)

    @property
    def steers_epsilon(self) -> bool:
        """Whether epsilon is found while training, not given or scheduled."""
        flags = self.args
        return self.attack.epsilon == AUTO or (isinstance(flags, AdversarialArguments) and flags.adv_recover)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after every problem of the configuration was looked for.

        Raises:
            ValueError: one message with all of them.
        """
        self._configure()
        self._refuse()
        if self._given_attack is None and not isinstance(self.args, AdversarialArguments):
            logger.warning("No attack was given: training with FGM(epsilon=1.0) on the input token embeddings.")
        self._begin()
        try:
            result = super().train(*args, **kwargs)
        finally:
            self._detach()
        if self._controller is not None and self._controller.idle:
            logger.warning(
                "adv_epsilon='auto' is as small as at the start: the model has learned nothing yet that an attack could"
                " take away, so it was hardly attacked. Train longer, or give adv_epsilon a number."
            )
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step on a micro-batch: as many passes as the attack asks for, each `super().training_step`.

        Returns:
            The clean loss, as `Trainer` reports it; where there is none, that of the first training pass.
        """
        given, inputs = inputs, self._for_model(inputs)
        if self.attack.epsilon == 0:
            return super().training_step(model, inputs, *args, **kwargs)
        factor = self.schedule.factor(self.state.global_step, self.state.max_steps)
        driver = self._attached(model)
        if self._next_position() == 0:
            self._settle()
        if factor == 0 and self._checked_batch:
            loss = super().training_step(model, inputs, *args, **kwargs)
            return self._observed_clean(loss, inputs)
        stock = super().training_step

        def run_pass(running: RunningPass, called: nn.Module, batch: Any) -> Tensor:
            self.running_pass = running
            try:
                with _Replaced(self, running):
                    reported = stock(called, batch, *args, **kwargs)
            finally:
                self.running_pass = None
            self._check_pass(running)
            return reported

        try:
            with self._watched(model, inputs):
                if factor == 0:
                    loss = self._observed_clean(driver.check(inputs, run_pass), inputs)
                else:
                    loss = self._attacked_step(driver, factor, inputs, given, run_pass)
            self._checked_batch = True
            return loss
        except BaseException:
            self._position = (-1, 0)
            raise

    def _attacked_step(
        self, driver: Driver, factor: float, inputs: dict[str, Any], given: dict[str, Any], run_pass: Any
    ) -> Tensor:
        self._window.begin(self._position[1] == 0)
        assert self._kept is not None
        controller = self._controller
        epsilon: Any = factor * float(driver.attack.epsilon) if controller is None else controller.epsilon
        step = Step(epsilon, self._seed(), self._kept.get("memory"), examples_in(inputs))
        ran = driver.run(step, inputs, run_pass, given, self._micro_batches())
        if controller is not None:
            controller.observe(ran, self._labels(inputs), self._micro_batches(), rise=factor)
        self._settle_due = True
        passes = [each for each in ran if each.is_training]
        perturbed = [each for each in passes if not each.is_clean]
        losses = [each.unweighted for each in perturbed]
        mean = torch.stack(losses).mean(0) if len(losses) > 1 else losses[0]
        self._window.perturbed(mean, perturbed[-1].forward_pass.row_norms())
        clean = [each.unweighted for each in passes if each.is_clean]
        return clean[-1] if clean else losses[0]

    def _observed_clean(self, loss: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if self._controller is not None:
            self._controller.observe_clean(loss.detach(), self._labels(inputs), self._micro_batches())
            self._settle_due = True
        return loss

    @property
    def _controller(self) -> EpsilonController | None:
        return (self._kept or {}).get("controller")  # type: ignore[return-value]

    def _labels(self, inputs: Mapping[str, Any]) -> Any:
        return inputs.get(self.label_names[0]) if len(self.label_names or ()) == 1 else None

    def _watched(self, model: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """A context in which `CollapseWatch` sees the model's answers."""
        logs = self.args.logging_strategy != "no"
        labels = self._labels(inputs) if logs else None
        return self._watch.watched(model, labels, self.state.global_step, self.schedule, self.state.max_steps)

    def _check_pass(self, running: RunningPass) -> None:
        name = type(self).__name__
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

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer.prediction_step`, without the column that only a targeted attack reads."""
        return super().prediction_step(model, self._for_model(inputs), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`; the lines of training get the attack's figures as well."""
        if "loss" in logs and "learning_rate" in logs and self.attack.epsilon != 0:
            if self._driver is not None:
                self._driver.check_range()
            logs = {**logs, **self._window.close(self.accelerator)}
            if self._controller is not None:
                logs["adv_epsilon"] = self._controller.epsilon.item() / self._unit
            state = self.state
            self._watch.see(
                logs["loss"], state.global_step, self.schedule, state.max_steps, state.log_history, self.accelerator
            )
            if not math.isfinite(logs.get("adv_loss", 0.0)):
                logger.warning(
                    f"The adversarial loss is {logs['adv_loss']} in the steps up to {self.state.global_step}."
                )
        super().log(logs, *args, **kwargs)

    def evaluate_robustness(self, eval_dataset: Any = None, **kwargs: Any) -> Any:
        """Clean and adversarial accuracy of the model: `robustness.evaluate_robustness` with the Trainer's own parts.

        Every process evaluates the whole data set, so all get the same report.

        Args:
            eval_dataset: what `Trainer.evaluate` takes: a data set, also an iterable one; a dictionary of data sets;
                the name of one of the Trainer's own; None for the Trainer's own.
            **kwargs: `attacks`, `epsilons` and the other arguments of `robustness.evaluate_robustness`.

        Returns:
            A `RobustnessReport`; for a dictionary of data sets one of each, by name.

        Raises:
            ValueError: there is no data set, or what `robustness.evaluate_robustness` refuses.
        """
        from .robustness import evaluate_robustness

        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, str):
            own = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {}
            if dataset not in own:
                names = ", ".join(own) or "none, since eval_dataset is no dictionary"
                raise ValueError(f"The Trainer's eval_dataset has no data set {dataset!r}; it has: {names}.")
            dataset = own[dataset]
        if dataset is None:
            raise ValueError("evaluate_robustness needs a data set: pass eval_dataset here or to the Trainer.")
        if isinstance(dataset, Mapping):
            return {name: self.evaluate_robustness(one, **kwargs) for name, one in dataset.items()}
        collate = kwargs.pop("collate_fn", self.data_collator)
        own_parts: dict[str, Any] = {
            "batch_size": self.args.eval_batch_size,
            # A model that was trained on perturbed weights is evaluated on perturbed inputs.
            "target": None if self._target == "weights" else self._target,
            "epsilon_unit": self._epsilon_unit,
            "clip": self._valid_range(),
            "progress": not self.args.disable_tqdm,
            "seed": self.args.seed,
            "collate_fn": self._get_collator_with_removed_columns(collate, description="evaluation"),
        }
        return evaluate_robustness(self._on_its_device(), dataset, **own_parts | kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`, with a section that names the attack and its settings."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self.attack.epsilon == 0:
            return
        target = EmbeddingOutput() if self._driver is None else self._driver.target
        scope = target.resolve_scope(self.attack.scope, self.attack.default_scope)
        rows = self.attack.settings() | {"scope": scope, "target": str(self._target)}
        rows |= {"epsilon_unit": self._epsilon_unit, **vars(self.schedule)}
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        with open(os.path.join(str(self.args.output_dir), "README.md"), "a", encoding="utf-8") as card:
            card.write("\n".join(["\n## Adversarial training\n", "| setting | value |", "|---|---|", *lines, ""]))

    # Preparation --------------------------------------------------------------------------------------------------

    def _attached(self, model: nn.Module) -> Driver:
        """The driver for the model that is being trained."""
        inner = self._inner(model)
        if not self._unit_known:
            self._unit_known = True
            self._unit = unit_of(self._epsilon_unit, inner)
        attack = self.attack.in_units(self._unit)
        driver = self._driver
        if (
            driver is None
            or driver.engine.wrapped is not model
            or driver.engine.accelerator is not self.accelerator
            # Another trainer may have taken it.
            or driver.target.model is not inner
        ):
            self._detach()
            target = self._target if isinstance(self._target, Target) else find_target(self._target, inner)
            target.attach(inner, model)
            target.clip = self._valid_range() or target.clip
            driver = self._driver = Driver(
                attack,
                target,
                target.resolve_scope(attack.scope, attack.default_scope),
                Engine(self.accelerator, model, inner),
                same_dropout=self._same_dropout,
                observe=lambda answer: self._window.gradient(answer.gradient),
            )
        driver.attack = attack
        if self._kept is None:
            self._kept = self._new_kept(driver)
        return driver

    def _new_kept(self, driver: Driver) -> dict[str, Memory]:
        """What is kept between steps, as it was saved where training goes on."""
        kept: dict[str, Memory | None] = {"memory": driver.attack.new_memory(self.args.seed)}
        if self.steers_epsilon:
            most = math.inf if driver.attack.epsilon == AUTO else float(driver.attack.epsilon)
            guessing = self._guessing(driver.engine.model)
            kept["controller"] = EpsilonController(self._strength, self.args.device, guessing, most)
        found = {name: each for name, each in kept.items() if each is not None}
        for name in found.keys() & self._saved.keys():
            found[name].load_state_dict(self._saved[name])
            self._settle_due = False
        return found

    def _guessing(self, model: nn.Module) -> GuessingLoss:
        """What guessing would cost; known of the model's own loss alone."""
        own = type(self).compute_loss in (Trainer.compute_loss, Seq2SeqTrainer.compute_loss)
        own = own and getattr(self, "compute_loss_func", None) is None and self.label_smoother is None
        return guessing_of(model) if own else GuessingLoss()

    def _detach(self) -> None:
        if self._driver is not None:
            self._driver.target.detach()
        self._driver = None

    def _valid_range(self) -> tuple[Tensor, Tensor] | None:
        clip = self.args.adv_clip if isinstance(self.args, AdversarialArguments) else None
        return None if clip is None else valid_range(clip, getattr(self, "processing_class", None))

    def _for_model(self, inputs: dict[str, Any]) -> Any:
        column = self._label_column()
        return without_column(inputs, column)

    def _label_column(self) -> str | None:
        """The column of the data that only a targeted attack reads."""
        label = self.attack.targeted
        return label if isinstance(label, str) and label != "least_likely" else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        column = self._label_column()
        kept: Any = self._signature_columns
        if column is not None and kept is not None and column not in kept:
            vars(self)["_signature_columns"] = [*kept, column]

    def _micro_batches(self) -> int:
        """How many micro-batches this optimizer step has."""
        return getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)

    # What the attack keeps ----------------------------------------------------------------------------------------

    def _settle(self) -> None:
        total = functools.partial(self.accelerator.reduce, reduction="sum")
        for each in (self._kept or {}).values() if self._settle_due else ():
            each.settle(self._inner(self.model_wrapped), total)
        self._settle_due = False

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # With `auto_find_batch_size` a run starts anew after it has run out of memory.
        self._forget()
        return super()._inner_training_loop(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if not self._kept and self._unit == 1.0:
            return
        self._settle()
        if self.args.should_save:
            states = {name: each.state_dict() for name, each in (self._kept or {}).items()}
            torch.save({"epsilon_unit": self._unit, **states}, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else os.path.join(checkpoint, STATE_FILE)
        if path is None or not os.path.exists(path):
            return
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self._unit, self._unit_known = state.pop("epsilon_unit"), True
        self._saved = state

    def _inner(self, model: nn.Module) -> nn.Module:
        """The model inside the wrappers of the engine and of torch.compile, its autocast kept."""
        # accelerate asks the file system which engines are installed, each time: a millisecond or two.
        if self._unwrapped is None or self._unwrapped[0] is not model:
            inner = self.accelerator.unwrap_model(model)
            self._unwrapped = (model, getattr(inner, "_orig_mod", inner))
        return self._unwrapped[1]

    def _on_its_device(self) -> nn.Module:
        model = self._inner(self.model_wrapped)
        if self.place_model_on_device and next(model.parameters()).device != self.args.device:
            # With full evaluation in half precision Trainer has not moved the model yet.
            model.to(self.args.device)
        return model

    def _next_position(self) -> int:
        """The index of this micro-batch in its optimizer step, on this process."""
        step, index = self._position
        index = index + 1 if step == self.state.global_step else 0
        self._position = (self.state.global_step, index)
        return index

    def _seed(self) -> int:
        """Differs by seed, step and micro-batch over all ranks: N processes draw as accumulation over N does."""
        world = self.accelerator.num_processes
        step, index = self._position
        batch = index * world + self.accelerator.process_index
        return hash((self.args.seed, step, batch)) % 2**63


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    """`Trainer` with adversarial training: swap the name, pass `--adv_epsilon`."""


class AdversarialSeq2SeqTrainer(AdversarialTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with adversarial training; the encoder's input is attacked."""


class _Replaced:
    """A context: inside, the losses and backward passes of the trainer are those of a pass.

    `compute_loss` and `accelerator.backward` are wrapped on the instances, so overrides above and below are all inside.
    """

    # A class: a generator takes four times as many calls, several times a step.
    def __init__(self, trainer: AdversarialTrainerMixin, running: RunningPass) -> None:
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
