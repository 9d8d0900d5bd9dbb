"""The smallest epsilon that fools the model, example by example: one number without a grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import FGM, PGD, Attack, Step
from ..engine.accelerate import bare
from ..engine.driver import unit_of
from ..perturbation.batches import examples_in, rows_of
from ..perturbation.target import Target
from ..perturbation.targets import find_target
from .data import bar, batches_of, on_device
from .evaluate import Evaluation
from .passes import evaluating, passes_of
from .report import plain


@dataclass(frozen=True)
class RadiusReport:
    """What `smallest_epsilons` found.

    Args:
        radii: of each example, the smallest epsilon that was found to fool the model: 0 where it is wrong without
            attack, infinite where it stands at `largest`.
        largest: the largest epsilon that was tried.
        resolution: how much smaller than a radius, at most, the next epsilon is at which the example stood.
    """

    radii: tuple[float, ...]
    largest: float
    resolution: float

    @property
    def median(self) -> float:
        """The radius that half of the examples do not exceed; infinite where half or more stand."""
        ordered = sorted(self.radii)
        return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

    def interval(self) -> tuple[float, float]:
        """The median's 95 % interval over examples, from order statistics (a sign test turned round)."""
        ordered, count = sorted(self.radii), len(self.radii)
        below, chance = 0, 0.0
        while below < count // 2 and chance + math.comb(count, below) / 2**count <= 0.025:
            chance += math.comb(count, below) / 2**count
            below += 1
        return ordered[max(below - 1, 0)], ordered[min(count - below, count - 1)]

    def accuracy(self, epsilon: float) -> float:
        """The share of examples that stand at an epsilon, at most `largest`."""
        return sum(radius > epsilon for radius in self.radii) / len(self.radii)

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON: None for a radius that is infinite."""
        return plain(asdict(self))


def smallest_epsilons(
    model: nn.Module,
    dataset: Any,
    attack: Attack | None = None,
    *,
    largest: float = 2.0,
    halvings: int = 9,
    target: str | Target | None = None,
    epsilon_unit: str = "absolute",
    clip: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RadiusReport:
    """By bisection: every example of a batch is attacked at an epsilon of its own.

    Args:
        model: a classifier.
        dataset: as for `evaluate_robustness`.
        attack: the attack; None for PGD of 20 steps.
        largest: the largest epsilon; what stands there has no radius.
        halvings: how often the range is halved.
        target: what is perturbed, as `adv_target`; None for the input token lookup.
        epsilon_unit: `absolute`, or `embedding`: radii in units of the mean norm of a token's embedding.
        clip: the valid range of the target's tensor (`valid_range`).
        batch_size: examples a batch.
        collate_fn: makes a batch of a list of examples; None for transformers' `default_data_collator`.
        seed: of whatever the attack draws.
        progress: show a bar.

    Returns:
        A `RadiusReport`.

    Raises:
        ValueError: the data set is empty, the model no classifier, or its target has not one row an example.
    """
    if not 0 < largest < math.inf or halvings < 1:
        raise ValueError(f"largest must be above 0 and halvings 1 or more; found {largest!r} and {halvings!r}.")
    model = bare(model, None)
    place = find_target(target or "word_embeddings", model)
    search = _Search(model, place, attack or PGD(steps=20), unit_of(epsilon_unit, model), largest, halvings)
    radii: list[float] = []
    with evaluating(model, place, clip):
        for number, batch in enumerate(bar(batches_of(dataset, batch_size, collate_fn, seed), progress, "radius")):
            radii += search.radii(on_device(batch, model), seed + number).tolist()
    if not radii:
        raise ValueError("Robustness can't be evaluated: the data set is empty.")
    return RadiusReport(tuple(radii), largest, largest / 2**halvings)


class _Search:
    def __init__(
        self, model: nn.Module, place: Target, attack: Attack, unit: float, largest: float, halvings: int
    ) -> None:
        self._model, self._place, self._unit = model, place, unit
        self._evaluation = Evaluation(model, place, unit, {attack.targeted})
        self._attack = attack.in_units(unit)
        self._largest, self._halvings, self._dims = largest, halvings, 3
        self._scope = place.resolve_scope(attack.scope, "example")

    def radii(self, batch: Mapping[str, Any], seed: int) -> Tensor:
        """Of each example, (examples,)."""
        clean = self._evaluation.clean(batch)
        if not self._evaluation.task.falls:
            metric = self._evaluation.task.metric
            raise ValueError(f"A radius is where an answer turns wrong; where {metric} is measured there is none.")
        self._refuse_other_rows(batch)
        found = torch.where(clean.right, math.inf, 0.0).double()
        low, tried = torch.zeros_like(found), torch.full_like(found, self._largest)
        for halving in range(self._halvings + 1):
            # At the largest epsilon first; then the examples that fell there, each in the middle of its range.
            rows = (found.isinf() if halving == 0 else (found > 0) & found.isfinite()).nonzero().flatten()
            if not len(rows):
                break
            fell = self._fell(batch, rows, tried[rows], seed)
            found[rows] = torch.where(fell, tried[rows], found[rows])
            low[rows] = torch.where(fell, low[rows], tried[rows])
            tried = (low + found) / 2
        return found

    def _fell(self, batch: Mapping[str, Any], rows: Tensor, epsilons: Tensor, seed: int) -> Tensor:
        part = rows_of(batch, rows, examples_in(batch))
        step = Step((epsilons * self._unit).view(-1, *[1] * (self._dims - 1)), seed, examples=len(rows))
        last = passes_of(self._model, self._place, part, self._attack, step, self._scope)[-1]
        return ~self._evaluation.task.judge(last.outputs, part).right

    def _refuse_other_rows(self, batch: Mapping[str, Any]) -> None:
        """Finds the shape of the tensor that is perturbed."""
        examples = examples_in(batch)
        none = Step(0.0, examples=examples)
        last = passes_of(self._model, self._place, batch, FGM(), none, "example")[-1]
        rows, self._dims = len(last.forward_pass.tensor.delta()), last.forward_pass.tensor.delta().dim()
        if rows != examples or self._scope not in ("example", "token"):
            raise ValueError(
                f"A radius of each example needs one row an example and scope 'example' or 'token'; here {examples} "
                f"examples are {rows} rows, and the scope is {self._scope!r}."
            )
