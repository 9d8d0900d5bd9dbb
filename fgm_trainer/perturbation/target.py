"""What a perturbation is added to: a tensor inside the model's forward pass, reached by hooks.

No weight is ever written, so none can be left perturbed, and `weight.grad`, which may hold earlier micro-batches, is
never read. The hooks are on the model while a pass runs, and at no other time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .calls import BARRIER, Draw, SharedCalls
from .forward_pass import PerturbedForward
from .hooks import Hook
from .lookups import is_compiled
from .watched import WatchedForward


class Site(NamedTuple):
    """Where a hook goes: (module, args, kwargs[, output]) -> what takes the place of the arguments or the output."""

    module: nn.Module
    before: bool
    call: Callable[..., Any]


class Target:
    """A tensor inside the model's forward pass that a perturbation is added to.

    `attach(model)` finds it, `perturbed(forward_pass)` is a context for one pass, `detach()` lets the model go.
    """

    scopes: tuple[str, ...] = ("example", "token")
    # What epsilon `auto` never exceeds, relative to the length of the tensor (docs/epsilon.md).
    ceiling: float = 0.035

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        # What the forward passes call, wrappers included.
        self.called: nn.Module | None = None
        # The valid range, which a perturbed tensor does not leave: two tensors that broadcast against it.
        self.clip: tuple[Tensor, Tensor] | None = None
        # Whether a forward pass may leave it out (layer drop).
        self.stochastic = False
        # Of several modules those that a loss has to meet, as far as it is known, and sets of them that it may meet.
        self.expected: set[nn.Module] = set()
        self.settled: set[frozenset[nn.Module]] = set()
        self._sites: list[tuple[Site, Hook]] = []
        self._handles: list[Any] = []
        self._pass: WatchedForward | None = None
        self._padding_id: int | None = None
        self._positions_first: set[nn.Module] = set()
        self._pads_inside = False

    def resolve_scope(self, scope: str | None, preferred: str) -> str:
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

    def attach(self, model: nn.Module, called: nn.Module | None = None) -> None:
        """Finds the target in the unwrapped `model`; raises ValueError if it is not there.

        Args:
            model: the model inside every wrapper.
            called: what the forward passes call, wrappers included: only `torch.compile`'s tells of itself.
        """
        self.detach()
        # XLNet computes on (positions, examples, dimension) inside.
        outer = [m for m in model.modules() if type(m).__name__ == "XLNetModel"]
        self._positions_first = {inner for m in outer for inner in m.modules() if inner is not m}
        config = getattr(model, "config", None)
        self._pads_inside = hasattr(config, "attention_window") or hasattr(config, "block_size")
        self._sites = [(site, Hook(site.call)) for site in self.find_sites(model)]
        self.model, self.called = model, called
        if is_compiled(model if called is None else called):
            # Code compiled earlier, for this model or for another of its shape, does not know of hooks registered now,
            # and would not know of those of a later pass.
            torch.compiler.reset()
            self._handles = self._register()

    def detach(self) -> None:
        """Lets the model go, and removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sites, self.model, self.called, self._pass = [], [], None, None, None
        self.stochastic, self.expected, self.settled = False, set(), set()
        self._positions_first = set()

    def shared_calls(self, scope: str, defers: bool = False) -> SharedCalls:
        """What the passes of one micro-batch share."""
        return SharedCalls(scope, self._padding_id, self._pads_inside, self.clip, self.stochastic, defers)

    def new_pass(self, shared: SharedCalls, delta: Tensor | Draw | None, **settings: Any) -> WatchedForward:
        """A pass over this target (`PerturbedForward`)."""
        return PerturbedForward(shared, delta, **settings)

    def perturbed(self, forward_pass: WatchedForward) -> Perturbed:
        """A context: inside, the calls of the target that the pass's loss is made of are perturbed."""
        return Perturbed(self, forward_pass)

    @contextmanager
    def replaced(self, forward_pass: WatchedForward) -> Iterator[None]:
        """Inside of a pass: the target's calls are those of another pass."""
        own, self._pass = self._pass, forward_pass
        try:
            yield
        finally:
            self._pass = own

    def unreached(self, batch: Any) -> str:
        """Why a forward pass on this batch may not have reached the target."""
        return f"The forward pass never reached the target {self}: nothing would be perturbed."

    # For subclasses ---------------------------------------------------------------------------------------------------

    def find_sites(self, model: nn.Module) -> list[Site]:
        """Where the hooks go in the unwrapped `model`; raises ValueError if the target is not there."""
        raise NotImplementedError

    def perturb(self, module: nn.Module, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        """What goes on through the model in place of `value`; to be called by the hooks.

        Args:
            module: what was called.
            value: (rows, positions, dimension), or (rows, ...) where there are no tokens.
            ids: int64, (rows, positions), where `module` looked tokens up.
            vocabulary_size: more than the largest id.
        """
        if not isinstance(self._pass, PerturbedForward):
            return value
        if module not in self._positions_first:
            return self._pass.perturb(module, value, ids, vocabulary_size)
        ids = None if ids is None else ids.transpose(0, 1)
        return self._pass.perturb(module, value.transpose(0, 1), ids, vocabulary_size).transpose(0, 1)

    def mask_sites(self, model: nn.Module, inside: set[nn.Module]) -> list[Site]:
        """Hooks that tell padding: they read the masks of the modules around `inside`, the innermost's last.

        They go in front of the target's own. The mask of the batch would not do: two towers have one each, R-Drop
        doubles it, a decoder has its own.
        """
        sites = []
        for module in model.modules():
            if inside.isdisjoint(module.modules()):
                continue
            places = list(inspect.signature(module.forward).parameters)
            if "attention_mask" in places:
                read = functools.partial(self._on_masked_call, places.index("attention_mask"))
                sites += [Site(module, True, read), Site(module, False, self._after_masked_call)]
        return sites

    # Hooks ------------------------------------------------------------------------------------------------------------

    def _register(self) -> list[Any]:
        # Before other hooks: what they make of a lookup's output, they make of its perturbed rows, too.
        return [
            site.module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
            if site.before
            else site.module.register_forward_hook(hook, prepend=True, with_kwargs=True, always_call=True)
            for site, hook in reversed(self._sites)
        ]

    def _begin(self, forward_pass: WatchedForward) -> None:
        self._pass = forward_pass
        if not self._handles:
            forward_pass.handles = self._register()

    def _end(self, forward_pass: WatchedForward) -> None:
        self._pass = None
        for handle in forward_pass.handles:
            handle.remove()
        forward_pass.handles = []

    def _on_masked_call(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is not None:
            self._pass.masks.append(_mask_of_call(place, args, kwargs))

    def _after_masked_call(self, *rest: Any) -> None:
        if self._pass is not None and self._pass.masks:
            self._pass.masks.pop()


def _mask_of_call(place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | str | None:
    """The attention mask that a module is called with, one entry a position; or `BARRIER`."""
    mask = args[place] if place < len(args) else kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and (mask.dim() == 2 or (mask.dim() == 3 and mask.shape[1] != mask.shape[2])):
        return mask
    # A decoder without a mask of its own: the encoder's says nothing of its positions.
    return None if kwargs.get("encoder_hidden_states") is None else BARRIER


class Perturbed:
    """The context of `Target.perturbed`."""

    # A class: a generator takes four times as many calls, several times a step.
    def __init__(self, target: Target, forward_pass: WatchedForward) -> None:
        self._target, self._pass = target, forward_pass

    def __enter__(self) -> WatchedForward:
        self._target._begin(self._pass)
        return self._pass

    def __exit__(self, *error: object) -> None:
        self._target._end(self._pass)
