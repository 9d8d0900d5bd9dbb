"""The driver: runs the passes that an attack asks for on a micro-batch, whoever owns the loop.

A loop says how one of its passes is made; the driver says which, and with what perturbation:

    attack --request--> Driver --RunningPass--> the loop's pass: measure(compute loss), backward(loss)
       ^                   |
       +----- PassResult ------+
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..attacks import Attack, ForwardPass, GradientPass, PassResult, Request, Step, TrainPass, run
from ..perturbation.batches import cloned, copied, examples_in, rows_of, versions_in
from ..perturbation.divergence import Outputs, detached, divergence, logits_of, relabelled
from ..perturbation.forward_pass import PerturbedForward, StepCalls
from ..perturbation.lookups import mean_embedding_norm
from ..perturbation.target import Target
from .accelerate import Engine
from .dropout import Masks, random_state_kept

EPSILON_UNITS = ("absolute", "embedding")

# One pass of a loop: (the pass, the model to call, the batch) -> what the loop reports as its loss.
RunPass = Callable[["RunningPass", nn.Module, Any], Tensor]


class Driver:
    """Runs the passes of attacked micro-batches.

    Args:
        attack: the attack, its lengths in the units of the target.
        target: what is perturbed, attached.
        scope: over which entries norms are taken, resolved.
        engine: what runs the backward passes.
        same_dropout: all passes of a step draw the same dropout masks.
        trains: whether training passes give gradients to weights; an evaluation's do not.
        observe: is told of every answer that an attack is sent.
    """

    def __init__(
        self,
        attack: Attack,
        target: Target,
        scope: str,
        engine: Engine,
        *,
        same_dropout: bool = False,
        trains: bool = True,
        observe: Callable[[PassResult], None] = lambda answer: None,
    ) -> None:
        self.attack, self.target, self.engine = attack, target, engine
        self._scope, self._same_dropout, self._trains, self._observe = scope, same_dropout, trains, observe
        self._device = next(engine.model.parameters()).device
        self._defers = trains and target.clip is None and engine.defers
        self._range_checked = False
        self._outside: Tensor | None = None

    def run(
        self, step: Step, batch: Any, run_pass: RunPass, given: Any = None, micro_batches: int | None = None
    ) -> list[RunningPass]:
        """The passes of one micro-batch; afterwards the weights' gradients are complete.

        Args:
            step: what the attack is told.
            batch: what the model is given.
            run_pass: makes one pass.
            given: the batch with the columns that only the attack reads; None for the batch.
            micro_batches: of how many the loop itself takes the mean; None where the engine does.

        Returns:
            The passes, in order.
        """
        state = _MicroBatch(self, batch, batch if given is None else given, run_pass, micro_batches)
        run(self.attack, step, state.train, state.look)
        return state.passes

    def check(self, batch: Any, run_pass: RunPass) -> Tensor:
        """A clean training pass that finds out whether this batch can be attacked; returns what the loop reports."""
        state = _MicroBatch(self, batch, batch, run_pass, None)
        state.calls.defers = False
        running = RunningPass(state, TrainPass(), batch, gradient=True, trains=True)
        with self.target.perturbed(running.forward_pass):
            reported = running.run(self.engine.wrapped)
        running.forward_pass.gradient(running.scales)
        running.forward_pass.units()
        return reported

    def check_range(self, calls: StepCalls | None = None) -> None:
        """Raises ValueError where a clean value was outside of the valid range.

        On a device the answer is waited for at the first batch, and where no micro-batch's calls are given.
        """
        found = [] if calls is None else calls.outside
        if found:
            flag = torch.stack(found).any()
            self._outside = flag if self._outside is None else self._outside | flag
            calls.outside = []  # type: ignore[union-attr]
        waits = calls is None or self._device.type == "cpu" or not self._range_checked
        if self._outside is None or not waits:
            return
        self._range_checked, flag, self._outside = True, self._outside, None
        if flag:
            assert self.target.clip is not None
            low, high = (bound.flatten()[0].item() for bound in self.target.clip)
            raise ValueError(
                f"adv_clip: clean values of {self.target} lie outside of the valid range, which is {low:.4g} to "
                f"{high:.4g} (of the first channel). Were they normalised? Give the Trainer the processor that made "
                "them (processing_class=...), so that the range is normalised too, or write the range that the model "
                "is really given."
            )


class _MicroBatch:
    """What the passes of one micro-batch share."""

    def __init__(self, driver: Driver, batch: Any, given: Any, run_pass: RunPass, micro_batches: int | None) -> None:
        self.driver, self._batch, self.given = driver, batch, given
        # A loss may write to its tensors; the next pass shall see what this one saw.
        self._kept, self._versions = cloned(batch), versions_in(batch)
        self.run_pass, self.micro_batches = run_pass, micro_batches
        self.calls: StepCalls = driver.target.step_calls(driver._scope, driver._defers)
        self.passes: list[RunningPass] = []
        self._masks = Masks(driver._device, driver._same_dropout)

    @property
    def batch(self) -> Any:
        """The batch as the step was given it."""
        if versions_in(self._batch) != self._versions:
            self._batch = cloned(self._kept)
            self._versions = versions_in(self._batch)
        return self._batch

    def train(self, request: TrainPass, last: bool) -> PassResult | None:
        driver = self.driver
        if not driver._trains:
            return self._measure(request, last)
        running = RunningPass(self, request, self.batch, gradient=not last, trains=True)
        self.passes.append(running)
        local = nullcontext() if last else driver.engine.local_gradients()
        with self._masks.drawn(request.masks), local, driver.target.perturbed(running.forward_pass):
            running.reported = running.run(driver.engine.wrapped)
        return None if last else self._answered(running)

    def look(self, request: GradientPass | ForwardPass) -> PassResult:
        """A pass that trains nothing, on the bare model: a wrapper's forward would wait for its backward."""
        driver, model = self.driver, self.driver.engine.model
        batch, given = self.batch, self.given
        if request.rows is not None:
            size = examples_in(batch)
            batch, given = rows_of(batch, request.rows, size), rows_of(given, request.rows, size)
        if isinstance(request, GradientPass) and request.label is not None:
            batch = relabelled(batch, request.label, given)
        called: nn.Module = model
        if isinstance(request, ForwardPass) and request.weights:
            called = _Reweighted(model, request.weights)
        running = RunningPass(self, request, batch, gradient=isinstance(request, GradientPass))
        self.passes.append(running)
        with ExitStack() as stack:
            stack.enter_context(self._masks.drawn(request.masks))
            stack.enter_context(driver.engine.local_gradients())
            stack.enter_context(driver.target.perturbed(running.forward_pass))
            stack.enter_context(still_statistics(model))
            stack.enter_context(torch.enable_grad())
            running.reported = running.run(called)
        return self._answered(running)

    def _measure(self, request: TrainPass, last: bool) -> PassResult | None:
        """A training pass where nothing trains: its loss, and unless it is the last, its gradient."""
        answer = None if last else self.look(GradientPass(request.delta))
        if request.delta is not None:
            delta = request.delta if answer is None else answer.delta
            running = RunningPass(self, replace(request, delta=delta), self.batch)
            self.passes.append(running)
            # With autograd, or a reference inside of the loss could not be told apart.
            with torch.enable_grad(), self.driver.target.perturbed(running.forward_pass):
                running.reported = running.run(self.driver.engine.model)
        return answer

    def _answered(self, running: RunningPass) -> PassResult:
        answer = running.answer()
        self.driver._observe(answer)
        return answer


class RunningPass:
    """One pass while a loop makes it: measures the loss, starts the way back, and says what came of it.

    The loop calls `measure` where it computes a loss and `backward` where it starts a backward pass; several of each
    are several parts of one batch.

    Attributes:
        forward_pass: the calls of the target in it.
        request: what the attack asked for.
        trains: whether weights get gradients from it.
        reported: what the loop reported as the loss of this pass.
        outputs: the outputs of the last loss, where the loop has them.
        measured: how many losses there were.
        scales: of each loss, d(what the way back started from) / d(loss): whatever the engine multiplies in, such as
            accumulation, GradScaler, DeepSpeed's loss scale and the weight.
    """

    def __init__(
        self, state: _MicroBatch, request: Request, batch: Any, *, gradient: bool = False, trains: bool = False
    ) -> None:
        self.request, self._state, self._batch = request, state, batch
        self._gradient, self.trains = gradient, trains
        chosen = request.rows if isinstance(request, TrainPass) else None
        self.forward_pass: PerturbedForward = state.driver.target.new_pass(
            state.calls, request.delta, gradient=gradient, trains=trains, chosen=chosen
        )
        self.reported = torch.zeros(())
        self.outputs: Any = None
        self._went_back = self._measuring = False
        self.scales: dict[int, Tensor] = {}
        # Those of the backward passes that add to gradients; an autograd.grad of the loop's own does not.
        self._added: dict[int, Tensor] = {}
        self._going_back = False
        self._losses: list[Tensor] = []
        self._logits: Outputs = ()
        # Of the losses whose backward pass has not started yet; and all of them, as the loop would report a loss.
        self._divergences: list[Tensor] = []
        self._reported_divergence: Tensor | None = None
        self._autograd = True

    @property
    def reads_outputs(self) -> bool:
        """Whether `measure` needs the outputs."""
        return self._state.driver.attack.reads_outputs

    @property
    def measured(self) -> int:
        return len(self._losses)

    @property
    def missed_backward(self) -> bool:
        """Whether the loop went back without `backward` where weights must get no gradient, or a divergence its own."""
        return not self._went_back and (not self.trains or bool(self._divergences))

    @property
    def takes_losses(self) -> bool:
        """Whether a loss computed now is this pass's: not one inside of another, nor a probe's without autograd."""
        return not self._measuring and torch.is_grad_enabled() == self._autograd

    def run(self, model: nn.Module) -> Tensor:
        """Has the loop make the pass; returns what it reports."""
        self._autograd = torch.is_grad_enabled()
        reported = self._state.run_pass(self, model, self._batch)
        self.forward_pass.end()
        return reported

    def measure(self, compute: Callable[[Any], Any], batch: Any) -> tuple[Tensor, Any]:
        """Computes a loss.

        Args:
            compute: batch -> the loss, or (loss, outputs); it gets a copy, and may take things out of it.
            batch: what the loss is computed on.

        Returns:
            The loss, weighted, and the outputs: what the loop goes on with.
        """
        state, seen = self._state, self.forward_pass
        self._measuring, before = True, _with_gradient(seen.leaves)
        try:
            with seen.loss_of(batch):
                loss, self.outputs = _pair(compute(copied(batch)))
            target = state.driver.target
            missed = not seen.reached or (
                seen.reached_modules < target.expected and seen.reached_modules not in target.settled
            )
            if missed and not state.calls.stochastic:
                self._look_again(compute, batch)
        finally:
            self._measuring = False
        if not self.trains and _with_gradient(seen.leaves) > before:
            raise RuntimeError(
                "The loss goes back by itself, so weights get gradients from a pass that only asks for the gradient at "
                "the perturbation. Choose a method whose passes all train, such as adv_method='fgm'."
            )
        if self.trains and _with_gradient(seen.leaves) > before and seen.has_references:
            raise RuntimeError(
                "The loss runs the model without autograd and goes back by itself (gradient caching by hand), so the "
                "gradient that it keeps would be that of the clean inputs. Compute the loss in one piece, or cache in "
                "its backward pass as sentence-transformers does."
            )
        state.driver.check_range(state.calls)
        measure = loss
        if self.reads_outputs:
            logits = logits_of(self.outputs)
            measure = self._compared(loss, logits, batch)
            self._logits += detached(logits)
        if self._gradient and measure.requires_grad:
            measure.register_hook(functools.partial(self._note_scale, self.measured))
        weight = self.request.weight if isinstance(self.request, TrainPass) else 1.0
        self._losses.append((loss if weight else measure).detach())
        return loss if weight == 1 else loss * weight, self.outputs

    def backward(self, loss: Tensor, engine_backward: Callable[..., None], **kwargs: Any) -> None:
        """Starts the backward pass of a loss; divergences are added here.

        `Trainer` divides some losses by the number of micro-batches, and not others; a divergence is always divided.
        """
        self._went_back = True
        started = self._with_divergence(loss, kwargs)
        self._going_back = True
        try:
            if self.trains:
                engine_backward(started, **kwargs)
            elif self._gradient:
                self._differentiate(started)
        finally:
            self._going_back = False

    def _note_scale(self, loss: int, scale: Tensor) -> None:
        if self._going_back:
            # A graph may be gone through several times.
            scale = self._added[loss] = self._added[loss] + scale if loss in self._added else scale
        if self._going_back or loss not in self._added:
            self.scales[loss] = scale

    def answer(self) -> PassResult:
        """What an attack is told of this pass."""
        seen = self.forward_pass
        units = seen.units()
        gradient = seen.gradient(self.scales) if self._gradient else seen.no_gradient()
        loss = self._losses[0] if self.measured == 1 else torch.stack(self._losses).sum()
        return PassResult(units.only_tokens(gradient), units, loss, seen.applied(), self._logits, seen.ids())

    @property
    def is_training(self) -> bool:
        return isinstance(self.request, TrainPass)

    @property
    def is_clean(self) -> bool:
        return self.request.delta is None

    @property
    def examples(self) -> int:
        return examples_in(self._batch)

    @property
    def unweighted(self) -> Tensor:
        """What the loop reported, its weight taken out; of a pass without a loss its divergence."""
        if not isinstance(self.request, TrainPass):
            return self.reported
        if self.request.weight == 0 and self._reported_divergence is not None:
            return self._reported_divergence
        return self.reported if self.request.weight == 1 else self.reported / self.request.weight

    def _compared(self, loss: Tensor, logits: Outputs, batch: Any) -> Tensor:
        """The divergence that is asked for, else the loss."""
        against = () if isinstance(self.request, ForwardPass) else self.request.against
        if not against:
            return loss
        # Of several losses, each is compared with its own part.
        own = slice(self.measured * len(logits), (self.measured + 1) * len(logits))
        against = tuple(replace(a, outputs=a.outputs[own]) for a in against)
        given = batch if isinstance(batch, Mapping) else {}
        found = divergence(logits, against, self._state.driver.engine.model, given)
        self._divergences.append(found)
        return found

    def _with_divergence(self, loss: Tensor, backward_arguments: dict[str, Any]) -> Tensor:
        if not self._divergences:
            return loss
        found, self._divergences = torch.stack(self._divergences).sum(), []
        if not isinstance(self.request, TrainPass):
            return found
        micro_batches = self._state.micro_batches
        share = found if micro_batches is None else found / micro_batches
        started = share
        if micro_batches is not None:
            started = share * self._state.driver.engine.divides_by(backward_arguments)
        if self.request.weight:
            return loss + started
        # A loss of weight 0 is left out: 0 times NaN is NaN.
        own = share.detach() / sum(a.weight for a in self.request.against)
        self._reported_divergence = own if self._reported_divergence is None else self._reported_divergence + own
        return started

    def _differentiate(self, started: Tensor) -> None:
        """The gradient at the perturbation alone: no weight's is computed or touched."""
        leaves = self.forward_pass.leaves
        if not leaves:
            return
        try:
            gradients = torch.autograd.grad(self._state.driver.engine.scaled(started), leaves, allow_unused=True)
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

    def _look_again(self, compute: Callable[[Any], Any], batch: Any) -> None:
        """The loss missed the target: by chance (layer drop), or always? In eval mode nothing is left to chance."""
        driver = self._state.driver
        probe = driver.target.new_pass(driver.target.step_calls("example"), None)
        modes = [(m, m.training) for m in driver.engine.model.modules()]
        own, driver.target._pass = driver.target._pass, probe
        try:
            driver.engine.model.eval()
            with torch.no_grad(), random_state_kept(driver._device), probe.loss_of(batch):
                compute(copied(batch))
        finally:
            driver.target._pass = own
            for module, mode in modes:
                module.training = mode
        if not probe.reached:
            raise RuntimeError(driver.target.unreached(batch))
        reached = self.forward_pass.reached_modules
        if probe.reached_modules <= reached:
            driver.target.settled.add(reached)
        else:
            driver.target.stochastic = self._state.calls.stochastic = True


class _Reweighted(nn.Module):
    """The model called with other weights; its own are not touched."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        # Not registered: this is no module of its own.
        self.__dict__["_model"], self.__dict__["_weights"] = model, weights
        self.__dict__["config"] = getattr(model, "config", None)

    def train(self, mode: bool = True) -> _Reweighted:
        self.__dict__["_model"].train(mode)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._model, dict(self._weights), args, kwargs)  # type: ignore[arg-type]


def unit_of(name: str, model: nn.Module) -> float:
    """What an epsilon is multiplied by. Raises ValueError for a name that is none of `EPSILON_UNITS`."""
    if name not in EPSILON_UNITS:
        raise ValueError(f"epsilon_unit must be one of {', '.join(EPSILON_UNITS)}; found {name!r}.")
    return mean_embedding_norm(model) if name == "embedding" else 1.0


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms keep their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    tracked = [m.track_running_stats for m in norms]
    try:
        for module in norms:
            module.track_running_stats = False
        yield
    finally:
        for module, flag in zip(norms, tracked, strict=True):
            module.track_running_stats = flag


def _with_gradient(leaves: list[Tensor]) -> int:
    return sum(leaf.grad is not None for leaf in leaves)


def _pair(result: Any) -> tuple[Tensor, Any]:
    return result if isinstance(result, tuple) else (result, None)
