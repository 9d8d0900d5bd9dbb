#!/usr/bin/env python
"""What each engine moves and holds in one optimizer step, plainly trained and with FGM; two processes over gloo.

Example: python benchmarks/scaling.py --output runs/scaling.json

The model has MiniLM's shape (BERT, 6 layers of 384, 30,522 tokens) and random weights; AdamW; float32. Counted by the
profiler in the third step: what a process hands to collectives, and how far its allocator rises above what lies there
between two steps. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from baselines import TRAININGS
from rich.console import Console
from rich.table import Table
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

ENGINES = {"ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "fsdp2": 2, "hsdp": 4}
# FGM's passes over one micro-batch stand beside plain training's over two.
RUNS = (("stock", 1), ("stock", 2), ("stock", 4), ("fgm", 1), ("fgm", 2))
# What people use today runs under DDP.
MORE_RUNS = {"ddp": tuple((kind, 1) for kind in TRAININGS if kind not in ("stock", "fgm"))}
MEASURED_STEP = 3


def main() -> None:
    """Starts every engine in processes of its own; in one of these, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--batch_size", type=int, default=8, help="Rows a process and micro-batch.")
    parser.add_argument("--length", type=int, default=64, help="Tokens a row.")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--inside", choices=ENGINES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        measure_engine(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        set_seed(0)
        BertForSequenceClassification(minilm()).save_pretrained(Path(folder) / "model")
        rows = [row for engine in options.engines for row in launch(engine, options, Path(folder))]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.platform(), "torch": torch.__version__, "python": platform.python_version()}
    shape = {"batch_size": options.batch_size, "length": options.length, "parameters": count(minilm())}
    options.output.write_text(json.dumps({**machine, **shape, "rows": rows}, indent=1))
    show(rows)


def minilm() -> BertConfig:
    """The shape of all-MiniLM-L6-v2."""
    return BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)


def count(config: BertConfig) -> int:
    """The number of weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in BertForSequenceClassification(config).parameters())


def launch(engine: str, options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Runs this script on the engine's processes; gives what its first process measured."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ENGINES[engine]}"]
    command += [f"--master_port={port}", __file__, "--inside", engine, "--output", str(folder / "row.json")]
    command += ["--batch_size", str(options.batch_size), "--length", str(options.length)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{engine} failed:\n{done.stderr[-4000:]}")
    rows: list[dict[str, Any]] = json.loads((folder / "row.json").read_text())
    return rows


def measure_engine(options: argparse.Namespace) -> None:
    """In one process of several: every training of this engine."""
    logging.disable_progress_bar()
    rows = []
    for kind, accumulation in (*RUNS, *MORE_RUNS.get(options.inside, ())):
        found = measure(options.inside, kind, accumulation, options)
        rows.append({"engine": options.inside, "training": kind, "micro_batches": accumulation, **found})
    if torch.distributed.get_rank() == 0:
        options.output.write_text(json.dumps(rows))
    torch.distributed.barrier()
    # gloo's threads may outlive the process group and abort an ordinary exit.
    os._exit(0)


def measure(engine: str, kind: str, accumulation: int, options: argparse.Namespace) -> dict[str, int]:
    """One run of a few steps."""
    # DeepSpeed's own default is a bucket of 2 GB.
    bucket = {"reduce_bucket_size": "auto"}
    zero = {"zero_optimization": {"stage": int(engine[-1]), **bucket}} if engine.startswith("zero") else None
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    deepspeed = {**zero, **dict.fromkeys(auto, "auto"), "zero_allow_untested_optimizer": True} if zero else None
    args = TrainingArguments(
        output_dir=str(options.output.parent / "run"),
        max_steps=MEASURED_STEP + 1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        deepspeed=deepspeed,
    )
    meter = Meter()
    rows = [row(options.length) for _ in range(4 * 4 * (MEASURED_STEP + 1) * options.batch_size)]
    model = load(engine, options.output.parent / "model")
    trainer_class, parts = TRAININGS[kind]
    trainer = trainer_class(model=model, args=args, train_dataset=rows, callbacks=[meter], **parts)
    trainer.model_accepts_loss_kwargs = False
    meter.held = lambda: held_by(trainer.accelerator.unwrap_model(trainer.model), trainer.optimizer)
    trainer.train()
    return meter.found


def row(length: int) -> dict[str, Any]:
    """One example of random tokens."""
    return {
        "input_ids": torch.randint(1000, 30000, (length,)),
        "attention_mask": torch.ones(length, dtype=torch.long),
        "labels": 0,
    }


def load(engine: str, path: Path) -> torch.nn.Module:
    """The model, sharded where transformers shards it at load time."""
    if engine not in ("fsdp2", "hsdp"):
        model: torch.nn.Module = BertForSequenceClassification.from_pretrained(path)
        return model
    from transformers.distributed import DistributedConfig

    replicas = {"dp_replicate_size": 2} if engine == "hsdp" else {}
    config = DistributedConfig(fsdp_size=2, **replicas)
    model = BertForSequenceClassification.from_pretrained(path, distributed_config=config)
    return model


class Meter(TrainerCallback):
    """Profiles one step."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self.held: Callable[[], int] = lambda: 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the profiler before the step that is measured."""
        if state.global_step == MEASURED_STEP - 1:
            self.profile = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
            )
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads it after the step."""
        if state.global_step == MEASURED_STEP:
            self.profile.stop()
            self.found = {**traffic(self.profile), "held": self.held(), "risen": risen(self.profile)}


def traffic(profile: torch.profiler.profile) -> dict[str, int]:
    """The bytes of one process's collectives: what was summed on all, what was scattered, what was gathered."""
    events = profile.events()
    scattered = sum(max(sizes(e)) for e in events if e.name == "c10d::_reduce_scatter_base_")
    gathered = sum(max(sizes(e)) for e in events if e.name == "c10d::_allgather_base_")
    reduced = sum(sum(sizes(e)) for e in events if e.name == "gloo:all_reduce")
    # gloo scatters a sum by way of one on all processes.
    return {"all_reduce": 4 * (reduced - scattered), "reduce_scatter": 4 * scattered, "all_gather": 4 * gathered}


def sizes(event: Any) -> list[int]:
    """The number of elements of each tensor that the event was given."""
    flat: list[int] = []
    for shape in event.input_shapes:
        nested = shape and isinstance(shape[0], list | tuple)
        flat += [torch.Size(s).numel() for s in (shape if nested else [shape]) if s]
    return flat or [0]


def risen(profile: torch.profiler.profile) -> int:
    """The highest point of the allocator in the step, in bytes above where the step began."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def held_by(model: torch.nn.Module, optimizer: Any) -> int:
    """The bytes of this process's weights and optimizer states."""
    tensors = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in model.parameters()]
    inner = getattr(optimizer, "optimizer", optimizer)
    states = getattr(inner, "optimizer", inner).state if hasattr(inner, "optimizer") else inner.state
    tensors += [v for state in states.values() for v in state.values() if torch.is_tensor(v)]
    # DeepSpeed's optimizer steps on float32 copies of its own part.
    tensors += [p for p in states if torch.is_tensor(p) and not any(p is q for q in model.parameters())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the figures in MB."""
    figures = ("all_reduce", "reduce_scatter", "all_gather", "held", "risen")
    table = Table("engine", "training", "micro-batches", *figures, title="MB a process and optimizer step")
    for one in rows:
        values = [f"{one[name] / 1e6:.1f}" for name in figures]
        table.add_row(one["engine"], one["training"], str(one["micro_batches"]), *values)
    Console().print(table)


if __name__ == "__main__":
    main()
