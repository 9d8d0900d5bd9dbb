"""A process that fails inside an adversarial pass: the launch ends, checkpoints are clean, and resuming goes on."""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import glue_world
import pytest
import torch
from glue_world import EXAMPLES, accelerate, launch, needs, v5, weights

FAULTY = Path(__file__).with_name("faulty_glue.py")
# Four steps an epoch: both checkpoints before the fault lie inside of one.
FLAGS = shlex.split(
    "--task_name sst2 --do_train --adv_epsilon 0.3 --pad_to_max_length False --max_seq_length 16 --report_to none "
    "--learning_rate 1e-2 --warmup_steps 2 --max_steps 9 --save_steps 3 --disable_tqdm True"
)
STEP, CHECKPOINTS = 8, ["checkpoint-3", "checkpoint-6"]
# What a launcher prints of the end of a process that was killed.
KILLED = {"one": "died with <Signals.SIGKILL: 9>", "two": "Signal 9 (SIGKILL) received by PID"}

world = glue_world.world


class Case(NamedTuple):
    """An engine and an attack: the folder of an uninterrupted run, and, by kind of fault, folder and output."""

    engine: str
    whole: Path
    interrupted: dict[str, tuple[Path, str]]
    flags: list[str]


def slow(engine, method):
    return pytest.param((engine, method), marks=pytest.mark.slow, id=f"{engine}-{method}")


CASES = [
    pytest.param(("ddp", "noise"), id="ddp-noise"),
    slow("ddp", "fgm"),
    slow("ddp", "pgd"),
    slow("fsdp2", "noise"),
    slow("zero2", "noise"),
    slow("zero3", "noise"),
    slow("one", "fgm"),
    slow("one", "noise"),
]


def start(engine, world, script, *flags, code=0):
    """A script on the engine; a fault must end it within two minutes."""
    command = [*accelerate("ddp", processes=1), "--cpu"] if engine == "one" else accelerate(engine)
    command += [FAULTY.with_name("on_cpu.py"), script]
    return launch(command, world, *flags, code=code, timeout=120, PYTHONPATH=str(EXAMPLES))


@pytest.fixture(scope="module", params=CASES)
def case(request, world):
    engine, method = request.param
    needs(engine)
    out = world / f"{engine}-{method}"
    rows = ["--per_device_train_batch_size", "8" if engine == "one" else "4"]
    flags = ["--model_name_or_path", world / "model", "--train_file", world / "single.csv", "--adv_method", method]
    flags += [*FLAGS, *rows, *(["--ddp_backend", "gloo"] if engine.startswith("zero") else [])]
    rank = 0 if engine == "one" else 1
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(start, engine, world, EXAMPLES / "run_glue.py", *flags, "--output_dir", out / "whole")
        found = {}
        for kind in ("exception", "kill"):
            faulty = [FAULTY, kind, rank, STEP, *flags, "--output_dir", out / kind]
            found[kind] = pool.submit(start, engine, world, *faulty, code=1)
    whole.result()
    return Case(engine, out / "whole", {kind: (out / kind, run.result()) for kind, run in found.items()}, flags)


@pytest.mark.parametrize("kind", ["exception", "kill"])
def test_the_output_names_rank_and_cause(case, kind):
    printed = case.interrupted[kind][1]
    if kind == "exception":
        assert "Traceback" in printed
        assert f"RuntimeError: injected into step {STEP}" in printed
    else:
        assert KILLED["one" if case.engine == "one" else "two"] in printed
    if case.engine != "one":
        first = printed[printed.index("Root Cause (first observed failure)") :]
        assert "rank      : 1 (local_rank: 1)" in first


@pytest.mark.parametrize("kind", ["exception", "kill"])
def test_the_checkpoints_are_those_of_an_uninterrupted_run(case, kind):
    folder = case.interrupted[kind][0]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == CHECKPOINTS
    assert not (folder / "model.safetensors").exists()
    for name in CHECKPOINTS:
        assert differences(state(folder / name), state(case.whole / name)) == {}


@pytest.mark.parametrize("kind", [pytest.param("exception", marks=pytest.mark.slow), "kill"])
def test_resuming_ends_where_an_uninterrupted_run_ends(case, kind, world):
    if case.engine != "one" and not v5():
        pytest.skip("several processes on CPU resume with transformers 5; 4.46 looks for a device cpu:0")
    folder = case.interrupted[kind][0]
    resume = ["--resume_from_checkpoint", folder / CHECKPOINTS[-1], "--output_dir", folder]
    start(case.engine, world, EXAMPLES / "run_glue.py", *case.flags, *resume)
    found, expected = weights(folder), weights(case.whole)
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0 if case.engine == "one" else 1e-7)


def state(checkpoint):
    """Every tensor and number that a checkpoint holds of the model and of the optimizer's processes."""
    found = {f"model/{name}": value for name, value in weights(checkpoint).items()}
    for path in sorted(checkpoint.rglob("*optim*.*")):
        flatten(torch.load(path, weights_only=False), path.name, found)
    assert any("exp_avg" in name for name in found), "the moments of AdamW are among what is compared"
    return found


def flatten(value, name, found):
    """Puts the leaves of nested dictionaries and lists into `found`, by their path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, (list, tuple)):
        value = list(enumerate(value))
    else:
        found[name] = value
        return
    for key, part in value:
        flatten(part, f"{name}/{key}", found)


def differences(one, other):
    """The names whose values are not the same, bit for bit."""
    assert one.keys() == other.keys()
    same = {k: torch.equal(v, other[k]) if torch.is_tensor(v) else repr(v) == repr(other[k]) for k, v in one.items()}
    return {name: (one[name], other[name]) for name, equal in same.items() if not equal}
