"""The valid range of an input: what a perturbed image may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def valid_range(clip: Sequence[float], processor: Any = None) -> tuple[Tensor, Tensor]:
    """The bounds of an input tensor, which an `Attack` keeps to in every pass.

    Args:
        clip: the lowest and the highest value before normalisation, such as (0, 1) for pixels.
        processor: the image processor that made the tensor, or one that holds it, as CLIP's does; where it normalises,
            the bounds are those of its output, one pair a channel.

    Returns:
        Two tensors that broadcast against (rows, channels, height, width): of shape (channels, 1, 1), or ().

    Raises:
        ValueError: no two numbers, the lower one first.
    """
    if len(clip) != 2 or not clip[0] < clip[1]:
        raise ValueError(f"A valid range is two numbers, the lower one first; found {list(clip)!r}.")
    low, high = torch.tensor(float(clip[0])), torch.tensor(float(clip[1]))
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", False) or mean is None or std is None:
        return low, high
    mean, std = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (low - mean) / std, (high - mean) / std
