#!/usr/bin/env python
"""Extractive question answering with `AdversarialTrainer`, from JSON lines with the columns of SQuAD 1.1.

Figures are of windows that hold an answer, and compare positions of tokens: the right words elsewhere count as wrong.

Example: python run_qa.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/qa
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness import EPSILONS, print_robustness


@dataclass
class ScriptArguments:
    """Model, data and evaluation."""

    model_name_or_path: str = field(metadata={"help": "Folder or name of the pretrained model."})
    train_file: str = field(metadata={"help": "JSON lines: `question`, `context`, `answers` (`text`, `answer_start`)."})
    validation_file: str = field(metadata={"help": "The same, for evaluation."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window: question and context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that a window has in common with the next."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first questions only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first questions only."})
    eval_robustness: bool = field(default=False, metadata={"help": "Evaluate under attack."})
    robustness_attacks: str = field(default="quick", metadata={"help": "quick or strong."})
    robustness_epsilons: list[float] = field(default_factory=lambda: list(EPSILONS), metadata={"help": "Their sizes."})


def main() -> None:
    """Runs what the flags ask for."""
    script, args = HfArgumentParser((ScriptArguments, AdversarialTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    for split, most in (("train", script.max_train_samples), ("validation", script.max_eval_samples)):
        raw[split] = raw[split].select(range(min(most or len(raw[split]), len(raw[split]))))
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    columns = raw["train"].column_names
    data = raw.map(windows, batched=True, remove_columns=columns, fn_kwargs={"tokenizer": tokenizer, "script": script})
    trainer = AdversarialTrainer(
        model=AutoModelForQuestionAnswering.from_pretrained(script.model_name_or_path),
        args=args,
        train_dataset=data["train"],
        # Windows without the answer are trained on, as for SQuAD, but they would flatter the figures.
        eval_dataset=data["validation"].filter(lambda window: window["start_positions"] > 0),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=figures,
    )
    if args.do_train:
        trainer.save_metrics("train", trainer.train().metrics)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if script.eval_robustness:
        report = trainer.evaluate_robustness(attacks=script.robustness_attacks, epsilons=script.robustness_epsilons)
        print_robustness(report)
        trainer.save_metrics("robust", report.metrics())


def windows(rows: dict[str, Any], tokenizer: Any, script: ScriptArguments) -> Any:
    """Windows of a context with its question, and where the answer starts and ends; 0 and 0 without an answer."""
    found = tokenizer(
        [question.strip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=script.max_seq_length,
        stride=script.doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    sources, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
    spans = []
    for i, source in enumerate(sources):
        answers = rows["answers"][source]
        first = answers["answer_start"][0]
        last = first + len(answers["text"][0])
        # Tokens of the context that overlap the answer, and whether the window holds all of it.
        context = [t for t, part in enumerate(found.sequence_ids(i)) if part == 1]
        inside = [t for t in context if offsets[i][t][0] < last and offsets[i][t][1] > first]
        whole = inside and offsets[i][context[0]][0] <= first and offsets[i][context[-1]][1] >= last
        spans.append((inside[0], inside[-1]) if whole else (0, 0))
    found["start_positions"], found["end_positions"] = (list(each) for each in zip(*spans, strict=True))
    return found


def figures(prediction: Any) -> dict[str, float]:
    """Exact match and F1 of tokens, of the best span of each window."""
    exact, f1 = [], []
    for start, end, *true in zip(*prediction.predictions, *prediction.label_ids, strict=True):
        scores = start[:, None] + end[None, :]
        best = np.unravel_index(np.where(np.tri(len(start), k=-1), -np.inf, scores).argmax(), scores.shape)
        shared = max(0, min(best[1], true[1]) - max(best[0], true[0]) + 1)
        exact.append(tuple(best) == tuple(true))
        f1.append(2 * shared / (best[1] - best[0] + true[1] - true[0] + 2))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1))}


if __name__ == "__main__":
    main()
