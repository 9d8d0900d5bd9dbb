"""The loss of guessing: what a constant answer costs that knows how frequent each label is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class GuessingLoss:
    """The loss of guessing, from the labels that were seen.

    - One class an example, or a position: the entropy of the classes.
    - Several labels an example, each there or not: their mean entropy.
    - Numbers: their mean variance.

    Args:
        size: the number of classes, labels or numbers; 0 where nothing is known of the loss.
        numbers: whether numbers are predicted.
    """

    def __init__(self, size: int = 0, numbers: bool = False) -> None:
        self._size, self._numbers = size, numbers
        # Whether labels are classes, one a label; else there is a column for each of `size`.
        self._one = True

    def new_counts(self) -> Tensor:
        """Of nothing: the number of labels, and of each class or column the sum and the sum of squares."""
        return torch.zeros(1 + 2 * self._size)

    def counts(self, labels: Any, like: Tensor) -> Tensor:
        """What the labels of a batch add, on the device of `like`; -100 stands for no label."""
        if not self._size or not isinstance(labels, Tensor):
            return self.new_counts().to(like.device)
        labels = labels.detach().to(like.device)
        self._one = not self._numbers and not labels.is_floating_point()
        if not self._one:
            rows = labels.reshape(-1, self._size).to(like.dtype)
            return torch.cat([like.new_full((1,), len(rows)), rows.sum(0), rows.square().sum(0)])
        flat = labels.flatten().long()
        seen = ((flat >= 0) & (flat < self._size)).to(like.dtype)
        sums = like.new_zeros(self._size).index_add_(0, flat.clamp(0, self._size - 1), seen)
        return torch.cat([seen.sum()[None], sums, sums])

    def loss(self, counts: Tensor) -> Tensor:
        """The loss of guessing, a scalar; NaN where it is not known."""
        if not self._size:
            return torch.full_like(counts[0], math.nan)
        found: Tensor
        mean, square = counts[1:].view(2, self._size) / counts[0]
        if self._numbers:
            found = (square - mean.square()).mean()
        elif self._one:
            found = _entropies(mean).sum()
        else:
            found = (_entropies(mean) + _entropies(1 - mean)).mean()
        return found


def _entropies(shares: Tensor) -> Tensor:
    found: Tensor = -torch.special.xlogy(shares, shares)
    return found


def guessing_of(model: nn.Module) -> GuessingLoss:
    """What a transformers model is known to predict; it must compute its own loss."""
    config = getattr(model, "config", None)
    size = getattr(config, "num_labels", 0)
    if "Classification" not in type(model).__name__ or not isinstance(size, int) or size < 1:
        return GuessingLoss()
    return GuessingLoss(size, size == 1 or getattr(config, "problem_type", None) == "regression")
