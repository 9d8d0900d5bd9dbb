"""What the scripts of single tasks share: files of JSON lines, and what a run does with its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from datasets import DatasetDict, load_dataset

from fgm_trainer.robustness import EPSILONS, print_robustness


@dataclass
class FileArguments:
    """Data and evaluation."""

    train_file: str = field(metadata={"help": "JSON lines to train on."})
    validation_file: str = field(metadata={"help": "JSON lines to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first of them only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first of them only."})
    eval_robustness: bool = field(default=False, metadata={"help": "Evaluate under attack."})
    robustness_attacks: str = field(default="quick", metadata={"help": "quick or strong."})
    robustness_epsilons: list[float] = field(default_factory=lambda: list(EPSILONS), metadata={"help": "Their sizes."})


def load(files: FileArguments) -> DatasetDict:
    """Both files, shortened as the flags ask for."""
    raw = load_dataset("json", data_files={"train": files.train_file, "validation": files.validation_file})
    for split, most in (("train", files.max_train_samples), ("validation", files.max_eval_samples)):
        raw[split] = raw[split].select(range(min(most or len(raw[split]), len(raw[split]))))
    return raw


def train_and_evaluate(trainer: Any, files: FileArguments, attacked: Any = None) -> None:
    """What --do_train, --do_eval and --eval_robustness ask for; all figures go to all_results.json.

    Args:
        trainer: the trainer.
        files: the flags.
        attacked: the data of the evaluation under attack; None for the trainer's own.
    """
    if trainer.args.do_train:
        trainer.save_metrics("train", trainer.train().metrics)
        trainer.save_model()
        trainer.save_state()
    if trainer.args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if files.eval_robustness:
        settings = {"attacks": files.robustness_attacks, "epsilons": files.robustness_epsilons}
        report = trainer.evaluate_robustness(attacked, **settings)
        print_robustness(report)
        trainer.save_metrics("robust", report.metrics())
