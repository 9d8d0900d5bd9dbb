"""Whether a run has collapsed: how far the model tells examples apart, and whether its loss has fallen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .engine.schedule import Schedule

logger = logging.get_logger(__name__)

# How many batches' answers are kept before they become one.
_KEPT = 1024
# Logits of more entries than this are not watched, a language model's for one: to look at them would take time.
_WATCHED = 1 << 18
# How many differences of labels are enough to say that those of answers are missing.
_DIFFERENCES = 10
# Below this share of the labels' differences, a model says nearly the same of all (docs/epsilon.md).
_SAME = 0.14


class Predictions:
    """How far the model tells examples apart: what its answers differ by from one example to the next, over the labels.

    An answer is the distribution over classes, or a number; a label likewise, all of it on one class. The figure is the
    root of the ratio of the mean squared differences, those of neighbours in a batch (J. von Neumann, "Distribution of
    the Ratio of the Mean Square Successive Difference to the Variance", 1941); or, where that is more, how often the
    most probable class is another one, over the same of the labels: of a model that begins to learn, probabilities
    differ little. A model that is right and sure has 1, one that says the same of all 0. Differences of neighbours do
    not see the answer drift from batch to batch, as that of a collapsed model does.

    Nothing is read from the device before `close`, and nothing here raises.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._answers: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._entries = 0
        # Squared differences of answers and their number, the same of labels, how many of these are classes, and how
        # often the most probable class is another one.
        self._older: list[Tensor] = []

    def observe(self, output: Any, labels: Any) -> None:
        """Notes what the model says of a batch, or of a part of it.

        Args:
            output: the model's, with logits (examples, classes), (examples, 1) or (examples,).
            labels: (examples,), or (examples, 1) for numbers; the examples may be more than in the output.
        """
        try:
            self._observe(_logits(output), labels)
        except Exception as error:  # whatever a model returns: a line of the log is not worth a run
            logger.debug(f"Predictions are not watched: {error!r}")

    def _observe(self, logits: Tensor | None, labels: Any) -> None:
        if logits is None or not isinstance(labels, Tensor):
            return
        if labels.dim() == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.dim() != 1 or not len(logits) or not len(labels) or logits.numel() > _WATCHED:
            return
        number = logits.dim() == 1 or logits.shape[1] == 1
        if not number and labels.is_floating_point():
            return
        if self._answers and self._answers[-1].shape[1:] != logits.view(len(logits), -1).shape[1:]:
            self._fold()
        # A copy either way: the output of a CUDA graph is overwritten by its next run.
        logits = logits.detach()
        answer = logits.view(-1, 1).to(torch.float32, copy=True) if number else logits.softmax(-1, torch.float32)
        self._answers.append(answer)
        self._labels.append(labels.detach().float() if number else labels.detach())
        self._entries += answer.numel()
        if len(self._answers) >= _KEPT or self._entries > _WATCHED:
            self._fold()

    def close(self, accelerator: Any) -> float | None:
        """The figure over all processes since it was last given; to be called on all of them.

        None where nothing was observed. NaN where what was observed says little: of labels that differ fewer than
        `_DIFFERENCES` times it waits for more, and where nine of ten or more are followed by the same class, an answer
        that is always the same is nearly right.
        """
        try:
            self._fold()
            own = sum(self._older, torch.zeros(6, device=accelerator.device))
        except Exception as error:
            logger.debug(f"Predictions are not watched: {error!r}")
            own = torch.zeros(6, device=accelerator.device)
        answers, pairs, labels, label_pairs, classes, others = accelerator.reduce(own, "sum").tolist()
        if not label_pairs:
            return None
        # Of numbers any two differ; of classes the square of the distance is 2.
        share = labels / 2 / label_pairs if classes else 1.0
        if share * min(pairs, label_pairs) < _DIFFERENCES:
            return math.nan
        self._clear()
        if not labels or share < 0.1:
            return math.nan
        probable = others / pairs / share if classes else 0.0
        return max(math.sqrt(answers / pairs / (labels / label_pairs)), probable)

    def _fold(self) -> None:
        """Makes sums of what is kept one by one."""
        answers, labels, self._answers, self._labels, self._entries = self._answers, self._labels, [], [], 0
        if not answers:
            return
        number = labels[0].is_floating_point()
        everything, all_labels = torch.cat(answers), torch.cat(labels)
        moved = (everything[1:] - everything[:-1]).square().sum(-1)
        apart = _other(all_labels).float() * 2 if not number else (all_labels[1:] - all_labels[:-1]).square()
        parts = [*_added_up(moved, answers), *_added_up(apart, labels)]
        # Of numbers the most probable class is always the first and only one.
        parts += [parts[-1] * (not number), _added_up(_other(everything.argmax(-1)), answers)[0]]
        self._older.append(torch.stack([part.to(moved.device) for part in parts]))


class FirstOutput:
    """A context: the first output of a module inside goes to `Predictions`. The hook is there that long and no longer.

    It is on the outermost module, around any compiled graph and whatever an engine does.

    Args:
        predictions: observe it.
        model: with its wrappers.
        labels: the batch's, (examples,): classes or numbers. Anything else is not observed.
    """

    def __init__(self, predictions: Predictions | None = None, model: Any = None, labels: Any = None) -> None:
        self._predictions, self._model, self._labels = predictions, model, labels
        self._handle: Any = None

    def __enter__(self) -> FirstOutput:
        # Compiled in place, the module has its hooks inside of the graph, which would be made anew with and without.
        if isinstance(self._labels, Tensor) and getattr(self._model, "_compiled_call_impl", None) is None:
            self._handle = self._model.register_forward_hook(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._predictions = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        predictions, self._predictions = self._predictions, None
        if predictions is not None:
            predictions.observe(output, self._labels)

    def __reduce__(self) -> tuple[type[FirstOutput], tuple[()]]:
        # A copy of the model made inside has one that does nothing.
        return FirstOutput, ()


def _logits(output: Any) -> Tensor | None:
    """The logits of one answer an example, if that is what the output has."""
    if isinstance(output, Tensor):
        found: Any = output
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, (tuple, list)):
        found = next((v for v in output if isinstance(v, Tensor) and v.dim()), None)
    else:
        found = getattr(output, "logits", None)
    fits = isinstance(found, Tensor) and found.is_floating_point() and found.dim() in (1, 2)
    return found if fits else None


def _other(classes: Tensor) -> Tensor:
    """Whether each class differs from the one before."""
    return classes[1:] != classes[:-1]


def _added_up(differences: Tensor, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The differences of neighbours, (examples - 1,), added up, and how many they are.

    Between two batches a difference counts where one of them is a single example, which has no other neighbour.
    """
    sizes = [len(batch) for batch in batches]
    counts = [1.0] * len(differences)
    end = -1
    for size, following in itertools.pairwise(sizes):
        end += size
        counts[end] = float(size == 1 or following == 1)
    weights = torch.tensor(counts).to(differences.device, non_blocking=True)
    return (differences * weights).sum(), weights.sum()


class CollapseWatch:
    """Says aloud, once, that a run has collapsed: after half of training the model says nearly the same of all.

    Where the model has no single answer an example (a language model, spans, tags), that it does not learn: its loss is
    where it was at the start. Loss alone would not do: some methods report that of examples under attack.

    A window is a logging window, or as many of them as make a twentieth of training: a single step's loss is noise.

    Attributes:
        said: whether it has.
    """

    def __init__(self) -> None:
        self.predictions = Predictions()
        self._losses: list[float] = []
        self._since: int | None = None
        self.said = False

    def watched(self, model: nn.Module, labels: Any, step: int, schedule: Schedule, total: int) -> Any:
        """A context around a step, in which the model's answers are noted where they will be asked for."""
        late = step >= _settled(schedule, total) - total / 20
        return FirstOutput(self.predictions, model, labels) if late and not self.said else nullcontext()

    def see(
        self,
        loss: float,
        step: int,
        schedule: Schedule,
        total: int,
        history: Sequence[Mapping[str, Any]],
        accelerator: Any,
    ) -> None:
        """A log line is written; to be called on every process.

        Args:
            loss: the line's.
            step: optimizer steps up to now.
            schedule: the attack's.
            total: all optimizer steps of training.
            history: the lines before, with `loss` and `step`, those before a resumption too.
            accelerator: the `accelerate.Accelerator`.
        """
        self._losses.append(loss)
        if self.said or (self._since is not None and step - self._since < total / 20):
            return
        loss, self._losses, self._since = sum(self._losses) / len(self._losses), [], step
        # Before half of training a slow start looks the same.
        if step <= _settled(schedule, total):
            return
        moved = self.predictions.close(accelerator)
        first = _first_loss(history, total)
        if moved is not None:
            found = _same_answer(moved) if moved < _SAME else None
        else:
            found = None if first is None or loss < 0.95 * first else _same_loss(loss, first)
        if found is None:
            return
        self.said = True
        logger.warning(
            f"Collapse? After {step} of {total} steps {found} A perturbation that is too large from the start does "
            "this. Try adv_epsilon='auto' (or adv_recover with your own), or a smaller learning rate."
        )


def _settled(schedule: Schedule, total: int) -> float:
    """The step after which a run is judged."""
    return max(schedule.warm(total), total / 2)


def _first_loss(history: Sequence[Mapping[str, Any]], total: int) -> float | None:
    """The mean loss of the first logging window of training."""
    lines = [line for line in history if "loss" in line and "step" in line]
    losses = [float(line["loss"]) for line in lines if line["step"] <= max(lines[0]["step"], total / 20)]
    return sum(losses) / len(losses) if losses else None


def _same_answer(moved: float) -> str:
    return (
        "the model says nearly the same of all examples: from one to the next its answers differ by "
        f"{moved:.2g} of what the labels differ by."
    )


def _same_loss(loss: float, first: float) -> str:
    return (
        f"the clean loss is {loss:.4g}, and it was {first:.4g} in the first logging window: the model has not learned "
        "yet."
    )
