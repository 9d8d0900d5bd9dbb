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
        ValueError: no two numbers, the lower one first; or a processor that normalises every example by itself (audio),
            so that no one range is right.
    """
    if len(clip) != 2 or not clip[0] < clip[1]:
        raise ValueError(f"A valid range is two numbers, the lower one first; found {list(clip)!r}.")
    low, high = torch.tensor(float(clip[0])), torch.tensor(float(clip[1]))
    for part in ("image_processor", "feature_extractor"):
        processor = getattr(processor, part, processor)
    if not getattr(processor, "do_normalize", False):
        return low, high
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if mean is None or std is None:
        raise ValueError(
            f"{type(processor).__name__} normalises each example by its own mean and deviation, so no valid range fits "
            "them all. Leave adv_clip out, or make the data with do_normalize=False."
        )
    mean, std = (torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    return (low - mean) / std, (high - mean) / std


def fitted(clip: tuple[Tensor, Tensor], values: Tensor) -> tuple[Tensor, Tensor]:
    """The range in the type of the values. Raises ValueError where it does not fit their shape."""
    low, high = (bound.to(values) for bound in clip)
    try:
        # Not by broadcasting: a range of three channels would silently make three channels of one.
        return low.expand_as(values), high.expand_as(values)
    except RuntimeError as error:
        raise ValueError(
            f"The valid range has shape {tuple(low.shape)}, which does not fit the target's {tuple(values.shape)}: is "
            "the processor, with its `image_mean` and `image_std`, the one that made this tensor?"
        ) from error


def outside(value: Tensor, low: Tensor, high: Tensor, padding: Tensor | None) -> Tensor:
    """Whether an entry that is no padding lies outside of the range by more than rounding, bool, ()."""
    slack = 1e-3 * (high - low)
    found = (value < low - slack) | (value > high + slack)
    return found.any() if padding is None else (found & ~padding.unsqueeze(-1)).any()


def within(moved: Tensor, clean: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The moved values, back in the range; an entry whose clean value is outside moves no further out."""
    return torch.minimum(torch.maximum(moved, torch.minimum(low, clean)), torch.maximum(high, clean))


class RangeCheck:
    """Whether the clean values of a target lie in its valid range.

    Args:
        name: what is perturbed, for the error.
        clip: the valid range, or None for none.
        device: where the model is.
    """

    def __init__(self, name: str, clip: tuple[Tensor, Tensor] | None, device: torch.device) -> None:
        self._name, self._clip = name, clip
        # On a device the answer is waited for at the first batch alone.
        self._waits = True
        self._on_cpu = device.type == "cpu"
        self._outside: Tensor | None = None

    def note(self, outside: list[Tensor]) -> None:
        """Takes in, and empties, what the calls of a micro-batch found."""
        if not outside:
            return
        flag = torch.stack(outside).any()
        outside.clear()
        self._outside = flag if self._outside is None else self._outside | flag
        if self._on_cpu or self._waits:
            self.check()

    def check(self) -> None:
        """Raises ValueError where a value was outside; waits for the device."""
        flag, self._outside = self._outside, None
        self._waits = self._waits and flag is None
        if flag is None or not flag:
            return
        assert self._clip is not None
        low, high = (bound.flatten()[0].item() for bound in self._clip)
        raise ValueError(
            f"adv_clip: clean values of {self._name} lie outside of the valid range, which is {low:.4g} to "
            f"{high:.4g} (of the first channel). Were they normalised? Give the Trainer the processor that made "
            "them (processing_class=...), so that the range is normalised too, or write the range that the model "
            "is really given."
        )
