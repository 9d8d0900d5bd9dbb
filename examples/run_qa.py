#!/usr/bin/env python
"""Extractive question answering with `AdversarialTrainer`, from JSON lines with the columns of SQuAD 1.1.

Figures are of windows that hold an answer, and compare positions of tokens: the right words elsewhere count as wrong.

Example: python run_qa.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/qa
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from json_lines import FileArguments, load, train_and_evaluate
from transformers import (
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness.tasks import Spans


@dataclass
class ScriptArguments(FileArguments):
    """Model, data and evaluation."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Folder or name of the pretrained model."})
    max_seq_length: int = field(default=384, metadata={"help": "Tokens of a window: question and context."})
    doc_stride: int = field(default=128, metadata={"help": "Tokens that a window has in common with the next."})


def main() -> None:
    """Runs what the flags ask for."""
    script, args = HfArgumentParser((ScriptArguments, AdversarialTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load(script)
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
    train_and_evaluate(trainer, script)


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
    """Exact match and F1 of tokens of the best span of each window: those of the evaluation under attack."""
    names = ("start_logits", "end_logits"), ("start_positions", "end_positions")
    values = (prediction.predictions, prediction.label_ids)
    outputs, batch = (
        {name: torch.as_tensor(each) for name, each in zip(of, given, strict=True)}
        for of, given in zip(names, values, strict=True)
    )
    task = Spans()
    return task.figures([task.judge(outputs, batch)], [task.labels(batch)])


if __name__ == "__main__":
    main()
