"""What is measured of a task: when an example has fallen, how wrong it is, and the figures that are reported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..perturbation.divergence import predicts_next

# Labels of positions that no loss counts.
IGNORED = -100


@dataclass
class Outcome:
    """What an attack has done to some examples so far. What fell stays fallen at every larger epsilon.

    Args:
        right: bool, (examples,): whether each still stands.
        error: (examples,): how wrong it is, at most `Task.worst`; an attack goes on until it is that.
        prediction: (examples, ...), of the pass with the largest error.
    """

    right: Tensor
    error: Tensor
    prediction: Tensor

    def worse_of(self, other: Outcome) -> Outcome:
        """Of each example the worse of the two."""
        worse = other.error > self.error
        error = torch.where(worse, other.error, self.error)
        of_rows = worse.view(-1, *[1] * (self.prediction.dim() - 1))
        return Outcome(self.right & other.right, error, torch.where(of_rows, other.prediction, self.prediction))

    def on_cpu(self) -> Outcome:
        """The same, on the CPU."""
        return Outcome(self.right.cpu(), self.error.cpu(), self.prediction.cpu())

    def rows(self, chosen: Tensor) -> Outcome:
        """Some of the examples."""
        return Outcome(self.right[chosen], self.error[chosen], self.prediction[chosen])

    def unless_nan(self, answers: Tensor, worst: float) -> Outcome:
        """Wrong, and as wrong as can be, where the model's answer (examples, ...) holds a NaN."""
        broken = answers.isnan().flatten(1).any(1)
        error = self.error.masked_fill(broken, worst)
        return Outcome(self.right & ~broken, error, self.prediction)

    def with_rows(self, chosen: Tensor, other: Outcome) -> Outcome:
        """With others in the place of some."""
        right, error, prediction = self.right.clone(), self.error.clone(), self.prediction.clone()
        right[chosen], error[chosen], prediction[chosen] = other.right, other.error, other.prediction
        return Outcome(right, error, prediction)


class Task:
    """One kind of task.

    Attributes:
        metric: the figure that a report is about, one of `figures`.
        worst: the largest error that there is.
        falls: whether examples fall, so that their number means something.
        classes: of a label, for attacks that raise a margin; 1 where there is none, 2 where none is targeted.
    """

    metric = "accuracy"
    worst = 1.0
    falls = True
    classes = 1

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        """How the model did in one pass."""
        raise NotImplementedError

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """What predictions are compared with, (examples, ...)."""
        return batch["labels"]

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        """What is reported of all batches; the first is `metric`."""
        return {self.metric: _mean([each.right for each in outcomes])}

    def row(self, labels: Tensor, value: Tensor) -> Any:
        """One example's labels, or prediction, as plain data."""
        return value.tolist()


class Classes(Task):
    """One label an example: it falls where another class is predicted. Accuracy."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        return batch["labels"].flatten()

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        logits = output(outputs, "logits", 1)
        prediction = logits.argmax(1)
        right = prediction == self.labels(batch)
        return Outcome(right, (~right).float(), prediction).unless_nan(logits, self.worst)


class Numbers(Task):
    """Regression: nothing falls, the squared error counts. Of one number an example Pearson's and Spearman's
    correlation too.
    """

    metric = "squared_error"
    worst = math.inf
    falls = False

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        labels: Tensor = batch["labels"].float()
        return labels.flatten() if labels.numel() == len(labels) else labels

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        labels = self.labels(batch)
        prediction = output(outputs, "logits", 1).float().view(labels.shape)
        error = (prediction - labels).square().view(len(labels), -1).mean(1)
        return Outcome(torch.ones_like(error, dtype=torch.bool), error, prediction).unless_nan(
            error[:, None], self.worst
        )

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        found = {self.metric: _mean([each.error for each in outcomes])}
        if labels[0].dim() == 1:
            pairs = torch.cat([torch.stack([o.prediction, of]) for o, of in zip(outcomes, labels, strict=True)], 1)
            pairs = pairs.double().cpu()
            found["pearson"] = torch.corrcoef(pairs)[0, 1].item()
            found["spearman"] = torch.corrcoef(torch.stack([ranks(row) for row in pairs]))[0, 1].item()
        return found


class SeveralLabels(Task):
    """Several labels an example, each there or not: it falls where one is wrong. Accuracy of whole examples, F1.

    Labels of -100 are not known, and count nowhere.
    """

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        logits, labels = output(outputs, "logits", 1), self.labels(batch).long()
        prediction, there = (logits > 0).long(), labels != IGNORED
        wrong = (prediction != labels) & there
        error = wrong.sum(1) / there.sum(1).clamp(min=1)
        return Outcome(~wrong.any(1), error, prediction).unless_nan(logits.masked_fill(~there, 0.0), self.worst)

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        given = torch.cat(list(labels)).long()
        there, true = given != IGNORED, given == 1
        found = torch.cat([o.prediction for o in outcomes]).bool() & there
        hits, all_of_them = (found & true).sum().item(), (found.sum() + true.sum()).item()
        return super().figures(outcomes, labels) | {"f1": 2 * hits / all_of_them if all_of_them else 1.0}


class Tags(Task):
    """A label for each token: an example falls where one is wrong.

    Reported is the accuracy of whole examples, that of tokens, and where the labels' names are tags such as `B-person`
    F1 of entities. Of all predictions that an attack finds for an example the one counts that has most
    tokens wrong.

    Args:
        names: of the labels, by number.
    """

    classes = 2

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = [names[number] for number in sorted(names)]
        self._entities = "O" in self._names and any(name.startswith("B-") for name in self._names)

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        labels, logits = batch["labels"], output(outputs, "logits", 1)
        prediction, there = logits.argmax(2), labels != IGNORED
        wrong = (prediction != labels) & there
        found = Outcome(~wrong.any(1), wrong.sum(1) / there.sum(1).clamp(min=1), prediction)
        return found.unless_nan(logits.masked_fill(~there[..., None], 0.0), self.worst)

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        pairs = [
            (o.prediction[i][row != IGNORED], row[row != IGNORED])
            for o, of in zip(outcomes, labels, strict=True)
            for i, row in enumerate(of)
        ]
        found = super().figures(outcomes, labels) | {"token_accuracy": _mean([a == b for a, b in pairs])}
        if self._entities:
            both = [[entities([self._names[tag] for tag in tags.tolist()]) for tags in pair] for pair in pairs]
            hits, total = sum(len(a & b) for a, b in both), sum(len(a) + len(b) for a, b in both)
            found["entity_f1"] = 2 * hits / total if total else 1.0
        return found

    def row(self, labels: Tensor, value: Tensor) -> Any:
        return value[labels != IGNORED].tolist()


class Spans(Task):
    """Where an answer stands in a text: an example falls where another span is predicted. Exact match and F1 of tokens.

    Spans are compared as positions, so a right answer that stands elsewhere too counts there as wrong.
    """

    metric = "exact_match"

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        return torch.stack([batch[name].flatten() for name in ("start_positions", "end_positions")], 1)

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        start, end = output(outputs, "start_logits", 1), output(outputs, "end_logits", 2)
        # No span ends before it begins.
        both = start[:, :, None] + end[:, None, :]
        both = both.masked_fill(torch.ones_like(both[0], dtype=torch.bool).tril(-1), -torch.inf).flatten(1)
        best = both.argmax(1)
        prediction = torch.stack([best // start.shape[1], best % start.shape[1]], 1)
        labels = self.labels(batch)
        length = prediction.new_tensor([-1, 1])
        shared = torch.minimum(prediction, labels)[:, 1] - torch.maximum(prediction, labels)[:, 0] + 1
        total = (prediction * length).sum(1) + (labels * length).sum(1) + 2
        found = Outcome((prediction == labels).all(1), 1 - 2 * shared.clamp(min=0) / total, prediction)
        return found.unless_nan(both, self.worst)

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        return super().figures(outcomes, labels) | {"f1": 1 - _mean([each.error for each in outcomes])}


class Texts(Task):
    """A language model: nothing falls, the loss of each text counts. Loss and perplexity of a token, exact match.

    A text matches where each token with a label is the most probable one: what greedy decoding writes then is the text.

    Args:
        shifted: whether each position predicts the next one's token.
    """

    metric = "loss"
    worst = math.inf
    falls = False

    def __init__(self, shifted: bool) -> None:
        self._shifted = shifted

    def labels(self, batch: Mapping[str, Any]) -> Tensor:
        """How many tokens each text has that are predicted."""
        labels: Tensor = batch["labels"]
        return (labels[:, int(self._shifted) :] != IGNORED).sum(1)

    def judge(self, outputs: Any, batch: Mapping[str, Any]) -> Outcome:
        logits, labels = output(outputs, "logits", 1), batch["labels"]
        if self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        error = losses.sum(1) / self.labels(batch).clamp(min=1)
        matches = ((logits.argmax(2) == labels) | (labels == IGNORED)).all(1)
        found = Outcome(matches, error, error)
        return found.unless_nan(error[:, None], self.worst)

    def figures(self, outcomes: Sequence[Outcome], labels: Sequence[Tensor]) -> dict[str, float]:
        tokens = torch.cat(list(labels)).double()
        losses = torch.cat([each.error for each in outcomes]).double()
        loss = ((losses * tokens).sum() / tokens.sum()).item()
        match = _mean([each.right for each in outcomes])
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact_match": match}


def task_of(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Task:
    """The kind of task, from what the model returns for a batch and the labels in it.

    Raises:
        ValueError: none that is known.
    """
    if "start_positions" in batch:
        return Spans()
    bare = getattr(model, "get_base_model", lambda: model)()
    config, labels, logits = getattr(bare, "config", None), batch["labels"], output(outputs, "logits", 1)
    if isinstance(logits, Tensor) and isinstance(labels, Tensor):
        problem = getattr(config, "problem_type", None)
        if logits.dim() == 2 and labels.shape == logits.shape and problem == "multi_label_classification":
            return SeveralLabels()
        if logits.dim() == 2 and labels.numel() == logits.numel() and (logits.shape[1] == 1 or problem == "regression"):
            return Numbers()
        if logits.dim() == 2 and labels.numel() == len(logits) and not labels.is_floating_point():
            return Classes(logits.shape[1])
        if logits.dim() == 2 and labels.shape == logits.shape:
            return SeveralLabels()
        if logits.dim() == 3 and labels.shape == logits.shape[:2]:
            size, text = logits.shape[2], getattr(config, "get_text_config", lambda: config)()
            tags = any("TokenClassification" in kind.__name__ for kind in type(bare).__mro__)
            if tags or (size == getattr(config, "num_labels", 0) and size != getattr(text, "vocab_size", 0)):
                return Tags(getattr(config, "id2label", None) or {i: str(i) for i in range(size)})
            if size == getattr(text, "vocab_size", 0):
                return _texts(bare, outputs, batch)
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (logits, labels)]
    raise ValueError(
        "Robustness is measured of classification, regression, several labels an example, token classification, answer "
        f"spans and language models; {type(bare).__name__} gave logits {shapes[0]} for labels {shapes[1]}, which is "
        "none of them."
    )


def _texts(model: nn.Module, outputs: Any, batch: Mapping[str, Any]) -> Texts:
    """Shifted or not, as the model's own loss is; as the name says where that is no number."""
    own = output(outputs, "loss", 0)
    if not isinstance(own, Tensor) or not own.isfinite():
        return Texts(shifted=predicts_next(type(model).__name__))

    def apart(task: Texts) -> float:
        loss = task.figures([task.judge(outputs, batch)], [task.labels(batch)])["loss"]
        return abs(loss - own.item())

    return min((Texts(shifted=True), Texts(shifted=False)), key=apart)


def output(outputs: Any, name: str, index: int) -> Any:
    """One of the model's outputs, detached: by its name, or of a tuple by its index."""
    value = outputs.get(name) if isinstance(outputs, Mapping) else outputs[index]
    return value.detach() if isinstance(value, Tensor) else value


def rows_in(task: Task, values: Sequence[Tensor], labels: Sequence[Tensor]) -> Iterator[Any]:
    """Example by example, as plain data."""
    for batch, of in zip(values, labels, strict=True):
        yield from (task.row(label, value) for label, value in zip(of, batch, strict=True))


def ranks(values: Tensor) -> Tensor:
    """The place of each value in ascending order, float64; equal ones share the mean of theirs."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    mean: Tensor = count.cumsum(0) - (count - 1) / 2
    return mean.double()[place]


def _mean(values: Sequence[Tensor]) -> float:
    return torch.cat([value.double() for value in values]).mean().item()


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a text's tags (IOB, IOB2, IOBES): kind, first token, and the one after the last.

    As conlleval and seqeval read them: one goes on while its kind does, and need not begin with `B-`.
    """
    found, start, before = set(), 0, "O"
    for position, tag in enumerate([*tags, "O"]):
        ends = tag[0] in "OBS" or before[0] in "ES" or tag[1:] != before[1:]
        if before != "O" and ends:
            found.add((before[2:], start, position))
        if tag != "O" and (before == "O" or ends):
            start = position
        before = tag
    return found
