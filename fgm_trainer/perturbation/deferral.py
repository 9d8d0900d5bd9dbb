"""A lookup's gradient, sent on once a step: the earlier passes keep theirs, and the last one brings them along.

The gradient of a lookup's weight is as large as the vocabulary. A plain lookup is linear, so its passes' gradients can
be added up at its output, (rows, positions, dimension), and written to the weight once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every

from .batches import version
from .hooks import Hook
from .lookups import is_sharded


class Looked:
    """The ids that were looked up in a pass that is over; whoever owns the tensor may write to it afterwards."""

    def __init__(self, ids: Tensor) -> None:
        # The source is held on to: its memory is nobody else's meanwhile.
        self._source, self._known, self.ids = ids, _identity(ids), ids.clone()

    def are(self, ids: Tensor) -> bool:
        """Whether these are known to be the same ids: the same memory, not written to since."""
        return _identity(ids) == self._known


def _identity(ids: Tensor) -> tuple[object, ...]:
    return version(ids), ids.data_ptr(), ids.shape, ids.stride(), ids.dtype


@dataclass(eq=False)
class Owed:
    """A gradient of a lookup's output that an earlier pass of the step kept, until the last pass has sent it on.

    Args:
        looked: what was looked up.
        gradient: (rows, positions, dimension), in float32 at least, as the engine scaled it.
        sent: whether it was sent on.
    """

    looked: Looked
    gradient: Tensor
    sent: bool = False

    def take(self) -> Tensor | None:
        """The gradient, once: a graph may be gone through backward twice."""
        if self.sent:
            return None
        self.sent = True
        return self.gradient


def sent_on(lookup: nn.Module, value: Tensor, ids: Tensor, owed: list[Owed]) -> Tensor:
    """The lookup's output, whose gradient will bring along what earlier passes owe the weight.

    Args:
        lookup: a plain lookup.
        value: its output, (rows, positions, dimension).
        ids: what it was asked for.
        owed: of the earlier passes.
    """
    for each in owed:
        if not value.requires_grad:
            break
        if each.looked.are(ids):
            value.register_hook(functools.partial(_with_owed, each))
        else:
            # Other ids, or not known to be the same: they are looked up once more, for the way back alone.
            other = nn.Embedding.forward(lookup, each.looked.ids)  # type: ignore[arg-type]
            value = _Accompanied.apply(value, other, each)  # type: ignore[no-untyped-call]
    return value


def send_the_rest(owed: Mapping[tuple[nn.Module, int, bool], list[Owed]]) -> None:
    """What no call of the last pass sent on: it left the lookup out, or its loss does not depend on it.

    Raises:
        RuntimeError: there are several processes, which add up gradients in the last backward pass alone.
    """
    for lookup, each in ((key[0], one) for key, some in owed.items() for one in some):
        gradient = each.take()
        if gradient is None or not lookup.weight.requires_grad:
            continue
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise RuntimeError(
                "The last pass of a step does not call the lookup that an earlier one called, or its loss does not "
                "depend on it, so the processes can't add up its gradient. Let every pass look the tokens up, or run "
                "on one process."
            )
        with torch.enable_grad():
            value = nn.Embedding.forward(lookup, each.looked.ids)  # type: ignore[arg-type]
            value.backward(gradient.to(value.dtype))


def is_plain_lookup(module: nn.Module) -> bool:
    """Whether the module's output is known to be rows of its weight, so that its gradient can wait for a later pass.

    A subclass, a hook before ours or a parametrization may drop, scale or renew rows in every pass.
    """
    weight = module._parameters.get("weight")
    return (
        type(module) is nn.Embedding
        # Hooks of all modules run before a module's own.
        and not (every._global_forward_hooks or every._global_forward_pre_hooks)
        and not (every._global_backward_hooks or every._global_backward_pre_hooks)
        and "forward" not in vars(module)
        and type(weight) is nn.Parameter
        and not is_sharded(weight)
        and not weight._backward_hooks
        and not getattr(weight, "_post_accumulate_grad_hooks", None)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
        and isinstance(next(iter(module._forward_hooks.values()), None), Hook)
        and not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
    )


class _Accompanied(torch.autograd.Function):
    """The value as it is; on the way back, a second tensor gets what is owed."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor, owed: Owed) -> Tensor:
        ctx.owed, ctx.other = owed, other.dtype
        return value.clone()

    @staticmethod
    def backward(ctx: Any, own: Tensor) -> tuple[Tensor, Tensor | None, None]:
        gradient = ctx.owed.take()
        return own, None if gradient is None else gradient.to(ctx.other), None


def _with_owed(owed: Owed, gradient: Tensor) -> Tensor:
    part = owed.take()
    return gradient if part is None else gradient + part.to(gradient.dtype)
