#!/usr/bin/env python
"""Token classification with `AdversarialTrainer`, from JSON lines with `tokens` and `ner_tags` (such as `B-person`).

Example: python run_ner.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/ner
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import DatasetDict, load_dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness import EPSILONS, print_robustness
from fgm_trainer.robustness.tasks import IGNORED, entities


@dataclass
class ScriptArguments:
    """Model, data and evaluation."""

    model_name_or_path: str = field(metadata={"help": "Folder or name of the pretrained model."})
    train_file: str = field(metadata={"help": "JSON lines: `tokens` and `ner_tags`, as many of one as of the other."})
    validation_file: str = field(metadata={"help": "The same, for evaluation."})
    max_seq_length: int = field(default=128, metadata={"help": "Longest input, in the model's tokens."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first of them only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first of them only."})
    eval_robustness: bool = field(default=False, metadata={"help": "Evaluate under attack."})
    robustness_attacks: str = field(default="quick", metadata={"help": "quick or strong."})
    robustness_epsilons: list[float] = field(default_factory=lambda: list(EPSILONS), metadata={"help": "Their sizes."})


def main() -> None:
    """Runs what the flags ask for."""
    script, args = HfArgumentParser((ScriptArguments, AdversarialTrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load(script)
    labels = sorted({tag for split in raw.values() for tags in split["ner_tags"] for tag in tags})
    # RoBERTa's kind takes words only with the space in front of them; other tokenizers ignore the flag.
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path, add_prefix_space=True)
    model = AutoModelForTokenClassification.from_pretrained(
        script.model_name_or_path,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    columns = raw["train"].column_names
    data = raw.map(encode, batched=True, remove_columns=columns, fn_kwargs={"args": (tokenizer, labels, script)})
    trainer = AdversarialTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: figures(prediction, labels),
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


def load(script: ScriptArguments) -> DatasetDict:
    """Both files, shortened as the flags ask for."""
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    for split, most in (("train", script.max_train_samples), ("validation", script.max_eval_samples)):
        raw[split] = raw[split].select(range(min(most or len(raw[split]), len(raw[split]))))
    return raw


def encode(rows: dict[str, Any], args: tuple[Any, list[str], ScriptArguments]) -> Any:
    """Words as tokens. A word's first token has its tag; the others have none."""
    tokenizer, labels, script = args
    found = tokenizer(rows["tokens"], is_split_into_words=True, truncation=True, max_length=script.max_seq_length)
    found["labels"] = []
    for i, tags in enumerate(rows["ner_tags"]):
        words = found.word_ids(i)
        first = [w is not None and w != before for before, w in zip([None, *words], words, strict=False)]
        found["labels"].append([labels.index(tags[w]) if f else IGNORED for w, f in zip(words, first, strict=True)])
    return found


def figures(prediction: Any, labels: list[str]) -> dict[str, float]:
    """Accuracy of tokens, F1 of entities."""
    predicted, true = prediction.predictions.argmax(-1), prediction.label_ids
    named = [
        [entities([labels[tag] for tag in row[of != IGNORED]]) for row, of in zip(rows, true, strict=True)]
        for rows in (predicted, true)
    ]
    hits, total = sum(len(a & b) for a, b in zip(*named, strict=True)), sum(len(e) for rows in named for e in rows)
    accuracy = float(np.mean((predicted == true)[true != IGNORED]))
    return {"token_accuracy": accuracy, "entity_f1": 2 * hits / total if total else 1.0}


if __name__ == "__main__":
    main()
