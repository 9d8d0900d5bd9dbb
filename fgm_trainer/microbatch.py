"""One attacked micro-batch in a `Trainer`: each of its training passes is a `super().training_step`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from .attacks import Answer, Attack, Glance, Look, Step, Train, run
from .driving import (
    answer_from,
    answer_look,
    chosen_in,
    scaled_as_the_engine_would,
)
from .objective import Outputs, detached, divergence, logits_of, problem_of
from .passes import Earlier, Pass
from .randomness import Masks
from .target import Target

if TYPE_CHECKING:
    from .trainer import AdversarialTrainerMixin


class MicroBatch:
    """The passes of one micro-batch.

    Args:
        trainer: whose they are.
        attack: what asks for them.
        scope: the attack's scope, settled.
        place: the attached target.
        model: the model as the engine wrapped it.
        inputs: what the model is given.
        given: the same with the columns that only the attack reads.
        stock: `super().training_step` on the inputs.
        loss_arguments: what `compute_loss` is given besides.
    """

    def __init__(
        self,
        trainer: AdversarialTrainerMixin,
        attack: Attack,
        scope: str,
        place: Target,
        model: nn.Module,
        inputs: Mapping[str, Any],
        given: Mapping[str, Any],
        stock: Callable[[], Tensor],
        loss_arguments: dict[str, Any],
    ) -> None:
        self._trainer, self._attack, self._scope, self._place = trainer, attack, scope, place
        self._model, self._inputs, self._given = model, inputs, given
        self._stock, self._loss_arguments = stock, loss_arguments
        self._compute_loss: Callable[..., Any] = trainer.compute_loss
        self._backward: Callable[..., None] = trainer.accelerator.backward
        # Of the training pass in progress.
        self._found: _Found | None = None
        self._earlier = Earlier() if trainer._gradients_wait else None
        self._masks = Masks(trainer.accelerator.device, trainer._same_dropout)
        self._clean: Tensor | None = None
        self._perturbed: list[Tensor] = []
        self._norms: tuple[Tensor, Tensor] | None = None

    def run(self, step: Step) -> Tensor:
        """All passes. Returns the clean loss as `Trainer` reports it, or where no pass is clean, the first one's."""
        with self._measured():
            run(self._attack, step, self._train, self._look)
        several = len(self._perturbed) > 1
        mean = torch.stack(self._perturbed).mean(0) if several else self._perturbed[0]
        self._trainer._window.perturbed(mean, self._norms)
        return self._perturbed[0] if self._clean is None else self._clean

    def check(self) -> Tensor:
        """A clean pass that finds out whether this batch can be attacked, where the attack starts later."""
        with self._measured(), self._place.record(gradient=True, scope=self._scope) as seen:
            loss, _ = self._pass(seen, Train())
        seen.gradient([leaf.grad for leaf in seen.leaves])
        seen.units()
        return loss

    def _train(self, request: Train, last: bool) -> Answer | None:
        trainer = self._trainer
        chosen = chosen_in(self._inputs, request)
        recorded = self._place.record(
            request.delta, gradient=not last, scope=self._scope, chosen=chosen, earlier=self._earlier
        )
        local = nullcontext() if last else trainer._gradients_stay(self._model)
        with self._masks.drawn(request.masks), local, recorded as seen:
            reported, found = self._pass(seen, request)
        unweighted = _over(reported, request.weight)
        loss = unweighted if found.reported is None else found.reported
        if request.delta is None:
            self._clean = unweighted
        else:
            self._perturbed.append(loss)
            self._norms = seen.row_norms()
        if last:
            return None
        gradient = seen.gradient([leaf.grad for leaf in seen.leaves]) / found.scale[0]
        return self._counted(answer_from(seen, gradient, found.loss, found.outputs))

    def _look(self, request: Look | Glance) -> Answer:
        trainer = self._trainer
        inner = trainer._inner(self._model)
        inner.train()
        inputs, given = (trainer._prepare_inputs(dict(batch)) for batch in (self._inputs, self._given))
        wanted = {"return_outputs": True} if self._attack.reads_outputs else {}

        def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
            with trainer.compute_loss_context_manager():
                result: Any = self._compute_loss(model, dict(batch), **wanted, **self._loss_arguments)
            return result if wanted else (result, None)

        scaled = functools.partial(scaled_as_the_engine_would, trainer.accelerator)
        with self._masks.drawn(request.masks):
            answer = answer_look(request, self._attack, self._place, self._scope, inner, inputs, given, loss_of, scaled)
        return self._counted(answer)

    def _counted(self, answer: Answer) -> Answer:
        self._trainer._window.gradient(answer.gradient)
        return answer

    def _pass(self, seen: Pass, request: Train) -> tuple[Tensor, _Found]:
        """One stock step: what it reports, and what was found out inside."""
        self._found = found = _Found(seen, request)
        try:
            reported = self._stock()
        finally:
            self._found = None
        if not seen.forward_done:
            raise RuntimeError(
                f"{type(self._trainer).__name__}.training_step does not call self.compute_loss, where the loss is "
                "weighted and the perturbation checked. Let it call compute_loss, or use fgm_trainer.raw.Adversary in "
                "a loop."
            )
        return reported, found

    def _measured(self) -> _Replaced:
        """Inside, training passes weight the loss and add the divergences.

        `compute_loss` is wrapped on the instance, so overrides above and below are all inside.
        """
        trainer = self._trainer

        def weighted(*args: Any, **kwargs: Any) -> Any:
            return self._weighted(*args, **kwargs)

        # Its signature is found.
        vars(weighted)["__wrapped__"] = self._compute_loss
        if not self._attack.reads_outputs:
            return _Replaced((trainer, "compute_loss", weighted))
        return _Replaced((trainer, "compute_loss", weighted), (trainer.accelerator, "backward", self._with_divergence))

    def _weighted(self, *args: Any, **kwargs: Any) -> Any:
        """`compute_loss` of a training pass; the Trainer's own outside of one."""
        # What it calls in turn is its own business.
        found, self._found = self._found, None
        if found is None:
            return self._compute_loss(*args, **kwargs)
        reads = self._attack.reads_outputs
        asked = kwargs.get("return_outputs", False) or any(a is True for a in args[2:3])
        wanted = {"return_outputs": True} if reads and not asked else {}
        try:
            result = self._compute_loss(*args, **kwargs, **wanted)
        finally:
            self._found = found
        self._place.forward_ended(found.seen, self._inputs)
        loss, outputs = result if isinstance(result, tuple) else (result, None)
        found.loss = loss.detach()
        request = found.request
        if reads:
            logits = logits_of(outputs)
            found.outputs = detached(logits)
            if request.against:
                problem = problem_of(self._trainer._inner(self._model))
                found.divergence = divergence(logits, request.against, problem, self._inputs.get("attention_mask"))
        measure = loss if found.divergence is None else found.divergence
        if found.seen.wanted and measure.requires_grad:
            measure.register_hook(found.scale.append)
        loss = loss if request.weight == 1 else loss * request.weight
        return (loss, outputs) if asked else loss

    def _with_divergence(self, loss: Tensor, **kwargs: Any) -> None:
        """`accelerator.backward` of a training pass; the accelerator's own outside of one.

        A divergence is added here, since `Trainer` divides some losses by the accumulation steps, and not others.
        """
        found = self._found
        if found is not None and found.divergence is not None:
            request = found.request
            share = found.divergence / self._trainer._micro_batches()
            started = share * _divided_later(self._trainer.accelerator, kwargs)
            if request.weight:
                loss = loss + started
            else:
                # A loss of weight 0 is left out: 0 times NaN is NaN.
                loss = started
                found.loss = found.divergence.detach()
                found.reported = share.detach() / sum(a.weight for a in request.against)
        self._backward(loss, **kwargs)


class _Found:
    """What is found out during a training pass.

    Args:
        seen: what the target met.
        request: what was asked for.

    Attributes:
        loss: the loss, or of a pass without one its divergence; unweighted, detached.
        scale: d(what backward started from) / d(loss), once it is there: whatever the engine multiplies in, such as
            accumulation, GradScaler, DeepSpeed's loss scale and the weight.
        reported: of a pass without a loss its divergence, unweighted, as `Trainer` would report a loss.
    """

    loss: Tensor
    reported: Tensor | None = None
    outputs: Outputs = ()
    divergence: Tensor | None = None

    def __init__(self, seen: Pass, request: Train) -> None:
        self.seen, self.request = seen, request
        self.scale: list[Tensor] = []


def _over(loss: Tensor, weight: float) -> Tensor:
    # Python's cost of a step is counted in such operations.
    return loss if weight == 1 else loss / weight


class _Replaced:
    """A context: inside, each (instance, name, call) has the call in place of its own method.

    A class: a generator takes four times as many calls.
    """

    def __init__(self, *calls: tuple[Any, str, Callable[..., Any]]) -> None:
        self._calls = calls

    def __enter__(self) -> None:
        self._own = [vars(instance).get(name) for instance, name, _ in self._calls]
        for instance, name, call in self._calls:
            vars(instance)[name] = call

    def __exit__(self, *error: object) -> None:
        for (instance, name, _), own in zip(self._calls, self._own, strict=True):
            vars(instance).pop(name)
            if own is not None:
                vars(instance)[name] = own


def _divided_later(accelerator: Any, backward_arguments: dict[str, Any]) -> int:
    """What `accelerator.backward`, or the engine inside it, divides a loss by."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return int(accelerator.gradient_accumulation_steps)
    if not backward_arguments.get("scale_wrt_gas", True):
        return 1
    return int(accelerator.deepspeed_engine_wrapped.engine.gradient_accumulation_steps())
