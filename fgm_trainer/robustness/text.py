"""Changed words: attacks that query a classifier through its tokenizer and see its probabilities alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import nn

from ..perturbation.lookups import eval_mode
from .candidates import Candidates, characters
from .data import bar
from .tasks import output

# A text's words, and what stands between them.
_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")


@dataclass(frozen=True)
class TextResult:
    """What an attack made of one text.

    Args:
        text: as it was.
        attacked: as it is, the best attempt where none fooled the model.
        label: the true class.
        prediction: of the text as it was.
        attacked_prediction: of the attacked text.
        changed: how many words were changed.
        words: how many there are.
        queries: how many texts the model was asked about.
    """

    text: str
    attacked: str
    label: int
    prediction: int
    attacked_prediction: int
    changed: int
    words: int
    queries: int

    @property
    def skipped(self) -> bool:
        """Whether the model was wrong without an attack."""
        return self.prediction != self.label

    @property
    def fooled(self) -> bool:
        """Whether the attack made a right answer wrong."""
        return not self.skipped and self.attacked_prediction != self.label


@dataclass(frozen=True)
class TextReport:
    """What `attack_texts` found, with TextAttack's definitions (Morris et al. 2020) of its figures."""

    results: tuple[TextResult, ...]

    @property
    def accuracy(self) -> float:
        """Without attack."""
        return mean(not each.skipped for each in self.results)

    @property
    def accuracy_under_attack(self) -> float:
        """The share of all texts that the model gets right, attacked or not."""
        return mean(not each.skipped and not each.fooled for each in self.results)

    @property
    def success_rate(self) -> float:
        """The share of attacked texts that fool the model; NaN where none was attacked."""
        return _mean(each.fooled for each in self.results if not each.skipped)

    @property
    def words_changed(self) -> float:
        """The mean share of words that are changed in texts that fool the model; NaN where none does."""
        return _mean(each.changed / max(each.words, 1) for each in self.results if each.fooled)

    @property
    def queries(self) -> float:
        """The mean number of queries of an attacked text; NaN where none was attacked."""
        return _mean(each.queries for each in self.results if not each.skipped)

    def metrics(self, prefix: str = "text") -> dict[str, float]:
        """All figures by name."""
        names = ("accuracy", "accuracy_under_attack", "success_rate", "words_changed", "queries")
        return {f"{prefix}_{name}": getattr(self, name) for name in names}

    def save(self, path: str | Path) -> None:
        """Writes one JSON line a text."""
        lines = (json.dumps(asdict(each), ensure_ascii=False) for each in self.results)
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def attack_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[int],
    candidates: Candidates = characters,
    *,
    before: Sequence[str] | None = None,
    most_changed: float = 0.3,
    budget: int = 500,
    beam: int = 1,
    keep: Collection[str] = (),
    max_length: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> TextReport:
    """Changes words until the model is wrong.

    The words whose removal costs the true class most are tried first (Jin et al. 2020, Gao et al. 2018); of the texts
    that a word's candidates make, the `beam` that leave the true class least are gone on with. Words with digits and
    those to `keep` stay.

    Args:
        model: a classifier with `logits`; put into eval mode, and back.
        tokenizer: its tokenizer.
        texts: what is attacked.
        labels: the true classes.
        candidates: what a word may become: `characters`, `NearestTokens(model, tokenizer)`, or a function of yours.
        before: the first text of each pair, which stays; None for single texts.
        most_changed: the share of words that may change; at least one may.
        budget: of queries a text.
        beam: how many attempts are gone on with.
        keep: words that stay, in lower case, such as those that name a label.
        max_length: of the tokenizer's output; None for the model's.
        batch_size: texts a query.
        seed: of what candidates draw.
        progress: show a bar.

    Raises:
        ValueError: bad settings, or lists that do not fit each other.
    """
    _check(model, texts, labels, before, {"most_changed": most_changed, "budget": budget, "beam": beam})
    firsts: Sequence[str | None] = [None] * len(texts) if before is None else before
    results = []
    with eval_mode(model):
        rows = zip(texts, labels, firsts, strict=True)
        for number, (text, label, first) in enumerate(bar(rows, progress, "texts", len(texts))):
            ask = _Oracle(model, tokenizer, first, max_length, batch_size, budget)
            search = _Search(ask, candidates, int(label), most_changed, beam, frozenset(keep))
            results.append(search.result(text, random.Random(f"{seed} {number}")))
    return TextReport(tuple(results))


class _Oracle:
    """Probabilities of texts, (texts, classes), as long as the budget lasts."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, first: str | None, max_length: int | None, size: int, budget: int
    ) -> None:
        self._model, self._tokenizer, self._first = model, tokenizer, first
        self._max_length = longest(model, tokenizer) if max_length is None else max_length
        self._size, self.left, self.queries = size, budget, 0

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        found, device = [], next(self._model.parameters()).device
        for start in range(0, len(texts), self._size):
            part = list(texts[start : start + self._size])
            # Some tokenizers make no token at all of an empty text.
            part = [text or " " for text in part]
            given = [part] if self._first is None else [[self._first] * len(part), part]
            # The mask says where tokens are; some models have no other way to know.
            inputs = self._tokenizer(
                *given, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
            )
            logits = output(self._model(**inputs.to(device)), "logits", 0)
            found.append(logits.float().softmax(-1).cpu())
        self.queries, self.left = self.queries + len(texts), self.left - len(texts)
        return torch.cat(found)


@dataclass(frozen=True)
class _Attempt:
    pieces: tuple[str, ...]
    probability: float
    prediction: int
    changed: frozenset[int] = frozenset()


class _Search:
    def __init__(
        self, ask: _Oracle, candidates: Candidates, label: int, share: float, beam: int, keep: frozenset[str]
    ) -> None:
        self._ask, self._candidates, self._label = ask, candidates, label
        self._share, self._beam, self._keep = share, beam, keep

    def result(self, text: str, draw: random.Random) -> TextResult:
        pieces, places = _pieces(text)
        (start,) = self._attempts([_Attempt(pieces, 1.0, -1)])
        best = start
        if start.prediction == self._label:
            best = self._attacked(start, places, draw)
        changed, count = len(best.changed), len(places)
        attacked = "".join(best.pieces)
        queries = self._ask.queries
        return TextResult(text, attacked, self._label, start.prediction, best.prediction, changed, count, queries)

    def _attacked(self, start: _Attempt, places: Sequence[int], draw: random.Random) -> _Attempt:
        allowed = max(1, int(self._share * len(places)))
        beam = best = [start]
        for place in self._by_importance(start, places)[: self._ask.left]:
            others = self._candidates(start.pieces[place], draw)
            tried = [self._with(attempt, place, other) for attempt in beam for other in others]
            tried = [each for each in tried if len(each.changed) <= allowed][: max(self._ask.left, 0)]
            if not tried:
                continue
            made = sorted([*beam, *self._attempts(tried)], key=lambda each: each.probability)
            wrong = [each for each in made if each.prediction != self._label]
            best = beam = (wrong or made)[: self._beam]
            if wrong or self._ask.left <= 0:
                break
        return best[0]

    def _by_importance(self, start: _Attempt, places: Sequence[int]) -> list[int]:
        """The words that may change, those whose removal leaves the true class least first."""
        open_ones = [p for p in places if self._may_change(start.pieces[p])][: max(self._ask.left, 0)]
        if not open_ones:
            return []
        without = self._attempts([self._with(start, place, "") for place in open_ones])
        order = sorted(range(len(open_ones)), key=lambda i: without[i].probability)
        return [open_ones[i] for i in order]

    def _may_change(self, word: str) -> bool:
        return word.lower() not in self._keep and not any(letter.isdigit() for letter in word)

    def _with(self, attempt: _Attempt, place: int, word: str) -> _Attempt:
        pieces = (*attempt.pieces[:place], word, *attempt.pieces[place + 1 :])
        return _Attempt(pieces, 1.0, -1, attempt.changed | {place})

    def _attempts(self, attempts: Sequence[_Attempt]) -> list[_Attempt]:
        """The same, with what the model says of them."""
        rows = self._ask(["".join(each.pieces) for each in attempts])
        if rows.dim() != 2 or not 0 <= self._label < rows.shape[1] or rows.shape[1] < 2:
            raise ValueError(f"Labels are classes of the model; found {self._label} for logits {tuple(rows.shape)}.")
        return [
            _Attempt(each.pieces, row[self._label].item(), int(row.argmax()), each.changed)
            for each, row in zip(attempts, rows, strict=True)
        ]


def longest(model: nn.Module, tokenizer: Any) -> int:
    """How many tokens of a text the model can read."""
    # Some models count their positions from 2; a tokenizer that knows no limit says 1e30.
    places = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    own: int = min(tokenizer.model_max_length, 10**6)
    return own if places is None or own <= places else max(places - 2, 1)


def print_texts(report: TextReport, most: int = 10, prefix: str = "text") -> None:
    """Prints up to `most` texts that fool the model, changed words in colour, and the figures. Needs rich."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for each in [each for each in report.results if each.fooled][:most]:
        console.print(f"{each.label} -> {each.attacked_prediction}", style="bold")
        for own, other, style in ((each.text, each.attacked, "red"), (each.attacked, each.text, "green")):
            console.print(Text.assemble(*_coloured(own, other, style)))
    console.print(", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report.metrics(prefix).items()))


def _coloured(own: str, other: str, style: str) -> Iterator[tuple[str, str]]:
    ours, theirs = _pieces(own)[0], _pieces(other)[0]
    if len(ours) != len(theirs):
        yield own, style
        return
    for piece, against in zip(ours, theirs, strict=True):
        yield piece, style if piece != against else ""


def _pieces(text: str) -> tuple[tuple[str, ...], list[int]]:
    """A text as words and what stands between them, and the places of the words."""
    pieces, end = [], 0
    for match in _WORD.finditer(text):
        pieces += [text[end : match.start()], match.group()]
        end = match.end()
    return (*pieces, text[end:]), list(range(1, len(pieces), 2))


def _mean(values: Iterator[Any]) -> float:
    found = list(values)
    return mean(found) if found else float("nan")


def check_classifier(model: nn.Module) -> None:
    """Raises ValueError where the model's configuration says that it does not give one class a text."""
    config = getattr(model, "config", None)
    several = getattr(config, "problem_type", None) == "multi_label_classification"
    if several or getattr(config, "num_labels", None) == 1:
        gives = "several labels a text" if several else "one number a text"
        raise ValueError(f"The texts can't be attacked: the model gives {gives}, and one class a text is attacked.")


def _check(
    model: nn.Module,
    texts: Sequence[str],
    labels: Sequence[int],
    before: Sequence[str] | None,
    settings: dict[str, float],
) -> None:
    check_classifier(model)
    problems = []
    if len(texts) == 0:
        problems.append("there is no text.")
    if len(texts) != len(labels) or (before is not None and len(before) != len(texts)):
        first = "" if before is None else f", {len(before)} first texts"
        problems.append(f"there are {len(texts)} texts, {len(labels)} labels{first}: they must be as many.")
    if not 0 < settings["most_changed"] <= 1:
        problems.append(f"most_changed must be above 0, at most 1; found {settings['most_changed']!r}.")
    problems += [
        f"{name} must be a whole number, 1 or more; found {settings[name]!r}."
        for name in ("budget", "beam")
        if not isinstance(settings[name], int) or settings[name] < 1
    ]
    if problems:
        raise ValueError("The texts can't be attacked: " + " ".join(problems))
