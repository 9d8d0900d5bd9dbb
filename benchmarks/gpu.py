"""What a step costs on a GPU: time, the allocator's peak, kernels, and how often a step waits for the device.

    make bench-gpu              # python3 with torch for CUDA, transformers, accelerate and pytest

Each setting (model, precision, eager or compiled) is a process of its own; none starts after `--seconds`, and what was
left out is named. Writes `gpu.json` and `gpu.md`. A setting that fails has its error in its place.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from step import Shape, bert_base, in_turn, machine, operations_of, peak_of, ratios, tiny, trainers, versions, xlmr
from transformers import HfArgumentParser, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

ALL = ("fgm", "fgm in place", "partial_fgm", "pgd-3", "freelb-3")
COMPILED = ("fgm", "freelb-3")
NO_GPU = "There is no GPU here. Run this where torch.cuda.is_available(); --cpu true measures the processor."


def decoder() -> PreTrainedModel:
    """Qwen2.5-0.5B's shape: 0.49 billion weights, its head tied."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def setting(model: Callable[[], PreTrainedModel], rows: int, length: int, precision: str, compiled: str = "") -> Shape:
    """A model and a batch, in one precision, eager or compiled."""
    return Shape(model, rows, length, COMPILED if compiled else ALL, precision, compiled, seconds=12.0)


# In the order of what is missed most where time runs out.
SETTINGS = {
    "bert-base, bf16": setting(bert_base, 32, 128, "bf16"),
    "decoder, bf16": setting(decoder, 4, 512, "bf16"),
    "bert-base, bf16, compiled": setting(bert_base, 32, 128, "bf16", "default"),
    "xlm-r-base, bf16": setting(xlmr, 32, 128, "bf16"),
    "bert-base, fp16": setting(bert_base, 32, 128, "fp16"),
    "bert-base, fp32": setting(bert_base, 32, 128, "fp32"),
    "bert-base, bf16, CUDA graphs": setting(bert_base, 32, 128, "bf16", "reduce-overhead"),
    "xlm-r-base, fp32": setting(xlmr, 32, 128, "fp32"),
    "decoder, fp16": setting(decoder, 4, 512, "fp16"),
    "xlm-r-base, fp16": setting(xlmr, 32, 128, "fp16"),
    "decoder, fp32": setting(decoder, 4, 512, "fp32"),
    "decoder, bf16, compiled": setting(decoder, 4, 512, "bf16", "default"),
    "xlm-r-base, bf16, compiled": setting(xlmr, 32, 128, "bf16", "default"),
}
# By name alone.
SMALL = {
    "tiny": setting(tiny, 4, 8, "fp32"),
    "tiny, bf16": setting(tiny, 4, 8, "bf16"),
    "tiny, compiled": setting(tiny, 4, 8, "fp32", "default"),
}


@dataclass
class GpuArguments:
    """What is measured."""

    settings: list[str] = field(default_factory=lambda: list(SETTINGS), metadata={"help": "Names, as in the table."})
    rounds: int = field(default=12, metadata={"help": "At most so many rounds of the timing."})
    seconds: float = field(default=360.0, metadata={"help": "After which no further setting starts."})
    output: str = field(default="runs/gpu", metadata={"help": "Where the figures go."})
    cpu: bool = field(default=False, metadata={"help": "Measure the processor where there is no GPU."})
    alone: bool = field(default=False, metadata={"help": "Inside: this process measures one setting."})


def main() -> None:
    """Every setting, while there is time; or, in a process started for it, one."""
    (args,) = HfArgumentParser(GpuArguments).parse_args_into_dataclasses()
    if not (args.cpu or torch.cuda.is_available()):
        raise SystemExit(NO_GPU)
    if args.alone:
        print(json.dumps(measured((SETTINGS | SMALL)[args.settings[0]], args.rounds)))
        return
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "settings": {}}
    begin = time.perf_counter()
    for name in args.settings:
        in_time = time.perf_counter() - begin < args.seconds
        figures["settings"][name] = apart(name, args) if in_time else {"left out": "no time was left"}
        # After each, since the machine may be taken away.
        (folder / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n")
        (folder / "gpu.md").write_text(table(figures["settings"]) + "\n")
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    print(table(figures["settings"]))


def apart(name: str, args: GpuArguments) -> dict[str, Any]:
    """`measured` in a process of its own: a compiler's state and the allocator's are nobody else's."""
    command = [sys.executable, __file__, "--settings", name, "--rounds", str(args.rounds), "--alone", "true"]
    done = subprocess.run([*command, "--cpu", str(args.cpu)], capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1], "log": done.stderr[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(shape: Shape, rounds: int) -> dict[str, Any]:
    """Of every method: time in turn with the others, then what one step's passes take and do."""
    with tempfile.TemporaryDirectory() as folder:
        found = trainers(shape, ("stock", *shape.methods), folder)
        return ratios(in_turn(found, rounds, shape.seconds)) | {
            "rows": shape.rows,
            "length": shape.length,
            "peak": {m: peak_of(one) for m, one in found.items()},
            "operations": {m: operations_of(one) if shape.compiled == "" else None for m, one in found.items()},
            "waits": {m: waits_of(one) for m, one in found.items()},
        }


def waits_of(trainer: Any) -> int | None:
    """How often the passes of a step make the host wait for the device; None where there is none."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            trainer.passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.update()
    return sum("synchronizing" in str(each.message) for each in seen)


def table(settings: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [
        "| setting | batch | method | forward and backward | whole step | peak, MB | operations | waits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in settings.items():
        if "passes" not in found:
            why = found.get("error", found.get("left out"))
            lines.append(f"| {name} | | {why} | | | | | |")
            continue
        for method, ratio in found["passes"].items():
            cells = [f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in (ratio, found["whole"][method])]
            if method == "stock":
                cells = ["1", f"{1000 * sum(found['stock_seconds'].values()):.1f} ms"]
            counts = [found[what][method] for what in ("operations", "waits")]
            cells += [f"{found['peak'][method] / 1e6:.0f}", *("" if count is None else str(count) for count in counts)]
            lines.append(f"| {name} | {found['rows']} x {found['length']} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
