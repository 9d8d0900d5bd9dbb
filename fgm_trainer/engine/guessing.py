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

    def loss(self, counts: Tensor, of: Tensor | None = None) -> Tensor:
        """The loss of guessing, a scalar; NaN where it is not known.

        Args:
            counts: of the labels that the guess is made from.
            of: of those that it is made for, some of the former; None for all of them.
        """
        if not self._size:
            return torch.full_like(counts[0], math.nan)
        of = counts if of is None else torch.where(of[0] > 0, of, counts)
        mean, _ = counts[1:].view(2, self._size) / counts[0]
        own, own_square = of[1:].view(2, self._size) / of[0]
        found: Tensor
        if self._numbers:
            found = (own_square - 2 * mean * own + mean.square()).mean()
        elif self._one:
            found = -torch.special.xlogy(own, mean).sum()
        else:
            found = -(torch.special.xlogy(own, mean) + torch.special.xlogy(1 - own, 1 - mean)).mean()
        return found

    def bearable(self, counts: Tensor) -> Tensor:
        """The part of what there is to lose that an attack may take, a scalar up to 1: 5/2 of the share of rare labels.

        Of classes those are all but the most frequent one, and two fifths of them count as even; of several labels an
        example they are the less frequent value of each. What an attack adds falls on them most: where nine words in
        ten are no entity, a mean of 0.4 more is up to 4 more on each entity. 1 for numbers, and where nothing is known.
        """
        if not self._size or self._numbers:
            return torch.ones_like(counts[0])
        mean = counts[1 : 1 + self._size] / counts[0]
        rare = 1 - mean.max() if self._one else torch.minimum(mean, 1 - mean).mean()
        return torch.where(counts[0] > 0, (2.5 * rare).clamp(max=1), 1.0)


def guessing_of(model: nn.Module) -> GuessingLoss:
    """What a transformers model is known to predict; it must compute its own loss."""
    config = getattr(model, "config", None)
    size = getattr(config, "num_labels", 0)
    if "Classification" not in type(model).__name__ or not isinstance(size, int) or size < 1:
        return GuessingLoss()
    return GuessingLoss(size, size == 1 or getattr(config, "problem_type", None) == "regression")
