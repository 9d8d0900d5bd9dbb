"""Which part of a stacked perturbation belongs to a call of a later pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .batches import examples_in
from .calls import Call, SharedCalls
from .stacking import cut

OTHER_CALLS = (
    "The model must call the target equally often in every pass of a step; this pass calls it more or less often than "
    "the first."
)


def part_of(delta: Tensor, shared: SharedCalls, call: Call, chosen: Tensor | None, batch: Any) -> Tensor | None:
    """The perturbation of one call, in its shape; None where there is none of it (layer drop).

    Args:
        delta: of all calls, stacked: (rows, positions, dimension).
        shared: knows the calls that it was made for.
        call: the call.
        chosen: where given, the examples that `delta` is of; the others stay clean.
        batch: what the loss is computed on.

    Raises:
        RuntimeError: `delta` was made for other calls, or other shapes.
    """
    layout = shared.layout or {}
    first = layout.get(call.key)
    if shared.stochastic and (first is None or len(delta) != sum(c.shape[0] for c in layout.values())):
        return None
    if first is None:
        raise RuntimeError(OTHER_CALLS)
    earlier = list(layout.values())
    parts = cut(delta, earlier)
    part = parts[list(layout).index(call.key)]
    if chosen is not None:
        part = _among_all(part, chosen, examples_in(batch), call)
    elif shared.scope == "vocabulary":
        part = _following_ids(parts, part, earlier, call)
    if part.shape != call.shape:
        raise RuntimeError(
            f"The target's tensor has shape {tuple(call.shape)} but its perturbation has {tuple(part.shape)}: the "
            "model must call the target equally often, with equal shapes, in every pass of a step."
        )
    return part


def _following_ids(parts: list[Tensor], part: Tensor, earlier: list[Call], call: Call) -> Tensor:
    """The perturbation of the earlier pass's vocabulary entries where this pass looks them up.

    Integers of the size of the vocabulary map an id to one of its positions; an entry that was not there has none.

    Args:
        parts: the perturbation of each call of the earlier pass.
        part: that of the same call.
        earlier: the calls of the earlier pass.
        call: the call of this pass.
    """
    assert call.ids is not None
    first = next(other for other in earlier if other.key == call.key)
    if first.looked is not None and first.looked.are(call.ids):
        return part
    size, entries = call.vocabulary_size, []
    for other in earlier:
        assert other.looked is not None
        ids = other.looked.ids.flatten().long()
        entries.append(ids if other.padding is None else ids.masked_fill(other.padding.flatten(), size))
    flat, rows = torch.cat(entries), torch.cat([each.flatten(0, -2) for each in parts])
    nowhere = flat.numel()
    holder = flat.new_full((size + 1,), nowhere).scatter_(0, flat, torch.arange(nowhere, device=flat.device))
    holder[size] = nowhere
    at = holder[call.ids.long()]
    if call.padding is not None:
        at = at.masked_fill(call.padding, nowhere)
    return torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])[at]


def _among_all(part: Tensor, chosen: Tensor, examples: int, call: Call) -> Tensor:
    """The perturbation of the chosen examples in the shape of the whole tensor, zero for the others."""
    several, rest = divmod(call.shape[0], max(examples, 1))
    known = several == 1 or call.examples is not None
    if rest or not known or part.shape != (len(chosen) * several, *call.shape[1:]):
        raise RuntimeError(
            f"A part of the batch can be perturbed where the target has one row an example, or as many for each; here "
            f"{examples} examples are {call.shape[0]} rows. Choose a method that perturbs them all, such as "
            "adv_method='fgm'."
        )
    rows = chosen.to(part.device)
    if several > 1:
        rows = (rows[:, None] * several + torch.arange(several, device=part.device)).flatten()
    return part.new_zeros(call.shape).index_copy_(0, rows, part)
