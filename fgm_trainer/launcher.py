"""Runs a script as it is, its Trainer adversarial: `python -m fgm_trainer SCRIPT ARGS --adv_epsilon auto`."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import sys
import types
import weakref
from abc import ABCMeta
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any, ClassVar

from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments
from transformers.utils import logging

from . import __version__, arguments
from .arguments import AdversarialArguments, AdversarialSeq2SeqTrainingArguments, AdversarialTrainingArguments
from .commands import attack, doctor
from .run import AttackedRun
from .trainer import AdversarialSeq2SeqTrainer, AdversarialTrainer, AdversarialTrainerMixin

logger = logging.get_logger(__name__)

PACKAGE = __name__.partition(".")[0]
COMMANDS = {"attack": attack, "doctor": doctor}
USAGE = """\
usage: python -m fgm_trainer SCRIPT ARGS --adv_epsilon auto    (also as fgm-train)
       python -m fgm_trainer -m MODULE ARGS --adv_method pgd
       accelerate launch -m fgm_trainer SCRIPT ARGS            (or torchrun -m)
       python -m fgm_trainer attack MODEL --data FILE          a checkpoint under attack; --help says more
       python -m fgm_trainer doctor [MODEL]                    versions, and what would be attacked in the model

Runs a script as it is. The Trainer that it makes, transformers' own or a subclass of it such as trl's, is adversarial.
The script need not know the --adv_* flags. They may also stand in the environment: FGM_TRAINER_EPSILON for
--adv_epsilon, and so on.
"""


class patch:  # noqa: N801
    """Makes every transformers Trainer adversarial, from now on, or as a context.

    `Trainer`, `Seq2SeqTrainer` and their argument classes are replaced wherever a module has them, and as the base of
    subclasses, those that are defined already as well as those that are imported later. Leaving the context, or `undo`,
    puts everything back, so that the process is as before; argument classes that were defined meanwhile keep the flags.
    One counts at a time: a new one undoes the former.

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
        self.flags = AdversarialArguments(**flags)
        self.trainers: list[str] = []
        # Whether one of them was asked to train, rather than to evaluate alone.
        self.trained = False
        # Forked processes share it.
        self._counter = multiprocessing.Value("q", 0)
        if patch._active is not None:
            patch._active.undo()
        patch._active = self
        arguments.GIVEN = flags
        self._classes: dict[type, type] = {
            Trainer: _counted(AdversarialTrainer, self),
            Seq2SeqTrainer: _counted(AdversarialSeq2SeqTrainer, self),
            TrainingArguments: AdversarialTrainingArguments,
            Seq2SeqTrainingArguments: AdversarialSeq2SeqTrainingArguments,
        }
        # Who has imported these under whatever name keeps them.
        self._left_alone = {(id(module), name) for module, name, _ in _places(self._classes.values())}
        for module, name, kind in _places(self._classes):
            setattr(module, name, self._classes[kind])
        _rebase(self._classes)
        AttackedRun.counters.append(self._counter)

    @property
    def steps(self) -> int:
        """How many micro-batches were attacked."""
        return int(self._counter.value)

    def undo(self) -> None:
        """Puts everything back."""
        if patch._active is not self:
            return
        stock = {new: old for old, new in self._classes.items()}
        for module, name, kind in _places(stock):
            if (id(module), name) not in self._left_alone and name != kind.__name__:
                setattr(module, name, stock[kind])
        _rebase(stock)
        for kind in _TakesTheMixin.named:
            kind.__bases__ = (AdversarialTrainerMixin, *kind.__bases__)
        _TakesTheMixin.named.clear()
        AttackedRun.counters.remove(self._counter)
        arguments.GIVEN, patch._active = {}, None

    def __enter__(self) -> patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def check(self) -> None:
        """Raises RuntimeError where nothing was attacked, though that was asked for."""
        if self.steps or self.flags.adv_epsilon == 0:
            return
        if not self.trainers:
            raise RuntimeError(
                "Nothing was attacked: no transformers Trainer was made in this process. A loop of its own needs "
                "fgm_trainer.loops.Adversary in place of its backward pass; in processes that a script spawns call "
                "fgm_trainer.patch."
            )
        if self.trained:
            raise RuntimeError(f"Nothing was attacked: {', '.join(self.trainers)} made no attacked training step.")


class _TakesTheMixin(ABCMeta):
    """Of a trainer that is adversarial: a subclass may name the mixin as well, which it has already."""

    named: ClassVar[weakref.WeakSet[type]] = weakref.WeakSet()

    def __new__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **more: Any) -> Any:
        others = tuple(base for base in bases if base is not AdversarialTrainerMixin)
        made = super().__new__(cls, name, others, namespace, **more)
        if others != bases and any(isinstance(base, cls) for base in others):
            cls.named.add(made)
        return made


def _counted(base: type, patched: patch) -> type:
    """The adversarial trainer, which tells what it does."""

    class Counted(base, metaclass=_TakesTheMixin):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            patched.trainers.append(type(self).__name__)
            if self.is_world_process_zero():
                plan = self._run.plan
                settings = ", ".join(f"{name} {value}" for name, value in plan.attack.settings().items())
                what = f"attacks {plan.target}: {settings}" if plan.attacks else "does not attack: epsilon is 0"
                print(f"fgm_trainer: {type(self).__name__} {what}", file=sys.stderr)

        def train(self, *args: Any, **kwargs: Any) -> Any:
            patched.trained = True
            return super().train(*args, **kwargs)

        @property
        def _flags(self) -> Any:
            return self.args if isinstance(self.args, AdversarialArguments) else patched.flags

    Counted.__name__, Counted.__qualname__, Counted.__module__ = base.__name__, base.__qualname__, base.__module__
    return Counted


def _places(classes: Iterable[type]) -> Iterator[tuple[types.ModuleType, str, type]]:
    """Where a module, other than our own, has one of the classes, and under which name."""
    # By identity: some modules hold things that mind being looked at.
    sought = {id(kind) for kind in classes}
    for module in _modules():
        yield from ((module, name, value) for name, value in list(vars(module).items()) if id(value) in sought)


def _rebase(classes: dict[type, type]) -> None:
    """Gives the subclasses of each trainer another base."""
    for old, new in classes.items():
        for child in old.__subclasses__() if issubclass(old, Trainer) else ():
            if child in (*classes, *classes.values()) or child.__module__.partition(".")[0] == PACKAGE:
                continue
            try:
                child.__bases__ = tuple(new if base is old else base for base in child.__bases__)
            except TypeError:
                # A class can't have the mixin twice.
                logger.warning(
                    f"{child.__qualname__} stays as it is, since a subclass of it has AdversarialTrainerMixin already."
                )


def _modules() -> list[types.ModuleType]:
    """All but our own: those that are registered, and those that they hold, as transformers is there twice."""
    known = [module for module in list(sys.modules.values()) if isinstance(module, types.ModuleType)]
    kinds = set(map(type, known))
    held = [value for module in known for value in list(vars(module).values()) if type(value) in kinds]
    return [m for m in {id(m): m for m in known + held}.values() if m.__name__.partition(".")[0] != PACKAGE]


def flags_in(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The adversarial flags of a command line and of the environment, and the words that are left."""
    kind: Any = AdversarialArguments
    parser = HfArgumentParser(kind, add_help=False, allow_abbrev=False)
    several: set[str] = set()
    switches: set[str] = set()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.nargs == "+":
            several.add(action.dest)
        elif action.nargs == "?":
            switches.update(action.option_strings)
    before = []
    for name in (f.name for f in fields(AdversarialArguments)):
        value = os.environ.get(f"{PACKAGE.upper()}_{name.removeprefix('adv_').upper()}")
        if value:
            before += [f"--{name}", *value.split()] if name in several else [f"--{name}={value}"]
    given, _ = parser.parse_known_args(before)
    # A switch takes no word that is none of its values.
    pairs = pairwise([*words, ""])
    words = [f"{w}=true" if w in switches and after.lower() not in _SWITCHED else w for w, after in pairs]
    found, rest = parser.parse_known_args(words)
    return vars(given) | vars(found), rest


_SWITCHED = ("true", "false", "yes", "no", "y", "n", "t", "f", "1", "0")


def main(words: Sequence[str] | None = None) -> None:
    """`python -m fgm_trainer`, `fgm-train`."""
    words = list(sys.argv[1:] if words is None else words)
    if words and words[0] in COMMANDS and not os.path.isfile(words[0]):
        try:
            COMMANDS[words[0]](words[1:])
        except (ValueError, OSError) as error:
            raise SystemExit(f"fgm_trainer: {error}") from None
        return
    as_module = words[:1] == ["-m"]
    words = words[as_module:]
    if words[:1] == ["--version"]:
        print(__version__)
        return
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if words else 2)
    script, (flags, rest) = words[0], flags_in(words[1:])
    if not as_module and not os.path.exists(script):
        raise SystemExit(f"fgm_trainer: there is no script {script!r}; a module is run as -m {script}.")
    try:
        patched = patch(**flags)
    except ValueError as error:
        raise SystemExit(f"fgm_trainer: {error}") from None
    with patched:
        sys.argv = [script, *rest]
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.abspath(script))
        code = _run(script, as_module)
    try:
        patched.check()
    except RuntimeError as error:
        raise SystemExit(f"fgm_trainer: {error}") from None
    raise SystemExit(code)


def _run(script: str, as_module: bool) -> int:
    """Runs it as the main program. Raises SystemExit where it ends with an error of its own."""
    try:
        if as_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    return 0
