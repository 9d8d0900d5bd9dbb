"""Two real processes over gloo give the weights of one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import train

from fgm_trainer.attacks import ATTACKS

HERE = Path(__file__).parent
CASES = [
    {"settings": {"adv_method": method, "adv_scope": scope, "per_device_train_batch_size": 2, **more}}
    for method in sorted(ATTACKS)
    for scope in ("vocabulary", "example")
    for more in ({}, {"gradient_accumulation_steps": 2})
]
STOCK = {"settings": {"per_device_train_batch_size": 2}, "stock": True}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Every case on two processes: by number of the case, the two ranks' results."""
    out = tmp_path_factory.mktemp("ddp")
    cases = [*CASES, STOCK]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command += [str(HERE / "distributed_worker.py"), str(out), json.dumps(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [[torch.load(out / f"case{n}-rank{r}.pt") for r in (0, 1)] for n in range(len(cases))]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: json.dumps(CASES[n]["settings"]))
def test_two_processes_equal_one_that_accumulates(two_processes, number, tmp_path):
    first, second = two_processes[number]
    assert largest_difference(first["weights"], second["weights"]) == 0, "the ranks disagree"
    settings = dict(CASES[number]["settings"])
    settings["gradient_accumulation_steps"] = 2 * settings.get("gradient_accumulation_steps", 1)
    one = train(tmp_path, settings)
    assert largest_difference(first["weights"], one["weights"]) < 1e-7
    # The log is over processes: the same figures on both, and those of the one process.
    assert first["log"] == second["log"]
    for ours, whole in zip(first["log"], one["log"], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4)


BY_EXAMPLE = [
    n
    for n, case in enumerate(CASES)
    # Noise is drawn by micro-batch.
    if case["settings"]["adv_scope"] == "example" and case["settings"]["adv_method"] != "noise"
]


@pytest.mark.parametrize("number", BY_EXAMPLE)
def test_scope_example_depends_on_no_split_at_all(two_processes, number, tmp_path):
    settings = dict(CASES[number]["settings"])
    rows = 2 * 2 * settings.pop("gradient_accumulation_steps", 1)
    whole = train(tmp_path, settings | {"per_device_train_batch_size": rows})
    assert largest_difference(two_processes[number][0]["weights"], whole["weights"]) < 1e-7


def test_an_attacked_step_moves_the_bytes_of_a_stock_step(two_processes):
    stock = two_processes[-1][0]["bytes"]
    assert stock > 0
    for case, (first, _) in zip(CASES, two_processes[:-1], strict=True):
        assert first["bytes"] == stock, case
