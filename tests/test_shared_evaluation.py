"""Several processes take turns at the batches of an evaluation, and all get the report of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port

TESTS = Path(__file__).parent


def evaluated(out, processes, examples):
    out.mkdir()
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)} if processes > 1 else {}
        command = [sys.executable, TESTS / "on_cpu.py", TESTS / "evaluation_worker.py", out, str(examples)]
        started.append(subprocess.Popen(command, env=os.environ | common | ranks, stderr=subprocess.PIPE, text=True))
    for process in started:
        _, errors = process.communicate(timeout=540)
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


# Seven batches, and one: a process without a batch of its own.
@pytest.mark.slow
@pytest.mark.parametrize("examples", [26, 3])
def test_two_processes_share_an_evaluation(tmp_path, examples):
    (alone,) = evaluated(tmp_path / "one", 1, examples)
    both = evaluated(tmp_path / "two", 2, examples)
    for found in both:
        assert found["reports"] == alone["reports"]
    one, other = (found["passes"] for found in both)
    # The second process looks at the first batch as well, for the task, in both evaluations.
    assert one + other == alone["passes"] + 2
    if examples == 26:
        assert alone["reports"][0]["scores"]["pgd-3"][1] < alone["reports"][0]["clean"]
        assert min(one, other) > alone["passes"] / 5
    else:
        assert other == 2
