"""What an evaluation found: figures with intervals, example by example, and how two models differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The standard normal's 97.5 % point: intervals are of 95 %.
_Z = 1.959963984540054


def plain(value: Any) -> Any:
    """The same with None in place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class RobustnessReport:
    """What `evaluate_robustness` measured.

    Args:
        examples: how many examples were evaluated.
        epsilons: the grid, ascending.
        clean: the score without attack, in terms of `metric`.
        scores: by attack, the score at each epsilon; it never improves as epsilon grows.
        metric: `accuracy` of examples, `exact_match` of answers, `squared_error` of regression, or `loss` of language
            models.
        clean_further: by name, the task's other figures without attack (`tasks`): Pearson's correlation, F1, ...
        further: by name, the same by attack at each epsilon.
        labels: of each example; of a language model how many tokens it predicts.
        predictions: without attack, of each example; of a language model its loss.
        fell: by attack, the smallest epsilon at which each example was wrong: 0 without attack, None where it never
            was. None for regression and language models.
        masking: signs that gradients are masked, one sentence each, where the attacks were `strong`.
    """

    examples: int
    epsilons: tuple[float, ...]
    clean: float
    scores: dict[str, tuple[float, ...]]
    metric: str = "accuracy"
    clean_further: dict[str, float] = field(default_factory=dict)
    further: dict[str, dict[str, tuple[float, ...]]] = field(default_factory=dict)
    labels: tuple[Any, ...] = ()
    predictions: tuple[Any, ...] = ()
    fell: dict[str, tuple[float | None, ...]] | None = None
    masking: tuple[str, ...] = ()

    @property
    def is_share(self) -> bool:
        """Whether scores are shares of examples, which have intervals."""
        return self.metric in ("accuracy", "exact_match")

    @property
    def clean_pearson(self) -> float | None:
        """Of regression: Pearson's correlation without attack."""
        return self.clean_further.get("pearson")

    @property
    def pearson(self) -> dict[str, tuple[float, ...]] | None:
        """Of regression: by attack, Pearson's correlation at each epsilon."""
        return self.further.get("pearson")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, for JSON: None where a number is not finite."""
        return plain(asdict(self))

    def rows(self) -> list[dict[str, Any]]:
        """One row an example, for `datasets.Dataset.from_list`: label, prediction, and where it fell to each attack."""
        fell = self.fell or {}
        return [
            {"label": label, "prediction": prediction} | {f"fell_{name}": fell[name][i] for name in fell}
            for i, (label, prediction) in enumerate(zip(self.labels, self.predictions, strict=True))
        ]

    def intervals(self, attack: str | None = None) -> list[tuple[float, float]]:
        """Of the accuracy at each epsilon, or of the clean one (None), the 95 % interval over examples.

        Wilson's (1927), which stays within 0 and 1 and does not shrink to a point where no example or every one falls.

        Raises:
            ValueError: the scores are no shares of examples.
        """
        if not self.is_share:
            raise ValueError(f"Intervals are of shares of examples, such as accuracy; these scores are {self.metric}.")
        scores = (self.clean,) if attack is None else self.scores[attack]
        return [wilson(score, self.examples) for score in scores]

    def cells(self, attack: str | None = None) -> list[str]:
        """The figures at each epsilon, or the clean one (None), as a table shows them."""
        scores = (self.clean,) if attack is None else self.scores[attack]
        if not self.is_share:
            return [f"{score:.4f}" for score in scores]
        bounds = self.intervals(attack)
        return [f"{score:.4f} ({low:.3f}-{high:.3f})" for score, (low, high) in zip(scores, bounds, strict=True)]

    def table(self) -> list[list[str]]:
        """The heads, and a row an attack and figure; shares of examples with their 95 % intervals."""
        rows = [["attack", "clean", *(f"epsilon {e:g}" for e in self.epsilons)]]
        for attack in self.scores:
            rows.append([attack, *self.cells(), *self.cells(attack)])
            for name, of in self.further.items():
                figures = (self.clean_further[name], *of[attack])
                rows.append([f"  {name.replace('_', ' ')}", *(f"{figure:.4f}" for figure in figures)])
        return rows

    def metrics(self, prefix: str = "robust") -> dict[str, float]:
        """The report as flat figures by name, such as `robust_pgd-10_0.2`, for logs and `all_results.json`.

        The task's other figures as well: `robust_pearson_pgd-10_0.2`.
        """
        flat = {f"{prefix}_clean": self.clean, **self._flat(prefix, self.scores)}
        for name, rows in self.further.items():
            flat |= {f"{prefix}_{name}_clean": self.clean_further[name], **self._flat(f"{prefix}_{name}", rows)}
        return flat

    def _flat(self, prefix: str, rows: Mapping[str, Sequence[float]]) -> dict[str, float]:
        return {f"{prefix}_{a}_{e:.12g}": s for a, row in rows.items() for e, s in zip(self.epsilons, row, strict=True)}


@dataclass(frozen=True)
class Difference:
    """How two models differ on the same examples, at one epsilon.

    Args:
        attack: the attack; `clean` without one.
        epsilon: its epsilon.
        difference: accuracy of the second less that of the first.
        interval: its 95 % interval over examples.
        only_first: how many examples the first has right and the second has not.
        only_second: and the other way round.
        p_value: of McNemar's exact test, two-sided: how probable so uneven a split of those is by chance.
    """

    attack: str
    epsilon: float
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p_value: float


def compare(first: RobustnessReport, second: RobustnessReport) -> list[Difference]:
    """The paired differences of two models: without attack, and for each attack and epsilon that both reports have.

    The interval is Wald's with half an example added to each kind (Agresti and Min 2005), which a sample without any
    difference needs; the test is McNemar's (1947), exact.

    Raises:
        ValueError: the reports are of other examples, of regression, or share no attack and epsilon.
    """
    if first.fell is None or second.fell is None:
        raise ValueError(
            "Only reports that say where each example fell can be compared; those of regression and language models do "
            "not."
        )
    if first.labels != second.labels:
        raise ValueError(
            f"The reports are not of the same examples: {first.examples} and {second.examples}, with other labels. "
            "Evaluate both models on the same data in the same order."
        )
    epsilons = [e for e in first.epsilons if e in second.epsilons]
    attacks = [name for name in first.fell if name in second.fell]
    if not attacks or not epsilons:
        raise ValueError("No attack, or no epsilon, is in both reports.")
    found = [_difference("clean", 0.0, _standing(first, attacks[0], 0.0), _standing(second, attacks[0], 0.0))]
    return found + [
        _difference(name, e, _standing(first, name, e), _standing(second, name, e))
        for name in attacks
        for e in epsilons
    ]


def _standing(report: RobustnessReport, attack: str, epsilon: float) -> list[bool]:
    assert report.fell is not None
    return [fell is None or fell > epsilon for fell in report.fell[attack]]


def _difference(attack: str, epsilon: float, first: Sequence[bool], second: Sequence[bool]) -> Difference:
    count = len(first)
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    # Half an example of each of the four kinds: right in both, in neither, in one of them.
    gain, loss, total = only_second + 0.5, only_first + 0.5, count + 2
    middle = (gain - loss) / total
    half = _Z * math.sqrt(max((gain + loss) / total - middle**2, 0.0) / total)
    interval = max(middle - half, -1.0), min(middle + half, 1.0)
    difference = (only_second - only_first) / count
    return Difference(attack, epsilon, difference, interval, only_first, only_second, mcnemar(only_first, only_second))


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test, two-sided: a fair coin is thrown for each example on which models differ."""
    thrown = only_first + only_second
    tail = sum(math.comb(thrown, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, float(2 * tail / 2**thrown))


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` examples."""
    spread = _Z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(middle - half, 0.0), min(middle + half, 1.0)
