"""`fgm_trainer.patch`: every transformers Trainer is adversarial, as long as it lasts."""

from __future__ import annotations

import functools
import multiprocessing
import sys
import types
from abc import ABCMeta
from collections.abc import Callable, Iterator, Set
from dataclasses import fields
from typing import Any, ClassVar, get_type_hints

from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.utils import logging

from . import arguments
from .arguments import AdversarialArguments, flag_names, flags_of
from .run import AttackedRun
from .trainer import AdversarialSeq2SeqTrainer, AdversarialTrainer, AdversarialTrainerMixin

logger = logging.get_logger(__name__)


class patch:  # noqa: N801
    """Makes every transformers Trainer adversarial, from now on, or as a context.

    No class changes its name, place or bases. A trainer, transformers' own or of a subclass, gets `AdversarialTrainer`
    among its bases when it is made, or when it is asked to train, and keeps it. `TrainingArguments` and its subclasses
    take the `adv_*` flags. Leaving the context, or `undo`, puts everything back; argument classes that were defined
    meanwhile keep the flags. One counts at a time: a new one undoes the former.

        with fgm_trainer.patch(adv_epsilon="auto"):
            trainer = trl.SFTTrainer(...)
            trainer.train()

    Args:
        **flags: `adv_*` flags, which count more than what training arguments say themselves.

    Attributes:
        trainers: the names of the trainers that were made.
        steps: how many micro-batches were attacked, in this process and those forked from it.

    Raises:
        ValueError: one message with every flag whose value is wrong.
    """

    _active: ClassVar[patch | None] = None

    def __init__(self, **flags: Any) -> None:
        # Those of the former one would count more.
        former, arguments.GIVEN = arguments.GIVEN, {}
        try:
            self.flags = _checked(flags)
        finally:
            arguments.GIVEN = former
        if patch._active is not None:
            patch._active.undo()
        self.trainers: list[str] = []
        # Whether one of them evaluated, and whether one trained with epsilon 0, as its arguments ask.
        self._evaluated = self._stock = self._trained = False
        # Forked processes share it.
        self._counter = multiprocessing.Value("q", 0)
        self._attributes = _Attributes(lambda: patch._active is self)
        # The adversarial class of each trainer's own, which may not be hashable.
        self._kinds: dict[int, tuple[type, type]] = {}
        patch._active, arguments.GIVEN = self, flags
        AttackedRun.counters.append(self._counter)
        self._attributes.wrap(Trainer, "__init__", self._made)
        self._attributes.wrap(Trainer, "train", self._train)
        for name in ("evaluate", "predict", "evaluation_loop"):
            self._attributes.wrap(Trainer, name, self._evaluate)
        _add_flags(self._attributes)

    @property
    def steps(self) -> int:
        """How many micro-batches were attacked."""
        return int(self._counter.value)

    def undo(self) -> None:
        """Puts everything back."""
        if patch._active is not self:
            return
        self._attributes.undo()
        AttackedRun.counters.remove(self._counter)
        arguments.GIVEN, patch._active = {}, None

    def __enter__(self) -> patch:
        if patch._active is not self:
            raise RuntimeError("This patch is over: make a new one, with fgm_trainer.patch(...).")
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self.undo()
        # A trainer that was made may still train.
        if kind is None and (self._trained or not self.trainers):
            try:
                self.check()
            except RuntimeError as error:
                logger.warning(str(error))

    def check(self) -> None:
        """Raises RuntimeError where nothing was attacked, though that was asked for."""
        if self.steps or self._stock or self.flags.adv_epsilon == 0:
            return
        if not self.trainers:
            raise RuntimeError(f"Nothing was attacked: no transformers Trainer was made in this process. {_OWN_LOOP}")
        names = ", ".join(dict.fromkeys(self.trainers))
        if self._trained:
            raise RuntimeError(f"Nothing was attacked: {names} made no attacked training step.")
        if not self._evaluated:
            raise RuntimeError(f"Nothing was attacked: {names} was made, and its train() not called. {_OWN_LOOP}")

    # What a Trainer calls ---------------------------------------------------------------------------------------------

    def _made(self, stock: Callable[..., None], trainer: Any, *args: Any, **kwargs: Any) -> None:
        stock(trainer, *args, **kwargs)
        self.trainers.append(type(trainer).__name__)
        self._adopt(trainer)

    def _train(self, stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(trainer, AdversarialTrainerMixin):
            # It was made before.
            self.trainers.append(type(trainer).__name__)
            self._adopt(trainer)
            return AdversarialTrainerMixin.train(trainer, *args, **kwargs)
        plan = trainer._adv_run.plan
        if plan.attacks:
            self._trained = True
        else:
            self._stock = True
        if trainer.is_world_process_zero():
            settings = ", ".join(f"{name} {value}" for name, value in plan.attack.settings().items())
            what = f"attacks {plan.target}: {settings}" if plan.attacks else "does not attack: epsilon is 0"
            print(f"fgm_trainer: {type(trainer).__name__} {what}", file=sys.stderr)
        return stock(trainer, *args, **kwargs)

    def _evaluate(self, stock: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = True
        return stock(trainer, *args, **kwargs)

    def _adopt(self, trainer: Any) -> None:
        """Puts `AdversarialTrainer` behind the trainer's own class, in front of `Trainer`."""
        kind = type(trainer)
        if isinstance(trainer, AdversarialTrainerMixin):
            return
        if id(kind) not in self._kinds:
            self._kinds[id(kind)] = kind, _adversarial(kind, self.flags)
        trainer.__class__ = self._kinds[id(kind)][1]
        trainer._adv_prepare()


_ABSENT = object()


class _Attributes:
    """Attributes of classes that have other values for a while.

    Args:
        lasts: whether the while is not over.
    """

    def __init__(self, lasts: Callable[[], bool]) -> None:
        self._lasts = lasts
        # Whose attribute was what, and is what now.
        self._set: list[tuple[type, str, Any, Any]] = []

    def set(self, owner: type, name: str, value: Any) -> None:
        """Gives an attribute another value."""
        self._set.append((owner, name, vars(owner).get(name, _ABSENT), value))
        setattr(owner, name, value)

    def wrap(self, owner: type, name: str, by: Callable[..., Any]) -> None:
        """Calls `by` in place of a method, with the method in front of its arguments."""
        stock = vars(owner)[name]

        @functools.wraps(stock)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # Somebody may have kept it.
            return by(stock, *args, **kwargs) if self._lasts() else stock(*args, **kwargs)

        self.set(owner, name, wrapper)

    def undo(self) -> None:
        """Puts back what nobody else has replaced."""
        for owner, name, former, own in reversed(self._set):
            if vars(owner).get(name) is not own:
                continue
            if former is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, former)


_OWN_LOOP = (
    "A loop of its own needs fgm_trainer.loops.Adversary in place of its backward pass; in processes that a script "
    "spawns call fgm_trainer.patch."
)


def _checked(flags: dict[str, Any]) -> AdversarialArguments:
    """The flags, each by itself where a script may still say of which method they are."""
    of_a_method = () if "adv_method" in flags else ("adv_steps", "adv_step_size", "adv_kwargs")
    others = AdversarialArguments(**{name: value for name, value in flags.items() if name not in of_a_method})
    try:
        return AdversarialArguments(**flags)
    except ValueError:
        return others


class _Quiet:
    """In front of the others: the user's classes are not told of ours."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class _Shown:
    """A property that gives way to an attribute of a trainer's own."""

    def __init__(self, of: property) -> None:
        self._of = of

    def __get__(self, trainer: Any, kind: type | None = None) -> Any:
        return self if trainer is None else self._of.__get__(trainer, kind)


def _adversarial(kind: type, flags: AdversarialArguments) -> type:
    """A trainer's class, with `AdversarialTrainer` behind it."""
    base = AdversarialSeq2SeqTrainer if issubclass(kind, Seq2SeqTrainer) else AdversarialTrainer
    bases = (_Quiet, base) if issubclass(base, kind) else (_Quiet, kind, base)
    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    # What `super(self.__class__, self)` of older scripts needs.
    own |= {"_adv_default_flags": flags, "__class__": property(lambda trainer: kind)}
    shown = {name: vars(AdversarialTrainerMixin)[name] for name in ("attack", "schedule")}
    own |= {name: _Shown(of) for name, of in shown.items() if not hasattr(kind, name)}
    if issubclass(type(kind), ABCMeta):
        return types.new_class(kind.__name__, bases, exec_body=lambda space: space.update(own))
    # Past what a metaclass of the user's does with each class.
    made: type = type.__new__(type(kind), kind.__name__, bases, own)
    return made


# Arguments ------------------------------------------------------------------------------------------------------------


def _add_flags(attributes: _Attributes) -> None:
    """Makes `TrainingArguments`, and what is derived from it already, take the flags as fields."""
    flags = {f.name: f for f in fields(AdversarialArguments)}
    attributes.wrap(TrainingArguments, "__post_init__", _check_flags)
    hints = TrainingArguments.__annotations__ | get_type_hints(AdversarialArguments)
    attributes.set(TrainingArguments, "__annotations__", hints)
    for name, flag in flags.items():
        # For arguments that were made before.
        attributes.set(TrainingArguments, name, flag.default)
    for kind in _with_subclasses(TrainingArguments):
        if "__dataclass_fields__" in vars(kind) and not issubclass(kind, AdversarialArguments):
            # Its own fields stay, also those of such a name.
            own = vars(kind)["__dataclass_fields__"]
            attributes.set(kind, "__dataclass_fields__", own | {n: f for n, f in flags.items() if n not in own})
            if "__init__" in vars(kind):
                attributes.wrap(kind, "__init__", functools.partial(_take_flags, flags.keys() - own.keys()))


def _take_flags(ours: Set[str], stock: Callable[..., None], args: Any, *values: Any, **named: Any) -> None:
    """`__init__` of a class of training arguments, which does not know these flags."""
    for name in ours & named.keys():
        setattr(args, name, named.pop(name))
    stock(args, *values, **named)


def _check_flags(stock: Callable[..., None], args: Any) -> None:
    """`__post_init__` of `TrainingArguments`."""
    stock(args)
    flags = None if isinstance(args, AdversarialArguments) else flags_of(args)
    if flags is not None:
        vars(args).update({name: getattr(flags, name) for name in flag_names(args)})


def _with_subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    yield kind
    child: type[Any]
    for child in kind.__subclasses__():
        yield from _with_subclasses(child)
