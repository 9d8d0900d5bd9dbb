"""Embedders of sentence-transformers under attack: how alike pairs are, and whether queries find their text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, mse_loss, normalize

from ..perturbation.lookups import eval_mode
from .data import on_device
from .evaluate import EPSILONS, evaluate_robustness
from .report import RobustnessReport
from .tasks import Numbers, Outcome, Task, output

# As sentence-transformers names them.
LABELS = ("label", "labels", "score", "scores")
_IDS = "_input_ids"
# Logits that differ by no more are those of rounding.
_AS_NEAR = 1e-5


def is_embedder(model: nn.Module) -> bool:
    """Whether it is one of sentence-transformers' embedders."""
    return any(kind.__name__ == "SentenceTransformer" for kind in type(model).__mro__)


def evaluate_embedder(
    model: nn.Module,
    dataset: Iterable[Mapping[str, Any]],
    attacks: Any = "quick",
    epsilons: Sequence[float] = EPSILONS,
    *,
    collate_fn: Callable[[list[dict[str, Any]]], Mapping[str, Any]] | None = None,
    batch_size: int = 32,
    **settings: Any,
) -> RobustnessReport:
    """How robust an embedder is, on rows of texts as sentence-transformers trains on them.

    With scores (a column `label`, `labels`, `score` or `scores`), both texts of a pair are perturbed, each by epsilon,
    to move the cosine away from the score: squared error, Pearson's and Spearman's correlation. Without, the first
    column's text is a query, the second's what it should find among all of that column: the query is perturbed, and
    accuracy is the share of queries that find their text first, `mrr` the mean reciprocal rank.

    Args:
        model: a `SentenceTransformer`.
        dataset: rows of two texts, and a score from -1 to 1 where there is one; further columns are not read.
        attacks: as for `evaluate_robustness`.
        epsilons: as for `evaluate_robustness`.
        collate_fn: makes a batch of rows, as a trainer's data collator does; None for sentence-transformers' own.
        batch_size: rows a batch.
        **settings: the other arguments of `evaluate_robustness`.

    Raises:
        ValueError: there are not two columns of texts, or scores are out of range.
    """
    rows = [dict(row) for row in dataset]
    (first, second), label = _columns(rows)
    collate = collate_fn or _own_collator(model)

    def batch_of(chosen: list[dict[str, Any]], *columns: str) -> dict[str, Any]:
        made = collate([{column: row[column] for column in columns} for row in chosen])
        return {name: value for name, value in made.items() if isinstance(value, Tensor)}

    settings |= {"batch_size": batch_size}
    if label is not None:

        def scored(chosen: list[dict[str, Any]]) -> dict[str, Any]:
            return batch_of(chosen, first, second) | {"labels": torch.tensor([float(row[label]) for row in chosen])}

        return evaluate_robustness(
            _Similarity(model), rows, attacks, epsilons, collate_fn=scored, task=Numbers(), **settings
        )
    texts = list(dict.fromkeys(row[second] for row in rows))
    places = {text: place for place, text in enumerate(texts)}

    def asked(chosen: list[dict[str, Any]]) -> dict[str, Any]:
        return batch_of(chosen, first) | {"labels": torch.tensor([places[row[second]] for row in chosen])}

    with eval_mode(model), torch.no_grad():
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        batches = (on_device(batch_of([{second: text} for text in part], second), model) for part in parts)
        found = [_embeddings(model, batch)[0] for batch in batches]
    search = _Search(model, torch.cat(found))
    return evaluate_robustness(search, rows, attacks, epsilons, collate_fn=asked, task=Ranks(), **settings)


class Ranks(Task):
    """Retrieval: a query falls where another text is as near as its own. Accuracy, mean reciprocal rank."""

    # Each other text would be a target; the margin is that of the nearest.
    classes = 2

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        logits, labels = output(outputs, "logits", 1), self.labels(batch)
        # What is as near comes first: else a model that says the same of all would be right.
        near = logits >= logits.gather(1, labels[:, None]) - _AS_NEAR
        rank = near.sum(1).clamp(min=1)
        return Outcome(rank == 1, 1 - 1 / rank, rank).unless_nan(logits, self.worst)

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        error = torch.cat([each.error.double() for each in outcomes])
        return super().figures(outcomes, labels) | {"mrr": 1 - error.mean().item()}


class _Similarity(nn.Module):
    """An embedder as a model of pairs."""

    def __init__(self, embedder: nn.Module) -> None:
        super().__init__()
        self.embedder = embedder

    def forward(self, labels: Tensor, **columns: Tensor) -> dict[str, Tensor]:
        one, other = _embeddings(self.embedder, columns)
        logits = cosine_similarity(one, other)
        return {"loss": mse_loss(logits, labels.to(logits)), "logits": logits[:, None]}


class _Search(nn.Module):
    """An embedder as a classifier: which of the texts does a query mean?"""

    def __init__(self, embedder: nn.Module, texts: Tensor) -> None:
        super().__init__()
        self.embedder, self._texts = embedder, normalize(texts, dim=-1)

    def forward(self, labels: Tensor, **columns: Tensor) -> dict[str, Tensor]:
        (queries,) = _embeddings(self.embedder, columns)
        # The scale that sentence-transformers trains with; no attack of a fixed length depends on it much.
        logits = 20 * normalize(queries, dim=-1) @ self._texts.T
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def _embeddings(model: nn.Module, columns: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each column of a batch, (examples, dimension)."""
    names = [name.removesuffix(_IDS) for name in columns if name.endswith(_IDS)]
    features: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in columns.items():
        # The longest name that fits: one may be the beginning of another.
        name = max((n for n in names if key.startswith(f"{n}_")), key=len)
        features[name][key.removeprefix(f"{name}_")] = value
    return [model(given)["sentence_embedding"] for given in features.values()]


def _columns(rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], str | None]:
    """The two columns of texts, and that of scores."""
    if not rows:
        raise ValueError("Robustness can't be evaluated: the data set is empty.")
    texts = [name for name, value in rows[0].items() if isinstance(value, str) and name != "dataset_name"]
    label = next((name for name in LABELS if name in rows[0]), None)
    if len(texts) < 2:
        raise ValueError(f"An embedder is evaluated on two columns of texts; found {', '.join(texts) or 'none'}.")
    if label is not None and any(isinstance(row[label], str) for row in rows):
        raise ValueError(f"{label!r} is compared with a cosine, so it must be a number; found a text.")
    if label is not None and any(not -1 <= row[label] <= 1 for row in rows):
        worst = max((row[label] for row in rows), key=abs)
        raise ValueError(f"{label!r} is compared with a cosine, so it must lie between -1 and 1; found {worst}.")
    return (texts[0], texts[1]), label


def _own_collator(model: Any) -> Any:
    from sentence_transformers import SentenceTransformerTrainer

    # As its trainer does, whatever the release.
    return SentenceTransformerTrainer.data_collator_class(model.preprocess)
