"""The methods by name, as `--adv_method` takes them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .base import Attack

ATTACKS: dict[str, type[Attack]] = {}
AttackClass = TypeVar("AttackClass", bound=type[Attack])


def register(name: str) -> Callable[[AttackClass], AttackClass]:
    """Class decorator: makes the method available as `--adv_method name`."""

    def add(attack: AttackClass) -> AttackClass:
        if name in ATTACKS:
            raise ValueError(f"An attack named {name!r} is registered already: {ATTACKS[name].__qualname__}.")
        attack.name = name
        ATTACKS[name] = attack
        return attack

    return add


def attack_class(name: str) -> type[Attack]:
    """The registered method of that name. Raises ValueError that lists what there is."""
    if name not in ATTACKS:
        near = difflib.get_close_matches(name, ATTACKS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"There is no attack {name!r}; registered are: {', '.join(sorted(ATTACKS))}.{hint}")
    return ATTACKS[name]


def own_settings(attack: type[Attack]) -> dict[str, Any]:
    """The settings that a method adds to `Attack`'s, with their defaults."""
    common = {f.name for f in fields(Attack)}
    return {f.name: None if f.default is MISSING else f.default for f in fields(attack) if f.name not in common}
