"""`AdversarialTrainer`: every pass of a step is a `super().training_step` of its own.

A batch enters `training_step`; the attack asks for passes; the target carries the perturbation in and the gradient
back. Nothing of `Trainer` is copied, and no weight is written.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.utils import logging

from .arguments import AdversarialArguments, changed_attack_fields
from .attacks import FGM, Answer, Attack, Look, Train, run
from .monitoring import CollapseWatch, LogWindow
from .passes import Pass
from .raw import gradients_stay_local, scaled_as_the_engine_would
from .refusals import refuse
from .schedule import Schedule
from .targets import EmbeddingOutput, Target, find_target, look

if TYPE_CHECKING:
    from .robustness import RobustnessReport

logger = logging.get_logger(__name__)

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
        *args, **kwargs: `Trainer`'s own.

    Raises:
        ValueError: `attack` and attack flags are both given.
    """

    def __init__(self, *args: Any, attack: Attack | None = None, target: str | Target | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        flags = self.args if isinstance(self.args, AdversarialArguments) else None
        changed = changed_attack_fields(flags)
        if attack is not None and changed:
            raise ValueError(
                f"The attack is given twice: attack={attack!r} and, in the arguments, {', '.join(changed)}. "
                "Leave one out."
            )
        self._given_attack, self._given_target = attack, target
        self._configure()
        self._place: Target | None = None
        self._position = (-1, 0)
        self._checked_batch = False
        self._window = LogWindow()
        self._watch = CollapseWatch()

    def _configure(self) -> None:
        """Reads the flags; again when training starts, since a hyperparameter search sets them one by one."""
        flags = self.args if isinstance(self.args, AdversarialArguments) else None
        self.attack: Attack = self._given_attack or (flags.make_attack() if flags else FGM(epsilon=1.0))
        self.schedule: Schedule = flags.make_schedule() if flags else Schedule()
        self._target: str | Target = self._given_target or (flags.adv_target if flags else "word_embeddings")
        self._same_dropout = flags is not None and flags.adv_same_dropout

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        self._configure()
        if self.attack.epsilon > 0:
            refuse(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, after every problem of the configuration was looked for.

        Raises:
            ValueError: one message with all of them.
        """
        self._configure()
        if self.attack.epsilon > 0:
            refuse(self)
        if self._given_attack is None and not isinstance(self.args, AdversarialArguments):
            logger.warning("No attack was given: training with FGM(epsilon=1.0) on the input token embeddings.")
        self._window, self._watch = LogWindow(), CollapseWatch()
        self._checked_batch, self._position = False, (-1, 0)
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._place is not None:
                self._place.detach()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One step on a micro-batch: as many passes as the attack asks for, each `super().training_step`.

        Returns:
            The loss of the first training pass, as `Trainer` reports it: the clean loss wherever there is one.
        """
        stock = functools.partial(super().training_step, model, inputs, *args, **kwargs)
        if self.attack.epsilon == 0:
            return stock()
        epsilon = self.attack.epsilon * self.schedule.factor(self.state.global_step, self.state.max_steps)
        place = self._attached(model)
        if epsilon == 0 and self._checked_batch:
            return stock()
        try:
            if epsilon == 0:
                return self._check_batch(place, inputs, stock)
            return self._adversarial_step(place, model, inputs, stock, epsilon, args, kwargs)
        except BaseException:
            self._position = (-1, 0)
            raise

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """`Trainer.log`; the lines of training get the attack's figures as well."""
        if "loss" in logs and "learning_rate" in logs and self.attack.epsilon > 0:
            logs = {**logs, **self._window.close(self.accelerator)}
            self._watch.see(logs["loss"], self.state.global_step, self.schedule, self.state.max_steps)
            if not math.isfinite(logs.get("adv_loss", 0.0)):
                logger.warning(
                    f"The adversarial loss is {logs['adv_loss']} in the steps up to {self.state.global_step}."
                )
        super().log(logs, *args, **kwargs)

    def evaluate_robustness(self, eval_dataset: Any = None, **kwargs: Any) -> RobustnessReport:
        """Clean and adversarial accuracy of the model: `robustness.evaluate_robustness` with the Trainer's own parts.

        Every process evaluates the whole data set, so all get the same report.

        Args:
            eval_dataset: a data set; None for the Trainer's own.
            **kwargs: `attacks`, `epsilons` and the other arguments of `robustness.evaluate_robustness`.
        """
        from .robustness import evaluate_robustness

        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluate_robustness needs a data set: pass eval_dataset here or to the Trainer.")
        kwargs.setdefault("batch_size", self.args.eval_batch_size)
        kwargs.setdefault("collate_fn", self.data_collator)
        kwargs.setdefault("target", self._target)
        kwargs.setdefault("progress", not self.args.disable_tqdm)
        kwargs.setdefault("seed", self.args.seed)
        model = self._inner(self.model_wrapped)
        if self.place_model_on_device and next(model.parameters()).device != self.args.device:
            # With full evaluation in half precision Trainer has not moved the model yet.
            model.to(self.args.device)
        return evaluate_robustness(model, _without_unused(self, dataset), **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`, with a section that names the attack and its settings."""
        super().create_model_card(*args, **kwargs)
        if not self.is_world_process_zero() or self.attack.epsilon == 0:
            return
        rows = self._resolved().settings() | {"target": str(self._target), **vars(self.schedule)}
        lines = [f"| {name} | {value} |" for name, value in rows.items()]
        with open(os.path.join(str(self.args.output_dir), "README.md"), "a", encoding="utf-8") as card:
            card.write("\n".join(["\n## Adversarial training\n", "| setting | value |", "|---|---|", *lines, ""]))

    # One step -----------------------------------------------------------------------------------------------------

    def _adversarial_step(
        self,
        place: Target,
        model: nn.Module,
        inputs: Mapping[str, Any],
        stock: Callable[[], Tensor],
        epsilon: float,
        args: Any,
        kwargs: Any,
    ) -> Tensor:
        attack = self._resolved()
        assert attack.scope is not None
        random_state = _random_state(self.args.device) if self._same_dropout else None
        losses: list[Tensor] = []
        first = self._next_position() == 0

        def train(request: Train, last: bool) -> Answer | None:
            with ExitStack() as stack:
                _restore(random_state)
                if not last:
                    stack.enter_context(gradients_stay_local(self.accelerator, model))
                seen = stack.enter_context(place.record(request.delta, gradient=not last))
                scale = stack.enter_context(self._compute_loss_seen(place, seen, inputs, request.weight))
                loss = stock() / request.weight
                self._check_forward(seen)
            losses.append(loss)
            if request.delta is not None:
                # Only the perturbation that is trained on last is reported.
                self._window.perturbed(loss, seen.row_norms() if last else None)
            if last:
                return None
            gradient = seen.gradient([leaf.grad for leaf in seen.leaves])
            return self._answer(seen, gradient / scale[0], loss, attack.scope or "")

        def look_(request: Look) -> Answer:
            _restore(random_state)
            inner = self._inner(model)
            prepared = self._prepare_inputs(dict(inputs))
            inner.train()

            def loss_of() -> Tensor:
                with self.compute_loss_context_manager():
                    loss: Any = self.compute_loss(inner, dict(prepared), **_loss_arguments(args, kwargs))
                return loss  # type: ignore[no-any-return]

            scaled = functools.partial(scaled_as_the_engine_would, self.accelerator)
            seen, gradient, loss = look(place, inputs, request.delta, loss_of, scaled)
            return self._answer(seen, gradient, loss, attack.scope or "")

        self._window.begin(first, self.args.device)
        run(attack, epsilon, self._seed(), train, look_)
        self._checked_batch = True
        return losses[0]

    def _answer(self, seen: Pass, gradient: Tensor, loss: Tensor, scope: str) -> Answer:
        units = seen.units(scope)
        self._window.gradient(units.only_tokens(gradient))
        return Answer(gradient, units, loss)

    def _check_batch(self, place: Target, inputs: Mapping[str, Any], stock: Callable[[], Tensor]) -> Tensor:
        """The first batch is checked even where the attack starts later."""
        with place.record(gradient=True) as seen, self._compute_loss_seen(place, seen, inputs, 1.0):
            loss = stock()
            self._check_forward(seen)
        seen.gradient([leaf.grad for leaf in seen.leaves])
        seen.units(self._resolved().scope or "")
        self._checked_batch = True
        return loss

    def _check_forward(self, seen: Pass) -> None:
        if not seen.forward_done:
            raise RuntimeError(
                f"{type(self).__name__}.training_step does not call self.compute_loss, where the loss is weighted and "
                "the perturbation checked. Let it call compute_loss, or use fgm_trainer.raw.Adversary in a loop."
            )

    @contextmanager
    def _compute_loss_seen(
        self, place: Target, seen: Pass, inputs: Mapping[str, Any], weight: float
    ) -> Iterator[list[Tensor]]:
        """Weights the loss, and yields a list that receives d(what backward starts from) / d(loss).

        That factor holds whatever the engine multiplies in: accumulation, GradScaler, DeepSpeed's loss scale, the
        weight. `compute_loss` is wrapped on the instance, so overrides above and below this class are all inside.
        """
        scale: list[Tensor] = []
        compute_loss: Callable[..., Any] = self.compute_loss
        own = vars(self).get("compute_loss")

        @functools.wraps(compute_loss)
        def weighted(*args: Any, **kwargs: Any) -> Any:
            result = compute_loss(*args, **kwargs)
            place.forward_ended(seen, inputs)
            loss = result[0] if isinstance(result, tuple) else result
            if loss.requires_grad:
                loss.register_hook(scale.append)
            loss = loss * weight
            return (loss, *result[1:]) if isinstance(result, tuple) else loss

        vars(self)["compute_loss"] = weighted
        try:
            yield scale
        finally:
            vars(self).pop("compute_loss")
            if own is not None:
                vars(self)["compute_loss"] = own

    # Preparation --------------------------------------------------------------------------------------------------

    def _attached(self, model: nn.Module) -> Target:
        """The target, its hooks on the model that is being trained."""
        inner = self._inner(model)
        if self._place is None or self._place.model is not inner:
            if self._place is not None:
                self._place.detach()
            place = self._target if isinstance(self._target, Target) else find_target(self._target, inner)
            place.attach(inner, model)
            self._place = place
        return self._place

    def _inner(self, model: nn.Module) -> nn.Module:
        """The model inside the wrappers of the engine and of torch.compile, its autocast kept."""
        inner = self.accelerator.unwrap_model(model)
        inner = getattr(inner, "_orig_mod", inner)
        assert isinstance(inner, nn.Module)
        return inner

    def _resolved(self) -> Attack:
        """The attack with its scope settled: asked for, else the method's default, else the target's."""
        place = self._place or EmbeddingOutput()
        return replace(self.attack, scope=place.settle(self.attack.scope, self.attack.default_scope))

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


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None, torch.device]:
    own = torch.get_device_module(device).get_rng_state(device) if device.type != "cpu" else None
    return torch.get_rng_state(), own, device


def _restore(state: tuple[Tensor, Tensor | None, torch.device] | None) -> None:
    if state is None:
        return
    cpu, own, device = state
    torch.set_rng_state(cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own, device)


def _loss_arguments(args: Any, kwargs: Any) -> dict[str, Any]:
    """`training_step`'s further arguments, for `compute_loss`: v4 and v5 pass num_items_in_batch, by place or name."""
    return {"num_items_in_batch": args[0]} if args else dict(kwargs)


def _without_unused(trainer: Any, dataset: Any) -> Any:
    """The data set without the columns that the model does not take, as `Trainer.evaluate` would see it."""
    remove = trainer._remove_unused_columns
    return remove(dataset, description="evaluation") if hasattr(dataset, "column_names") else dataset
