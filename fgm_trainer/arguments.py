"""The `--adv_*` flags: parse and validate, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .attacks import ATTACKS, AUTO, Attack, attack_class, own_settings
from .engine.controller import STRENGTH
from .engine.driver import EPSILON_UNITS
from .engine.schedule import WARMUP, Schedule
from .perturbation.batches import INPUT_TENSORS
from .perturbation.geometry import NORMS, SCOPES

_METHODS = ", ".join(sorted(ATTACKS))

# Flags that count more than what arguments say (`patching.patch`).
GIVEN: dict[str, Any] = {}


@dataclass
class AdversarialArguments:
    """The adversarial flags, for any dataclass of training arguments to inherit (put it first)."""

    adv_epsilon: float | str | None = field(
        default=None,
        metadata={
            "help": "Size of the perturbation (Miyato et al. 2017, eq. 5). 0 is the stock Trainer, bit for bit. It is "
            "not portable between scopes: `adv_delta_norm` in the log is the length that an example really got. "
            "`auto`, the default of every method, finds it while training."
        },
    )
    adv_strength: float = field(
        default=STRENGTH,
        metadata={
            "help": "With adv_epsilon `auto`: the share of what there is to lose (the loss of guessing less the clean "
            "loss) that an attack may add to the loss."
        },
    )
    adv_epsilon_unit: str = field(
        default="absolute",
        metadata={
            "help": "`absolute`, or `embedding`: epsilon and all other lengths are multiples of the mean norm of a "
            "token's embedding, measured once at the start, so that one value serves models of different size."
        },
    )
    adv_method: str = field(default="fgm", metadata={"help": f"The attack, one of: {_METHODS}."})
    adv_scope: str | None = field(
        default=None,
        metadata={
            "help": "Over which entries a norm is taken: `vocabulary` (rows of the lookup's weight, over the "
            "micro-batch), `example`, `token`. Default: `example`; `vocabulary` for fgm, pgd and noise with a fixed "
            "epsilon."
        },
    )
    adv_norm: str | None = field(
        default=None,
        metadata={"help": f"Norm of the perturbation, one of: {', '.join(NORMS)}. Default: the method's own."},
    )
    adv_target: str | None = field(
        default=None,
        metadata={
            "help": "What is perturbed: `word_embeddings` (the input token lookup of any model), a module path such as "
            "`bert.encoder.layer.3` or a pattern such as `bert.encoder.layer.*`, an input tensor such as "
            "`pixel_values`, or `weights`. Default: the method's own, `word_embeddings` for all but awp."
        },
    )
    adv_clip: list[float] | None = field(
        default=None,
        metadata={
            "help": "Valid range of an input tensor, such as `0 1`, held in every pass; where the Trainer has an image "
            "processor that normalises, the range before normalisation."
        },
    )
    adv_targeted: int | str | None = field(
        default=None,
        metadata={
            "help": "Move towards a label in place of away from the true one: a class, `least_likely`, or a column of "
            "the data that holds it."
        },
    )
    adv_weight: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the adversarial loss. The two losses add up, so the gradient is about twice as long and "
            "`max_grad_norm` clips sooner."
        },
    )
    adv_clean_weight: float = field(
        default=1.0, metadata={"help": "Factor of the clean loss; 0 trains on adversarial examples alone."}
    )
    adv_start: float = field(
        default=0.0,
        metadata={"help": "No attack before this optimizer step, or, below 1, before this fraction of training."},
    )
    adv_warmup: float | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps, or, below 1, the fraction of training, over which epsilon (where it is `auto`: "
            "`adv_strength`) rises linearly from `adv_start` on. A large epsilon from the first step on can collapse a "
            f"run; 0 for the classic snippet's steps. Default: {WARMUP}."
        },
    )
    adv_recover: bool = field(
        default=False,
        metadata={
            "help": "A fixed epsilon is lowered as `auto` does where a model can't bear it, and is never exceeded."
        },
    )
    adv_every: int = field(default=1, metadata={"help": "Attack every k-th optimizer step."})
    adv_same_dropout: bool = field(
        default=False, metadata={"help": "All passes of a step draw the same dropout masks."}
    )
    adv_steps: int | None = field(
        default=None, metadata={"help": "Ascent steps of an iterated method. Default: the method's own."}
    )
    adv_step_size: float | None = field(
        default=None, metadata={"help": "Length of one ascent step. Default: the method's own."}
    )
    adv_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "JSON object of further settings of the method."}
    )

    def __post_init__(self) -> None:
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()
        for name, value in GIVEN.items():
            setattr(self, name, value)
        self.check()

    def check(self) -> None:
        """Brings the flags into their types. Raises ValueError, one message with every flag that is wrong."""
        problems: list[str] = []
        if isinstance(self.adv_kwargs, str):
            try:
                self.adv_kwargs = json.loads(self.adv_kwargs)
            except json.JSONDecodeError as error:
                problems.append(f"adv_kwargs must be a JSON object; found {self.adv_kwargs!r} ({error}).")
                self.adv_kwargs = None
        self.adv_epsilon = as_number(self.adv_epsilon)
        if isinstance(self.adv_targeted, str) and self.adv_targeted.isdecimal():
            self.adv_targeted = int(self.adv_targeted)
        problems += _problems(self)
        if problems:
            raise ValueError(
                "\n".join(["Adversarial training can't be configured like this:", *map("- ".__add__, problems)])
            )

    def make_attack(self) -> Attack:
        """The attack that the flags describe."""
        return attack_class(self.adv_method)(
            weight=self.adv_weight, clean_weight=self.adv_clean_weight, targeted=self.adv_targeted, **_given(self)
        )

    def make_schedule(self, shape: Callable[[float], float] | None = None) -> Schedule:
        """The schedule that the flags describe, with a shape that stands in place of start and warm-up."""
        warmup = self.adv_warmup
        if warmup is None:
            warmup = WARMUP if shape is None else 0.0
        return Schedule(self.adv_start, warmup, self.adv_every, shape)


@dataclass
class AdversarialTrainingArguments(AdversarialArguments, TrainingArguments):
    """`TrainingArguments` and the adversarial flags, flat, for `HfArgumentParser`.

    Raises:
        ValueError: one message with every adversarial flag that is wrong, before any training.
    """


@dataclass
class AdversarialSeq2SeqTrainingArguments(AdversarialArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and the adversarial flags."""


def flags_of(args: Any) -> AdversarialArguments | None:
    """The adversarial flags of training arguments, checked again, as they may have been set one by one; None without.

    Raises:
        ValueError: one message with every flag that is wrong.
    """
    if isinstance(args, AdversarialArguments):
        args.check()
        return args
    names = flag_names(args)
    return AdversarialArguments(**{name: getattr(args, name) for name in names}) if names else None


def flag_names(args: Any) -> list[str]:
    """The flags that training arguments have, by name; fields of a script's own that are called so are none."""
    known = getattr(args, "__dataclass_fields__", {})
    return [f.name for f in fields(AdversarialArguments) if hasattr(args, f.name) and known.get(f.name, f) is f]


def as_number(value: Any) -> Any:
    """A flag's number, which a command line gives as text; any other text as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


# Settings of a method that have a flag, and are its own where the flag is left out.
_SETTINGS = ("epsilon", "scope", "norm", "steps", "step_size")


def changed_attack_fields(args: Any) -> list[str]:
    """The flags that describe the attack and differ from their defaults."""
    defaults = {f.name: f.default for f in fields(AdversarialArguments)}
    names = ("method", *_SETTINGS, "weight", "clean_weight", "targeted", "kwargs")
    flags = [f"adv_{name}" for name in names]
    return [flag for flag in flags if getattr(args, flag, defaults[flag]) != defaults[flag]]


def _given(args: AdversarialArguments) -> dict[str, Any]:
    """The method's settings that were given, by the method's names for them."""
    named = {name: getattr(args, f"adv_{name}") for name in _SETTINGS}
    given = {name: value for name, value in named.items() if value is not None}
    return given | (args.adv_kwargs if isinstance(args.adv_kwargs, dict) else {})


def _problems(args: AdversarialArguments) -> list[str]:
    found = []
    for name in ("adv_epsilon", "adv_strength", "adv_weight", "adv_clean_weight", "adv_start", "adv_warmup"):
        value = getattr(args, name)
        if (value is None and name in ("adv_epsilon", "adv_warmup")) or (value == AUTO and name == "adv_epsilon"):
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            auto = ", or 'auto'" * (name == "adv_epsilon")
            found.append(f"{name} must be a finite number, 0 or more{auto}; found {value!r}.")
        elif name in ("adv_start", "adv_warmup") and value >= 1 and value != int(value):
            found.append(f"{name} is a fraction below 1 or a whole number of optimizer steps; found {value!r}.")
    if args.adv_strength == 0:
        found.append("adv_strength must be above 0; to train without an attack write adv_epsilon=0.")
    if args.adv_weight == 0:
        found.append("adv_weight must be above 0; to train without an attack write adv_epsilon=0.")
    if not isinstance(args.adv_every, int) or args.adv_every < 1:
        found.append(f"adv_every must be a whole number, 1 or more; found {args.adv_every!r}.")
    if args.adv_scope is not None and args.adv_scope not in SCOPES:
        found.append(f"adv_scope must be one of {', '.join(SCOPES)}; found {args.adv_scope!r}.")
    elif args.adv_scope == "vocabulary" and args.adv_target in INPUT_TENSORS:
        found.append(
            f"adv_scope='vocabulary' exists for token lookups only, and adv_target is {args.adv_target!r}; "
            "write adv_scope='example'."
        )
    if args.adv_epsilon_unit not in EPSILON_UNITS:
        found.append(f"adv_epsilon_unit must be one of {', '.join(EPSILON_UNITS)}; found {args.adv_epsilon_unit!r}.")
    if args.adv_clip is not None:
        if args.adv_target not in INPUT_TENSORS:
            found.append(
                "adv_clip is the valid range of an input tensor, and adv_target is "
                f"{args.adv_target or 'the token lookup'!r}; write adv_target='pixel_values', or leave adv_clip out."
            )
        if len(args.adv_clip) != 2 or not args.adv_clip[0] < args.adv_clip[1]:
            found.append(f"adv_clip must be two numbers, the lower one first; found {args.adv_clip!r}.")
    if args.adv_norm is not None and args.adv_norm not in NORMS:
        found.append(f"adv_norm must be one of {', '.join(NORMS)}; found {args.adv_norm!r}.")
    if args.adv_kwargs is not None and not isinstance(args.adv_kwargs, dict):
        found.append(f"adv_kwargs must be a JSON object; found {args.adv_kwargs!r}.")
    for name in _SETTINGS:
        if isinstance(args.adv_kwargs, dict) and name in args.adv_kwargs and getattr(args, f"adv_{name}") is not None:
            found.append(f"{name} is given twice: adv_{name} and adv_kwargs[{name!r}]. Leave one out.")
    try:
        method = attack_class(args.adv_method)
    except ValueError as error:
        return [*found, f"adv_method: {error}"]
    own = own_settings(method)
    for name in set(_given(args)) - {"epsilon", "scope", "norm"} - set(own):
        flag = f"adv_{name}" if name in ("steps", "step_size") else f"adv_kwargs[{name!r}]"
        found.append(
            f"{flag} is given, but the method {args.adv_method!r} has no such setting; "
            f"its own settings are: {', '.join(own) or 'none'}."
        )
    if not found:
        try:
            args.make_attack()
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return found
