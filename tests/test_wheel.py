"""The wheel that a release would be: what it holds, and that it runs where there is no source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fgm_trainer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "dist", "runs")


def run(*words, folder):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    found = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools leaves folders behind, and takes files that a former build left there."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    # Neither an isolated environment nor an index: setuptools is that of this environment.
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "dist"]
    run(sys.executable, "-m", "pip", "wheel", *flags, folder / "source", folder=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of an environment that has the wheel, and reads every other package from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=folder)
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(run(python, "-c", asked, folder=folder).strip())
    # Paths in a .pth come after the environment's own, and .pth files found there, such as the one of an editable
    # install, are not read: the wheel wins.
    others = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (own / "others.pth").write_text("\n".join(others) + "\n")
    return python


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(n).decode() for n in names if n.endswith(".dist-info/METADATA")]
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "fgm_trainer").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "fgm_trainer/py.typed" in names
    assert [name for name in names if name.endswith("/licenses/LICENSE")]
    assert {name.split("/")[0] for name in names} == {
        "fgm_trainer",
        f"fgm_trainer-{fgm_trainer.__version__}.dist-info",
    }
    assert "\nDescription-Content-Type: text/markdown\n" in metadata


def test_it_runs_where_there_is_no_source_tree(installed, tmp_path):
    where = "import fgm_trainer; print(fgm_trainer.__file__)"
    place = Path(run(installed, "-c", where, folder=tmp_path).strip())
    assert place.is_relative_to(installed.parent.parent)
    assert run(installed, "-m", "fgm_trainer", "--version", folder=tmp_path).strip() == fgm_trainer.__version__
    assert f"fgm_trainer {fgm_trainer.__version__}" in run(installed.parent / "fgm-train", "doctor", folder=tmp_path)


def test_it_trains(installed, tmp_path):
    shutil.copy(ROOT / ".ci" / "wheel_smoke.py", tmp_path)
    found = run(installed, "wheel_smoke.py", installed.parent.parent, folder=tmp_path)
    assert found.splitlines()[-1].startswith(f"{fgm_trainer.__version__} of ")
