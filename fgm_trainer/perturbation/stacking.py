"""Several calls of a target as one tensor, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def stack(tensors: list[Tensor], fill: float = 0) -> Tensor:
    """The calls' tensors one after the other along the rows, the shorter ones filled up at the end."""
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    padded = [torch.cat([t, t.new_full((t.shape[0], longest - t.shape[1], *t.shape[2:]), fill)], 1) for t in tensors]
    return torch.cat(padded)


def cut(stacked: Tensor, rows: slice, shape: torch.Size) -> Tensor:
    """The part of one call."""
    return stacked[rows] if stacked.dim() < 3 else stacked[rows, : shape[1]]


def joined(tensors: list[Tensor]) -> Tensor:
    """One after the other along the rows."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def row_norms(values: Tensor, padding: Tensor | None) -> Tensor:
    """The Euclidean norm of each row, over the positions that hold a token: (rows,), in float32 at least."""
    dtype = torch.float32 if values.dtype.itemsize < 4 else None
    dims = tuple(range(1, values.dim())) if padding is None else (-1,)
    norms: Tensor = torch.linalg.vector_norm(values, dim=dims, dtype=dtype)
    if padding is not None:
        norms = norms.masked_fill(padding, 0.0)
    return norms if norms.dim() == 1 else torch.linalg.vector_norm(norms, dim=1)
