"""One encoder trained plainly and adversarially on the same reviews, and both attacked: a table and a picture.

`make demo` runs it. docs/demo.md says what its settings are and what three seeds of it gave.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import transformers
from machine import versions
from reviews import FetchError, Review, Reviews, load_reviews, pretrained_model
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness import (
    RobustnessReport,
    TextReport,
    attack_texts,
    compare,
    evaluate_robustness,
    plot_robustness,
)
from fgm_trainer.robustness.report import wilson

MODELS = ("plain", "adversarial")
SENTIMENTS = ("negative", "positive")
SETS = {"movies": "movie snippets", "amazon": "Amazon snippets"}

# Batches of like length have little padding, which costs as much as text. transformers 5 renamed the flag.
_FLAGS = {f.name for f in fields(TrainingArguments)}
GROUP_BY_LENGTH: dict[str, Any] = (
    {"group_by_length": True} if "group_by_length" in _FLAGS else {"train_sampling_strategy": "group_by_length"}
)


@dataclass(frozen=True)
class Measured:
    """One model on one test set.

    Args:
        clean: accuracy without attack, on `clean_examples` of them: passes without gradient are cheap.
        clean_examples: how many those are.
        report: clean and attacked, on the first of the same snippets.
    """

    clean: float
    clean_examples: int
    report: RobustnessReport


Run = dict[str, dict[str, Measured]]
"""What one seed gave: by test set, then by model."""


@dataclass(frozen=True)
class Changed:
    """What changed letters do to both models, which embeddings say nothing of.

    Args:
        under: by model, the report of an attack on the first held-out movie snippets.
        answers: by model, its answer to the first text that fools the plain one, that of `under["plain"]`; None where
            no text does.
    """

    under: dict[str, TextReport]
    answers: dict[str, int] | None


@dataclass
class DemoArguments:
    """What the demo lets one choose."""

    adv_epsilon: str = field(default="auto", metadata={"help": "Size of the perturbation in training, or `auto`."})
    adv_scope: str = field(default="example", metadata={"help": "`vocabulary`, `example` or `token`."})
    adv_warmup: float = field(default=0.5, metadata={"help": "Fraction of training over which the attack grows."})
    seed: int = field(default=0, metadata={"help": "Seed of the new head, the order of the data and the dropout."})
    seeds: list[int] | None = field(default=None, metadata={"help": "Several seeds: prints mean and spread."})
    train_samples: int = field(default=3000, metadata={"help": "Movie snippets to train on."})
    test_sets: list[str] = field(
        default_factory=lambda: ["movies"],
        metadata={"help": "What to test on; `amazon` is another domain than in training.", "choices": list(SETS)},
    )
    test_samples: int = field(default=200, metadata={"help": "Snippets of each test set to attack."})
    text_samples: int = field(default=20, metadata={"help": "Movie snippets whose letters are changed; 0 for none."})
    clean_samples: int = field(default=1000, metadata={"help": "Snippets of each test set without attack."})
    test_epsilons: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.4], metadata={"help": "Lengths of the attack in the evaluation."}
    )
    test_attacks: str = field(
        default="quick", metadata={"help": "`quick`, or `strong`, which takes hours.", "choices": ["quick", "strong"]}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate, for both models."})
    batch_size: int = field(default=16, metadata={"help": "Snippets a training step."})
    output_dir: str = field(default="runs/demo", metadata={"help": "Where table, picture and figures go."})


def main(arguments: Sequence[str] | None = None) -> None:
    """The whole demo."""
    (args,) = HfArgumentParser(DemoArguments).parse_args_into_dataclasses(arguments)
    start = time.perf_counter()
    folder, reviews = pretrained_model(), load_reviews()
    models = {seed: train_models(args, seed, folder, reviews) for seed in args.seeds or [args.seed]}
    runs = {seed: measure_all(args, seed, both, folder, reviews) for seed, both in models.items()}
    changed = change_letters(args, next(iter(models.values())), folder, reviews) if args.text_samples else None
    write_results(args, runs, changed, time.perf_counter() - start)


# One seed -------------------------------------------------------------------------------------------------------------


def train_models(args: DemoArguments, seed: int, folder: Path, reviews: Reviews) -> dict[str, torch.nn.Module]:
    """Both models, from the same start on the same batches."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = encode(tokenizer, reviews.train[: args.train_samples])
    found = {}
    for name, epsilon in zip(MODELS, ("0", args.adv_epsilon), strict=True):
        print(f"\nSeed {seed}, {name}: training on {len(train)} movie snippets", flush=True)
        found[name] = train_model(args, seed, epsilon, folder, train, DataCollatorWithPadding(tokenizer))
    return found


def measure_all(
    args: DemoArguments, seed: int, models: dict[str, torch.nn.Module], folder: Path, reviews: Reviews
) -> Run:
    """Both models on the same snippets."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    run: Run = {name: {} for name in args.test_sets}
    for test in args.test_sets:
        examples = encode(tokenizer, getattr(reviews, test))
        for name, model in models.items():
            print(f"Seed {seed}, {name}: under attack on {SETS[test]}", flush=True)
            run[test][name] = measure(args, seed, model, examples, DataCollatorWithPadding(tokenizer))
    return run


def change_letters(args: DemoArguments, models: dict[str, torch.nn.Module], folder: Path, reviews: Reviews) -> Changed:
    """Both models where letters are changed, each by an attack of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, labels = zip(*reviews.movies[: args.text_samples], strict=True)
    print("\nChanging letters", flush=True)
    under = {name: attack_texts(model, tokenizer, texts, labels, budget=200) for name, model in models.items()}
    fooled = next((each.attacked for each in under["plain"].results if each.fooled), None)
    if fooled is None:
        return Changed(under, None)
    (row,) = encode(tokenizer, [Review(fooled, 0)])
    batch = DataCollatorWithPadding(tokenizer)([row])
    batch.pop("labels")
    with torch.no_grad():
        answers = {name: int(m.eval()(**batch.to(m.device)).logits.argmax()) for name, m in models.items()}
    return Changed(under, answers)


def measure(
    args: DemoArguments, seed: int, model: torch.nn.Module, examples: list[dict[str, Any]], collate: Any
) -> Measured:
    """Accuracy without attack on many snippets, and with every attack on the first of them."""
    many, few = (by_length(examples[:n]) for n in (args.clean_samples, args.test_samples))
    clean = evaluate_robustness(model, many, epsilons=[0.0], collate_fn=collate, progress=False).clean
    report = evaluate_robustness(model, few, args.test_attacks, args.test_epsilons, collate_fn=collate, seed=seed)
    return Measured(clean, len(many), report)


def train_model(
    args: DemoArguments, seed: int, epsilon: str, folder: Path, train: list[dict[str, Any]], collate: Any
) -> torch.nn.Module:
    """One epoch. Epsilon 0 is the stock Trainer, so nothing else differs between the two models."""
    training = AdversarialTrainingArguments(
        output_dir=str(Path(args.output_dir) / "trainer"),
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=0.1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
        adv_epsilon=epsilon,
        adv_scope=args.adv_scope,
        adv_warmup=args.adv_warmup,
        **GROUP_BY_LENGTH,
    )
    trainer = AdversarialTrainer(
        model=new_model(folder, seed), args=training, train_dataset=train, data_collator=collate
    )
    trainer.train()
    assert isinstance(trainer.model, torch.nn.Module)
    return trainer.model


def new_model(folder: Path, seed: int) -> torch.nn.Module:
    """The pretrained encoder with a new head, the same for the same seed."""
    set_seed(seed)
    # Loading reports that the head is new, which it is meant to be.
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    finally:
        transformers.logging.set_verbosity(level)


def encode(tokenizer: Any, reviews: list[Review]) -> list[dict[str, Any]]:
    """Token ids and labels, one dictionary a snippet. Of movie snippets the longest has 79 tokens."""
    ids = tokenizer([r.text for r in reviews], truncation=True, max_length=128)["input_ids"]
    return [{"input_ids": i, "labels": r.label} for i, r in zip(ids, reviews, strict=True)]


def by_length(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same examples, the shortest first: a batch is padded to its longest, and padding costs as much as text."""
    return sorted(examples, key=lambda e: len(e["input_ids"]))


# What comes out -------------------------------------------------------------------------------------------------------


def write_results(args: DemoArguments, runs: dict[int, Run], changed: Changed | None, seconds: float) -> None:
    """Prints the table; writes it, the picture and all figures into the output folder."""
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo_results.json").write_text(json.dumps(results(args, runs, changed, seconds), indent=2) + "\n")
    seed, test = next(iter(runs)), args.test_sets[0]
    curves = {model: measured.report for model, measured in _first_set(runs).items()}
    title = f"all-MiniLM-L6-v2, held-out {SETS[test]}, seed {seed}"
    plot_robustness(curves, folder / "robustness.png", title, attack=list(curves["plain"].scores)[-1])
    with (folder / "table.md").open("w", encoding="utf-8") as file:
        Console(file=file, width=200).print(table(runs, box.MARKDOWN))
    console = Console()
    # Where there is no terminal it takes 80 columns, and the table has more.
    console.width = max(console.width, 112)
    console.print(table(runs), note(args, runs), sep="\n")
    if changed is not None:
        console.print(letters(changed))
    console.print(f"{seconds:.0f} seconds in all. Written:")
    for name in ("table.md", "robustness.png", "demo_results.json"):
        console.print(f"  {folder / name}")


def table(runs: dict[int, Run], style: box.Box = box.SIMPLE_HEAD) -> Table:
    """Accuracy in percent: a row for every attack and epsilon, a column for every test set and model."""
    grid = Table(box=style)
    grid.add_column("attack")
    grid.add_column("epsilon", justify="right")
    sets = next(iter(runs.values()))
    for test in sets:
        for model in MODELS:
            grid.add_column(f"{test}: {model}", justify="right", min_width=len("(82.7-83.9)"))
    for row in rows(runs):
        cells = [cell([run[test][model] for run in runs.values()], row) for test in sets for model in MODELS]
        grid.add_row(*row, *cells)
    return grid


def rows(runs: dict[int, Run]) -> list[tuple[str, str]]:
    """What stands at the head of every row: attack and epsilon."""
    return list(scores(_first_set(runs)["plain"]))


def _first_set(runs: dict[int, Run]) -> dict[str, Measured]:
    """Both models of the first seed on the first test set."""
    return next(iter(next(iter(runs.values())).values()))


def scores(measured: Measured) -> dict[tuple[str, str], float]:
    """Every accuracy by (attack, epsilon)."""
    report = measured.report
    clean = {
        (f"clean ({measured.clean_examples})", ""): measured.clean,
        (f"clean ({report.examples})", ""): report.clean,
    }
    return clean | {
        (attack, f"{epsilon:g}"): score
        for attack, row in report.scores.items()
        for epsilon, score in zip(report.epsilons, row, strict=True)
    }


def cell(measured: list[Measured], row: tuple[str, str]) -> str:
    """The mean in percent; of one seed with its 95 % interval, of several with the smallest and the largest."""
    values = [scores(each)[row] for each in measured]
    low, high = min(values), max(values)
    if len(values) == 1:
        of_many = row[0] == f"clean ({measured[0].clean_examples})"
        low, high = wilson(values[0], measured[0].clean_examples if of_many else measured[0].report.examples)
    return f"{100 * mean(values):.1f} ({100 * low:.1f}-{100 * high:.1f})"


def note(args: DemoArguments, runs: dict[int, Run]) -> str:
    """What one has to know to read the table."""
    measured = _first_set(runs)["plain"]
    spread = "the smallest and the largest over seeds" if len(runs) > 1 else "its 95 % interval, seed"
    return (
        f"Accuracy in percent and, in brackets, {spread} {', '.join(map(str, runs))}; "
        f"{measured.report.examples} snippets under attack.\n"
        "Epsilon is the L2 length of the perturbation of a snippet's embeddings; noise is a random direction of that "
        f"length.\nAdversarial: FGM, scope {args.adv_scope}, epsilon {args.adv_epsilon}, warm-up "
        f"{args.adv_warmup:g}.\n{differences(runs)}"
    )


def differences(runs: dict[int, Run]) -> str:
    """How the two models differ under the last attack, on the same snippets of the first seed: a line an epsilon."""
    seed, both = next(iter(runs)), _first_set(runs)
    plain, adversarial = (both[model].report for model in MODELS)
    name = list(plain.scores)[-1]
    return "".join(
        f"Under {name} of {each.epsilon:g}, seed {seed}: {100 * each.difference:+.1f} points (95 % interval "
        f"{100 * each.interval[0]:+.1f} to {100 * each.interval[1]:+.1f}, McNemar's p = {each.p_value:.2g}).\n"
        for each in compare(plain, adversarial)
        if each.attack == name
    )


def letters(changed: Changed) -> Text:
    """Accuracies with changed letters, and the first text that fools the plain model, its changes in bold."""
    under = {name: report.accuracy_under_attack for name, report in changed.under.items()}
    plain = changed.under["plain"]
    text = Text(
        f"With changed letters (attack_texts, {len(plain.results)} movie snippets): "
        + ", ".join(f"{name} {100 * accuracy:.0f} %" for name, accuracy in under.items())
        + ".\n"
    )
    if changed.answers is None:
        return text
    first = next(each for each in plain.results if each.fooled)
    for word, before in zip_longest(first.attacked.split(" "), first.text.split(" "), fillvalue=""):
        text.append(f"{word} ", "bold red" if word != before else "italic")
    said = ", ".join(f"{name} {SENTIMENTS[answer]}" for name, answer in changed.answers.items())
    return text.append(f"\n({SENTIMENTS[first.label]}; {said}; it was changed to fool the plain model)")


def results(args: DemoArguments, runs: dict[int, Run], changed: Changed | None, seconds: float) -> dict[str, Any]:
    """Settings, versions, seconds and every figure, as plain data."""
    return {
        "settings": asdict(args),
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "letters": None if changed is None else asdict(changed),
        "seeds": {
            str(seed): {test: {model: asdict(m) for model, m in models.items()} for test, models in run.items()}
            for seed, run in runs.items()
        },
    }


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"demo: {error}")
