"""What a batch holds: how many examples, which of them, and which rows of a tensor belong to which example."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Inputs of a model that a perturbation can be added to.
INPUT_TENSORS = ("inputs_embeds", "pixel_values", "input_values", "input_features")


def copied(batch: Any, of_tensor: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Any:
    """The batch in containers of its own, nested ones too: a pass may take things out of it. Tensors are shared."""
    if isinstance(batch, Tensor):
        return of_tensor(batch)
    if isinstance(batch, Mapping):
        return with_entries(batch, {name: copied(value, of_tensor) for name, value in batch.items()})
    return _sequence(batch, [copied(v, of_tensor) for v in batch]) if isinstance(batch, (list, tuple)) else batch


def cloned(batch: Any) -> Any:
    """The batch with tensors of its own."""
    return copied(batch, lambda tensor: tensor.detach().clone())


def versions_in(batch: Any) -> list[int]:
    """How often each tensor of the batch was written to."""
    return [version(tensor) for tensor in tensors_in(batch)]


def version(tensor: Tensor) -> int:
    """How often the tensor was written to; 0 where nobody may."""
    return 0 if tensor.is_inference() else tensor._version


def with_entries(batch: Mapping[str, Any], entries: Mapping[str, Any]) -> Any:
    """A batch of the same type (a `BatchEncoding` has its entries as attributes too) with these entries alone."""
    if not isinstance(batch, (dict, UserDict)) or hasattr(batch, "to_tuple"):
        return dict(entries)
    own: Any = copy.copy(batch)
    own.clear()
    own.update(entries)
    return own


def _sequence(like: Any, values: Iterable[Any]) -> Any:
    if isinstance(like, list):
        return list(values)
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def without_column(batch: Any, name: object) -> Any:
    """The batch without a column that only an attack reads."""
    if not isinstance(name, str) or not isinstance(batch, Mapping) or name not in batch:
        return batch
    return with_entries(batch, {key: value for key, value in batch.items() if key != name})


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """Every tensor of the batch that has a dimension, nested ones too, in order."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_in(value)


def examples_in(batch: Any) -> int:
    """How many examples a batch has: the length of its labels, else of its ids, else of its first tensor."""
    named = batch if isinstance(batch, Mapping) else {}
    labels = named.get("labels")
    if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], Mapping):
        # Detection: the objects of each image.
        return len(labels)
    known = [value for name in ("labels", "input_ids") for value in tensors_in(named.get(name))]
    first = next(iter(known), None)
    first = next(tensors_in(batch), None) if first is None else first
    return 0 if first is None else first.shape[0]


def rows_of(batch: Any, chosen: Tensor, size: int) -> Any:
    """The batch with the chosen examples alone; what has not one entry for each of the `size` examples stays.

    Raises:
        ValueError: an input tensor has another number of rows, and which of them belong to an example is not known.
    """
    if isinstance(batch, Tensor):
        return batch[chosen.to(batch.device)] if batch.dim() and batch.shape[0] == size else batch
    if isinstance(batch, Mapping):
        for name, value in batch.items():
            is_input = name in INPUT_TENSORS or str(name).startswith("pixel_values")
            if is_input and isinstance(value, Tensor) and value.shape[0] != size:
                raise ValueError(
                    f"A part of the batch can be attacked where every input has one row an example; {name!r} has "
                    f"{value.shape[0]} rows for {size} examples. Choose a method that attacks them all, such as "
                    "adv_method='fgm'."
                )
        return with_entries(batch, {name: rows_of(value, chosen, size) for name, value in batch.items()})
    if isinstance(batch, list) and len(batch) == size:
        return [batch[i] for i in chosen.tolist()]
    if isinstance(batch, (list, tuple)):
        return _sequence(batch, [rows_of(value, chosen, size) for value in batch])
    return batch


def example_of_rows(batch: Any, rows: int) -> Tensor | None:
    """To which example each row of a tensor belongs, int64 (rows,); None where it is not known.

    Known are choices, chunks and images that the model flattens from (examples, several, ...) into (rows, ...), and
    the patches of Qwen2-VL's kind, counted by `image_grid_thw`, where there is one image an example.
    """
    examples = examples_in(batch)
    for tensor in tensors_in(batch):
        if tensor.dim() > 2 and tensor.shape[0] == examples and examples * tensor.shape[1] == rows:
            return torch.arange(examples, device=tensor.device).repeat_interleave(tensor.shape[1])
    grid = batch.get("image_grid_thw") if isinstance(batch, Mapping) else None
    if isinstance(grid, Tensor) and len(grid) == examples:
        patches = grid.prod(-1)
        merged, rest = divmod(int(patches.sum()), rows)
        if not rest and not (patches % merged).any():
            return torch.arange(examples, device=grid.device).repeat_interleave(patches // merged)
    return None
