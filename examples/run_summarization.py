#!/usr/bin/env python
"""Summarization with `AdversarialSeq2SeqTrainer`, from JSON lines with a text and its summary; the encoder is attacked.

Example: python run_summarization.py --model_name_or_path MODEL --train_file train.jsonl
--validation_file validation.jsonl --adv_epsilon auto --do_train --do_eval --eval_robustness --predict_with_generate
--output_dir runs/summarization
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from json_lines import FileArguments, load, train_and_evaluate
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, set_seed

from fgm_trainer import AdversarialSeq2SeqTrainer, AdversarialSeq2SeqTrainingArguments


@dataclass
class ScriptArguments(FileArguments):
    """Model, data and evaluation."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Folder or name of the pretrained model."})
    text_column: str = field(default="text", metadata={"help": "The column of what is summarized."})
    summary_column: str = field(default="summary", metadata={"help": "The column of the summary."})
    source_prefix: str = field(default="", metadata={"help": "In front of every text, such as `summarize: ` for T5."})
    max_source_length: int = field(default=512, metadata={"help": "Longest text, in tokens."})
    max_target_length: int = field(default=64, metadata={"help": "Longest summary, in tokens."})


def main() -> None:
    """Runs what the flags ask for."""
    parser = HfArgumentParser((ScriptArguments, AdversarialSeq2SeqTrainingArguments))
    script, args = parser.parse_args_into_dataclasses()
    args.generation_max_length = args.generation_max_length or script.max_target_length
    set_seed(args.seed)
    raw = load(script)
    tokenizer = AutoTokenizer.from_pretrained(script.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(script.model_name_or_path)
    columns = raw["train"].column_names
    data = raw.map(encode, batched=True, remove_columns=columns, fn_kwargs={"tokenizer": tokenizer, "script": script})
    trainer = AdversarialSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=(lambda found: figures(found, tokenizer)) if args.predict_with_generate else None,
    )
    train_and_evaluate(trainer, script)


def encode(rows: dict[str, Any], tokenizer: Any, script: ScriptArguments) -> Any:
    """Texts as inputs, summaries as labels."""
    texts = [script.source_prefix + text for text in rows[script.text_column]]
    found = tokenizer(texts, truncation=True, max_length=script.max_source_length)
    summaries = tokenizer(text_target=rows[script.summary_column], truncation=True, max_length=script.max_target_length)
    return found | {"labels": summaries["input_ids"]}


def figures(prediction: Any, tokenizer: Any) -> dict[str, float]:
    """F1 of single words, which is ROUGE-1 without a stemmer, and how long the summaries are."""
    said, meant = (
        tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
        for ids in (prediction.predictions, prediction.label_ids)
    )
    pairs = [(Counter(a.lower().split()), Counter(b.lower().split())) for a, b in zip(said, meant, strict=True)]
    f1 = [2 * (a & b).total() / max(a.total() + b.total(), 1) for a, b in pairs]
    return {"word_f1": float(np.mean(f1)), "gen_len": float(np.mean([a.total() for a, _ in pairs]))}


if __name__ == "__main__":
    main()
