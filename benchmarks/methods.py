"""Every method side by side: what a step costs, and what training with it does to accuracy, clean and under attack.

    .venv/bin/python benchmarks/methods.py cost effect --output runs/methods

`cost` times whole optimizer steps in turn, method by method, over and over, and gives medians of ratios to the stock
step of the same round. `effect` trains a model on the demo's reviews with each method and attacks it with 10-step PGD.
Writes `cost.json` and `effect-SEED-NAME.json`; `table` prints what is there.
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
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import GROUP_BY_LENGTH, by_length, encode, new_model
from machine import machine, versions
from reviews import load_reviews, pretrained_model

from fgm_trainer import (
    ALUM,
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
    TokenAware,
)
from fgm_trainer.robustness import evaluate_robustness

# Lengths are such that one snippet moves by about 0.2, as in the demo, where the method has no published size.
METHODS: dict[str, Attack] = {
    "stock": FGM(epsilon=0.0),
    "noise": Noise(epsilon=0.2, scope="example"),
    "fgm": FGM(epsilon=0.2, scope="example"),
    "fgm, vocabulary": FGM(epsilon=1.0),
    "fgm, adversarial only": FGM(epsilon=0.2, scope="example", clean_weight=0.0),
    "fgsm": FGSM(epsilon=0.002),
    "pgd": PGD(epsilon=0.2, scope="example"),
    "freelb": FreeLB(),
    "freelb, clean": FreeLB(clean=True),
    "token_aware": TokenAware(),
    "vat": VAT(),
    "smart, published": SMART(),
    "smart, 0.002": SMART(epsilon=0.002, step_size=0.002, weight=5.0),
    "alum": ALUM(),
    "r3f": R3F(),
    "awp": AWP(),
}


@dataclass
class BenchmarkArguments:
    """What is measured."""

    parts: list[str] = field(metadata={"help": "`cost`, `effect`, `table`."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Names, as in the table."})
    seed: int = field(default=0, metadata={"help": "Seed of the head, the order of the data and the dropout."})
    rounds: int = field(default=7, metadata={"help": "Rounds of the timing."})
    train_samples: int = field(default=3000, metadata={"help": "Movie snippets to train on."})
    test_samples: int = field(default=200, metadata={"help": "Movie snippets under attack."})
    output: str = field(default="runs/methods", metadata={"help": "Where the figures go."})


class OneStep(AdversarialTrainer):
    """A trainer whose steps are taken one by one."""

    def start(self, batch: dict[str, Any]) -> None:
        """Makes optimizer and model ready."""
        self.create_optimizer_and_scheduler(num_training_steps=1000)
        self.model_wrapped, self._batch = self.model, batch
        self.state.max_steps = 1000
        self.current_gradient_accumulation_steps = 1

    def step(self) -> float:
        """Processor seconds of one optimizer step, which other work on the machine does not lengthen."""
        begin = time.process_time()
        self.training_step(self.model, dict(self._batch))
        self.optimizer.step()
        self.model.zero_grad()
        seconds = time.process_time() - begin
        self.state.global_step += 1
        if self._place is not None:
            # The model is every trainer's: the next one shall not run through this one's hooks.
            self._place.detach()
        return seconds


def cost(args: BenchmarkArguments, folder: Path, train: list[dict[str, Any]], collate: Any) -> None:
    """Times steps in turn."""
    batch = collate(by_length(train)[len(train) // 2 :][:16])
    trainers, model = {}, new_model(folder, args.seed)
    for name in dict.fromkeys(["stock", *args.methods]):
        trainers[name] = OneStep(model=model, args=quiet(args), attack=METHODS[name])
        trainers[name].start(batch)
    rounds = []
    for number in range(args.rounds + 1):
        seconds = {name: trainer.step() for name, trainer in trainers.items()}
        if number:  # the first makes the optimizer's state
            rounds.append({name: value / seconds["stock"] for name, value in seconds.items()})
    ratios = {name: sorted(r[name] for r in rounds) for name in trainers}
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
        flags = AdversarialTrainingArguments(
            num_train_epochs=1,
            per_device_train_batch_size=16,
            learning_rate=1e-4,
            seed=args.seed,
            adv_warmup=0.5,
            **common(args),
            **GROUP_BY_LENGTH,
        )
        trainer = AdversarialTrainer(
            model=new_model(folder, args.seed),
            args=flags,
            attack=METHODS[name],
            train_dataset=train,
            data_collator=collate,
        )
        trainer.train()
        many, few = by_length(test[:1000]), by_length(test[: args.test_samples])
        parts = {"collate_fn": collate, "progress": False, "seed": args.seed}
        clean = evaluate_robustness(trainer.model, many, epsilons=[0.0], **parts).clean
        report = evaluate_robustness(trainer.model, few, [PGD(steps=10)], [0.1, 0.2, 0.4], **parts)
        last = [line for line in trainer.state.log_history if "adv_delta_norm" in line][-1:]
        figures = {
            "settings": METHODS[name].settings(),
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
        files = sorted(folder.glob(f"effect-*-{name.replace(' ', '_')}.json"))
        found = [json.loads(file.read_text()) for file in files]
        cells = [mean_of([f["clean"] for f in found])]
        cells += [mean_of([f["pgd-10"][e] for f in found]) for e in ("0.1", "0.2", "0.4")]
        print(f"| {name} | {costs[name]['median']:.2f} | {' | '.join(cells)} |")


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


def quiet(args: BenchmarkArguments) -> TrainingArguments:
    """Training arguments of a trainer whose steps are taken by hand."""
    return TrainingArguments(**common(args), max_steps=1000)


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


if __name__ == "__main__":
    main()
