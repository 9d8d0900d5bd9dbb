"""The shape of the package: imports point one way, and importing it is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fgm_trainer"

# Lower layers know nothing of higher ones. A folder is a layer to the others, and has an order of its own.
LAYERS = [
    "perturbation",
    "attacks",
    "engine",
    "in_place",
    "loops",
    "robustness",
    "arguments",
    "collapse",
    "metrics",
    "compatibility",
    "plan",
    "cards",
    "trainer_pass",
    "loss_reduction",
    "checkpoint",
    "trainer_evaluation",
    "run",
    "trainer",
    "patching",
    "commands",
    "launcher",
    "__main__",
]
INSIDE = {
    "perturbation": [
        "geometry",
        "hooks",
        "batches",
        "divergence",
        "clipping",
        "lookups",
        "deferral",
        "calls",
        "stacking",
        "parts",
        "watched",
        "forward_pass",
        "target",
        "weights",
        "targets",
    ],
    "engine": ["schedule", "dropout", "accelerate", "running_pass", "driver", "guessing", "controller", "kept"],
    "robustness": [
        "tasks",
        "report",
        "data",
        "passes",
        "attacked_batch",
        "ensemble",
        "foolbox",
        "evaluate",
        "embedders",
        "radius",
        "candidates",
        "text",
        "plotting",
    ],
}


def imports(source):
    """(level, module, names) of every relative import, also of those inside of functions and for types alone."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node.level, (node.module or "").split("."), [alias.name for alias in node.names]


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path, source):
    """The layers of the package that a file imports, and the files of its own folder."""
    depth = len(path.relative_to(PACKAGE).parts)
    outer, inner = set(), set()
    for level, module, names in imports(source):
        found = names if module == [""] else [module[0]]
        (outer if level == depth else inner).update(found)
    return outer & set(LAYERS), inner


def against_the_order(files):
    found = []
    for path, source in files:
        layer = layer_of(path)
        outer, inner = imported(path, source)
        found += [f"{layer} imports {o}" for o in outer if LAYERS.index(o) >= LAYERS.index(layer)]
        order = INSIDE.get(layer, [])
        if path.stem in order:
            found += [f"{layer}: {path.stem} imports {i}" for i in inner if order.index(i) >= order.index(path.stem)]
    return found


def test_imports_point_one_way():
    files = [(p, p.read_text()) for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_moved.py")]
    assert {layer_of(p) for p, _ in files} == set(LAYERS), "a module without a layer"
    for folder, order in INSIDE.items():
        assert {p.stem for p, _ in files if layer_of(p) == folder} == set(order), (
            f"a module of {folder} without a place"
        )
    assert against_the_order(files) == []


def test_the_rule_can_fail():
    low, high = PACKAGE / "perturbation" / "geometry.py", PACKAGE / "trainer.py"
    assert against_the_order([(low, "from ..trainer import AdversarialTrainer")]) == ["perturbation imports trainer"]
    assert against_the_order([(low, "def f():\n    from .targets import find_target")]) == [
        "perturbation: geometry imports targets"
    ]
    assert against_the_order([(high, "from .perturbation.geometry import ascent")]) == []


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import fgm_trainer; fgm_trainer.FGM", "transformers"),
        ("import fgm_trainer.loops, fgm_trainer.robustness", "transformers"),
        ("import fgm_trainer.robustness.plotting", "matplotlib"),
        ("import fgm_trainer", "accelerate"),
    ],
)
def test_the_core_runs_on_torch_alone(code, forbidden):
    check = f"{code}\nimport sys\nassert {forbidden!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_the_check_of_light_imports_can_fail():
    check = "import json\nimport sys\nassert 'json' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert "AssertionError" in done.stderr


def test_the_module_paths_of_the_former_version_name_the_same_modules():
    code = """
import importlib, pickle, sys
from fgm_trainer._moved import MOVED
for old, new in MOVED.items():
    a, b = importlib.import_module('fgm_trainer.' + old), importlib.import_module('fgm_trainer.' + new)
    assert a is b and b.__name__ == b.__spec__.name == 'fgm_trainer.' + new, (old, a, b.__spec__)
from fgm_trainer.raw import FGM
import fgm_trainer.geometry
from fgm_trainer import geometry
try:
    import fgm_trainer.nowhere
except ModuleNotFoundError:
    pass
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
