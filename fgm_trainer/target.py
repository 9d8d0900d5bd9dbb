"""What a perturbation is added to: a tensor inside the model's forward pass, reached by a hook; and the passes over it.

The hook returns `tensor + leaf`. In a pass that only asks for the gradient the leaf is zero; in an adversarial
pass it is the perturbation. After the backward pass `leaf.grad` is the gradient. No weight is ever written, so
none can be left perturbed, and `weight.grad`, which may hold earlier micro-batches, is never read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .inspection import is_compiled
from .passes import Draw, Earlier, Pass


class Target:
    """A tensor inside the model's forward pass that a perturbation is added to.

    `attach(model)` registers the hooks, `detach()` removes them; `record(...)` is one pass.
    """

    scopes: tuple[str, ...] = ("example", "token")

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._pass: Pass | None = None
        self._padding_id: int | None = None
        self._positions_first = False
        self.model: nn.Module | None = None
        # Whether all that is behind the target is a lookup, whose gradient can wait for the last pass of a step.
        self.can_wait = False
        # The valid range, which a perturbed tensor does not leave: two tensors that broadcast against it.
        self.clip: tuple[Tensor, Tensor] | None = None

    def settle(self, scope: str | None, preferred: str) -> str:
        """The scope to use: the one asked for, else the preferred one where it exists here, else the target's first.

        Raises:
            ValueError: the scope asked for does not exist here.
        """
        if scope is None:
            return preferred if preferred in self.scopes else self.scopes[0]
        if scope not in self.scopes:
            raise ValueError(
                f"adv_scope {scope!r} does not exist at adv_target {self}; choose one of: {', '.join(self.scopes)}."
            )
        return scope

    def forward_ended(self, seen: Pass, batch: Any) -> None:
        """To be called when the loss is there. Raises RuntimeError where the forward pass did not meet the target."""
        if not seen.calls:
            raise RuntimeError(self.unreached(batch))
        seen.check()
        seen.forward_done = True

    def attach(self, model: nn.Module, called: nn.Module | None = None) -> None:
        """Registers the hooks on the unwrapped `model`; raises ValueError if it does not have the target.

        Args:
            model: the model inside every wrapper.
            called: what the forward passes call, wrappers included: only `torch.compile`'s tells of itself.
        """
        self.detach()
        if is_compiled(model if called is None else called):
            # Code compiled earlier, for this model or for another of its shape, does not know of hooks registered now.
            torch.compiler.reset()
        # XLNet computes on (positions, examples, dimension).
        self._positions_first = getattr(getattr(model, "config", None), "model_type", None) == "xlnet"
        self._handles = self._register(model)
        self.model = model

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.model, self._pass, self.can_wait = [], None, None, False

    def record(
        self,
        delta: Tensor | Draw | None = None,
        *,
        gradient: bool,
        scope: str = "example",
        chosen: tuple[Tensor, int] | None = None,
        earlier: Earlier | None = None,
    ) -> Recording:
        """One pass: inside, the target's tensor is moved by `delta`; the `Pass` says what was met."""
        seen = self._new_pass(delta, gradient, scope)
        seen.part_of(chosen, earlier)
        return Recording(self, seen)

    def unreached(self, batch: Any) -> str:
        """Why a forward pass on this batch may not have met the target."""
        return f"The forward pass never reached the target {self}: nothing would be perturbed."

    def _new_pass(self, delta: Tensor | Draw | None, gradient: bool, scope: str) -> Pass:
        return Pass(delta, gradient, scope, self._padding_id, self.clip)

    def _pass_ended(self) -> None:
        self._pass = None

    def _register(self, model: nn.Module) -> list[Any]:
        raise NotImplementedError

    def _meet(self, seen: Pass, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        if not self._positions_first:
            return seen.meet(value, ids, vocabulary_size)
        ids = None if ids is None else ids.transpose(0, 1)
        return seen.meet(value.transpose(0, 1), ids, vocabulary_size).transpose(0, 1)

    def _watch_masks(self, model: nn.Module, inside: Sequence[nn.Module]) -> list[Any]:
        """Hooks that note the attention mask with which the modules around `inside` are called, the innermost's last.

        The mask of the batch would not do: two towers have one each, R-Drop doubles it, a decoder has its own.
        """
        handles = []
        for module in model.modules():
            within = list(module.modules())
            if not any(m is other for m in inside for other in within):
                continue
            places = list(inspect.signature(module.forward).parameters)
            if "attention_mask" in places:
                hook = outside_graphs(functools.partial(self._on_masked_call, places.index("attention_mask")))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _on_masked_call(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is None:
            return
        mask = args[place] if place < len(args) else kwargs.get("attention_mask")
        if (
            isinstance(mask, Tensor)
            and mask.dim() in (2, 3)
            and not (mask.dim() == 3 and mask.shape[1] == mask.shape[2])
        ):
            self._pass.mask = mask
        elif kwargs.get("encoder_hidden_states") is not None:
            # A decoder without a mask of its own: the encoder's says nothing of its positions.
            self._pass.mask = None


class Recording:
    """A context: inside, what the target meets belongs to the pass."""

    # A class: a generator takes four times as many calls, twice a step.
    def __init__(self, target: Target, seen: Pass) -> None:
        self._target, self._seen = target, seen

    def __enter__(self) -> Pass:
        self._target._pass = self._seen
        return self._seen

    def __exit__(self, *error: object) -> None:
        self._target._pass_ended()


def look(
    target: Target,
    batch: Any,
    delta: Tensor | Draw | None,
    objective_of: Callable[[], Tensor],
    scope: str,
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Pass, Tensor, Tensor]:
    """The gradient of an objective with respect to the perturbation alone: no weight gradient is computed or touched.

    Args:
        target: an attached target.
        batch: the model's inputs, for the message where they never reach the target.
        delta: where the gradient is taken; None for zero.
        objective_of: runs the forward pass and returns a scalar, such as the loss.
        scope: over which entries norms are taken.
        scaled: multiplies the objective by the loss scale of half precision, for the way back alone.

    Returns:
        The pass, the gradient and the objective. Running statistics of batch norms stay as they are.
    """
    with (
        target.record(delta, gradient=True, scope=scope) as seen,
        torch.enable_grad(),
        still_statistics(target.model),
    ):
        objective = objective_of()
        target.forward_ended(seen, batch)
        # As the first entry: d(what the way back starts from) / d(objective).
        leaves = [objective, *seen.leaves]
        try:
            scale, *gradients = torch.autograd.grad(scaled(objective), leaves, allow_unused=True)
        except RuntimeError as error:
            if "reentrant" not in str(error):
                raise
            raise RuntimeError(
                "Reentrant gradient checkpointing can't give the gradient with respect to the perturbation alone. "
                "Enable it with use_reentrant=False."
            ) from error
        return seen, seen.gradient(gradients) / scale, objective.detach()


def glance(
    target: Target, batch: Any, delta: Tensor | Draw | None, objective_of: Callable[[], Tensor], scope: str
) -> tuple[Pass, Tensor, Tensor]:
    """A forward pass without any gradient; arguments and results as for `look`, the gradient zero."""
    with target.record(delta, gradient=False, scope=scope) as seen, torch.no_grad(), still_statistics(target.model):
        objective = objective_of()
        target.forward_ended(seen, batch)
        return seen, seen.no_gradient(), objective.detach()


@contextmanager
def still_statistics(model: nn.Module | None) -> Iterator[None]:
    """Inside, batch norms keep their running statistics."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training] if model is not None else []
    tracked = [m.track_running_stats for m in norms]
    try:
        for module in norms:
            module.track_running_stats = False
        yield
    finally:
        for module, flag in zip(norms, tracked, strict=True):
            module.track_running_stats = flag


def outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which no compiled graph takes in."""
    # A hook keeps state from call to call, which a compiled graph can't. Whether the model is compiled does not matter:
    # it does not know of a `torch.compile` around it, or of one that comes later. (A function around both that asks
    # `is_dynamo_compiling` is cheaper in eager, but is itself compiled anew for every hook, shape and gradient mode.)
    outside: Callable[..., Any] = torch.compiler.disable(hook)
    return outside
