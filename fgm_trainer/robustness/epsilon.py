"""Which epsilon to train with: loss and accuracy on a few batches over a grid, as a learning-rate finder has them."""

from __future__ import annotations

import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import Attack, Step
from ..engine.driver import unit_of
from ..perturbation.batches import examples_in
from ..perturbation.divergence import logits_of
from ..perturbation.target import Target
from ..perturbation.targets import find_target
from ..perturbation.weights import Weights
from .evaluate import LossOf, bar, evaluating, model_loss, on_device, under_attack
from .plotting import plot_epsilon

POINTS, DECADES = 20, 4
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class EpsilonCurve:
    """What `find_epsilon` measured.

    Args:
        epsilons: the grid, ascending, in `unit`.
        loss: the loss under attack at each epsilon.
        accuracy: the accuracy under attack at each epsilon; None where an example has not one class as its label.
        delta_norm: the mean Euclidean length of what was added to an example at each epsilon, never in units of
            `unit`: what a run logs as `adv_delta_norm`.
        clean_loss: the loss without attack.
        clean_accuracy: the accuracy without attack, or None.
        guess_loss: the loss of a guess that knows how frequent each label is, or None (`suggest`).
        suggestion: an epsilon of the grid, or None where no rule gives one (`suggest`).
        unit: `absolute`, or `embedding`: multiples of the mean norm of a token's embedding.
        examples: how many examples were used.
    """

    epsilons: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    delta_norm: tuple[float, ...]
    clean_loss: float
    clean_accuracy: float | None
    guess_loss: float | None
    suggestion: float | None
    unit: str
    examples: int

    def to_dict(self) -> dict[str, Any]:
        """The curve as plain data, for JSON."""
        return asdict(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """The curve as a matplotlib figure (`plotting.plot_epsilon`), written to `path` if there is one."""
        return plot_epsilon(self, path)


def find_epsilon(
    model: nn.Module,
    batches: Sequence[Batch],
    attack: Attack,
    epsilons: Sequence[float] | None = None,
    *,
    target: str | Target | None = None,
    epsilon_unit: str = "absolute",
    clip: tuple[Tensor, Tensor] | None = None,
    loss_of: LossOf | None = None,
    seed: int = 0,
    progress: bool = True,
) -> EpsilonCurve:
    """Loss and accuracy of a trained model under the attack that it would be trained with, over a grid of epsilons.

    At each epsilon the last perturbed pass that the attack would train on is measured, in eval mode. The attack works
    in the scope that it has in training. In scope `vocabulary` a batch shares one norm, so the batches must have
    the size that they have in training. Only epsilon varies: a `step_size` or `init` that was given stays.

    Args:
        model: the model, not wrapped by an engine.
        batches: a few batches as the model takes them (`choose_batches`).
        attack: the attack; its own epsilon is replaced by the grid's.
        epsilons: above 0, any order; None for 20 from a hundredth to a hundred times the method's default.
        target: what is perturbed, as `adv_target`; None for the method's default.
        epsilon_unit: `absolute`, or `embedding`: the grid and the attack's lengths in units of the mean norm of a
            token's embedding.
        clip: the valid range of the target's tensor, two tensors that broadcast against it (`valid_range`).
        loss_of: (model, inputs) -> (loss, outputs); None for the model's own loss.
        seed: of whatever is random.
        progress: show a bar.

    Returns:
        An `EpsilonCurve`. Weights, `.grad`s, modes, hooks and random state are as before.

    Raises:
        ValueError: bad epsilons, no batch, an attack on weights, no loss, or a clean loss that is not finite.

    Warns:
        UserWarning: there is no suggestion, or a loss that is not finite.
    """
    model = getattr(model, "_orig_mod", model)
    grid = _check(attack, epsilons, batches)
    place = target if isinstance(target, Target) else find_target(target or attack.default_target, model)
    if isinstance(place, Weights):
        raise ValueError(f"find_epsilon is for perturbations of inputs; {attack.name} on {place} perturbs weights.")
    scope = place.resolve_scope(attack.scope, attack.default_scope)
    unit = unit_of(epsilon_unit, model)
    loss_of = loss_of or model_loss
    with evaluating(model, place, clip), _own_randomness(seed):
        batches = [on_device(batch, model) for batch in batches]
        clean = _mean([_clean(model, batch, attack, loss_of) for batch in batches])
        if not math.isfinite(clean.loss):
            raise ValueError(f"The loss without attack is {clean.loss}: no epsilon can be found for this model.")
        points = []
        for epsilon in bar(grid, progress, "epsilon"):
            own = replace(attack, epsilon=epsilon).in_units(unit)
            each = [_attacked(model, place, b, own, seed + i, scope, loss_of) for i, b in enumerate(batches)]
            points.append(_mean(each))
    loss = tuple(p.loss for p in points)
    right = [p.accuracy for p in points if p.accuracy is not None]
    guess = _guess_loss([b.get("labels") for b in batches], getattr(model, "config", None))
    return EpsilonCurve(
        epsilons=grid,
        loss=loss,
        accuracy=tuple(right) if len(right) == len(grid) else None,
        delta_norm=tuple(p.delta_norm for p in points),
        clean_loss=clean.loss,
        clean_accuracy=clean.accuracy,
        guess_loss=guess,
        suggestion=suggest(grid, loss, clean.loss, guess),
        unit=epsilon_unit,
        examples=clean.examples,
    )


def suggest(
    epsilons: Sequence[float], loss: Sequence[float], clean_loss: float, guess_loss: float | None
) -> float | None:
    """The largest epsilon up to which the attack raises the loss by less than guessing costs.

    That is `loss < clean_loss + guess_loss` there and at every smaller epsilon of the grid. The loss of a guess that
    knows the frequencies of the labels is their entropy (for regression their variance): all that the labels say. An
    attack that raises the loss by more takes away more than there is to learn. The finding of a trained model is an
    upper end for one that starts: `adv_warmup=0.5` belongs to it (measured in docs/epsilon.md).

    Args:
        epsilons: the grid, ascending.
        loss: the loss under attack at each.
        clean_loss: the loss without attack.
        guess_loss: the loss of guessing; None where it is not known.

    Returns:
        An epsilon of the grid, or None with a warning: the loss of guessing is not known or 0, the model does no
        better than it, or the loss crosses the line nowhere in the grid.
    """
    bad = [f"{e:g}" for e, value in zip(epsilons, loss, strict=True) if not math.isfinite(value)]
    if bad:
        warnings.warn(f"The loss is not finite at epsilon {', '.join(bad)}: taken for a lost model.", stacklevel=2)
    below = [value < clean_loss + (guess_loss or 0.0) for value in loss]
    if not guess_loss:
        why = "the loss of guessing is not known, or all labels are the same. Read the curve, or take more batches."
    elif clean_loss >= guess_loss:
        why = f"the loss is {clean_loss:.4g} without attack, and {guess_loss:.4g} by guessing. Train the model first."
    elif all(below):
        why = f"the model is not lost even at {epsilons[-1]:g}. Pass larger epsilons."
    elif not below[0]:
        why = f"the model is lost already at {epsilons[0]:g}. Pass smaller epsilons."
    else:
        return epsilons[below.index(False) - 1]
    warnings.warn(f"No epsilon is suggested: {why}", stacklevel=2)
    return None


def choose_batches(
    dataset: Any, collate_fn: Callable[[list[Any]], Batch], batch_size: int, batches: int = 4, seed: int = 0
) -> list[Batch]:
    """A few batches of a data set, chosen by `seed`; of a stream the first ones. The random state stays as it is.

    Args:
        dataset: examples for `collate_fn`.
        collate_fn: makes a batch of a list of examples.
        batch_size: examples a batch; the last batch of a small data set may have fewer.
        batches: how many, at most.
        seed: of the choice, and of a collator that draws.

    Raises:
        ValueError: `batches` is no whole number above 0, or the data set is empty.
    """
    if not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches must be a whole number, 1 or more; found {batches!r}.")
    with _own_randomness(seed):
        if hasattr(dataset, "__len__"):
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = [dataset[i] for i in order[: batches * batch_size]]
        else:
            chosen = list(islice(dataset, batches * batch_size))
        if not chosen:
            raise ValueError("find_epsilon needs examples; the data set is empty.")
        return [collate_fn(chosen[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]


# One batch ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """What one batch gave, or all of them."""

    loss: float
    accuracy: float | None
    delta_norm: float
    examples: int


@torch.no_grad()
def _clean(model: nn.Module, batch: Batch, attack: Attack, loss_of: LossOf) -> _Point:
    loss, outputs = loss_of(model, {name: value for name, value in batch.items() if name != attack.targeted})
    return _Point(loss.item(), _accuracy(outputs, batch), 0.0, _size(batch))


def _attacked(
    model: nn.Module, place: Target, batch: Batch, attack: Attack, seed: int, scope: str, loss_of: LossOf
) -> _Point:
    step = Step(attack.epsilon, seed, examples=examples_in(batch))
    last = under_attack(model, place, batch, attack, step, scope, loss_of)
    length = last.forward_pass.row_norms()[1].mean().item()
    return _Point(last.reported.item(), _accuracy(last.outputs, batch), length, _size(batch))


def _mean(points: list[_Point]) -> _Point:
    """The mean over examples, each of them with its batch's figures."""
    examples = sum(p.examples for p in points)

    def mean(values: list[float]) -> float:
        return sum(v * p.examples for v, p in zip(values, points, strict=True)) / examples

    right = [p.accuracy for p in points if p.accuracy is not None]
    return _Point(
        mean([p.loss for p in points]),
        mean(right) if len(right) == len(points) else None,
        mean([p.delta_norm for p in points]),
        examples,
    )


def _accuracy(outputs: Any, batch: Batch) -> float | None:
    """The share of right classes; None unless every example has one class as its label."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return None
    try:
        logits = logits_of(outputs)[0]
    except ValueError:
        return None
    known = labels.flatten() != -100
    if logits.dim() != 2 or logits.shape[1] == 1 or len(known) != len(logits) or not known.any():
        return None
    return (logits.argmax(dim=1) == labels.flatten())[known].double().mean().item()


def _guess_loss(labels: Sequence[Any], config: Any) -> float | None:
    """The loss of the best constant answer: entropy of the labels, or their variance; None where there are none."""
    if not all(isinstance(part, Tensor) for part in labels):
        return None
    problem = getattr(config, "problem_type", None)
    flat = torch.cat([part.flatten() for part in labels])
    if problem == "multi_label_classification":
        share = torch.cat(list(labels)).double().mean(0)
        loss = torch.special.entr(torch.stack([share, 1 - share])).sum(0).mean()
    elif flat.is_floating_point() or problem == "regression":
        loss = flat.double().var(correction=0)
    else:
        _, counts = flat[flat != -100].unique(return_counts=True)
        loss = torch.special.entr(counts.double() / counts.sum()).sum()
    return float(loss)


def _size(batch: Batch) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim())


# What is around it ----------------------------------------------------------------------------------------------------


def _check(attack: Attack, epsilons: Sequence[float] | None, batches: Sequence[Batch]) -> tuple[float, ...]:
    problems = []
    if attack.default_target == "weights":
        problems.append(f"{attack.name} perturbs weights, not inputs.")
    grid = _default_grid(attack) if epsilons is None else [float(e) for e in epsilons]
    if not grid or not all(0 < e < math.inf for e in grid):
        problems.append(f"epsilons must be finite numbers above 0, at least one; found {grid!r}.")
    if not len(batches):
        problems.append("there is no batch.")
    if problems:
        raise ValueError("No epsilon can be found: " + " ".join(problems))
    return tuple(sorted(set(grid)))


def _default_grid(attack: Attack) -> list[float]:
    middle: Any = next(f.default for f in fields(attack) if f.name == "epsilon")
    return [middle * 10 ** (DECADES * (i / (POINTS - 1) - 0.5)) for i in range(POINTS)]


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Inside, Python, NumPy and torch draw from `seed` on; afterwards they go on as if nothing had been drawn."""
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            random.seed(seed)
            torch.manual_seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
