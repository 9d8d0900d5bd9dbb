"""The notebooks run from top to bottom, train adversarially, and are committed without outputs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# What a notebook leaves behind is looked at here, in its own process.
AFTER = """
moved = [line["adv_delta_norm"] for line in {trainer}.state.log_history if "adv_delta_norm" in line]
assert moved and max(moved) > 0, moved
"""
TRAINERS = {"quickstart": "trainer", "robustness": "adversarial"}


def cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_none_is_forgotten():
    assert [path.stem for path in NOTEBOOKS] == sorted(TRAINERS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_short_and_has_no_outputs(path):
    assert len(cells(path)) <= 12
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two minutes of one core, and whatever else runs there
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    # Cells of plain Python, one after the other, are a script: no kernel is needed.
    code = ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join([*code, AFTER.format(trainer=TRAINERS[path.stem])]), encoding="utf-8")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    # Jupyter starts a kernel in the notebook's folder.
    found = subprocess.run(
        [sys.executable, script], cwd=FOLDER, env=os.environ | settings, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout + found.stderr
