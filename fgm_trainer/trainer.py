"""`AdversarialTrainer`: every pass of a step is a `super().training_step` of its own.

A batch enters `training_step`; `run.AttackedRun` hands it to the driver, which runs the attack's passes; the target
carries the perturbation in and the gradient back. Nothing of `Trainer` is copied, and no weight is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .arguments import AdversarialArguments, changed_attack_fields, flags_of
from .attacks import Attack
from .cards import add_to_card
from .compatibility import refuse
from .engine.accelerate import bare
from .engine.running_pass import RunningPass
from .engine.schedule import Schedule
from .metrics import show
from .perturbation.batches import without_column
from .perturbation.target import Target
from .plan import Plan, make_plan
from .robustness import RobustnessReport
from .run import AttackedRun
from .trainer_evaluation import dataset_of, evaluate_trainer

logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class AdversarialTrainerMixin(_Base):
    """Goes in front of a `Trainer` subclass: `class MyTrainer(AdversarialTrainerMixin, SFTTrainer)`.

    Args:
        attack: the attack, where `args` has no `adv_*` flags or leaves those of the attack at their defaults.
            Without one the flags describe it; with plain `TrainingArguments` it is `FGM(epsilon=1.0)`. There an
            attack's fixed epsilon counts from the first step on; with `adv_*` flags it rises over `adv_warmup`.
        target: what is perturbed, in place of `args.adv_target`.
        epsilon_schedule: what epsilon is multiplied by, as a function of training progress from 0 to 1; 0 for no
            attack. In place of `args.adv_start` and `args.adv_warmup`.
        *args, **kwargs: `Trainer`'s own.

    Raises:
        ValueError: `attack` and attack flags are both given.
    """

    # Where the arguments have none (`patching.patch`).
    _adv_default_flags: AdversarialArguments | None = None

    def __init__(
        self,
        *args: Any,
        attack: Attack | None = None,
        target: str | Target | None = None,
        epsilon_schedule: Callable[[float], float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if attack is not None and (changed := changed_attack_fields(self._adv_flags)):
            raise ValueError(
                f"The attack is given twice: attack={attack!r} and, in the arguments, {', '.join(changed)}. Leave one "
                "out."
            )
        self._adv_prepare(attack, target, epsilon_schedule)

    def _adv_prepare(
        self,
        attack: Attack | None = None,
        target: str | Target | None = None,
        epsilon_schedule: Callable[[float], float] | None = None,
    ) -> None:
        """What `__init__` adds to a Trainer that is made."""
        self._adv_given = attack, target, epsilon_schedule
        # The pass that an overridden `training_step` or `compute_loss` is called for.
        self.running_pass: RunningPass | None = None
        # What the card shows, by the name of the data.
        self._adv_reports: dict[str, RobustnessReport] = {}
        self._adv_begin()

    @property
    def attack(self) -> Attack:
        """What the run is attacked with."""
        return self._adv_run.plan.attack

    @property
    def schedule(self) -> Schedule:
        """When, and how epsilon rises."""
        return self._adv_run.plan.schedule

    def _adv_begin(self) -> None:
        """A new run; the flags are read again, since a hyperparameter search sets them one by one."""
        self._adv_run = AttackedRun(self, self._adv_plan())

    @property
    def _adv_flags(self) -> AdversarialArguments | None:
        """The flags, where there are some."""
        return flags_of(self.args) or self._adv_default_flags

    def _adv_plan(self) -> Plan:
        return make_plan(self._adv_flags, *self._adv_given, getattr(self, "processing_class", None))

    def _hp_search_setup(self, trial: Any) -> None:
        # Trainer brings what a trial says into the type of what is there, and epsilon may be a number or a word.
        args: Any = self.args
        before = getattr(args, "adv_epsilon", None)
        if before is not None:
            args.adv_epsilon = None
        super()._hp_search_setup(trial)
        if before is not None and args.adv_epsilon is None:
            args.adv_epsilon = before
        self._adv_begin()
        self._adv_refuse()

    def _adv_refuse(self) -> None:
        plan = self._adv_run.plan
        if plan.attacks:
            model = None if self.model is None else bare(self.model, self.accelerator)
            refuse(self, model, plan.attack, plan.target, plan.epsilon_unit)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after every problem of the configuration was looked for.

        Raises:
            ValueError: one message with all of them.
        """
        self._adv_begin()
        self._adv_refuse()
        # They were of another model.
        self._adv_reports = {}
        if self._adv_given[0] is None and self._adv_flags is None:
            logger.warning("No attack was given: training with FGM(epsilon=1.0) on the input token embeddings.")
        try:
            result = super().train(*args, **kwargs)
        finally:
            self._adv_run.detach()
        self._adv_run.end()
        return result

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step on a micro-batch: as many passes as the attack asks for, each `super().training_step`.

        Returns:
            The clean loss, as `Trainer` reports it; where there is none, that of the first training pass.
        """
        stock = super().training_step
        if not self._adv_run.plan.attacks:
            return stock(model, self._adv_for_model(inputs), *args, **kwargs)
        return self._adv_run.step(model, inputs, lambda called, batch: stock(called, batch, *args, **kwargs))

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """`Trainer.prediction_step`, without the column that only a targeted attack reads."""
        return super().prediction_step(model, self._adv_for_model(inputs), *args, **kwargs)

    def _adv_for_model(self, inputs: dict[str, Any]) -> Any:
        return without_column(inputs, self._adv_run.plan.attack.targeted)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`; the lines of training get the attack's figures as well."""
        # setfit's loss has a name of its own.
        if "learning_rate" in logs and any(name.endswith("loss") for name in logs) and self._adv_run.plan.attacks:
            logs = self._adv_run.with_figures(logs)
        super().log(logs, *args, **kwargs)
        show(self, logs)

    def evaluate_robustness(self, eval_dataset: Any = None, **kwargs: Any) -> Any:
        """Clean and adversarial accuracy of the model: `robustness.evaluate_robustness` with the Trainer's own parts.

        Under DDP processes take turns at the batches; where weights are spread each attacks them all. All get the same
        report.

        Args:
            eval_dataset: what `Trainer.evaluate` takes: a data set, also an iterable one; a dictionary of data sets;
                the name of one of the Trainer's own; None for the Trainer's own.
            **kwargs: `attacks`, `epsilons` and the other arguments of `robustness.evaluate_robustness`.

        Returns:
            A `RobustnessReport`; for a dictionary of data sets one of each, by name.

        Raises:
            ValueError: there is no data set, or what `robustness.evaluate_robustness` refuses.
        """
        dataset = dataset_of(self, eval_dataset)
        if isinstance(dataset, Mapping):
            self._adv_reports = {name: self.evaluate_robustness(one, **kwargs) for name, one in dataset.items()}
            return self._adv_reports
        report = evaluate_trainer(self, self._adv_plan(), dataset, **kwargs)
        self._adv_reports = {"": report}
        return report

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`, with the attack's settings and what `evaluate_robustness` found last."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and (self._adv_run.plan.attacks or self._adv_reports):
            model: Any = self.model
            kind = type(bare(model, self.accelerator)).__name__
            add_to_card(str(self.args.output_dir), self._adv_run.plan, self._adv_run.scope, self._adv_reports, kind)

    # What Trainer asks for on the way ---------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # The column of the data that only a targeted attack reads.
        column, kept = self._adv_run.plan.attack.targeted, vars(self)["_signature_columns"]
        if isinstance(column, str) and kept is not None and column not in kept:
            vars(self)["_signature_columns"] = [*kept, column]

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        # With `auto_find_batch_size` a run starts anew after it has run out of memory.
        self._adv_run.state.forget()
        return super()._inner_training_loop(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self._adv_run.state.save(output_dir, self._adv_run.driver)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._adv_run.state.load(checkpoint)


class AdversarialTrainer(AdversarialTrainerMixin, Trainer):
    """`Trainer` with adversarial training: swap the name, pass `--adv_epsilon`."""


class AdversarialSeq2SeqTrainer(AdversarialTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with adversarial training; the encoder's input is attacked."""
