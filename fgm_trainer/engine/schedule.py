"""When the attack runs and how large it is: a start, a linear rise, a period."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

# Over which part of training epsilon rises, where nothing else is asked for (docs/epsilon.md).
WARMUP = 0.5


@dataclass(frozen=True)
class Schedule:
    """Durations are whole optimizer steps, or, below 1, fractions of training.

    Args:
        start: no attack before it.
        warmup: epsilon rises linearly over it, from the first attacked step on: epsilon * (k + 1) / warmup.
        every: attack every k-th optimizer step, counted from `start`.
        shape: in place of start and warm-up, the factor of epsilon by training progress: 0 at the first step, below 1
            at the last.
    """

    start: float = 0.0
    warmup: float = 0.0
    every: int = 1
    shape: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None and (self.start or self.warmup):
            raise ValueError(
                f"epsilon_schedule takes the place of adv_start ({self.start}) and adv_warmup ({self.warmup}): leave "
                "them out, or let the function be 0 at the start."
            )

    def factor(self, step: int, total: int) -> float:
        """What epsilon is multiplied by at optimizer step `step` (from 0) of `total`; 0 for no attack."""
        since = step - in_steps(self.start, total)
        if since < 0 or since % self.every:
            return 0.0
        if self.shape is not None:
            found = float(self.shape(step / total))
            if not 0 <= found < math.inf:
                raise ValueError(
                    f"epsilon_schedule must give a finite number, 0 or more; at {step / total:g} it gave {found!r}."
                )
            return found
        rise = in_steps(self.warmup, total)
        return 1.0 if since >= rise else (since + 1) / rise

    def remark(self, total: int) -> str | None:
        """What does not fit into `total` optimizer steps; None where all does."""
        first, rise = in_steps(self.start, total), in_steps(self.warmup, total)
        if first >= total:
            return f"adv_start={self.start:g} lies beyond the end of training ({total} steps): nothing is attacked."
        if first + rise > total:
            last = self.factor(total - 1 - (total - 1 - first) % self.every, total)
            return f"adv_warmup={self.warmup:g} lasts longer than training ({total} steps): epsilon ends at {last:.0%}."
        if self.every > 1 and first + self.every >= total:
            return f"adv_every={self.every}: of the {total} steps of training one alone is attacked."
        return None

    def warm(self, total: int) -> int:
        """The first optimizer step at which epsilon has its full size."""
        return in_steps(self.start, total) + in_steps(self.warmup, total)


@functools.cache
def in_steps(duration: float, total: int) -> int:
    """A duration in whole optimizer steps."""
    # Rounded first: 0.07 * 100 is a little more than 7 in binary.
    return math.ceil(round(duration * total, 9)) if duration < 1 else int(duration)
