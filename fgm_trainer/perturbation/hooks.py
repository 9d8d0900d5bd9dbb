"""Hooks that belong to one model: its copies, and what is loaded from a file, do not have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Hook:
    """A module hook that no compiled graph takes in, and that is not copied or saved with the module.

    Args:
        call: the hook; it may keep state from call to call.
    """

    def __init__(self, call: Callable[..., Any]) -> None:
        self._hook = call
        # A compiled graph can't keep state. Set once for the class: a function per hook would be compiled anew for
        # each; and only here, since torch's compiler takes a second to import.
        if Hook.__call__ is _run:
            Hook.__call__ = torch.compiler.disable(_run)  # type: ignore[method-assign]

    def __call__(self, *args: Any) -> Any: ...

    def __reduce__(self) -> tuple[type[SpentHook], tuple[()]]:
        return SpentHook, ()


def _run(self: Hook, *args: Any) -> Any:
    return self._hook(*args)


Hook.__call__ = _run  # type: ignore[method-assign]


class SpentHook:
    """What a copied or loaded module has in a hook's place. It does nothing but take itself off at the first call."""

    def __call__(self, module: nn.Module, *rest: Any) -> None:
        kinds = (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook is self]:
                del hooks[key]
                # A later hook may get the same number, and would be called as this one was.
                for kind in (*kinds, module._forward_hooks_always_called):
                    kind.pop(key, None)
