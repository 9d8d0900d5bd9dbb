"""Several calls of a target as one tensor, and back."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import Call
from .geometry import Units, by_example, shared_entries, widen


class StackedCalls:
    """The calls of a pass as one tensor, in the order of the step's first pass.

    Several calls in one forward (two towers, R-Drop) stand one after the other along the rows, shorter ones filled up
    at the end. Where a pass left a call out (layer drop) there are zeros.

    Args:
        scope: over which entries norms are taken.
        pairs: the calls of the step's first pass, each with that of this pass, None where it was left out.
    """

    def __init__(self, scope: str, pairs: Sequence[tuple[Call, Call | None]]) -> None:
        self._scope, self._pairs = scope, pairs
        self._calls = [first if call is None else call for first, call in pairs]

    def of(self, value_of: Callable[[Call], Tensor | None]) -> Tensor:
        """The calls' tensors, stacked: (rows, positions, dimension); zeros for None, in float32 at least."""
        parts = []
        for first, call in self._pairs:
            value = None if call is None else value_of(call)
            leaf = first.leaf if call is None or call.leaf is None else call.leaf
            assert leaf is not None
            parts.append(torch.zeros_like(widen(leaf.detach())) if value is None else value)
        # Where the first pass left the only layer out, nothing is perturbed in this step.
        return stack(parts) if parts else torch.zeros(1, 1, 1)

    def gradient(self, scales: Mapping[int, Tensor]) -> Tensor:
        """The gradients at the leaves, in float32 at least.

        Args:
            scales: of each loss of the pass, what its gradients were multiplied by on the way.
        """
        # A loss scale is divided out after widening: what is left may be zero in float16.
        return self.of(lambda call: None if call.gradient is None else widen(call.gradient) / scales[call.loss])

    def delta(self) -> Tensor:
        """The perturbation as it was applied: drawn, in the target's type, clipped."""
        return self.of(lambda call: None if call.delta is None else call.delta.detach())

    def ids(self) -> Tensor | None:
        """The ids that were looked up, (rows, positions); None where the target is no lookup."""
        ids = [call.ids for call in self._calls if call.ids is not None]
        return stack(ids) if ids and len(ids) == len(self._calls) else None

    def units(self) -> Units:
        """Their units. Raises ValueError where the scope does not fit the tensor."""
        scope, calls = self._scope, self._calls
        if not calls:
            return Units("example")
        shape, padding, ids = calls[0].shape, _padding(calls), self.ids()
        if scope == "vocabulary":
            if ids is None:
                raise ValueError("adv_scope 'vocabulary' exists for token lookups only; write adv_scope='example'.")
            return Units(scope, padding, shared_entries(ids, padding, calls[0].vocabulary_size))
        if scope == "example" and len(shape) < 3 and calls[0].ids is not None:
            raise ValueError(
                f"The lookup's output has shape {tuple(shape)}, several examples packed into one row: "
                "adv_scope 'example' would mean the pack. Write adv_scope='token' or 'vocabulary', or do not pack."
            )
        if scope == "token" and len(shape) != 3 and calls[0].ids is None:
            raise ValueError(
                f"adv_scope 'token' needs a tensor (examples, positions, dimension); the target's is "
                f"{tuple(shape)}. Write adv_scope='example'."
            )
        return Units(scope, padding, examples=_examples(calls) if scope == "example" else None)


def example_norms(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """The Euclidean norms of each example's tokens, clean, and of their perturbation: (examples,) both."""
    moved = [(call, call.norms) for call in calls if call.norms is not None]
    if not moved:
        return torch.zeros(0), torch.zeros(0)
    values, deltas = (stack(list(norms)) for norms in zip(*(norms for _, norms in moved), strict=True))
    calls = [call for call, _ in moved]
    examples = _examples(calls)
    if examples is None:
        return values, deltas
    number = sum(call.example_count for call in calls)
    return by_example(values, examples)[:number], by_example(deltas, examples)[:number]


def stack(tensors: list[Tensor], fill: float = 0) -> Tensor:
    """The calls' tensors one after the other along the rows, the shorter ones filled up at the end."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    padded = [torch.cat([t, t.new_full((t.shape[0], longest - t.shape[1], *t.shape[2:]), fill)], 1) for t in tensors]
    return torch.cat(padded)


def cut(stacked: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """The part of each call."""
    # Not `split`: where the first pass had all examples and the next one a part of them, there are fewer rows.
    ends = list(itertools.accumulate(call.shape[0] for call in calls))
    parts = [stacked[end - call.shape[0] : end] for call, end in zip(calls, ends, strict=True)]
    return [p if p.dim() < 3 else p[:, : call.shape[1]] for p, call in zip(parts, calls, strict=True)]


def row_norms(values: Tensor, padding: Tensor | None, outliers: float = math.inf) -> Tensor:
    """The Euclidean norm of each row, over the positions that hold a token: (rows,), in float32 at least.

    Args:
        values: (rows, ...), or (rows, positions, dimension) where there are tokens.
        padding: bool, (rows, positions), true where there is no token.
        outliers: no token counts for more than so many times the row's median one. In the hidden states of language
            models a few are a thousand times as long as the others (Sun et al. 2024, "Massive Activations").
    """
    dtype = torch.float32 if values.dtype.itemsize < 4 else None
    by_token = padding is not None or (outliers < math.inf and values.dim() == 3)
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1 if by_token else tuple(range(1, values.dim())), dtype=dtype)
    if norms.dim() == 1:
        return norms
    if outliers < math.inf:
        median = (norms if padding is None else norms.masked_fill(padding, torch.nan)).nanmedian(dim=1, keepdim=True)[0]
        norms = torch.where(median > 0, norms.minimum(outliers * median), norms)
    if padding is not None:
        norms = norms.masked_fill(padding, 0.0)
    return torch.linalg.vector_norm(norms, dim=1)


def _padding(calls: Sequence[Call]) -> Tensor | None:
    if len(calls) == 1:
        return calls[0].padding
    # What is filled up to stack calls of different lengths is padding as well.
    first = calls[0].shape
    if all(c.padding is None for c in calls) and (len(first) != 3 or len({c.shape[1] for c in calls}) == 1):
        return None
    like: Any = calls[0].leaf
    each = [like.new_zeros(c.shape[:-1], dtype=torch.bool) if c.padding is None else c.padding for c in calls]
    return stack(each, fill=True)


def _examples(calls: Sequence[Call]) -> Tensor | None:
    """To which example each row of the stacked calls belongs; every call has examples of its own."""
    if all(call.examples is None for call in calls):
        return None
    like = next(call.examples for call in calls if call.examples is not None)
    each, before = [], 0
    for call in calls:
        own = torch.arange(call.shape[0], device=like.device) if call.examples is None else call.examples
        each.append(own + before)
        before += call.example_count
    return torch.cat(each)
