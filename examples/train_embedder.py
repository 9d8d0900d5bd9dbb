#!/usr/bin/env python
"""Sentence embeddings: sentence-transformers' trainer, attacked, on pairs with a similarity, as of the STS benchmark.

Evaluated are Spearman's correlation with the similarities, and retrieval: how often the nearest `sentence2` of all is
the one that belongs to a `sentence1`, as it is and with typing errors.

Example: python train_embedder.py --model_name_or_path MODEL --train_file train.jsonl
--validation_file validation.jsonl --adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/embedder
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.util import cos_sim
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
class ScriptArguments:
    """Model, data and evaluation."""

    model_name_or_path: str = field(metadata={"help": "Folder or name of the pretrained model."})
    train_file: str = field(metadata={"help": "JSON lines: `sentence1`, `sentence2`, `label` from 0 to 5."})
    validation_file: str = field(metadata={"help": "The same, for evaluation."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Longest sentence in tokens; the model's own."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first pairs only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first pairs only."})
    eval_robustness: bool = field(default=False, metadata={"help": "Retrieval with and without typing errors."})
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
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    for split, most in (("train", script.max_train_samples), ("validation", script.max_eval_samples)):
        raw[split] = raw[split].select(range(min(most or len(raw[split]), len(raw[split]))))
    raw = raw.map(lambda row: {"score": row["label"] / 5}, remove_columns="label")
    model = SentenceTransformer(script.model_name_or_path)
    model.max_seq_length = script.max_seq_length or model.max_seq_length
    trainer = AdversarialSentenceTransformerTrainer(
        model=model, args=args, train_dataset=raw["train"], loss=CosineSimilarityLoss(model)
    )
    if args.do_train:
        trainer.save_metrics("train", trainer.train().metrics)
        trainer.save_model()
        trainer.save_state()
    pairs, figures = raw["validation"], {}
    if args.do_eval:
        similarity = EmbeddingSimilarityEvaluator(pairs["sentence1"], pairs["sentence2"], pairs["score"])
        figures |= {f"eval_{name}": value for name, value in similarity(model).items()}
    if script.eval_robustness:
        figures |= retrieval(model, pairs, script.typing_errors, args.seed)
    trainer.log_metrics("eval", figures)
    trainer.save_metrics("eval", figures)


def retrieval(model: SentenceTransformer, pairs: Dataset, share: float, seed: int) -> dict[str, float]:
    """How often the nearest second sentence is the right one, of pairs that mean the same (a similarity of 4 to 5)."""
    documents = list(dict.fromkeys(pairs["sentence2"]))
    same = {pair["sentence1"]: documents.index(pair["sentence2"]) for pair in pairs if pair["score"] >= 0.8}
    draw = random.Random(seed)
    queries = {"clean": list(same), "typing_errors": [mistyped(query, share, draw) for query in same]}
    found = {"robust_queries": float(len(same)), "robust_documents": float(len(documents))}
    for name, texts in queries.items():
        nearest = cos_sim(model.encode(texts), model.encode(documents)).argmax(1).tolist()
        right = sum(a == b for a, b in zip(nearest, same.values(), strict=True))
        found[f"robust_recall_at_1_{name}"] = right / max(len(same), 1)
    return found


def mistyped(text: str, share: float, draw: random.Random) -> str:
    """The text with a typing error in some of its words."""
    words = text.split()
    chosen = draw.sample(range(len(words)), max(1, round(share * len(words))))
    return " ".join((characters(w, draw) or [w])[0] if i in chosen else w for i, w in enumerate(words))


if __name__ == "__main__":
    main()
