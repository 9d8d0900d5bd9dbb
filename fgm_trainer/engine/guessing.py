"""The loss of guessing: what a constant answer costs that knows how frequent each label is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

_NO_LABEL = -100


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
        """Of nothing: of each class or column the number of labels, their sum and the sum of their squares."""
        return torch.zeros(3 * self._size)

    def counts(self, labels: Any, like: Tensor) -> Tensor:
        """What the labels of a batch add, on the device of `like`; -100 stands for no label."""
        if not self._size or not isinstance(labels, Tensor):
            return self.new_counts().to(like.device)
        labels = labels.detach().to(like.device)
        self._one = not self._numbers and not labels.is_floating_point()
        if not self._one:
            if labels.numel() % self._size:
                return self.new_counts().to(like.device)
            rows = labels.reshape(-1, self._size).to(like.dtype)
            there = rows != _NO_LABEL
            rows = rows.masked_fill(~there, 0.0)
            return torch.cat([there.sum(0).to(like.dtype), rows.sum(0), rows.square().sum(0)])
        flat = labels.flatten().long()
        seen = ((flat >= 0) & (flat < self._size)).to(like.dtype)
        sums = like.new_zeros(self._size).index_add_(0, flat.clamp(0, self._size - 1), seen)
        return torch.cat([seen.sum().expand(self._size), sums, sums])

    def loss(self, counts: Tensor, of: Tensor | None = None) -> Tensor:
        """The loss of guessing, a scalar; NaN where it is not known.

        Args:
            counts: of the labels that the guess is made from.
            of: of those that it is made for, some of the former; None for all of them.
        """
        if not self._size:
            return counts.new_full((), math.nan)
        number, total, square = counts.view(3, self._size)
        mean, own, own_square = total / number, total / number, square / number
        if of is not None:
            # A column that has no label in this step stands for itself.
            of_number, of_total, of_square = of.view(3, self._size)
            own = torch.where(of_number > 0, of_total / of_number, own)
            own_square = torch.where(of_number > 0, of_square / of_number, own_square)
        found: Tensor
        if self._numbers:
            found = (own_square - 2 * mean * own + mean.square()).mean()
        elif self._one:
            found = -torch.special.xlogy(own, mean).sum()
        else:
            found = -(torch.special.xlogy(own, mean) + torch.special.xlogy(1 - own, 1 - mean)).mean()
        return found

    def bearable(self, counts: Tensor) -> Tensor:
        """The part of what there is to lose that an attack may take, a scalar up to 1: the odds of a rare label.

        Of classes those are all but the most frequent one; of several labels an example the less frequent value of
        each. What an attack adds falls on them most: where nine words in ten are no entity, a mean of 0.4 more is up to
        4 more on each entity. 1 for numbers, and where nothing is known.
        """
        if not self._size or self._numbers:
            return counts.new_ones(())
        number, total, _ = counts.view(3, self._size)
        mean = total / number
        rare = 1 - mean.max() if self._one else torch.minimum(mean, 1 - mean)
        return torch.where((number > 0).any(), (rare / (1 - rare)).clamp(max=1).nanmean(), 1.0)


def guessing_of(model: nn.Module) -> GuessingLoss:
    """What a transformers model is known to predict; it must compute its own loss, with that library's forward."""
    bare = getattr(model, "get_base_model", lambda: model)()
    config, kind = getattr(bare, "config", None), type(bare)
    size, problem = getattr(config, "num_labels", 0), getattr(config, "problem_type", None)
    known = "Classification" in kind.__name__ and kind.forward.__module__.startswith("transformers.")
    # Frames of sound have one-hot labels.
    if not known or "AudioFrame" in kind.__name__ or not isinstance(size, int) or size < 1:
        return GuessingLoss()
    return GuessingLoss(size, problem == "regression" or (size == 1 and problem is None))
