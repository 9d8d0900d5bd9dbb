"""Every method side by side: what a step costs, and what training with it does to accuracy, clean and under attack.

    .venv/bin/python benchmarks/methods.py cost effect --output runs/methods

`cost` times whole optimizer steps in turn, method by method, over and over, and gives medians of ratios to the stock
step of the same round. `effect` trains a model on the demo's reviews with each method and attacks it with 10-step PGD.
Writes `cost.json` and `effect-SEED-NAME.json`; `table` prints what is there, `picture` draws it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from by_hand import by_hand
from candidates import (
    ByScore,
    JustMoved,
    LeastCertain,
    LeastCertainBefore,
    LowPrecisionLook,
    Remembered,
    ShallowLook,
)
from demo import GROUP_BY_LENGTH, by_length, encode, new_model
from machine import machine, versions
from reviews import load_reviews, pretrained_model

from fgm_trainer import (
    ALUM,
    ATTA,
    AWP,
    FGM,
    FGSM,
    PGD,
    R3F,
    SMART,
    VAT,
    AdversarialTrainer,
    AdversarialTrainingArguments,
    Attack,
    FreeLB,
    Noise,
    PartialFGM,
    TokenAware,
)
from fgm_trainer.robustness import evaluate_robustness


@dataclass(frozen=True)
class Method:
    """What is trained with.

    Args:
        attack: the attack; None for a trainer that has none.
        trainer: which takes it.
        every: attack every k-th step.
    """

    attack: Attack | None
    trainer: type[Trainer] = AdversarialTrainer
    every: int = 1


# Lengths are such that one snippet moves by about 0.2, as in the demo, where the method has no published size.
METHODS: dict[str, Method] = {
    "stock": Method(FGM(epsilon=0.0)),
    "noise": Method(Noise(epsilon=0.2, scope="example")),
    "fgm": Method(FGM(epsilon=0.2, scope="example")),
    "fgm, vocabulary": Method(FGM(epsilon=1.0)),
    "fgm, adversarial only": Method(FGM(epsilon=0.2, scope="example", clean_weight=0.0)),
    "partial_fgm": Method(PartialFGM(epsilon=0.3)),
    "fgsm": Method(FGSM(epsilon=0.002)),
    "pgd": Method(PGD(epsilon=0.2, scope="example")),
    "freelb": Method(FreeLB(epsilon=0.2)),
    "freelb, clean": Method(FreeLB(epsilon=0.2, clean=True)),
    "token_aware": Method(TokenAware(epsilon=0.2)),
    "vat": Method(VAT(epsilon=0.2)),
    "smart, published": Method(SMART(epsilon=1e-5)),
    "smart, 0.002": Method(SMART(epsilon=0.002, step_size=0.002, weight=5.0)),
    "alum": Method(ALUM(epsilon=1e-5)),
    "r3f": Method(R3F(epsilon=1e-5)),
    "awp": Method(AWP(epsilon=5e-3)),
}
ALONE = FGM(epsilon=0.2, scope="example", clean_weight=0.0)
# Cheaper than two passes.
CANDIDATES: dict[str, Method] = {
    "every 2nd step": Method(FGM(epsilon=0.2, scope="example"), every=2),
    "every 3rd step, 0.3": Method(FGM(epsilon=0.3, scope="example"), every=3),
    "a third, 0.3": Method(PartialFGM(epsilon=0.3, share=1 / 3)),
    "0.4, 0.4": Method(PartialFGM(epsilon=0.4, share=0.4)),
    "0.4, least certain": Method(LeastCertain()),
    "all, in bf16": Method(ALONE, LowPrecisionLook),
    "all, half of the layers": Method(ALONE, ShallowLook),
    "remembered": Method(None, Remembered),
}
# These know more of an example each time that they meet it: from the second or third epoch on.
BY_MEMORY: dict[str, Method] = {
    "0.4, least certain before": Method(ByScore(), LeastCertainBefore),
    "0.4, just moved": Method(ByScore(), JustMoved),
    "atta": Method(ATTA(epsilon=0.3)),
    "atta, 0.4": Method(ATTA(epsilon=0.4)),
    "atta, auto": Method(ATTA()),
}
ALL = METHODS | CANDIDATES | BY_MEMORY


@dataclass
class BenchmarkArguments:
    """What is measured."""

    parts: list[str] = field(metadata={"help": "`cost`, `effect`, `table`, `picture`."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "Names, or `candidates`, or `memory`."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the head, the order of the data and the dropout."})
    rounds: int = field(default=7, metadata={"help": "Rounds of the timing."})
    train_samples: int = field(default=3000, metadata={"help": "Movie snippets to train on."})
    epochs: float = field(default=1.0, metadata={"help": "How often each of them is met."})
    test_samples: int = field(default=200, metadata={"help": "Movie snippets under attack."})
    output: str = field(default="runs/methods", metadata={"help": "Where the figures go."})


def cost(args: BenchmarkArguments, folder: Path, train: list[dict[str, Any]], collate: Any) -> None:
    """Times steps in turn."""
    batch = dict(collate(by_length(train)[len(train) // 2 :][:16]))
    model = new_model(folder, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)
    optimizers = (optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    steps = {}
    for name in dict.fromkeys(["stock", *args.methods]):
        method = ALL[name]
        attack = {} if method.attack is None else {"attack": method.attack}
        steps[name] = by_hand(method.trainer, model, batch, args.output, optimizers=optimizers, **attack)
    rounds = []
    for number in range(args.rounds + 1):
        seconds = {name: sum(one.times(time.process_time)) for name, one in steps.items()}
        for name in steps:
            # The other steps are the stock Trainer's.
            seconds[name] = seconds["stock"] + (seconds[name] - seconds["stock"]) / ALL[name].every
        if number:  # the first makes the optimizer's state
            rounds.append({name: value / seconds["stock"] for name, value in seconds.items()})
    ratios = {name: sorted(r[name] for r in rounds) for name in steps}
    figures = {
        "machine": machine(),
        "versions": versions(),
        "batch": list(batch["input_ids"].shape),
        "ratio": {
            name: {"median": statistics.median(row), "least": row[0], "most": row[-1]} for name, row in ratios.items()
        },
    }
    write(args, "cost.json", figures)


def effect(args: BenchmarkArguments, folder: Path, train: list[dict[str, Any]], test: Any, collate: Any) -> None:
    """Trains with each method and attacks what came of it."""
    for name in args.methods:
        method = ALL[name]
        flags = AdversarialTrainingArguments(
            num_train_epochs=args.epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            seed=args.seed,
            adv_warmup=0.5,
            adv_every=method.every,
            **common(args),
            **GROUP_BY_LENGTH,
        )
        attack = {} if method.attack is None else {"attack": method.attack}
        model = new_model(folder, args.seed)
        trainer = method.trainer(model=model, args=flags, train_dataset=train, data_collator=collate, **attack)
        trainer.train()
        many, few = by_length(test[:1000]), by_length(test[: args.test_samples])
        parts = {"collate_fn": collate, "progress": False, "seed": args.seed}
        clean = evaluate_robustness(trainer.model, many, epsilons=[0.0], **parts).clean
        report = evaluate_robustness(trainer.model, few, [PGD(epsilon=1.0, steps=10)], [0.1, 0.2, 0.4], **parts)
        last = [line for line in trainer.state.log_history if "adv_delta_norm" in line][-1:]
        figures = {
            "settings": method.attack.settings() if method.attack else {},
            "clean": clean,
            "pgd-10": dict(zip(map(str, report.epsilons), report.scores["pgd-10"], strict=True)),
            "log": last,
        }
        write(args, f"effect-{args.seed}-{name.replace(' ', '_')}.json", figures)
        print(name, clean, report.scores, flush=True)


def table(args: BenchmarkArguments) -> None:
    """Prints what has been measured, as Markdown."""
    folder = Path(args.output)
    costs = json.loads((folder / "cost.json").read_text())["ratio"]
    print("| method | step | clean | PGD-10 0.1 | 0.2 | 0.4 |\n|---|---|---|---|---|---|")
    for name in args.methods:
        found = effects(folder, name)
        cells = [mean_of([f["clean"] for f in found])]
        cells += [mean_of([f["pgd-10"][e] for f in found]) for e in ("0.1", "0.2", "0.4")]
        print(f"| {name} | {costs[name]['median']:.2f} | {' | '.join(cells)} |")


def picture(args: BenchmarkArguments) -> None:
    """Accuracy under attack over the cost of a step, means over the seeds; the line is nine tenths of FGM's gain."""
    import matplotlib

    matplotlib.use("Agg")

    folder = Path(args.output)
    costs = json.loads((folder / "cost.json").read_text())["ratio"]
    robust = {name: [100 * f["pgd-10"]["0.2"] for f in effects(folder, name)] for name in args.methods}
    draw({name: (costs[name]["median"], values) for name, values in robust.items() if values}, folder / "frontier.png")


def draw(points: dict[str, tuple[float, list[float]]], path: Path) -> None:
    """Of each method the cost, and the accuracies of its seeds; numbers at the points, names beside the picture."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8.5, 4.5), layout="constrained")
    for number, (name, (cost, values)) in enumerate(sorted(points.items(), key=lambda item: item[1][0]), 1):
        mean, color = statistics.mean(values), "black" if name in ("stock", "fgm") else "#2a6f97"
        axes.plot([cost] * 2, [min(values), max(values)], color="#b0b0b0", linewidth=1, zorder=1)
        axes.scatter(cost, mean, s=110, color=color, zorder=2, label=f"{number}  {name}")
        axes.annotate(str(number), (cost, mean), ha="center", va="center", color="white", fontsize=7, zorder=3)
    stock, fgm = (statistics.mean(points[name][1]) for name in ("stock", "fgm"))
    goal: dict[str, Any] = {"color": "#c1121f", "linewidth": 0.8}
    axes.axhline(stock + 0.9 * (fgm - stock), label="nine tenths of FGM's gain; cost 1.3", **goal)
    axes.axvline(1.3, **goal)
    axes.set_xlabel("cost of an optimizer step, over the stock step")
    axes.set_ylabel("accuracy under 10-step PGD of length 0.2, percent")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, markerscale=0.5)
    figure.savefig(path, dpi=130)


def effects(folder: Path, name: str) -> list[dict[str, Any]]:
    """What was measured of a method, seed by seed."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"effect-*-{name.replace(' ', '_')}.json"))]


def mean_of(values: list[float]) -> str:
    """In percent, with the values behind a mean of several."""
    if not values:
        return "-"
    each = ", ".join(f"{100 * v:.1f}" for v in values)
    return each if len(values) == 1 else f"{100 * statistics.mean(values):.1f} ({each})"


def common(args: BenchmarkArguments) -> dict[str, Any]:
    """What every run is told."""
    return {
        "output_dir": str(Path(args.output) / "trainer"),
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 0.1,
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def write(args: BenchmarkArguments, name: str, figures: dict[str, Any]) -> None:
    """One file of figures."""
    path = Path(args.output)
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    """All parts that are asked for."""
    argv = sys.argv[1:]
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(
        ["--parts", *argv] if argv and not argv[0].startswith("-") else argv
    )
    if args.methods == ["candidates"]:
        args.methods = ["stock", "fgm", "fgm, adversarial only", "partial_fgm", *CANDIDATES]
    if args.methods == ["memory"]:
        args.methods = ["stock", "fgm", "partial_fgm", *BY_MEMORY]
    if {"cost", "effect"} & set(args.parts):
        folder, reviews = pretrained_model(), load_reviews()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        collate = DataCollatorWithPadding(tokenizer)
        train = encode(tokenizer, reviews.train[: args.train_samples])
        if "cost" in args.parts:
            cost(args, folder, train, collate)
        if "effect" in args.parts:
            effect(args, folder, train, encode(tokenizer, reviews.movies), collate)
    if "table" in args.parts:
        table(args)
    if "picture" in args.parts:
        picture(args)


if __name__ == "__main__":
    main()
