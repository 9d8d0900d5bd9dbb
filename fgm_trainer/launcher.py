"""Runs a script as it is, its Trainer adversarial: `python -m fgm_trainer SCRIPT ARGS --adv_epsilon auto`."""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from typing import Any

from transformers import HfArgumentParser

from . import __version__
from .arguments import AdversarialArguments
from .commands import attack, doctor
from .patching import patch

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
    for name, value in _environment().items():
        before += [f"--{name}", *value.split()] if name in several else [f"--{name}={value}"]
    given, _ = parser.parse_known_args(before)
    # A switch takes no word that is none of its values.
    pairs = pairwise([*words, ""])
    words = [f"{w}=true" if w in switches and after.lower() not in _SWITCHED else w for w, after in pairs]
    found, rest = parser.parse_known_args(words)
    return vars(given) | vars(found), rest


def _environment() -> dict[str, str]:
    """The flags that stand in the environment. Raises ValueError where a name is none of them."""
    prefix = f"{PACKAGE.upper()}_"
    known = {prefix + f.name.removeprefix("adv_").upper(): f.name for f in fields(AdversarialArguments)}
    given = {name: value for name, value in os.environ.items() if name.startswith(prefix) and value}
    if unknown := sorted(set(given) - set(known)):
        near = [f"{name} ({', '.join(difflib.get_close_matches(name, known, n=1))}?)" for name in unknown]
        raise ValueError(f"The environment has {', '.join(near)}; flags are: {', '.join(known)}.")
    return {known[name]: value for name, value in given.items()}


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
    script = words[0]
    if script.startswith("-"):
        raise SystemExit(f"fgm_trainer: found {script} where the script stands; flags come after it: SCRIPT {script}.")
    if not as_module and not os.path.exists(script):
        raise SystemExit(f"fgm_trainer: there is no script {script!r}; a module is run as -m {script}.")
    try:
        flags, rest = flags_in(words[1:])
        patched = patch(**flags)
    except ValueError as error:
        raise SystemExit(f"fgm_trainer: {error}") from None
    _name_misspelt(rest)
    try:
        _run(script, rest, as_module)
    finally:
        patched.undo()
    if {"-h", "--help"} & set(rest):
        return
    try:
        patched.check()
    except RuntimeError as error:
        raise SystemExit(f"fgm_trainer: {error}") from None


def _name_misspelt(words: Sequence[str]) -> None:
    """Words that the script may know, and that look like a flag of ours."""
    known = [f"--{f.name}" for f in fields(AdversarialArguments)]
    for word in words:
        name = word.partition("=")[0]
        if word == "--":
            return
        if name.startswith("--adv") and (near := difflib.get_close_matches(name, known, n=1, cutoff=0.8)):
            print(f"fgm_trainer: {name} is left to the script. Did you mean {near[0]}?", file=sys.stderr)


def _run(script: str, words: Sequence[str], as_module: bool) -> None:
    """Runs it as the main program. Raises SystemExit where it ends with an error of its own."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [script, *words]
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(script))
    try:
        if as_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            # As Python has it.
            runpy.run_path(os.path.abspath(script), run_name="__main__")
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sys.argv, sys.path[:] = argv, path
