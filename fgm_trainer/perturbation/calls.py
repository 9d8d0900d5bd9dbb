"""The calls of a target in a forward pass, and what the passes of a step know of one another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batches import example_of_rows, examples_in
from .deferral import Looked, Owed
from .geometry import Units


@dataclass(frozen=True)
class TargetCall:
    """A call of the target, for a perturbation that is drawn there and then.

    Args:
        value: the tensor to be perturbed, (rows, positions, dimension).
        units: its units.
        ids: where tokens are looked up, their ids, (rows, positions).
        vocabulary_size: and how many rows the lookup has.
        call: the number of the call in this forward pass, from 0.
    """

    value: Tensor
    units: Units
    ids: Tensor | None
    vocabulary_size: int
    call: int


# Its name in 0.1.
Met = TargetCall

# Noise has to be drawn where its shape is known, inside of the forward pass.
Draw = Callable[[TargetCall], Tensor]

# In place of a mask: those of the modules further out do not describe this call's positions, as a decoder's that reads
# an encoder.
BARRIER = "barrier"

# Names a call of the target from pass to pass: the module, the call's number in the pass, and whether autograd was on.
# Calls without autograd have numbers of their own: a reference model may run in one pass and not in the next.
Key = tuple[nn.Module, int, bool]


@dataclass(eq=False)
class Call:
    """One call of the target in one forward pass.

    Args:
        key: which call it is.
        shape: of the value.
        ids: where tokens are looked up, their ids, (rows, positions).
        vocabulary_size: and how many rows the lookup has.
        padding: bool, (rows, positions), true where there is no token; None where there is one everywhere.
        examples: to which example of the loss's batch each row belongs, (rows,); None for one row an example.
        example_count: how many examples there are.
        loss: the number of the loss that it belongs to.

    Attributes:
        delta: the perturbation, as it was applied.
        leaf: what the gradient is read from.
        deferred: whether `leaf` is the moved value itself, so that the way back ends here.
        repeated: whether it was run again in the backward pass.
        norms: of each row, the Euclidean norm of the value and of the perturbation.
        looked: its ids, kept when the pass was over.
    """

    key: Key
    shape: torch.Size
    ids: Tensor | None
    vocabulary_size: int
    padding: Tensor | None
    examples: Tensor | None
    example_count: int
    loss: int
    delta: Tensor | None = None
    leaf: Tensor | None = None
    deferred: bool = False
    repeated: bool = False
    norms: tuple[Tensor, Tensor] | None = None
    looked: Looked | None = None

    @property
    def graded(self) -> bool:
        """Whether autograd was on, so that the loss depends on it."""
        return self.key[2]

    @property
    def gradient(self) -> Tensor | None:
        """At the leaf, after the backward pass."""
        return None if self.leaf is None else self.leaf.grad


@dataclass
class SharedCalls:
    """What the passes of one micro-batch know of one another's calls of the target.

    Args:
        scope: over which entries norms are taken.
        padding_id: the id that carries no token, where there is no attention mask.
        pads_inside: whether the model pads its input to a multiple of its window (Longformer).
        clip: the valid range of the tensor, two tensors that broadcast against it.
        stochastic: whether a pass may leave a module out (layer drop).
        defers: whether the gradients that earlier passes owe a lookup's weight are sent on by the last pass.

    Attributes:
        layout: the calls of the first pass, each with its part of the stacked perturbation.
        cached: calls without autograd that the backward pass runs again.
        idle: calls with autograd that the loss does not depend on (a probe inside of it).
        owed: by call, what earlier passes owe the lookup's weight, as the engine scaled it.
        outside: whether a clean value was outside of `clip`, read later.
    """

    scope: str = "example"
    padding_id: int | None = None
    pads_inside: bool = False
    clip: tuple[Tensor, Tensor] | None = None
    stochastic: bool = False
    defers: bool = False
    layout: dict[Key, Call] | None = None
    cached: set[Key] = field(default_factory=set)
    idle: set[Key] = field(default_factory=set)
    owed: dict[Key, list[Owed]] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)

    def is_perturbed(self, key: Key) -> bool:
        """Whether the perturbation is added to this call, as far as it is known."""
        return (key[2] and key not in self.idle) or key in self.cached

    def padding_of(self, value: Tensor, ids: Tensor | None, around: list[Tensor | str | None]) -> Tensor | None:
        """True where there is no token.

        Args:
            value: the tensor that is perturbed.
            ids: what was looked up.
            around: the attention masks of the calls around it, the innermost's last, or `BARRIER`.
        """
        places = value.shape[:-1] if ids is None else ids.shape
        barrier = max((i for i, mask in enumerate(around) if mask is BARRIER), default=-1)
        masks = [mask for mask in around[barrier + 1 :] if isinstance(mask, Tensor)]
        if len(places) == 2:
            # The innermost that fits: a wrapper may call what is inside with virtual tokens in front (prefix tuning).
            for mask in reversed(masks):
                if mask.shape[-1] == places[1] and mask.numel() == places.numel():
                    return (mask.to(value.device) == 0).view(places)
            if masks and self.pads_inside and masks[-1].shape[0] == places[0] and masks[-1].shape[1] < places[1]:
                padding = masks[-1].to(value.device) == 0
                return nn.functional.pad(padding, (0, places[1] - padding.shape[1]), value=True)
        return ids == self.padding_id if ids is not None and self.padding_id is not None else None


def examples_of(batch: Any, value: Tensor, is_sequences: bool) -> tuple[Tensor | None, int]:
    """To which example of a batch each row of a tensor belongs, None for one row an example; the number of examples.

    Args:
        batch: what the loss is computed on.
        value: (rows, ...).
        is_sequences: whether a row is known to be a sequence of its own, such as one of a batch that the loss doubled.

    Raises:
        ValueError: it is not known.
    """
    examples, rows = examples_in(batch), value.shape[0]
    if rows == examples:
        return None, rows
    found = example_of_rows(batch, rows)
    if found is not None:
        return found.to(value.device), examples
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    # Pairs with one label each: an example of the model's own is a row.
    if is_sequences or (isinstance(tokens, Tensor) and len(tokens) == rows):
        return None, rows
    raise ValueError(
        f"The target's tensor has {rows} rows for {examples} examples, and which row belongs to which example "
        "is not known, so adv_scope 'example' has no meaning here. Write adv_scope='token' where a row is a "
        "position, or choose an adv_target with one row an example."
    )


def repeated_call(calls: list[Call], module: nn.Module, value: Tensor, ids: Tensor | None) -> Call | None:
    """Which of a forward pass's calls is repeated by one inside of the backward pass; None for none of them.

    Raises:
        RuntimeError: it can't be told.
    """
    calls = [c for c in calls if c.key[0] is module and c.shape == value.shape]
    if len(calls) > 1 and ids is not None:
        calls = [c for c in calls if c.ids is not None and torch.equal(c.ids, ids)]
        calls = [c for c in calls if not c.repeated] or calls
    # What was a reference is run again by gradient caching alone, which has no other calls.
    calls = [c for c in calls if c.graded] or calls
    if len(calls) > 1 and ids is None:
        raise RuntimeError(
            f"The target is called {len(calls)} times and run again in the backward pass (gradient checkpointing, "
            "gradient caching), which can't tell which call it repeats. Turn that off or choose another adv_target."
        )
    # Checkpointing repeats the last call first, gradient caching the first.
    return (calls[-1] if calls[-1].graded else calls[0]) if calls else None
