#!/usr/bin/env python
"""Adversarial fine-tuning on GLUE, or on own texts, with `AdversarialTrainer`.

Example: python run_glue.py --model_name_or_path bert-base-cased --task_name mrpc --do_train --do_eval
--adv_epsilon 1.0 --output_dir runs/mrpc
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

from glue_data import (
    DataTrainingArguments,
    ModelArguments,
    Prepared,
    load_model,
    load_splits,
    make_figures,
    need,
    parse,
    predictions_of,
    prepare,
    quiet_unless,
    splits_of,
    write_predictions,
)
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness import print_robustness


@dataclass
class OutputArguments:
    """A flag that transformers 5 took out of `TrainingArguments`."""

    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew in an output_dir with content."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs what the flags ask for. Returns all figures."""
    model_args, data_args, args, overwrite = parse_arguments(sys.argv[1:] if argv is None else argv)
    quiet_unless(args.process_index == 0)
    checkpoint = find_checkpoint(args, overwrite)
    set_seed(args.seed)
    with args.main_process_first(desc="loading and tokenising"):
        raw = load_splits(data_args, model_args)
        evaluated = splits_of(raw, "validation") if args.do_eval or data_args.eval_robustness else []
        predicted = splits_of(raw, "test") if args.do_predict else []
        splits = [need(raw, "--do_train", "train")] if args.do_train else []
        splits += [need(raw, "--do_eval", split) for split, _ in evaluated]
        splits += [need(raw, "--do_predict", split) for split, _ in predicted]
        multiple = 8 if args.fp16 or args.bf16 else None
        prepared = prepare(model_args, data_args, raw, splits, multiple)
    prepared.model = load_model(model_args, prepared.config)
    figures = make_figures(data_args.task_name, prepared.labels, model_args.cache_dir)
    trainer = make_trainer(args, prepared, figures)
    found: dict[str, float] = {}
    if args.do_train:
        found |= train(trainer, checkpoint)
    if args.do_eval:
        found |= evaluate(trainer, prepared, evaluated)
    if data_args.eval_robustness:
        found |= evaluate_robustness(trainer, prepared.splits[evaluated[0][0]], data_args)
    if args.do_predict:
        found |= predict(trainer, prepared, predicted, data_args.task_name)
    finish(trainer, model_args, data_args)
    return found


def parse_arguments(argv: list[str]) -> tuple[Any, Any, Any, bool]:
    """The flags of model, data and training; the last one says whether an output_dir with content may be used."""
    classes: list[Any] = [ModelArguments, DataTrainingArguments, AdversarialTrainingArguments]
    if not hasattr(TrainingArguments, "overwrite_output_dir"):
        classes.append(OutputArguments)
    parsed = parse(HfArgumentParser(classes, description=__doc__), argv)
    model_args, data_args, args = parsed[:3]
    if args.output_dir is None:
        raise SystemExit("--output_dir is missing: pass the folder for the model and the figures.")
    return model_args, data_args, args, parsed[-1].overwrite_output_dir


def find_checkpoint(args: AdversarialTrainingArguments, overwrite: bool) -> str | None:
    """Where training goes on: the checkpoint asked for, else the last one in output_dir, unless that is overwritten."""
    if args.resume_from_checkpoint is not None and not os.path.isdir(args.resume_from_checkpoint):
        raise SystemExit(f"--resume_from_checkpoint: there is no folder {args.resume_from_checkpoint!r}.")
    if args.resume_from_checkpoint or not args.do_train or not os.path.isdir(args.output_dir):
        return args.resume_from_checkpoint
    if overwrite:
        # Trainer adds to the figures of an earlier run; they would pass for this one's.
        stale = os.path.join(args.output_dir, "all_results.json")
        if args.process_index == 0 and os.path.exists(stale):
            os.remove(stale)
        return None
    last = get_last_checkpoint(args.output_dir)
    if last is None and os.listdir(args.output_dir):
        raise SystemExit(f"The output_dir {args.output_dir!r} is not empty: pass another, or --overwrite_output_dir.")
    if last is not None:
        print(f"Going on from {last}; --overwrite_output_dir or another --output_dir starts anew.", flush=True)
    return last


def make_trainer(args: AdversarialTrainingArguments, prepared: Prepared, figures: Any) -> AdversarialTrainer:
    """The trainer, its figures computed from logits."""
    validation = "validation_matched" if "validation_matched" in prepared.splits else "validation"
    return AdversarialTrainer(
        model=prepared.model,
        args=args,
        train_dataset=prepared.splits.get("train"),
        eval_dataset=prepared.splits.get(validation),
        compute_metrics=lambda p: figures(predictions_of(p.predictions, prepared.labels), p.label_ids),
        processing_class=prepared.tokenizer,
        data_collator=prepared.collator,
    )


def train(trainer: AdversarialTrainer, checkpoint: str | None) -> dict[str, float]:
    """Trains and saves the model, the figures and the trainer's state."""
    result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()
    figures = result.metrics | {"train_samples": len(trainer.train_dataset)}
    return record(trainer, "train", figures)


def evaluate(trainer: AdversarialTrainer, prepared: Prepared, splits: list[tuple[str, str]]) -> dict[str, float]:
    """The task's figures on each validation split."""
    figures: dict[str, float] = {}
    for split, suffix in splits:
        dataset = prepared.splits[split]
        found = trainer.evaluate(eval_dataset=dataset) | {"eval_samples": len(dataset)}
        figures |= {name + suffix: value for name, value in found.items()}
    return record(trainer, "eval", figures)


def evaluate_robustness(
    trainer: AdversarialTrainer, dataset: Any, data_args: DataTrainingArguments
) -> dict[str, float]:
    """Figures under attack."""
    attacks, epsilons = data_args.robustness_attacks, data_args.robustness_epsilons
    report = trainer.evaluate_robustness(dataset, attacks=attacks, epsilons=epsilons)
    if trainer.is_world_process_zero():
        print_robustness(report)
    return record(trainer, "robust", report.metrics() | {"robust_samples": report.examples})


def predict(
    trainer: AdversarialTrainer, prepared: Prepared, splits: list[tuple[str, str]], task: str | None
) -> dict[str, float]:
    """Writes a tsv of predictions a test split; where the split has labels, its figures too."""
    figures: dict[str, float] = {}
    for split, suffix in splits:
        result = trainer.predict(prepared.splits[split], metric_key_prefix="predict")
        figures |= {name + suffix: value for name, value in (result.metrics or {}).items()}
        name = "_".join(filter(None, ("predict_results", task))) + suffix.replace("_", "-")
        if trainer.is_world_process_zero():
            path = os.path.join(str(trainer.args.output_dir), f"{name}.tsv")
            write_predictions(path, predictions_of(result.predictions, prepared.labels), prepared.labels)
    return record(trainer, "predict", figures)


def record(trainer: AdversarialTrainer, kind: str, figures: dict[str, float]) -> dict[str, float]:
    """Shows the figures and adds them to all_results.json."""
    trainer.log_metrics(kind, figures)
    trainer.save_metrics(kind, figures)
    return figures


def finish(trainer: AdversarialTrainer, model_args: ModelArguments, data_args: DataTrainingArguments) -> None:
    """The model card, which names the attack; with --push_to_hub, the upload."""
    card: dict[str, Any] = {"tasks": "text-classification"}
    # A folder of this machine is nothing to name in a card.
    if not os.path.isdir(model_args.model_name_or_path):
        card["finetuned_from"] = model_args.model_name_or_path
    if data_args.task_name is not None:
        card |= {"language": "en", "dataset_tags": "glue", "dataset_args": data_args.task_name}
        card["dataset"] = f"GLUE {data_args.task_name.upper()}"
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)


if __name__ == "__main__":
    main()
