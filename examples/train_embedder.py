#!/usr/bin/env python
"""Sentence embeddings: sentence-transformers' trainer, attacked, on pairs with a similarity, as of the STS benchmark.

Evaluated are Spearman's correlation with the similarities, and retrieval among pairs that mean the same: how often the
nearest `sentence2` is the one that belongs to a `sentence1`, as it is, perturbed, and with typing errors.

Example: python train_embedder.py --model_name_or_path MODEL --train_file train.jsonl
--validation_file validation.jsonl --adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/embedder
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from json_lines import FileArguments, load, train_and_evaluate
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import HfArgumentParser, set_seed

from fgm_trainer import AdversarialArguments, AdversarialTrainerMixin
from fgm_trainer.robustness import characters

try:
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
except ImportError:  # sentence-transformers 5
    from sentence_transformers.evaluation import EmbeddingSimilarityEvaluator
    from sentence_transformers.losses import CosineSimilarityLoss


@dataclass
class ScriptArguments(FileArguments):
    """Model, data and evaluation."""

    model_name_or_path: str = field(kw_only=True, metadata={"help": "Folder or name of the pretrained model."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest sentence in tokens; the model's own."})
    typing_errors: float = field(default=0.3, metadata={"help": "The share of a query's words that have one."})


@dataclass
class Training(AdversarialArguments, SentenceTransformerTrainingArguments):
    """The flags of sentence-transformers and the adversarial ones."""


class AdversarialSentenceTransformerTrainer(AdversarialTrainerMixin, SentenceTransformerTrainer):
    """`SentenceTransformerTrainer`, attacked."""


def main() -> None:
    """Runs what the flags ask for."""
    script, args = HfArgumentParser((ScriptArguments, Training)).parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load(script)
    raw = raw.map(lambda row: {"score": row["label"] / 5}, remove_columns="label")
    model = SentenceTransformer(script.model_name_or_path)
    model.max_seq_length = script.max_seq_length or model.max_seq_length
    pairs = raw["validation"]
    trainer = AdversarialSentenceTransformerTrainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=pairs,
        loss=CosineSimilarityLoss(model),
        evaluator=EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"]),
    )
    # Pairs that mean the same: a sentence should find its other half.
    same = [{"query": p["sentence1"], "text": p["sentence2"]} for p in pairs if p["score"] >= 0.8]
    train_and_evaluate(trainer, script, same)
    if script.eval_robustness:
        draw = random.Random(args.seed)
        changed = [row | {"query": mistyped(row["query"], script.typing_errors, draw)} for row in same]
        found = {"robust_typing_errors": trainer.evaluate_robustness(changed, epsilons=[0.0]).clean}
        trainer.log_metrics("robust", found)
        trainer.save_metrics("robust", found)


def mistyped(text: str, share: float, draw: random.Random) -> str:
    """The text with a typing error in some of its words."""
    words = text.split()
    chosen = draw.sample(range(len(words)), max(1, round(share * len(words))))
    return " ".join((characters(w, draw) or [w])[0] if i in chosen else w for i, w in enumerate(words))


if __name__ == "__main__":
    main()
