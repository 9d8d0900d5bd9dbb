"""The attacks, one file each. A module put into this folder is imported, and so registered, by itself."""

import importlib
import pkgutil

from .base import AUTO, Answer, Attack, Glance, Iterated, Look, Train, run
from .registry import ATTACKS, attack_class, own_settings, register
from .requests import ForwardPass, GradientPass, Memory, Passes, PassResult, Request, Step, Total, TrainPass

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from .alum import ALUM  # noqa: E402
from .atta import ATTA  # noqa: E402
from .awp import AWP  # noqa: E402
from .fgm import FGM  # noqa: E402
from .fgsm import FGSM  # noqa: E402
from .freelb import FreeLB  # noqa: E402
from .noise import Noise  # noqa: E402
from .partial_fgm import PartialFGM  # noqa: E402
from .pgd import PGD  # noqa: E402
from .r3f import R3F  # noqa: E402
from .smart import SMART  # noqa: E402
from .token_aware import TokenAware  # noqa: E402
from .vat import VAT  # noqa: E402

__all__ = [
    "ALUM",
    "ATTA",
    "ATTACKS",
    "AUTO",
    "AWP",
    "FGM",
    "FGSM",
    "PGD",
    "R3F",
    "SMART",
    "VAT",
    "Answer",
    "Attack",
    "ForwardPass",
    "FreeLB",
    "Glance",
    "GradientPass",
    "Iterated",
    "Look",
    "Memory",
    "Noise",
    "PartialFGM",
    "PassResult",
    "Passes",
    "Request",
    "Step",
    "TokenAware",
    "Total",
    "Train",
    "TrainPass",
    "attack_class",
    "own_settings",
    "register",
    "run",
]
