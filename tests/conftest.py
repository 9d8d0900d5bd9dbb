import os

os.environ["HF_HUB_OFFLINE"] = "1"

import gc
import random
import warnings
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)

# (engine, scope, attack): the largest difference of any weight from one process's.
DIFFERENCES = pytest.StashKey()


def pytest_configure(config):
    # What releases of accelerate of transformers 4.46's day say when they are imported, or used, with newer libraries.
    if Version(version("accelerate")) < Version("1.2"):
        config.addinivalue_line("filterwarnings", "ignore:numpy.core is deprecated:DeprecationWarning")


def pytest_collection_modifyitems(items):
    # Files that start processes come first: what is left at the end is short, so that two workers end together.
    first = ("distributed", "launch", "launcher", "process_faults", "examples", "more_examples", "trainers", "compile")
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in first)


def pytest_sessionfinish(session):
    # A worker of pytest-xdist hands its part over; keys have to be strings on the way.
    if hasattr(session.config, "workeroutput"):
        found = session.config.stash.get(DIFFERENCES, {})
        session.config.workeroutput["differences"] = [[*place, value] for place, value in found.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    found = node.config.stash.setdefault(DIFFERENCES, {})
    for engine, scope, attack, value in getattr(node, "workeroutput", {}).get("differences", []):
        found[engine, scope, attack] = value


def pytest_terminal_summary(terminalreporter, config):
    """The table of docs/scaling.md."""
    found = config.stash.get(DIFFERENCES, {})
    attacks = sorted({attack for _, _, attack in found})
    if found:
        terminalreporter.section("largest difference of any weight from one process's")
        terminalreporter.write_line(f"| engine | scope | {' | '.join(attacks)} |")
        terminalreporter.write_line("|---" * (2 + len(attacks)) + "|")
    for engine, scope in dict.fromkeys((engine, scope) for engine, scope, _ in found):
        figures = [f"{found[engine, scope, a]:.1e}" if (engine, scope, a) in found else "" for a in attacks]
        terminalreporter.write_line(f"| {engine} | {scope} | {' | '.join(figures)} |")


def pytest_collection_finish(session):
    # Every Trainer collects garbage when it starts; what was imported by now is none.
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """TrainingArguments write mixed precision and compilation into the environment, where later tests would read it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def resumable(monkeypatch):
    """transformers 4.46 saves numpy's random state, which the default of torch >= 2.6 refuses to load."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    # pytest takes the filter back after the test.
    warnings.filterwarnings("ignore", "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", UserWarning)
