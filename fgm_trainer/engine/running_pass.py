"""One pass while a loop makes it: its loss, the way back, and what came of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ForwardPass, PassResult, Request, TrainPass
from ..perturbation.batches import copied, examples_in
from ..perturbation.calls import SharedCalls
from ..perturbation.divergence import Against, Outputs, divergence, embeddings_noted, logits_of
from ..perturbation.geometry import widen
from ..perturbation.lookups import eval_mode
from ..perturbation.target import Target
from .accelerate import Engine
from .dropout import random_state_kept

# One pass of a loop: (the pass, the model to call, the batch) -> what the loop reports as its loss.
RunPass = Callable[["RunningPass", nn.Module, Any], Tensor]


@dataclass
class MicroBatch:
    """What the passes of one micro-batch share.

    Args:
        target: what is perturbed.
        engine: what runs the backward passes.
        calls: the calls of the target.
        run_pass: makes one pass.
        micro_batches: of how many the loop itself takes the mean; None where the engine does.
        reads_outputs: whether the attack compares outputs.
        check_range: raises where a clean value was outside of the valid range.
    """

    target: Target
    engine: Engine
    calls: SharedCalls
    run_pass: RunPass
    micro_batches: int | None
    reads_outputs: bool
    check_range: Callable[[list[Tensor]], None]


class RunningPass:
    """One pass while a loop makes it.

    The loop calls `measure` where it computes a loss and `backward` where it starts a backward pass; several of each
    are several parts of one batch.

    Args:
        shared: what it shares with the other passes of the micro-batch.
        request: what the attack asked for.
        batch: what the model is given.
        gradient: whether the gradient with respect to the perturbation is wanted.
        trains: whether weights get gradients from it.

    Attributes:
        forward_pass: the calls of the target in it.
        reported: what the loop reported as the loss of this pass.
        outputs: the outputs of the last loss, where the loop has them.
    """

    def __init__(
        self, shared: MicroBatch, request: Request, batch: Any, *, gradient: bool = False, trains: bool = False
    ) -> None:
        self.request, self.gradient, self.trains = request, gradient, trains
        self._shared, self._batch = shared, batch
        chosen = request.rows if isinstance(request, TrainPass) else None
        self.forward_pass = shared.target.new_pass(
            shared.calls, request.delta, gradient=gradient, trains=trains, chosen=chosen
        )
        self.reported = torch.zeros(())
        self.outputs: Any = None
        self.scales = LossScales()
        self._losses: list[Tensor] = []
        self._logits: Outputs = ()
        self._divergences = _Divergences()
        self._went_back = self._measuring = False
        self._autograd = True

    @property
    def is_training(self) -> bool:
        """Whether the attack asked for a training pass."""
        return isinstance(self.request, TrainPass)

    @property
    def is_clean(self) -> bool:
        """Whether nothing is perturbed in it."""
        return self.request.delta is None

    @property
    def examples(self) -> int:
        """How many examples it has."""
        return examples_in(self._batch)

    @property
    def reads_outputs(self) -> bool:
        """Whether `measure` needs the outputs."""
        return self._shared.reads_outputs

    @property
    def measured(self) -> int:
        """How many losses there were."""
        return len(self._losses)

    @property
    def missed_backward(self) -> bool:
        """Whether the loop went back without `backward` where weights must get no gradient, or a divergence its own."""
        return not self._went_back and (not self.trains or bool(self._divergences.waiting))

    @property
    def takes_losses(self) -> bool:
        """Whether a loss computed now is this pass's: not one inside of another, nor a probe's without autograd."""
        return not self._measuring and torch.is_grad_enabled() == self._autograd

    @property
    def unweighted(self) -> Tensor:
        """What the loop reported, its weight taken out; of a pass without a loss its divergence."""
        if not isinstance(self.request, TrainPass):
            return self.reported
        if self.request.weight == 0 and self._divergences.reported is not None:
            return self._divergences.reported
        return self.reported if self.request.weight == 1 else self.reported / self.request.weight

    @property
    def loss(self) -> Tensor:
        """The loss as it was computed, unweighted, or the divergence where the pass has none."""
        return self._losses[0] if self.measured == 1 else torch.stack(self._losses).sum()

    def run(self, model: nn.Module) -> Tensor:
        """Has the loop make the pass; returns what it reports."""
        self._autograd = torch.is_grad_enabled()
        self.reported = self._shared.run_pass(self, model, self._batch)
        self.forward_pass.end()
        return self.reported

    def measure(self, compute: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Any]:
        """Computes a loss.

        Args:
            compute: batch -> the loss, or (loss, outputs); it gets a copy, and may take things out of it.
            batch: what the loss is computed on.

        Returns:
            The loss, weighted, and the outputs: what the loop goes on with.
        """
        shared = self._shared
        _check_whole(self, batch)
        self._measuring, before = True, _with_gradient(self)
        try:
            outputs_noted: Any = embeddings_noted(shared.engine.model) if self.reads_outputs else nullcontext([])
            with self.forward_pass.loss_of(batch), outputs_noted as noted:
                result = compute(copied(batch))
            _check_reached(self, compute, batch)
        finally:
            self._measuring = False
        if _with_gradient(self) > before:
            _refuse_own_backward(self)
        shared.check_range(shared.calls.outside)
        loss, self.outputs = result if isinstance(result, tuple) else (result, None)
        differentiated = loss
        if self.reads_outputs:
            logits = logits_of(self.outputs, noted)
            against = _against_of(self.request, self.measured, logits)
            if against:
                differentiated = self._divergences.take_in(logits, against, shared.engine.model, batch)
            self._logits += tuple(each.detach() for each in logits)
        if self.gradient and differentiated.requires_grad:
            differentiated.register_hook(functools.partial(self.scales.note, self.measured))
        weight = self.request.weight if isinstance(self.request, TrainPass) else 1.0
        # A copy: transformers 4.46 multiplies the loss in place.
        self._losses.append((loss if weight else differentiated).detach().clone())
        return loss if weight == 1 else loss * weight, self.outputs

    def backward(self, loss: Tensor, engine_backward: Callable[..., None], **kwargs: Any) -> None:
        """Starts the backward pass of a loss; divergences are added here."""
        self._went_back = True
        if isinstance(self.request, TrainPass):
            start = self._divergences.added_to(loss, self.request, self._shared, kwargs)
        else:
            start = self._divergences.take(loss)
        with self.scales:
            if self.trains:
                engine_backward(start, **kwargs)
            elif self.gradient:
                _differentiate(self._shared.engine.scaled(start), self.forward_pass.leaves)

    def result(self) -> PassResult:
        """What an attack is told of this pass."""
        tensor = self.forward_pass.tensor
        units = tensor.units()
        gradient = tensor.gradient(self.scales.of_loss) if self.gradient else torch.zeros_like(widen(tensor.delta()))
        applied = None if self.is_clean else tensor.delta()
        return PassResult(units.only_tokens(gradient), units, self.loss, applied, self._logits, tensor.ids())


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """The model's own loss and its outputs. Raises ValueError where it returns no loss."""
    outputs = model(**batch)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ValueError(f"{type(model).__name__} returned no loss for a batch of: {', '.join(batch)}. Has it labels?")
    return loss, outputs


def reported_loss(passes: Sequence[RunningPass]) -> Tensor:
    """What a loop reports of a micro-batch: the clean loss; where there is none, that of the first training pass."""
    trained = [each for each in passes if each.is_training]
    return next((each for each in trained if each.is_clean), trained[0]).unweighted


class LossScales:
    """Of each loss, d(what the way back started from) / d(loss): whatever the engine multiplies in, such as
    accumulation, GradScaler, DeepSpeed's loss scale and the weight. A context around the loop's backward pass.

    Attributes:
        of_loss: the scale by the number of the loss.
    """

    def __init__(self) -> None:
        self.of_loss: dict[int, Tensor] = {}
        self._added: set[int] = set()
        self._going_back = False

    def __enter__(self) -> None:
        self._going_back = True

    def __exit__(self, *error: object) -> None:
        self._going_back = False

    def note(self, loss: int, scale: Tensor) -> None:
        """A loss's own gradient arrived. A graph may be gone through several times: then scales add up."""
        if self._going_back:
            self.of_loss[loss] = self.of_loss[loss] + scale if loss in self._added else scale
            self._added.add(loss)
        elif loss not in self._added:
            # An autograd.grad of the loop's own.
            self.of_loss[loss] = scale


class _Divergences:
    """The divergences of a pass.

    Attributes:
        waiting: of the losses whose backward pass has not started yet.
        reported: of all, as the loop would report a loss; None before the first backward pass.
    """

    def __init__(self) -> None:
        self.waiting: list[Tensor] = []
        self.reported: Tensor | None = None

    def take_in(self, logits: Outputs, against: tuple[Against, ...], model: nn.Module, batch: Any) -> Tensor:
        """The divergence of a loss's outputs."""
        found = divergence(logits, against, model, batch if isinstance(batch, Mapping) else {})
        self.waiting.append(found)
        return found

    def take(self, loss: Tensor) -> Tensor:
        """What the gradient is that of: the divergences, where there are some, else the loss."""
        found = torch.stack(self.waiting).sum() if self.waiting else loss
        self.waiting = []
        return found

    def added_to(self, loss: Tensor, request: TrainPass, shared: MicroBatch, kwargs: dict[str, Any]) -> Tensor:
        """What a training pass goes back from.

        `Trainer` divides some losses by the number of micro-batches, and not others; a divergence is always divided.
        """
        if not self.waiting:
            return loss
        share = self.take(loss)
        if shared.micro_batches is not None:
            share = share / shared.micro_batches
        own = share.detach() / sum(against.weight for against in request.against)
        self.reported = own if self.reported is None else self.reported + own
        start = share if shared.micro_batches is None else share * shared.engine.divides_by(kwargs)
        # A loss of weight 0 is left out: 0 times NaN is NaN.
        return loss + start if request.weight else start


def _differentiate(start: Tensor, leaves: list[Tensor]) -> None:
    """The gradient at the leaves alone: no weight's is computed or touched."""
    if not leaves:
        return
    try:
        gradients = torch.autograd.grad(start, leaves, allow_unused=True)
    except RuntimeError as error:
        if "reentrant" not in str(error):
            raise
        raise RuntimeError(
            "Reentrant gradient checkpointing can't give the gradient with respect to the perturbation alone. "
            "Enable it with use_reentrant=False."
        ) from error
    for leaf, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


def _refuse_own_backward(running: RunningPass) -> None:
    """The loss has gone back by itself."""
    if not running.trains:
        raise RuntimeError(
            "The loss goes back by itself, so weights get gradients from a pass that only asks for the gradient at "
            "the perturbation. Choose a method whose passes all train, such as adv_method='fgm'."
        )
    if not all(call.graded for call in running.forward_pass.of_last_loss):
        raise RuntimeError(
            "The loss runs the model without autograd and goes back by itself (gradient caching by hand), so the "
            "gradient that it keeps would be that of the clean inputs. Compute the loss in one piece, or cache in "
            "its backward pass as sentence-transformers does."
        )


def _with_gradient(running: RunningPass) -> int:
    return sum(leaf.grad is not None for leaf in running.forward_pass.leaves)


def _against_of(request: Request, loss: int, logits: Outputs) -> tuple[Against, ...]:
    """What the outputs of a loss are compared with; of several losses, each with its own part."""
    against = () if isinstance(request, ForwardPass) else request.against
    if against:
        _check_graph(logits)
    own = slice(loss * len(logits), (loss + 1) * len(logits))
    return tuple(replace(a, outputs=a.outputs[own]) for a in against)


def _check_graph(logits: Outputs) -> None:
    if torch.is_grad_enabled() and not any(each.requires_grad for each in logits):
        raise ValueError(
            "This method compares the model's outputs, and the loss comes with outputs that have no graph, as that of "
            "trl's SFTTrainer does, which is computed in chunks. Take a method that raises the loss, such as "
            "adv_method='fgm'."
        )


def _check_whole(running: RunningPass, batch: Any) -> None:
    """Raises RuntimeError where a part of the examples is perturbed, and the loss is not that of all of them."""
    examples = examples_in(batch)
    if isinstance(running.request, TrainPass) and running.request.rows is not None and examples != running.examples:
        raise RuntimeError(
            f"A part of the batch is perturbed, so its loss must be computed at once; here one of {examples} of its "
            f"{running.examples} examples is. Choose a method that perturbs them all, such as adv_method='fgm'."
        )


def _check_reached(running: RunningPass, compute: Callable[[Any], Any], batch: Any) -> None:
    """Where a loss missed the target: by chance (layer drop), or always? In eval mode nothing is left to chance.

    Raises:
        RuntimeError: always.
    """
    shared, seen = running._shared, running.forward_pass
    target, model, reached = shared.target, shared.engine.model, seen.reached_modules
    missed = not seen.reached or (reached < target.expected and reached not in target.settled)
    if not missed or shared.calls.stochastic:
        return
    probe = target.new_pass(target.shared_calls("example"), None)
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad(), random_state_kept(device), target.replaced(probe), probe.loss_of(batch):
        compute(copied(batch))
    if not probe.reached:
        raise RuntimeError(target.unreached(batch))
    if probe.reached_modules <= reached:
        target.settled.add(reached)
    else:
        target.stochastic = shared.calls.stochastic = True
