"""Does adversarial training make a model more robust? Strong attacks, changed words, another domain, calibration, cost.

    .venv/bin/python benchmarks/study.py --tasks movies_sst2 --methods stock fgm --seeds 0 1 --data DATA
    .venv/bin/python benchmarks/study.py --tables

Models, tasks and training are those of `defaults.py`; every method has its defaults. Every run is one JSON line, and is
not made again. Epsilons are in units of the mean norm of a token's embedding.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorForTokenClassification, DataCollatorWithPadding, HfArgumentParser

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from defaults import DefaultsArguments, Run, Task, add, answers, batches, encode, known, load_task, train
from demo import by_length
from reviews import load_reviews, pretrained_model

from fgm_trainer.attacks import PGD
from fgm_trainer.robustness import (
    NearestTokens,
    RobustnessReport,
    attack_texts,
    characters,
    compare,
    evaluate_robustness,
    smallest_epsilons,
    strong,
)

EPSILONS = (0.1, 0.2)


@dataclass
class StudyArguments:
    """A grid of runs, and how much each is tested."""

    output: str = field(default="runs/study.jsonl", metadata={"help": "Where the lines go; those there are kept."})
    data: str = field(default="../shared/data", metadata={"help": "The folder of the tasks."})
    tasks: list[str] = field(default_factory=lambda: ["movies_sst2"], metadata={"help": "As in defaults.py."})
    methods: list[str] = field(default_factory=lambda: ["stock", "fgm"], metadata={"help": "`stock` and methods."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of head, order, dropout and attack."})
    rows: int = field(default=3000, metadata={"help": "Rows to train on, one epoch."})
    rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    clean_samples: int = field(default=872, metadata={"help": "Held-out rows without attack."})
    attacked_samples: int = field(default=128, metadata={"help": "Rows under attack."})
    steps: int = field(default=20, metadata={"help": "Of the strong attack; 50 is the package's."})
    restarts: int = field(default=1, metadata={"help": "Of the strong attack; 2 is the package's."})
    texts: int = field(default=100, metadata={"help": "Texts whose words are changed; 0 for none."})
    tables: bool = field(default=False, metadata={"help": "Print the tables of the lines that are there, no more."})


def measure(args: StudyArguments, model: Any, task: Task, tokenizer: Any, collate: Any) -> dict[str, Any]:
    """All figures of a trained model."""
    model.eval()
    own = {"collate_fn": collate, "epsilon_unit": "embedding", "progress": False}
    rows = by_length(task.test[: args.attacked_samples])
    report = evaluate_robustness(model, rows, strong(args.steps, args.restarts), EPSILONS, **own)
    found: dict[str, Any] = {"report": report.to_dict(), "further": report.further}
    found["clean"] = task.figure(*answers(model, batches(task.test, collate), lambda batch: model(**batch).logits))
    if task.kind == "classes":
        found["radius"] = smallest_epsilons(model, rows, PGD(steps=10), largest=1.0, halvings=6, **own).median
        found["ece"] = calibration_error(model, task, collate)
        texts = [row["sentence"] for row in task.raw[: args.texts] if "sentence" in row]
        labels = [row["labels"] for row in task.test[: len(texts)]]
        kinds = {"characters": characters, "words": NearestTokens(model, tokenizer)} if texts else {}
        for name, candidates in kinds.items():
            under = attack_texts(model, tokenizer, texts, labels, candidates, max_length=64, progress=False)
            found |= under.metrics(name)
    return found


def calibration_error(model: Any, task: Task, collate: Any, bins: int = 10) -> float:
    """The expected calibration error (Guo et al. 2017): how far confidence is from accuracy, over bins of like size."""
    sure, right = [], []
    for batch in batches(task.test, collate):
        with torch.no_grad():
            confidence, prediction = model(**batch).logits.softmax(-1).max(-1)
        sure += confidence.tolist()
        right += (prediction == batch["labels"]).tolist()
    order = np.argsort(sure)
    parts = np.array_split(np.stack([sure, right])[:, order], bins, axis=1)
    return float(sum(part.shape[1] * abs(part[0].mean() - part[1].mean()) for part in parts) / len(sure))


def other_domain(model: Any, tokenizer: Any, collate: Any) -> float:
    """Accuracy on snippets of product reviews."""
    rows = encode(tokenizer, [{"sentence": each.text, "label": each.label} for each in load_reviews().amazon])
    found, labels = answers(model, batches(rows, collate), lambda batch: model(**batch).logits)
    return float((found == labels).mean())


def line_of(args: StudyArguments, name: str, method: str, seed: int, tokenizer: Any) -> dict[str, Any]:
    """One run."""
    of_training = DefaultsArguments(output=args.output, data=args.data, clean_samples=args.clean_samples)
    run = Run("minilm", name, args.rows, 16, args.rate, seed, method, "" if method == "stock" else "default")
    task = load_task(of_training, name, args.rows, tokenizer)
    collate = (DataCollatorForTokenClassification if task.kind == "tags" else DataCollatorWithPadding)(tokenizer)
    model, said = train(of_training, run, task, tokenizer, collate)
    line = asdict(run) | {"seconds": said["seconds"], "adv_epsilon": said["adv_epsilon"][-1:]}
    line |= measure(args, model, task, tokenizer, collate)
    return line | ({"other_domain": other_domain(model, tokenizer, collate)} if name.startswith("movies") else {})


# Tables ---------------------------------------------------------------------------------------------------------------


def tables(lines: list[dict[str, Any]]) -> None:
    """One table a task: means over seeds, and the paired difference from stock."""
    for name in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == name]
        stock = {line["seed"]: line for line in own if line["method"] == "stock"}
        columns = {"clean": lambda line: line["clean"]}
        for attack in ("pgd-10", "strong"):
            for i, epsilon in enumerate(EPSILONS):
                columns[f"{attack} {epsilon}"] = lambda line, a=attack, i=i: line["report"]["scores"][a][i]
        for key in own[0]["further"]:
            columns[f"{key}, strong 0.2"] = lambda line, key=key: line["further"][key]["strong"][1]
        for key in ("characters_accuracy_under_attack", "words_accuracy_under_attack", "other_domain", "ece"):
            if all(key in line for line in own):
                columns[key.replace("_", " ")] = lambda line, key=key: line[key]
        print(f"\n{name}, {own[0]['rows']} rows, learning rate {own[0]['rate']}\n")
        heads = ["method", "seeds", *columns, "median radius", "time"]
        print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
        for method in dict.fromkeys(line["method"] for line in own):
            runs = [line for line in own if line["method"] == method]
            cells = [f"{100 * np.mean([of(line) for line in runs]):.1f}" for of in columns.values()]
            radius = f"{np.mean([line['radius'] for line in runs]):.3f}" if "radius" in runs[0] else ""
            over = [line["seconds"] / stock[line["seed"]]["seconds"] for line in runs if line["seed"] in stock]
            print(f"| {method} | {len(runs)} | {' | '.join(cells)} | {radius} | {np.median(over):.2f} |")
        for line in own:
            if line["method"] != "stock" and line["seed"] in stock and line["report"]["fell"]:
                found = compare(report_of(stock[line["seed"]]), report_of(line))
                for each in [each for each in found if each.attack in ("clean", "strong")]:
                    low, middle, high = (100 * x for x in (each.interval[0], each.difference, each.interval[1]))
                    where = f"{line['method']}, seed {line['seed']}, {each.attack} {each.epsilon}"
                    print(f"{where}: {middle:+.1f} ({low:+.1f} to {high:+.1f}), p {each.p_value:.3g}")
        signs = [(line["method"], sign) for line in own for sign in line["report"]["masking"]]
        print(*(f"Masked gradients? {method}: {sign}" for method, sign in signs), sep="\n")


def report_of(line: dict[str, Any]) -> RobustnessReport:
    """The report of a line, from JSON."""
    given = dict(line["report"])
    for name in ("epsilons", "labels", "predictions", "masking"):
        given[name] = tuple(given[name])
    return RobustnessReport(**given)


def main() -> None:
    """All runs that are not there yet."""
    (args,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
    torch.set_num_threads(1)
    path = Path(args.output)
    if args.tables:
        return tables(known(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(pretrained_model())
    for name, seed, method in product(args.tasks, args.seeds, args.methods):
        sought = {"task": name, "seed": seed, "method": method, "rows": args.rows, "rate": args.rate}
        if not any(sought.items() <= line.items() for line in known(path)):
            add(path, line_of(args, name, method, seed, tokenizer))


if __name__ == "__main__":
    main()
