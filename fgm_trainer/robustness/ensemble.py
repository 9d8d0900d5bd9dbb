"""The strong evaluation: several attacks, of which the worst counts for each example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import PGD, Attack, Noise
from ..perturbation.divergence import logits_of
from .passes import LossOf
from .report import RobustnessReport, mcnemar

LOSSES = ("own", "margin", "targeted")


@dataclass(frozen=True)
class Member:
    """One attack of an ensemble.

    Args:
        attack: the attack.
        loss: what it raises: the model's `own` loss; the `margin` of the most probable wrong class over the true one;
            or that of a `targeted` class, each wrong class in turn.
        restarts: how often it starts anew, with other random numbers.
    """

    attack: Attack
    loss: str = "own"
    restarts: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.attack, Attack):
            raise ValueError(
                f"A member's attack is one of fgm_trainer's; found {type(self.attack).__name__}. "
                "Others stand in the list of attacks by themselves."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}; found {self.loss!r}.")


@dataclass(frozen=True)
class Ensemble:
    """Attacks one after the other, each on the examples that still stand; an example falls at any iterate of any.

    Args:
        name: what the report calls it.
        members: the attacks, cheap ones first.
        adds_up: whether examples that fell to the attacks before it in the evaluation count as fallen.
    """

    name: str
    members: Sequence[Member]
    adds_up: bool = False

    def runs(self, classes: int) -> Iterator[tuple[Attack, LossOf | None]]:
        """Each run with what it raises, None for the model's own loss.

        Args:
            classes: of a label; 1 where there is no margin (`tasks.Task.classes`). Of two classes the margin is that
                towards the only wrong one, so nothing is targeted.
        """
        for member in self.members:
            losses: list[LossOf | None] = [None]
            if member.loss == "margin":
                losses = [margin_loss()] if classes > 1 else []
            elif member.loss == "targeted":
                losses = [margin_loss(number) for number in range(1, classes)] if classes > 2 else []
            for loss_of in losses:
                yield from [(member.attack, loss_of)] * member.restarts


def strong(steps: int = 50, restarts: int = 2) -> tuple[Attack | Ensemble, ...]:
    """What a sceptic would ask for: the counterpart for embeddings of AutoAttack (Croce and Hein 2020).

    PGD of 10 steps, to show by how much it overstates; PGD of `steps`; random draws in the ball, which need no
    gradient; and `strong`: the worst of all of these and of PGD of `steps` with random starts on the model's own loss,
    on the margin, and towards each wrong class.

    Args:
        steps: of the long attacks.
        restarts: random starts of each loss.
    """
    start = PGD(steps=steps, random_start=True)
    white = [Member(start, loss, restarts) for loss in ("own", "margin", "targeted")]
    return (
        PGD(steps=10),
        PGD(steps=steps),
        Ensemble("random-20", [Member(Noise(), restarts=20)]),
        Ensemble("strong", white, adds_up=True),
    )


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """How far a wrong class is ahead of the true one, (examples,): the difference of logits ratio (DLR).

    Croce and Hein 2020, eq. 6: (max of the others - true) / (largest - third largest), which no scale of the logits
    changes. Of two classes, which have no third, the difference alone.

    Args:
        logits: (examples, classes).
        labels: int64, (examples,).
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.masked_fill(nn.functional.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    ahead = others.amax(1) - own
    if logits.shape[1] < 3:
        return ahead
    ordered = logits.sort(dim=1, descending=True).values
    return ahead / (ordered[:, 0] - ordered[:, 2]).clamp(min=1e-12)


def targeted_margin(logits: Tensor, labels: Tensor, wrong: Tensor) -> Tensor:
    """How far the classes `wrong`, int64, (examples,), are ahead of the true ones, (examples,).

    Croce and Hein 2020, eq. 7: over largest - (third + fourth largest) / 2. Of three classes the difference alone.
    """
    ahead, own = logits.gather(1, torch.stack([wrong, labels], 1)).unbind(1)
    if logits.shape[1] < 4:
        return ahead - own
    ordered = logits.sort(dim=1, descending=True).values
    return (ahead - own) / (ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2).clamp(min=1e-12)


def margin_loss(number: int | None = None) -> LossOf:
    """The sum of the margins of a batch, as a function of model and inputs that gives (loss, outputs).

    Args:
        number: where given, that of the class which is this far after the true one, round the end.
    """

    def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        logits = logits_of(outputs)[0]
        labels = inputs["labels"].flatten()
        # Of tags those count that there are.
        logits, labels = logits.flatten(0, -2)[labels >= 0], labels[labels >= 0]
        if number is None:
            return margin(logits, labels).sum(), outputs
        return targeted_margin(logits, labels, (labels + number) % logits.shape[1]).sum(), outputs

    return loss_of


def signs_of_masking(report: RobustnessReport, far: int) -> tuple[str, ...]:
    """Signs that the model hides its gradients rather than resists, after `strong` (Athalye et al. 2018, section 3.1).

    Args:
        report: of the attacks of `strong`.
        far: how many examples stand at a hundred times the largest epsilon.
    """
    if report.fell is None:
        return ()
    short, long, draws = (report.fell[name] for name in list(report.fell)[:3])
    found = []
    by_chance, to_gradient = _only(draws, short), _only(short, draws)
    if by_chance > to_gradient:
        found.append(
            f"Random draws fool the model on {by_chance} examples that 10-step PGD does not, and PGD on {to_gradient} "
            "that they do not: the gradient says less than chance."
        )
    fewer, more = _only(short, long), _only(long, short)
    if fewer > more and mcnemar(fewer, more) < 0.05:
        found.append(f"More steps are weaker: {fewer} examples fall to 10 steps alone, {more} to more alone.")
    if far:
        found.append(f"{far} examples stand at a hundred times the largest epsilon, where nothing of them is left.")
    scores, gradients = _only(draws, long), _only(long, draws)
    if scores > gradients:
        found.append(
            f"{scores} examples fall to random draws, which see scores alone, and not to the long PGD; {gradients} the "
            "other way round."
        )
    return tuple(found)


def _only(one: Sequence[float | None], other: Sequence[float | None]) -> int:
    """How many examples fell to one attack at some epsilon, and to the other at none."""
    return sum(a is not None and b is None for a, b in zip(one, other, strict=True))
