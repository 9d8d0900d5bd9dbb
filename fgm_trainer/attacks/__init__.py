"""The attacks, one file each. A module put into this folder is imported, and so registered, by itself."""

import importlib
import pkgutil

from .base import ATTACKS, Answer, Attack, Look, Passes, Request, Train, attack_class, own_settings, register, run

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .fgm import FGM  # noqa: E402
from .noise import Noise  # noqa: E402
from .pgd import PGD  # noqa: E402

__all__ = [
    "ATTACKS",
    "FGM",
    "PGD",
    "Answer",
    "Attack",
    "Look",
    "Noise",
    "Passes",
    "Request",
    "Train",
    "attack_class",
    "own_settings",
    "register",
    "run",
]
