"""How often the collapse warning is right: runs that collapse, runs that do not, and two rules on all of them.

    .venv/bin/python benchmarks/collapse.py --output runs/collapse.jsonl

Every run is one JSON line with what the rules read, each step's loss, logits and labels; a run whose line is there
is not made again, and both rules are replayed on the lines, so a change of a rule needs no training. The truth is the
trained model on held-out rows: it has collapsed where it predicts one class for 98 % of them or more, and for a number
where the spread of its predictions is below a tenth of the labels'.

all-MiniLM-L6-v2, on the demo's movie snippets by default. `--data` takes folders with `train.jsonl` and
`validation.jsonl`, rows of `sentence` or `sentence1` and `sentence2`, and `label`: as GLUE has them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import GROUP_BY_LENGTH, by_length
from reviews import load_reviews, pretrained_model

from fgm_trainer import (
    AWP,
    FGM,
    PGD,
    AdversarialTrainer,
    AdversarialTrainingArguments,
    Attack,
    FreeLB,
    Noise,
    PartialFGM,
)
from fgm_trainer.engine.schedule import Schedule
from fgm_trainer.metrics import CollapseWatch


@dataclass(frozen=True)
class Setting:
    """What is trained with, and on how many seeds."""

    attack: Attack
    warmup: float = 0.0
    rate: float = 1e-4
    seeds: int = 1


MOVIES = {
    "partial_fgm": Setting(PartialFGM(), seeds=3),
    "fgm": Setting(FGM(epsilon=1.0), seeds=3),
    "fgm, 3": Setting(FGM(epsilon=3.0)),
    "fgm, example 0.5": Setting(FGM(epsilon=0.5, scope="example")),
    "fgm, example 0.2, warm-up": Setting(FGM(epsilon=0.2, scope="example"), warmup=0.5),
    "awp": Setting(AWP()),
    "freelb": Setting(FreeLB()),
    "noise": Setting(Noise(epsilon=0.2, scope="example")),
    "pgd, example 1": Setting(PGD(epsilon=1.0, scope="example")),
    "fgm, rate 5e-3": Setting(FGM(epsilon=1.0), rate=5e-3),
    "fgm, 2": Setting(FGM(epsilon=2.0)),
    "fgm, example 0.3": Setting(FGM(epsilon=0.3, scope="example")),
}
OTHERS = {
    name: Setting(MOVIES[name].attack, MOVIES[name].warmup)
    for name in ("partial_fgm", "fgm, example 0.5", "fgm", "fgm, 3", "noise")
}


@dataclass
class CollapseArguments:
    """What is measured."""

    output: str = field(default="runs/collapse.jsonl", metadata={"help": "Where the lines go; those there are kept."})
    data: list[str] = field(
        default_factory=lambda: ["movies"], metadata={"help": "`movies`, and folders of further data sets."}
    )
    settings: list[str] = field(
        default_factory=lambda: list(MOVIES), metadata={"help": "Names of what is trained with."}
    )
    train_samples: int = field(default=1000, metadata={"help": "Rows to train on, one epoch."})
    test_samples: int = field(default=300, metadata={"help": "Held-out rows that say whether a run has collapsed."})
    tables: bool = field(default=False, metadata={"help": "Print the tables of the lines that are there, no more."})
    every: float = field(default=0.1, metadata={"help": "How often the rules read a log line."})


@dataclass(frozen=True)
class Task:
    """A data set: rows of `input_ids` and `labels`, and how many outputs the model has (1: it predicts a number)."""

    name: str
    outputs: int
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


class Recorded(AdversarialTrainer):
    """Keeps every step's loss, the labels, and the logits of its first forward pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[dict[str, Any]] = []
        self.model.register_forward_hook(self._on_output)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.steps.append({"labels": inputs["labels"].tolist()})
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.steps[-1]["loss"] = round(loss.item(), 5)
        return loss

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if module.training:
            rows = output.logits.detach().double().tolist()
            self.steps[-1].setdefault("logits", [[round(value, 4) for value in row] for row in rows])


def one_run(args: CollapseArguments, task: Task, setting: Setting, seed: int, folder: Path, collate: Any) -> dict:
    """Trains once; what the rules read, and the truth."""
    flags = AdversarialTrainingArguments(
        output_dir=str(Path(args.output).parent / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=setting.rate,
        save_strategy="no",
        report_to="none",
        logging_steps=0.1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=seed,
        adv_warmup=setting.warmup,
        **GROUP_BY_LENGTH,
    )
    model = new_model(folder, seed, task.outputs)
    trainer = Recorded(model=model, args=flags, train_dataset=task.train, data_collator=collate, attack=setting.attack)
    start = time.process_time()
    trainer.train()
    seconds = round(time.process_time() - start, 1)
    warm = trainer.schedule.warm(trainer.state.max_steps)
    return {"seconds": seconds, "warm": warm, **held_out(model, task, collate), "steps": trainer.steps}


def new_model(folder: Path, seed: int, outputs: int) -> nn.Module:
    """The pretrained encoder with a new head."""
    transformers.set_seed(seed)
    transformers.logging.set_verbosity_error()
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)


@torch.no_grad()
def held_out(model: nn.Module, task: Task, collate: Any) -> dict[str, float]:
    """How alike the predictions are, and how good."""
    model.eval()
    rows = by_length(task.test)
    batches = [collate(rows[i : i + 32]) for i in range(0, len(rows), 32)]
    logits = torch.cat([model(**batch).logits.double() for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    if task.outputs == 1:
        found = logits[:, 0]
        return {
            "spread": (found.std() / labels.std()).item(),
            "score": torch.corrcoef(torch.stack([found, labels]))[0, 1].item(),
        }
    found = logits.argmax(-1)
    share = found.bincount(minlength=task.outputs).max().item() / len(found)
    return {"share": share, "score": (found == labels).double().mean().item()}


def tasks(args: CollapseArguments, tokenizer: Any) -> Iterator[tuple[Task, dict[str, Setting]]]:
    """Each data set with what is trained on it."""
    for name in args.data:
        if name == "movies":
            reviews = load_reviews()
            parts = [[{"sentence": r.text, "label": r.label} for r in part] for part in (reviews.train, reviews.movies)]
            yield task_of(name, args, tokenizer, *parts), MOVIES
        else:
            files = [Path(name) / f"{part}.jsonl" for part in ("train", "validation")]
            parts = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
            yield task_of(Path(name).name, args, tokenizer, *parts), OTHERS


def task_of(name: str, args: CollapseArguments, tokenizer: Any, train: list[dict], test: list[dict]) -> Task:
    """The rows, encoded."""
    number = any(isinstance(row["label"], float) for row in train)
    outputs = 1 if number else 1 + max(row["label"] for row in train)
    # GLUE's files stand in the order in which they were collected.
    chosen = [
        [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].tolist()]
        for rows, count in ((train, args.train_samples), (test, args.test_samples))
    ]
    return Task(name, outputs, *(encode(tokenizer, rows) for rows in chosen))


def encode(tokenizer: Any, rows: list[dict]) -> list[dict[str, Any]]:
    """Token ids and labels."""
    texts = [[row[name] for row in rows] for name in ("sentence", "sentence1", "sentence2") if name in rows[0]]
    ids = tokenizer(*texts, truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]


# The rules, replayed ------------------------------------------------------------------------------------------------


def replayed(run: dict[str, Any], every: float, rule: str) -> bool:
    """Whether a rule warns of a run that is logged every so many steps (below 1: of training)."""
    steps, total = run["steps"], len(run["steps"])
    every = math.ceil(every * total) if every < 1 else int(every)
    watch, first = CollapseWatch(), LossRule()
    schedule, accelerator = Schedule(warmup=float(run["warm"])), Alone()
    history: list[dict[str, float]] = []
    for number, step in enumerate(steps, start=1):
        with watch.watched(nn.Identity(), torch.tensor(step["labels"]), number - 1, schedule, total) as seen:
            if seen is not None:
                seen(None, (), torch.tensor(step["logits"]))
        if number % every == 0:
            loss = statistics.mean(s["loss"] for s in steps[number - every : number])
            watch.see(loss, number, schedule, total, history, accelerator)
            first.see(loss, number, schedule, total)
            history.append({"loss": loss, "step": number})
    return (watch if rule == "predictions" else first).said


class Alone:
    """What the watch asks of an accelerator, on one process."""

    device = torch.device("cpu")

    def reduce(self, value: torch.Tensor, reduction: str) -> torch.Tensor:
        return value


class LossRule:
    """The rule of before: the loss of a window after half of training is not 5 % below the first window's."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.losses: list[float] = []
        self.since: int | None = None
        self.said = False

    def see(self, loss: float, step: int, schedule: Schedule, total: int) -> None:
        """A log line."""
        self.losses.append(loss)
        if self.since is not None and step - self.since < total / 20:
            return
        loss, self.losses, self.since = statistics.mean(self.losses), [], step
        if self.first is None:
            self.first = loss
        elif step > max(schedule.warm(total), total / 2) and loss >= 0.95 * self.first:
            self.said = True


def collapsed(run: dict[str, Any]) -> bool:
    """The truth, from the held-out rows."""
    return bool(run["share"] >= 0.98 if "share" in run else run["spread"] < 0.1)


def tables(runs: list[dict[str, Any]], every: float) -> None:
    """Each run, and the rules' errors."""
    rules = ("loss", "predictions")
    counts = {rule: Counter[str]() for rule in rules}
    print(
        "| data | trained with | seed | rows | share or spread | score | loss rule | predictions |\n|---"
        + "|---" * 7
        + "|"
    )
    for run in runs:
        said = {rule: replayed(run, every, rule) for rule in rules}
        truth = collapsed(run)
        for rule in rules:
            counts[rule][OUTCOMES[truth, said[rule]]] += 1
        alike = run["share"] if "share" in run else run["spread"]
        cells = [run["task"], run["setting"], run["seed"], run["rows"], f"{alike:.2f}", f"{100 * run['score']:.1f}"]
        print(f"| {' | '.join(map(str, cells))} | {' | '.join(OUTCOMES[truth, said[rule]] for rule in rules)} |")
    print(
        f"\nA log line every {every:g} of training.\n\n| rule | {' | '.join(OUTCOMES.values())} |\n|---"
        + "|---" * 4
        + "|"
    )
    for rule in rules:
        print(f"| {rule} | {' | '.join(str(counts[rule][o]) for o in OUTCOMES.values())} |")


OUTCOMES = {
    (True, True): "hit",
    (True, False): "miss",
    (False, True): "false alarm",
    (False, False): "silent",
}


def lines(path: Path) -> list[dict[str, Any]]:
    """The runs that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> None:
    """All runs that are not there yet."""
    (args,) = HfArgumentParser(CollapseArguments).parse_args_into_dataclasses()
    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    if args.tables:
        return tables(lines(path), args.every)
    known = {(r["task"], r["setting"], r["seed"], r["rows"]) for r in lines(path)}
    folder = pretrained_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collate = DataCollatorWithPadding(tokenizer)
    for task, settings in tasks(args, tokenizer):
        for name in args.settings:
            setting = settings.get(name, Setting(FGM(), seeds=0))
            for seed in range(setting.seeds):
                if (task.name, name, seed, len(task.train)) in known:
                    continue
                run = {"task": task.name, "setting": name, "seed": seed, "rows": len(task.train)}
                run |= one_run(args, task, setting, seed, folder, collate)
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
                print({k: v for k, v in run.items() if k != "steps"}, flush=True)
    tables(lines(path), args.every)


if __name__ == "__main__":
    main()
