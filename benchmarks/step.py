"""What a step costs beside the stock Trainer's, and beside what people use today: time and memory.

    .venv/bin/python benchmarks/step.py --output runs/step

Trainers of one model take steps in turn, in an order that moves on from round to round; a figure is the
median of the ratios to the stock step of the same round. Memory is the peak of a step above what lay there before, in
a process of its own: resident on CPU, the allocator's on a GPU. Writes `step.json`, `step.md` and `step.png`.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from baselines import TRAININGS
from by_hand import Bare, ByHand, GradientAlone, Twice, by_hand
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    set_seed,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from machine import machine, versions

from fgm_trainer import FGM, AdversarialTrainer, PartialFGM


@dataclass(frozen=True)
class Shape:
    """A model's size and a batch's.

    Args:
        model: makes the model.
        rows, length: of the batch.
        methods: what is measured beside the stock step.
        precision: `fp32`, or what passes are computed in under autocast.
        compiled: the mode of `torch.compile`, none for eager.
        seconds: after which no further round of the timing starts.
    """

    model: Callable[[], PreTrainedModel]
    rows: int
    length: int
    methods: tuple[str, ...]
    precision: str = "fp32"
    compiled: str = ""
    seconds: float = 25.0

    @property
    def arguments(self) -> dict[str, Any]:
        """What that is among `TrainingArguments`."""
        found: dict[str, Any] = {} if self.precision == "fp32" else {self.precision: True}
        if self.compiled:
            found |= {"torch_compile": True, "torch_compile_mode": self.compiled}
        return found


METHODS = TRAININGS | {
    "fgm, example": (AdversarialTrainer, {"attack": FGM(epsilon=1.0, scope="example")}),
    "fgm, adversarial only": (AdversarialTrainer, {"attack": FGM(epsilon=1.0, clean_weight=0.0)}),
    "partial_fgm": (AdversarialTrainer, {"attack": PartialFGM(epsilon=0.3)}),
}
FEW = ("fgm", "fgm in place")
# Without anything of ours: two passes whose gradients add up, and a pass for the gradient at the embeddings alone.
REFERENCES = ("stock, two", "gradient alone")
ALL = tuple(METHODS)[1:]


def minilm() -> PreTrainedModel:
    """all-MiniLM-L6-v2's shape."""
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )


def bert_base() -> PreTrainedModel:
    """bert-base-uncased's shape."""
    return BertForSequenceClassification(BertConfig())


def xlmr(layers: int = 12) -> PreTrainedModel:
    """xlm-roberta-base's shape."""
    config = XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, num_hidden_layers=layers)
    return XLMRobertaForSequenceClassification(config)


def llama() -> PreTrainedModel:
    """A small decoder with Llama 3's vocabulary, its head tied."""
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=1024,
        num_hidden_layers=4,
        intermediate_size=2816,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def tiny() -> PreTrainedModel:
    """So small that Python is what costs."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


SHAPES = {
    "minilm": Shape(minilm, 8, 64, ALL, seconds=60.0),
    "minilm, long": Shape(minilm, 4, 256, FEW),
    "minilm, bf16": Shape(minilm, 8, 64, FEW, precision="bf16"),
    "bert-base": Shape(bert_base, 8, 32, ("fgm", "fgm, example", "fgm in place"), seconds=50.0),
    "xlm-r-base": Shape(xlmr, 8, 32, FEW),
    "llama": Shape(llama, 2, 64, FEW),
}
# By name alone.
SHAPES_ASKED_FOR = {
    "xlm-r, 2 layers": Shape(lambda: xlmr(2), 8, 32, FEW),
    "bert-base, all": Shape(bert_base, 8, 32, ALL, seconds=240.0),
    "bert-base, bf16": Shape(bert_base, 8, 32, ALL, precision="bf16", seconds=100.0),
    "xlm-r-base, bf16": Shape(xlmr, 8, 32, FEW, precision="bf16", seconds=60.0),
    "llama, bf16": Shape(llama, 2, 64, FEW, precision="bf16", seconds=60.0),
    "bert-base, long": Shape(bert_base, 2, 256, ALL, seconds=240.0),
    "tiny": Shape(tiny, 4, 8, ALL),
}


@dataclass
class StepArguments:
    """What is measured."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": "Names, as in the table."})
    rounds: int = field(default=15, metadata={"help": "At most so many rounds of the timing."})
    threads: int = field(default=0, metadata={"help": "Threads of torch; 0 for its own choice."})
    output: str = field(default="runs/step", metadata={"help": "Where the figures go."})
    memory_only: bool = field(default=False, metadata={"help": "Inside: this process measures one shape's memory."})


def main() -> None:
    """Every shape, then Python's own cost; or, in a process started for it, one shape's memory."""
    (args,) = HfArgumentParser(StepArguments).parse_args_into_dataclasses()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory_only:
        print(json.dumps(memory(shape_of(args.shapes[0]))))
        return
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "shapes": {}}
    for name in args.shapes:
        figures["shapes"][name] = measured(name, args)
        print(table({name: figures["shapes"][name]}), flush=True)
    figures["python"] = python_cost()
    print(json.dumps(figures["python"], indent=1))
    (folder / "step.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "step.md").write_text(table(figures["shapes"]) + "\n")
    picture(figures["shapes"], folder / "step.png")


def shape_of(name: str) -> Shape:
    """By its name in the table."""
    return (SHAPES | SHAPES_ASKED_FOR)[name]


def measured(name: str, args: StepArguments) -> dict[str, Any]:
    """Time and memory of one shape."""
    shape = shape_of(name)
    figures: dict[str, Any] = {"rows": shape.rows, "length": shape.length, "precision": shape.precision}
    figures["time"] = timed(shape, args)
    gc.collect()
    hidden = figures["time"].pop("hidden")
    figures["activation"] = shape.rows * shape.length * hidden * 4
    figures["memory"] = memory_apart(name, args)
    return figures


def trainers(shape: Shape, methods: tuple[str, ...], folder: str) -> dict[str, ByHand]:
    """One a method, on the same weights, with one optimizer; and the references."""
    set_seed(0)
    model = shape.model()
    low, high = 5, model.config.vocab_size
    ids = torch.randint(low, high, (shape.rows, shape.length))
    causal = isinstance(model, LlamaForCausalLM)
    labels = ids if causal else torch.randint(2, (shape.rows,))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    # What it steps by does not matter for what a step costs; the weights shall stay sane.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    parts = {"optimizers": (optimizer, schedule), "arguments": shape.arguments}
    found = {m: by_hand(METHODS[m][0], model, batch, folder, **parts, **METHODS[m][1]) for m in methods}
    two, alone = REFERENCES
    references: dict[str, ByHand] = {two: Twice(found["stock"].trainer, batch)}
    if "fgm, adversarial only" in methods:
        references[alone] = GradientAlone(found["stock"].trainer, batch)
    return found | references


def timed(shape: Shape, args: StepArguments) -> dict[str, Any]:
    """Of every method: seconds of the passes and of the whole step, and their ratios to the stock step."""
    with tempfile.TemporaryDirectory() as folder:
        found = trainers(shape, ("stock", *shape.methods), folder)
        hidden = found["stock"].trainer.model.config.hidden_size
        rounds = in_turn(found, args.rounds, shape.seconds)
    return ratios(rounds) | {
        "hidden": hidden,
        # In one run, round by round.
        "in_place_over_ours": {
            m: spread([r[other][0] / r[m][0] for r in rounds])
            for m, other in (("fgm", "fgm in place"), ("pgd-3", "pgd-3 in place"), ("freelb-3", "freelb-3 on embeds"))
            if m in found and other in found
        },
    }


def in_turn(found: dict[str, ByHand], most: int, seconds: float) -> list[dict[str, tuple[float, float]]]:
    """Seconds of the passes and of the update of each trainer, in rounds: three at least, `most` at most."""
    rounds: list[dict[str, tuple[float, float]]] = []
    for one in found.values():
        one.times()  # makes the optimizer's state, and what a compiler makes
    begin = time.perf_counter()
    while len(rounds) < most and (len(rounds) < 3 or time.perf_counter() - begin < seconds):
        start = len(rounds) % len(found)
        rounds.append({name: found[name].times() for name in [*found][start:] + [*found][:start]})
    return rounds


def ratios(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Seconds of the stock step, and of every method the ratios to that of the same round."""
    stock, methods = [r["stock"] for r in rounds], [*rounds[0]]
    return {
        "rounds": len(rounds),
        "stock_seconds": {
            "passes": statistics.median(p for p, _ in stock),
            "update": statistics.median(u for _, u in stock),
        },
        "passes": {m: spread([r[m][0] / r["stock"][0] for r in rounds]) for m in methods},
        "whole": {m: spread([sum(r[m]) / sum(r["stock"]) for r in rounds]) for m in methods},
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles around it."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def memory_apart(name: str, args: StepArguments) -> dict[str, int]:
    """`memory` in a process whose allocator gives every large piece back when it is free."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--shapes", name, "--memory_only", "--threads", str(args.threads)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Memory of {name}:\n{done.stderr[-4000:]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(shape: Shape) -> dict[str, int]:
    """Of every method the peak of a step's passes, in bytes above what lay there before; two micro-batches in one."""
    with tempfile.TemporaryDirectory() as folder:
        found = trainers(shape, ("stock", *shape.methods), folder)
        return {method: peak_of(one) for method, one in found.items()}


def peak_of(trainer: ByHand) -> int:
    """The second of two steps: the first makes what stays."""
    for _ in range(2):
        begin = reset_peak()
        trainer.passes()
        risen = peak() - begin
        trainer.update()
    return risen


def reset_peak() -> int:
    """Forgets the peak; returns the bytes in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Linux: the high-water mark of this process starts anew.
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak() -> int:
    """The most bytes in use since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident("VmHWM")


def resident(name: str) -> int:
    """One line of the kernel's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def python_cost() -> dict[str, Any]:
    """Milliseconds of a step of FGM on a tiny model: outside of its passes, and in all over two stock passes.

    The second holds the hooks inside of the passes as well. Beside them, how many operations that makes.
    """
    passes: list[float] = []
    stock_step = Trainer.training_step

    def timed_step(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        loss = stock_step(*args, **kwargs)
        passes.append(time.perf_counter() - begin)
        return loss

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Trainer, "training_step", timed_step):
        found = with_bare(trainers(Shape(tiny, 4, 8, ()), ("stock", "fgm", "fgm, example"), folder), folder)
        whole: dict[str, list[float]] = {name: [] for name in found}
        outside: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(200):
            for name, one in found.items():
                passes.clear()
                whole[name].append(1000 * one.times()[0])
                outside[name].append(whole[name][-1] - 1000 * sum(passes))
        operations = {name: operations_of(one) for name, one in found.items()}
    two = "stock, two"
    figures: dict[str, Any] = {two: {"in all": spread(whole[two]), "operations": operations[two]}}
    for name in ("fgm", "fgm, example", "fgm, bare", "fgm, example, bare"):
        over = [own - theirs for own, theirs in zip(whole[name], whole[two], strict=True)]
        figures[name] = {
            "outside of the passes": spread(outside[name]),
            "over two stock passes": spread(over),
            "operations over those": operations[name] - operations[two],
        }
    return figures


def with_bare(found: dict[str, ByHand], folder: str) -> dict[str, ByHand]:
    """The trainers, and FGM's operations without anything around them."""
    stock = found["stock"]
    own = {"optimizers": (stock.trainer.optimizer, stock.trainer.lr_scheduler)}
    for name, shared in (("fgm, bare", True), ("fgm, example, bare", False)):
        trainer = by_hand(Trainer, stock.trainer.model, stock.batch, folder, **own).trainer
        found[name] = Bare(trainer, stock.batch, shared)
    return found


def operations_of(trainer: ByHand) -> int:
    """How many operations a step's passes are made of, views apart: on a GPU, each starts a kernel."""
    counted = Operations()
    with counted:
        trainer.passes()
    trainer.update()
    return counted.count


class Operations(TorchDispatchMode):
    """Counts."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation."""
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def table(shapes: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [
        "| shape | batch | method | forward and backward | whole step | peak, MB | over stock's two, in (B, L, D) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in shapes.items():
        seconds = found["time"]["stock_seconds"]
        for method, ratio in found["time"]["passes"].items():
            whole = found["time"]["whole"][method]
            own = found["memory"][method]
            over = (own - found["memory"]["stock, two"]) / found["activation"]
            figures = [f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in (ratio, whole)]
            if method == "gradient alone":
                figures[1] = ""  # it gives the optimizer nothing to do
            if method == "stock":
                figures = [f"{seconds['passes']:.3f} s", f"{sum(seconds.values()):.3f} s"]
            cells = [name, f"{found['rows']} x {found['length']}", method, *figures, f"{own / 1e6:.0f}", f"{over:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(shapes: dict[str, Any], path: Path) -> None:
    """Forward and backward of each method over the stock Trainer's, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [(f"{m}   {name}", r) for name, f in shapes.items() for m, r in f["time"]["passes"].items() if m != "stock"]
    rows.reverse()
    figure, axes = pyplot.subplots(figsize=(7, 0.24 * len(rows) + 1), layout="constrained")
    for place, (label, r) in enumerate(rows):
        theirs = "in place" in label or "on embeds" in label
        reference = label.startswith(REFERENCES)
        color = "#b0b0b0" if theirs else "#d9d9d9" if reference else "#2a6f97"
        axes.barh(place, r["median"], color=color, hatch="//" if reference else None)
        axes.plot([r["low"], r["high"]], [place, place], color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.set_xlabel(
        "forward and backward, over the stock Trainer's\n(grey: what people use today; hatched: references)"
    )
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
