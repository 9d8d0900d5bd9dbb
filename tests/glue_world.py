"""A tiny world for the GLUE scripts: a model of a few thousand weights, data in every form, and a way to run them."""

from __future__ import annotations

import csv
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers
from processes import free_port, require
from safetensors.torch import load_file
from transformers import BertConfig, BertModel, BertTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
GOOD, BAD = ("lovely", "warm", "funny"), ("dull", "cold", "boring")
WORDS = ("the", "film", "is", "a", "story", *GOOD, *BAD)
FAST = shlex.split(
    "--pad_to_max_length False --max_seq_length 16 --report_to none --per_device_train_batch_size 8 --max_steps 6 "
    "--learning_rate 1e-2 --logging_steps 2"
)

# The least releases that a launcher needs, where they are newer than the package's own; and its library.
NEEDS = {
    "fsdp2": {"accelerate": "1.6"},
    "zero2": {"accelerate": "1.8"},
    "zero3": {"accelerate": "1.8"},
    "ray": {"transformers": "5"},
}
LIBRARY = {"zero2": "deepspeed", "zero3": "deepspeed", "ray": "ray"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, and the same kind of data in every form that the scripts read."""
    folder = tmp_path_factory.mktemp("world")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    save_model(folder / "model")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt")) if v5() else BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "model")
    single = [review(i) for i in range(32)]
    pairs = [
        {"sentence1": r["sentence"], "sentence2": single[i - 1]["sentence"], "label": i % 11 / 2}
        for i, r in enumerate(single)
    ]
    write_jsonl(folder / "single.jsonl", single)
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_delimited(folder / "single.csv", single, ",")
    write_delimited(folder / "single.tsv", single, "\t")
    write_jsonl(folder / "unlabelled.jsonl", [{"sentence": r["sentence"]} for r in single[:5]])
    write_parquet(folder / "pairs.parquet", pairs)
    return folder


def save_model(path, **settings):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    lookups = {"vocab_size": len(WORDS) + 5, "max_position_embeddings": 32}
    BertModel(BertConfig(**shape | lookups | settings)).save_pretrained(path)


def v5():
    return int(transformers.__version__.split(".")[0]) >= 5


def review(seed):
    draw = random.Random(seed)
    label = seed % 2
    word = draw.choice(GOOD if label else BAD)
    return {"sentence": f"the {draw.choice(('film', 'story'))} is {word}", "label": label}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_delimited(path, rows, delimiter):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def environment(world):
    """The environment of a script's process, with the caches inside the tiny world."""
    settings = {"HF_HOME": str(world / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    if not v5():
        # transformers 4.46 resumes with a bare torch.load, which torch >= 2.6 refuses for the random states.
        settings["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return os.environ | settings


def run(script, world, *flags, fails=False, before=""):
    """Runs a script in a process of its own. Returns what it printed."""
    code = ["-c", before] if before else [str(EXAMPLES / script)]
    done = subprocess.run(
        [sys.executable, *code, *map(str, flags)],
        env=environment(world),
        cwd=world,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = done.stdout + done.stderr
    assert done.returncode == (1 if fails else 0), output
    return done.stderr if fails else output


def needs(name):
    require(name, NEEDS.get(name, {}), LIBRARY.get(name, "torch"))


def accelerate(name, processes=2):
    """The command of `accelerate launch` with one of the configuration files."""
    config = EXAMPLES / "launch" / f"{name}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*command, "--num_processes", processes, "--main_process_port", free_port()]


def launch(command, world, *flags, code=0, timeout=540, **settings):
    """Runs a launcher and its processes, of which none may be left at the end. Returns what they printed."""
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # A process that outlives its launcher would keep a pipe open for ever: the output goes through a file.
    with (world / f"{mark}.txt").open("w+") as output:
        launcher = subprocess.Popen(
            [*map(str, command), *map(str, flags)],
            env=environment(world) | {"PATH": path, "DS_ACCELERATOR": "cpu", "LAUNCH_MARK": mark} | settings,
            cwd=world,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            found = launcher.wait(timeout)
        except subprocess.TimeoutExpired:
            found = f"none after {timeout} seconds"
        left = end_what_is_left(mark, patience=20 if found == code else 0)
        launcher.kill()
        launcher.wait()
        output.seek(0)
        printed = output.read()
    assert found == code, f"exit code {found}\n{printed}"
    assert not left, f"processes are left: {left}\n{printed}"
    return printed


def end_what_is_left(mark, patience):
    """Waits for the processes of a launch, ends those that stay, and returns their names."""
    until = time.monotonic() + patience
    while (left := processes_with(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    for process in left:
        with suppress(OSError):
            os.kill(int(process), signal.SIGKILL)
    return list(left.values())


def processes_with(mark):
    """By id, the names of the processes that have the mark in their environment; none where there is no /proc."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        # It may have ended, or not be ours to read.
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes():
                found[process.name] = (process / "comm").read_text().strip()
    return found


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def saved_results(folder):
    return json.loads((folder / "all_results.json").read_text())
