"""Which dropout masks the passes of a step draw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]
_AS_THEY_COME = nullcontext()


class Masks:
    """Passes under the same name draw the same masks; those without a name go on in the stream of random numbers.

    Args:
        device: where the model is.
        all_same: every pass has the same masks, whatever its name.
    """

    def __init__(self, device: torch.device, all_same: bool = False) -> None:
        self._device, self._all_same = device, all_same
        self._starts: dict[str, State] = {}

    def drawn(self, name: str) -> AbstractContextManager[None]:
        """One pass. A repetition leaves the random state as it found it."""
        name = "all" if self._all_same else name
        if name in self._starts:
            return self._again(name)
        if name:
            self._starts[name] = _state(self._device)
        return _AS_THEY_COME

    @contextmanager
    def _again(self, name: str) -> Iterator[None]:
        with random_state_kept(self._device):
            _set(self._device, self._starts[name])
            yield


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards they go on as if none had been."""
    now = _state(device)
    try:
        yield
    finally:
        _set(device, now)


def _state(device: torch.device) -> State:
    own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_place(device))
    return torch.get_rng_state(), own


def _set(device: torch.device, state: State) -> None:
    cpu, own = state
    torch.set_rng_state(cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own, *_place(device))


def _place(device: torch.device) -> tuple[torch.device, ...]:
    # torch.mps has one device, and its functions take none.
    return () if device.type == "mps" else (device,)
