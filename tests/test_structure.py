"""The shape of the package: imports point one way, and importing it is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fgm_trainer"

# Lower layers know nothing of higher ones; `geometry`, `schedule` and `targets` know torch alone.
LAYERS = [
    "geometry",
    "schedule",
    "inspection",
    "objective",
    "passes",
    "target",
    "weights",
    "targets",
    "attacks",
    "randomness",
    "driving",
    "clipping",
    "raw",
    "robustness",
    "plotting",
    "epsilon",
    "arguments",
    "monitoring",
    "microbatch",
    "refusals",
    "trainer",
]


def imported(source):
    """The package's modules that a source imports at its top level, by layer."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
            found |= set(names)
    return found & set(LAYERS)


def against_the_order(sources):
    return [
        f"{layer} imports {other}"
        for layer, source in sources
        for other in imported(source)
        if LAYERS.index(other) > LAYERS.index(layer)
    ]


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_one_way():
    sources = [(layer_of(p), p.read_text()) for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in LAYERS]
    assert {layer for layer, _ in sources} == set(LAYERS), "a module without a layer"
    assert against_the_order(sources) == []


def test_the_rule_can_fail():
    assert against_the_order([("geometry", "from .trainer import AdversarialTrainer")]) == ["geometry imports trainer"]
    assert against_the_order([("trainer", "from .geometry import ascent")]) == []


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import fgm_trainer; fgm_trainer.FGM", "transformers"),
        ("import fgm_trainer.raw, fgm_trainer.robustness", "transformers"),
        ("import fgm_trainer.plotting", "matplotlib"),
        ("import fgm_trainer", "accelerate"),
    ],
)
def test_the_core_runs_on_torch_alone(code, forbidden):
    check = f"{code}\nimport sys\nassert {forbidden!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)


def test_the_check_of_light_imports_can_fail():
    check = "import fgm_trainer; fgm_trainer.AdversarialTrainer\nimport sys\nassert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert "AssertionError" in done.stderr
