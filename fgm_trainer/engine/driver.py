"""The driver: runs the passes that an attack asks for on a micro-batch, whoever owns the loop.

A loop says how one of its passes is made; the driver says which, and with what perturbation:

    attack --request--> Driver --RunningPass--> the loop's pass: measure(compute loss), backward(loss)
       ^                   |
       +--- PassResult ----+
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.stateless import _reparametrize_module

from ..attacks import Attack, ForwardPass, GradientPass, PassResult, Request, Step, TrainPass, run
from ..perturbation.batches import cloned, examples_in, rows_of, versions_in
from ..perturbation.clipping import RangeCheck
from ..perturbation.divergence import relabelled
from ..perturbation.lookups import mean_embedding_norm
from ..perturbation.target import Target
from .accelerate import Engine
from .dropout import Masks
from .running_pass import MicroBatch, RunningPass, RunPass

EPSILON_UNITS = ("absolute", "embedding")


class Driver:
    """Runs the passes of attacked micro-batches.

    Args:
        attack: the attack, its lengths in the units of the target.
        target: what is perturbed, attached.
        scope: over which entries norms are taken, resolved.
        engine: what runs the backward passes.
        same_dropout: all passes of a step draw the same dropout masks.
        trains: whether training passes give gradients to weights; an evaluation's do not.
        observe: is told of every result that an attack is sent.
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
        observe: Callable[[PassResult], None] = lambda result: None,
    ) -> None:
        self.attack, self.target, self.engine = attack, target, engine
        self.same_dropout, self.trains = same_dropout, trains
        self.device = next(engine.model.parameters()).device
        self._scope, self._observe = scope, observe
        self._defers = trains and target.clip is None and engine.defers
        self._range = RangeCheck(str(target), target.clip, self.device)

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
        shared = self._new_shared(run_pass, micro_batches)
        attacked = _AttackedMicroBatch(self, shared, batch, batch if given is None else given)
        run(self.attack, step, attacked.train, attacked.gradient_or_outputs)
        return attacked.passes

    def check(self, batch: Any, run_pass: RunPass) -> Tensor:
        """A clean training pass that finds out whether this batch can be attacked; returns what the loop reports."""
        shared = self._new_shared(run_pass, None)
        shared.calls.defers = False
        running = RunningPass(shared, TrainPass(), batch, gradient=True, trains=True)
        with self.target.perturbed(running.forward_pass):
            reported = running.run(self.engine.wrapped)
        running.result()
        return reported

    def check_range(self) -> None:
        """Raises ValueError where a clean value was outside of the valid range; waits for the device."""
        self._range.check()

    def _new_shared(self, run_pass: RunPass, micro_batches: int | None) -> MicroBatch:
        return MicroBatch(
            self.target,
            self.engine,
            self.target.shared_calls(self._scope, self._defers),
            run_pass,
            micro_batches,
            self.attack.reads_outputs,
            self._range.note,
        )


class _AttackedMicroBatch:
    """The passes of one micro-batch, each made when the attack asks for it."""

    def __init__(self, driver: Driver, shared: MicroBatch, batch: Any, given: Any) -> None:
        self._driver, self._shared, self._batch, self._given = driver, shared, batch, given
        # A loss may write to its tensors; the next pass shall see what this one saw.
        self._original, self._versions = cloned(batch), versions_in(batch)
        self.passes: list[RunningPass] = []
        self._masks = Masks(driver.device, driver.same_dropout)

    @property
    def batch(self) -> Any:
        """The batch as the step was given it."""
        if versions_in(self._batch) != self._versions:
            self._batch = cloned(self._original)
            self._versions = versions_in(self._batch)
        return self._batch

    def train(self, request: TrainPass, last: bool) -> PassResult | None:
        """A training pass; `last` is true for the one after which gradients are complete."""
        driver = self._driver
        if not driver.trains:
            return self._evaluate(request, last)
        if request.then is not None:
            # What comes last has nobody to send a gradient on to.
            self._shared.calls.defers = False
        needs_result = not last or request.then is not None
        running = self._new_pass(request, self.batch, gradient=needs_result, trains=True)
        local = nullcontext() if last else driver.engine.local_gradients()
        with self._masks.drawn(request.masks), local, driver.target.perturbed(running.forward_pass):
            running.run(driver.engine.wrapped)
        result = self._result(running) if needs_result else None
        if request.then is not None:
            assert result is not None
            request.then(result)
        return result

    def gradient_or_outputs(self, request: GradientPass | ForwardPass) -> PassResult:
        """A pass that trains nothing, on the bare model: a wrapper's forward would wait for its backward."""
        driver, model = self._driver, self._driver.engine.model
        batch, given = self.batch, self._given
        if request.rows is not None:
            size = examples_in(batch)
            batch, given = rows_of(batch, request.rows, size), rows_of(given, request.rows, size)
        if isinstance(request, GradientPass) and request.label is not None:
            batch = relabelled(batch, request.label, given)
        weights = request.weights if isinstance(request, ForwardPass) else {}
        running = self._new_pass(request, batch, gradient=isinstance(request, GradientPass))
        with ExitStack() as stack:
            stack.enter_context(self._masks.drawn(request.masks))
            stack.enter_context(driver.engine.local_gradients())
            stack.enter_context(driver.target.perturbed(running.forward_pass))
            stack.enter_context(_frozen_statistics(model))
            stack.enter_context(torch.enable_grad())
            if weights:
                # Of the model itself, since a loss may hold it.
                own = {name: weight.to(driver.device) for name, weight in weights.items()}
                stack.enter_context(_reparametrize_module(model, own, tie_weights=True))
            running.run(model)
        return self._result(running)

    def _evaluate(self, request: TrainPass, last: bool) -> PassResult | None:
        """A training pass where nothing trains: its loss, and unless it is the last, its gradient."""
        result = None if last else self.gradient_or_outputs(GradientPass(request.delta))
        if request.delta is not None:
            delta = request.delta if result is None else result.delta
            running = self._new_pass(replace(request, delta=delta), self.batch)
            # With autograd, or a reference inside of the loss could not be told apart.
            with torch.enable_grad(), self._driver.target.perturbed(running.forward_pass):
                running.run(self._driver.engine.model)
        return result

    def _new_pass(self, request: Request, batch: Any, **settings: bool) -> RunningPass:
        self.passes.append(RunningPass(self._shared, request, batch, **settings))
        return self.passes[-1]

    def _result(self, running: RunningPass) -> PassResult:
        result = running.result()
        self._driver._observe(result)
        return result


def unit_of(name: str, model: nn.Module) -> float:
    """What an epsilon is multiplied by. Raises ValueError for a name that is none of `EPSILON_UNITS`."""
    if name not in EPSILON_UNITS:
        raise ValueError(f"epsilon_unit must be one of {', '.join(EPSILON_UNITS)}; found {name!r}.")
    return mean_embedding_norm(model) if name == "embedding" else 1.0


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, norms of batches and of instances keep their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.training]
    before = [(m.track_running_stats, m.momentum) for m in norms]
    try:
        for module in norms:
            # An instance norm computes its statistics whatever that says, and adds none of them to the running ones.
            module.momentum = 0.0 if isinstance(module, _InstanceNorm) else module.momentum
            module.track_running_stats = isinstance(module, _InstanceNorm) and module.track_running_stats
        yield
    finally:
        for module, (flag, momentum) in zip(norms, before, strict=True):
            module.track_running_stats, module.momentum = flag, momentum
