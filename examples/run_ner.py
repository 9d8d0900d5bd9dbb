#!/usr/bin/env python
"""Token classification with `AdversarialTrainer`, from JSON lines with `tokens` and `ner_tags` (such as `B-person`).

Example: python run_ner.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/ner
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from json_lines import FileArguments, load, train_and_evaluate
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    HfArgumentParser,
    set_seed,
)

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.robustness.tasks import IGNORED, Tags


@dataclass
class ScriptArguments(FileArguments):
    """Model, data and evaluation."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Folder or name of the pretrained model."})
    max_seq_length: int = field(default=128, metadata={"help": "Longest input, in the model's tokens."})


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
    train_and_evaluate(trainer, script)


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
    """Accuracy of texts and of tokens, F1 of entities: those of the evaluation under attack."""
    task, batch = Tags(dict(enumerate(labels))), {"labels": torch.as_tensor(prediction.label_ids)}
    outcome = task.judge({"logits": torch.as_tensor(prediction.predictions)}, batch)
    return task.figures([outcome], [batch["labels"]])


if __name__ == "__main__":
    main()
