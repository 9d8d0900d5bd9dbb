"""What methods do to a model at their defaults, with epsilon `auto`, and at fixed sizes: clean and robust figures.

    .venv/bin/python benchmarks/defaults.py --methods stock fgm --epsilons auto 1.0
    .venv/bin/python benchmarks/defaults.py --tables

Every run is one JSON line; a run whose line is there is not made again, so a study can be cut into pieces. `movies` are
the demo's snippets, `movies_sst2` those that are not in SST-2's validation set, which is tested on; the other tasks are
folders in `--data` with `train.jsonl` and `validation.jsonl` in GLUE's columns (`wnut17`: `tokens` and `ner_tags`).
With `:train` behind its name a task is tested on further rows of its training part: to choose settings.
Models: all-MiniLM-L6-v2, `random` (BERT of 2 layers of 128 from random weights), or a folder.

Figures: accuracy; Matthews correlation (cola), Pearson correlation (numbers), F1 of the tokens of entities (wnut17).
Robust: the same under PGD of 10 steps whose L2 length is `--attack_length` times the mean norm of a token's embedding.
A run has collapsed if the model predicts one class for 98 % of held-out rows or more, or numbers whose spread is below
a tenth of the labels'; of tagging, if it finds no entity.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import GROUP_BY_LENGTH, by_length
from reviews import load_reviews, pretrained_model

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.attacks import PGD
from fgm_trainer.engine.driver import unit_of
from fgm_trainer.robustness import attack_batch

LISTED: dict[str, Any] = {"nargs": "+"}


@dataclass(frozen=True)
class Run:
    """What is trained, on what, and how."""

    model: str
    task: str
    rows: int
    batch: int
    rate: float
    seed: int
    method: str
    epsilon: str
    flags: str = ""


@dataclass
class DefaultsArguments:
    """A grid of runs."""

    output: str = field(default="runs/defaults.jsonl", metadata={"help": "Where the lines go; those there are kept."})
    data: str = field(default="../shared/data", metadata={"help": "The folder of the other tasks."})
    models: list[str] = field(default_factory=lambda: ["minilm"], metadata={"help": "`minilm`, `random`, folders."})
    tasks: list[str] = field(
        default_factory=lambda: ["movies"],
        metadata={"help": "`movies`, `movies_sst2`, folders; `:train`."},
    )
    methods: list[str] = field(default_factory=lambda: ["stock", "fgm"], metadata={"help": "`stock` and methods."})
    epsilons: list[str] = field(
        default_factory=lambda: ["default"], metadata={"help": "`default` (nothing is passed), `auto`, numbers."}
    )
    flags: list[str] = field(
        default_factory=lambda: [""],
        metadata={"help": "More flags of a run, such as `adv_warmup=0.5,adv_scope=token`."},
    )
    rows: list[int] = field(default_factory=lambda: [1000], metadata={"help": "Rows to train on, one epoch."})
    batches: list[int] = field(default_factory=lambda: [16], metadata={"help": "Batch sizes."})
    rates: list[float] = field(default_factory=lambda: [1e-4], metadata={"help": "Learning rates."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of head, order, dropout and attack."})
    clean_samples: int = field(default=800, metadata={"help": "Held-out rows without attack."})
    attacked_samples: int = field(default=128, metadata={"help": "And with."})
    attack_length: float = field(default=0.2, metadata={"help": "In units of the mean norm of a token's embedding."})
    tables: bool = field(default=False, metadata={"help": "Print the tables of the lines that are there, no more."})


# Tasks ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Tokenised rows, what to predict, the figure by which it is judged: (predictions, labels) -> a number; the names
    of tags, and the held-out rows as they were.
    """

    kind: str
    outputs: int
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]
    figure: Callable[[np.ndarray, np.ndarray], float]
    tags: tuple[str, ...] = ()
    raw: tuple[dict[str, Any], ...] = ()


def load_task(args: DefaultsArguments, name: str, rows: int, tokenizer: Any) -> Task:
    """The rows of a task."""
    name, _, tested_on = name.partition(":")
    if name.startswith("movies"):
        reviews = load_reviews()
        parts = [[{"sentence": r.text, "label": r.label} for r in part] for part in (reviews.train, reviews.movies)]
        if name == "movies_sst2":
            parts[1] = read_rows(Path(args.data) / "sst2" / "validation.jsonl")
            # Both were collected from the same reviews: most of SST-2's sentences are among the snippets.
            tested = {letters(row["sentence"]) for row in parts[1]}
            parts[0] = [row for row in parts[0] if letters(row["sentence"]) not in tested]
    else:
        parts = [read_rows(Path(args.data) / name / f"{part}.jsonl") for part in ("train", "validation")]
    # GLUE's files stand in the order in which they were collected.
    order = [torch.randperm(len(part), generator=torch.Generator().manual_seed(0)).tolist() for part in parts]
    train, test = ([part[i] for i in indices] for part, indices in zip(parts, order, strict=True))
    train, test = train[:rows], (train[rows:] if tested_on == "train" else test)[: args.clean_samples]
    if "tokens" in train[0]:
        tags = sorted({tag for row in parts[0] for tag in row["ner_tags"]}, key=lambda tag: (tag != "O", tag))
        encoded = [tag_tokens(tokenizer, part, tags) for part in (train, test)]
        return Task("tags", len(tags), *encoded, entity_f1, tuple(tags), tuple(test))
    encoded = [encode(tokenizer, part) for part in (train, test)]
    if any(isinstance(row["label"], float) for row in train):
        return Task("numbers", 1, *encoded, lambda found, labels: float(np.corrcoef(found, labels)[0, 1]))
    figure = matthews if name == "cola" else lambda found, labels: float((found == labels).mean())
    return Task("classes", 1 + max(row["label"] for row in parts[0]), *encoded, figure, raw=tuple(test))


def letters(text: str) -> str:
    """A text's letters and digits alone: SST-2 has spaces inside of words ("does n't")."""
    return "".join(filter(str.isalnum, text.lower()))


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def encode(tokenizer: Any, rows: list[dict]) -> list[dict[str, Any]]:
    """Token ids and labels."""
    texts = [[row[name] for row in rows] for name in ("sentence", "sentence1", "sentence2") if name in rows[0]]
    ids = tokenizer(*texts, truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": i, "labels": row["label"]} for i, row in zip(ids, rows, strict=True)]


def tag_tokens(tokenizer: Any, rows: list[dict], tags: list[str]) -> list[dict[str, Any]]:
    """Token ids, and the tag of each word at its first token."""
    encoded = tokenizer([row["tokens"] for row in rows], is_split_into_words=True, truncation=True, max_length=64)
    found = []
    for number, row in enumerate(rows):
        words = encoded.word_ids(number)
        first = [word is not None and word != before for word, before in zip(words, [None, *words], strict=False)]
        labels = [
            tags.index(row["ner_tags"][w]) if is_first else -100 for w, is_first in zip(words, first, strict=True)
        ]
        found.append({"input_ids": encoded["input_ids"][number], "labels": labels})
    return found


def matthews(found: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation; 0 where everything is predicted to be of one class."""
    return float(np.nan_to_num(np.corrcoef(found, labels)[0, 1])) if len(set(found.tolist())) > 1 else 0.0


def entity_f1(found: np.ndarray, labels: np.ndarray) -> float:
    """F1 of the tokens of entities, each with its own tag."""
    hits = ((found == labels) & (labels > 0)).sum()
    return float(2 * hits / max((found > 0).sum() + (labels > 0).sum(), 1))


# One run --------------------------------------------------------------------------------------------------------------


def train(args: DefaultsArguments, run: Run, task: Task, tokenizer: Any, collate: Any) -> tuple[nn.Module, dict]:
    """Trains; the model, and what the log said."""
    transformers.set_seed(run.seed)
    model = new_model(run.model, task)
    flags = dict(flag.split("=") for flag in run.flags.split(",") if flag)
    if run.method == "stock":
        flags["adv_epsilon"] = "0"
    else:
        flags |= {"adv_method": run.method} | ({} if run.epsilon == "default" else {"adv_epsilon": run.epsilon})
    settings = {"output_dir": str(Path(args.output).parent / "trainer"), "seed": run.seed, "learning_rate": run.rate}
    settings |= {"num_train_epochs": 1, "per_device_train_batch_size": run.batch, "logging_steps": 0.1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    words = [word for name, value in (settings | GROUP_BY_LENGTH | flags).items() for word in (f"--{name}", str(value))]
    (training,) = HfArgumentParser(AdversarialTrainingArguments).parse_args_into_dataclasses(words)
    training.dataloader_pin_memory = False
    trainer = AdversarialTrainer(model=model, args=training, train_dataset=task.train, data_collator=collate)
    trainer.remove_callback(transformers.PrinterCallback)
    start = time.process_time()
    trainer.train()
    seconds = round(time.process_time() - start, 1)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    kept = ("loss", "adv_loss", "adv_epsilon", "adv_delta_norm", "adv_delta_ratio")
    shown = {name: [float(f"{line[name]:.4g}") for line in logs if name in line] for name in kept}
    return model, {"seconds": seconds, "warned": trainer._adv_run.figures.watch.said, **shown}


def new_model(name: str, task: Task) -> nn.Module:
    """The encoder with a new head."""
    transformers.logging.set_verbosity_error()
    of = AutoModelForTokenClassification if task.kind == "tags" else AutoModelForSequenceClassification
    folder = folder_of(name)
    if name != "random":
        named = {"id2label": dict(enumerate(task.tags))} if task.tags else {}
        return of.from_pretrained(folder, num_labels=task.outputs, **named)
    vocabulary = AutoConfig.from_pretrained(folder).vocab_size
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    return of.from_config(BertConfig(vocab_size=vocabulary, num_labels=task.outputs, **sizes))


def folder_of(model: str) -> str:
    """Where a model's files are; `random` has MiniLM's tokens."""
    return str(pretrained_model()) if model in ("minilm", "random") else model


def measure(args: DefaultsArguments, model: nn.Module, task: Task, collate: Any) -> dict[str, Any]:
    """Clean and robust figures, and whether the model says the same of everything."""
    model.eval()
    with torch.no_grad():
        clean = answers(model, batches(task.test, collate), lambda batch: model(**batch).logits)
    length = args.attack_length * unit_of("embedding", model)
    attack = PGD(epsilon=length, steps=10)
    attacked = batches(task.test[: args.attacked_samples], collate)
    robust = answers(model, attacked, lambda batch: attack_batch(model, batch, attack).outputs.logits)
    figures = {"clean": task.figure(*clean), "robust": task.figure(*robust)}
    return figures | {"length": length, "collapsed": collapsed(task, *clean)}


def batches(rows: list[dict[str, Any]], collate: Any) -> Iterator[dict[str, Tensor]]:
    """Rows of like length together."""
    rows = by_length(rows)
    return (collate(rows[i : i + 32]) for i in range(0, len(rows), 32))


def answers(model: nn.Module, data: Iterator[dict], logits_of: Callable[[dict], Tensor]) -> tuple[np.ndarray, ...]:
    """Predictions and labels, one a row or tagged word."""
    found, labels = [], []
    for batch in data:
        logits = logits_of(batch).detach()
        prediction = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        keep = batch["labels"] != -100
        found.append(prediction[keep].numpy())
        labels.append(batch["labels"][keep].numpy())
    return np.concatenate(found), np.concatenate(labels)


def collapsed(task: Task, found: np.ndarray, labels: np.ndarray) -> bool:
    """Whether the model says the same of everything."""
    if task.kind == "numbers":
        return bool(found.std() < 0.1 * labels.std())
    if task.kind == "tags":
        return not found.any()
    return bool(np.bincount(found.astype(int)).max() >= 0.98 * len(found))


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(lines: list[dict[str, Any]]) -> None:
    """One table a model, task, number of rows, batch size and learning rate: what each method does beside stock."""
    settings = ("model", "task", "rows", "batch", "rate")
    for setting in dict.fromkeys(tuple(line[name] for name in settings) for line in lines):
        own = [line for line in lines if tuple(line[name] for name in settings) == setting]
        stock = {line["seed"]: line for line in own if line["method"] == "stock"}
        print("\n" + ", ".join(f"{name} {value}" for name, value in zip(settings, setting, strict=True)))
        heads = ["method", "epsilon", "flags", "seeds", "clean", "robust", "collapsed", "warned", "time"]
        print(f"\n| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
        for kind in dict.fromkeys((line["method"], line["epsilon"], line["flags"]) for line in own):
            runs = [line for line in own if (line["method"], line["epsilon"], line["flags"]) == kind]
            time_over = [r["seconds"] / stock[r["seed"]]["seconds"] for r in runs if r["seed"] in stock]
            cells = [*kind, len(runs), *(spread([r[name] for r in runs]) for name in ("clean", "robust"))]
            cells += [sum(r[name] for r in runs) for name in ("collapsed", "warned")]
            cells.append(f"{statistics.median(time_over):.2f}" if time_over else "")
            print(f"| {' | '.join(map(str, cells))} |")
    said = [(line["collapsed"], line["warned"]) for line in lines if line["method"] != "stock"]
    counts = [said.count(kind) for kind in product((True, False), (True, False))]
    print(f"\nThe warning: {counts[0]} hits, {counts[1]} misses, {counts[2]} false alarms, {counts[3]} rightly silent.")


def spread(values: list[float]) -> str:
    """The mean in percent, and (smallest-largest) of several."""
    values = [100 * value for value in values]
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def known(path: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add(path: Path, line: dict[str, Any]) -> None:
    """One more line; prints what is short of it."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key not in ("loss", "report")}, flush=True)


def main() -> None:
    """All runs that are not there yet."""
    (args,) = HfArgumentParser(DefaultsArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    path = Path(args.output)
    if args.tables:
        return tables(known(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = product(
        args.seeds,
        args.models,
        args.tasks,
        args.rows,
        args.batches,
        args.rates,
        args.methods,
        args.epsilons,
        args.flags,
    )
    for seed, model, name, rows, batch, rate, method, epsilon, flags in grid:
        plain = method == "stock"
        kept = ",".join(flag for flag in flags.split(",") if not (plain and flag.startswith("adv_")))
        run = Run(model, name, rows, batch, rate, seed, method, "" if plain else epsilon, kept)
        if any(asdict(run).items() <= line.items() for line in known(path)):
            continue
        tokenizer = AutoTokenizer.from_pretrained(folder_of(model))
        task = load_task(args, name, rows, tokenizer)
        collate = (DataCollatorForTokenClassification if task.kind == "tags" else DataCollatorWithPadding)(tokenizer)
        trained, said = train(args, run, task, tokenizer, collate)
        line = asdict(run) | measure(args, trained, task, collate) | said
        if math.isnan(line["clean"]):
            line |= {"clean": 0.0, "collapsed": True}
        add(path, line)


if __name__ == "__main__":
    main()
