"""The batches of an evaluation: of every kind of data set, the same each time, labelled, where the model is."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..engine.dropout import random_state_kept
from ..perturbation.batches import rows_of
from .tasks import IGNORED


def batches_of(dataset: Any, size: int, collate_fn: Any, seed: int = 0) -> Iterator[Mapping[str, Any]]:
    """The examples of a data set that have a label, in order, collated; `seed` is of what that draws, such as masks."""
    if collate_fn is None:
        from transformers import default_data_collator as collate_fn
    examples = iter(dataset) if _is_stream(dataset) else (dataset[i] for i in range(len(dataset)))
    for number in count():
        chunk = list(islice(examples, size))
        if not chunk:
            return
        with _seeded(seed + number):
            batch = collate_fn(chunk)
        if not {"labels", "start_positions"} & set(batch):
            raise ValueError(f"Robustness needs `labels` in every batch; found {', '.join(batch)}.")
        labelled = _labelled(batch)
        if labelled is None or labelled.all():
            yield batch
        elif labelled.any():
            yield rows_of(batch, labelled.nonzero().flatten(), len(labelled))


def _labelled(batch: Mapping[str, Any]) -> Tensor | None:
    """Which examples have a label; None where each has."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.dim():
        return None
    return (labels != IGNORED).view(len(labels), -1).any(1)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers of a CPU start from a seed, and are as before afterwards."""
    states = random.getstate(), np.random.get_state()
    with random_state_kept(torch.device("cpu")):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _is_stream(dataset: Any) -> bool:
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    return isinstance(dataset, IterableDataset) or not indexed


def on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def bar(items: Iterable[Any], progress: bool, label: str, total: int | None = None) -> Any:
    """The items, under a progress bar where one is wanted."""
    if not progress:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label, total=total)
