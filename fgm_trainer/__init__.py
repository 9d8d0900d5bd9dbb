"""Adversarial training for HuggingFace Transformers: swap `Trainer` for `AdversarialTrainer`."""

from typing import TYPE_CHECKING, Any

from . import _moved as _moved
from .attacks import (
    ALUM,
    ATTA,
    AWP,
    FGM,
    FGSM,
    PGD,
    R3F,
    SMART,
    VAT,
    Attack,
    FreeLB,
    Noise,
    PartialFGM,
    TokenAware,
    register,
)
from .perturbation.clipping import valid_range

if TYPE_CHECKING:
    from .arguments import AdversarialArguments, AdversarialSeq2SeqTrainingArguments, AdversarialTrainingArguments
    from .patching import patch
    from .trainer import AdversarialSeq2SeqTrainer, AdversarialTrainer, AdversarialTrainerMixin

__version__ = "0.2.0"

__all__ = [
    "ALUM",
    "ATTA",
    "AWP",
    "FGM",
    "FGSM",
    "PGD",
    "R3F",
    "SMART",
    "VAT",
    "AdversarialArguments",
    "AdversarialSeq2SeqTrainer",
    "AdversarialSeq2SeqTrainingArguments",
    "AdversarialTrainer",
    "AdversarialTrainerMixin",
    "AdversarialTrainingArguments",
    "Attack",
    "FreeLB",
    "Noise",
    "PartialFGM",
    "TokenAware",
    "patch",
    "register",
    "valid_range",
]

_LAZY = {
    "AdversarialArguments": "arguments",
    "AdversarialTrainingArguments": "arguments",
    "AdversarialSeq2SeqTrainingArguments": "arguments",
    "AdversarialTrainer": "trainer",
    "AdversarialTrainerMixin": "trainer",
    "AdversarialSeq2SeqTrainer": "trainer",
    "patch": "patching",
}


def __getattr__(name: str) -> Any:
    # The core runs on torch alone: transformers is imported when a trainer's name is touched.
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
