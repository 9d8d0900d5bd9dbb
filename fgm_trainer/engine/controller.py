"""Epsilon `auto`: found while training, so that the attack takes a given share of what there is to lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ForwardPass, GradientPass, Total, TrainPass
from .guessing import GuessingLoss
from .running_pass import RunningPass

# By default the loss under attack may exceed that of guessing by half of the distance (docs/epsilon.md).
STRENGTH = 1.5
# The first step's epsilon, before the length of what is perturbed is known.
_FIRST = 1e-4
# Relative to that length: below which epsilon never falls, and where it starts.
_FLOOR, _START = 1e-5, 5e-3
# How much of the smoothed losses is kept from step to step, and the factors by which epsilon falls and rises at most.
_DECAY = 0.9
_FALL, _RISE = 0.5, 1.2
# At most, where epsilon is smaller than at the start; and where the model is no better than guessing.
_RETURN, _LOST = 2.0, 0.8
# Losses whose difference is below this share of the loss of guessing are near to each other.
_NEAR = 0.05
# Where the loss of guessing is not known: the steps whose mean loss takes its place, and the share of the clean loss
# that there is to lose at least.
_START_STEPS = 10
_LEAST = 0.1


class EpsilonController:
    """Steers epsilon so that under attack the loss reaches `strength` times that of guessing, or a little more.

    With c the clean loss, g what the attack adds (`losses_of`), e epsilon and H the loss of guessing, means over an
    optimizer step of all processes, smoothed over about ten steps; t a twentieth of H, or of c where that is larger;
    r the odds of a rare label, at most 1 (`GuessingLoss.bearable`), and rise what the schedule says:

        target   = strength * rise * r * max(H + t - c, 0)
        epsilon <- epsilon * clip((target + t) / (g * epsilon / e + t), 0.5, 1.2)

    and at most 0.8 times epsilon where c >= H: a model that knows nothing yet, or no more, is hardly attacked. Epsilon
    starts at 5e-3 times the length of what is perturbed, stays between a floor and a ceiling that are relative to that,
    and may double where it is smaller than at the start. Where H is not known (language models, a loss of your own),
    H - c is what training has gained so far, and a tenth of c at least.

    A `Memory`: settled between optimizer steps, the same on all processes, saved with a checkpoint. Its state is on the
    device, and nothing is read from there.

    Args:
        strength: 1 lets the loss under attack reach that of guessing.
        device: where the model is.
        guessing: knows H.
        ceiling: what epsilon never exceeds, relative to the length of what is perturbed (`Target.ceiling`).
        most: what it never exceeds either.
    """

    def __init__(
        self,
        strength: float,
        device: torch.device,
        guessing: GuessingLoss,
        *,
        ceiling: float = 0.035,
        most: float = math.inf,
    ) -> None:
        self._strength, self._guessing, self._ceiling, self._most = strength, guessing, ceiling, most
        names = ("clean", "added", "guess", "mean_epsilon", "weight", "start", "steps", "length", "lengths")
        self._state = {name: torch.zeros((), device=device) for name in names}
        self._state["epsilon"] = torch.full((), min(most, _FIRST), device=device)
        self._state["labels"] = guessing.new_counts().to(device)
        self._observed: list[Tensor] = []
        self._rise = 1.0

    @property
    def epsilon(self) -> Tensor:
        """This step's epsilon, a scalar tensor."""
        return self._state["epsilon"]

    @property
    def idle(self) -> bool:
        """Whether epsilon is no larger than at the start; waits for the device."""
        return bool(self.epsilon <= _START * self._state["length"])

    def observe(
        self,
        passes: Sequence[RunningPass],
        labels: Any,
        rise: float = 1.0,
        *,
        of_losses: float = 1.0,
        of_divergences: float = 1.0,
    ) -> None:
        """Notes an attacked micro-batch.

        Args:
            passes: all that were run, in order.
            labels: the batch's, None where it has none of its own.
            of_losses: what reported losses are multiplied by, so that their mean is that of the step.
            of_divergences: the same of divergences.
            rise: the part of `strength` that the next step shall have, by the schedule.
        """
        self._rise = rise
        perturbed = [each for each in passes if not each.is_clean]
        values, deltas = perturbed[-1].forward_pass.example_norms()
        moved = (deltas > 0) & (values > 0)
        relative = torch.where(moved, deltas / values, 0.0).sum()
        clean, added = losses_of(passes, of_losses, of_divergences)
        self.note(clean, added, relative, moved.sum(), labels)

    def observe_clean(self, loss: Tensor, labels: Any) -> None:
        """Notes the loss of a micro-batch without attack, multiplied as in `observe`."""
        nothing = torch.zeros_like(self.epsilon)
        self.note(loss, nothing.log(), nothing, nothing, labels)

    def note(self, clean: Tensor, added: Tensor, relative: Tensor, rows: Tensor, labels: Any) -> None:
        """Notes the figures of a micro-batch.

        Args:
            clean: the clean loss.
            added: what the attack adds to it.
            relative: of each row that is perturbed, the length of the perturbation over that of what it is added to,
                added up.
            rows: how many those are.
            labels: the batch's.
        """
        values = (torch.ones_like(self.epsilon), clean, added, relative, rows)
        figures = torch.stack([value.detach().to(self.epsilon) for value in values])
        self._observed.append(torch.cat([figures, self._guessing.counts(labels, figures)]))

    def settle(self, model: nn.Module, total: Total) -> None:
        """Between two optimizer steps: the next one's epsilon, from what was observed of the last."""
        if not self._observed:
            return
        sums, self._observed = total(torch.stack(self._observed).sum(0)), []
        count, clean, added, relative, rows = sums[:5]
        self._state["labels"] = self._state["labels"] + sums[5:]
        # Of the labels of this step: what they make the loss differ by, they make this differ by as well.
        guess = self._guessing.loss(self._state["labels"], sums[5:])
        attacked = self._smooth(clean / count, added / count, guess)
        steered = torch.where(attacked, self._steered(), self.epsilon)
        # A loss that an attack takes out of range.
        steered = torch.where(added.isnan() | (added == math.inf), self.epsilon * _FALL, steered)
        self._state["epsilon"] = self._within(steered, self.epsilon * rows / relative)

    def _smooth(self, clean: Tensor, added: Tensor, guess: Tensor) -> Tensor:
        """Takes a step's losses into the means; whether it had both."""
        state = self._state
        early = (state["steps"] < _START_STEPS) & clean.isfinite()
        start = state["start"] + (clean - state["start"]) / (state["steps"] + 1)
        state["start"], state["steps"] = torch.where(early, start, state["start"]), state["steps"] + early
        attacked = clean.isfinite() & added.isfinite()
        values = {"clean": clean, "added": added, "guess": guess, "mean_epsilon": self.epsilon}
        for name, value in (*values.items(), ("weight", torch.ones_like(clean))):
            state[name] = torch.where(attacked, _DECAY * state[name] + (1 - _DECAY) * value, state[name])
        return attacked

    def _steered(self) -> Tensor:
        state = self._state
        clean, added, epsilon = (state[name] / state["weight"] for name in ("clean", "added", "mean_epsilon"))
        to_lose = _to_lose(clean, state["guess"] / state["weight"], state["start"])
        near = _NEAR * (clean.abs() + to_lose.clamp(min=0)) + 1e-12
        bearable = self._guessing.bearable(state["labels"])
        target = self._rise * self._strength * bearable * (to_lose + near).clamp(min=0)
        # What the attack adds at this epsilon. An attack that lowers the loss, by chance, adds nothing.
        adds = (added * self.epsilon / epsilon).clamp(min=0)
        factor = ((target + near) / (adds + near)).clamp(min=_FALL)
        rise = torch.where(self.epsilon < _START * state["length"], _RETURN, _RISE)
        # Where an attack changes nothing at all, a larger one need not either.
        rise = torch.where(added == 0, 1.0, rise)
        rise = torch.where(to_lose > 0, rise, _LOST)
        # How far the model is from guessing; one that has collapsed would be moved by nothing, however large.
        learned = (to_lose / near).clamp(0, 1)
        ceiling = (self._ceiling * learned).clamp(min=_START) * state["length"]
        return torch.minimum(self.epsilon * torch.minimum(factor, rise), ceiling)

    def _within(self, steered: Tensor, length: Tensor) -> Tensor:
        """Within floor and ceiling; where the length is seen for the first time, what epsilon starts with."""
        state, seen = self._state, length.isfinite()
        first = seen & (state["lengths"] == 0)
        # The mean of all steps: batches of like length may begin with the longest.
        state["lengths"] = state["lengths"] + seen
        mean = state["length"] + (length - state["length"]) / state["lengths"]
        known = state["length"] = torch.where(seen, mean, state["length"])
        within = torch.where(
            first | steered.isnan(), _START * known, steered.clamp(_FLOOR * known, self._ceiling * known)
        )
        return torch.where(known > 0, within.clamp(max=self._most), self.epsilon)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {name: value.to(self.epsilon.device) for name, value in state.items()}


def _to_lose(clean: Tensor, guess: Tensor, start: Tensor) -> Tensor:
    """How far the clean loss is from that of guessing; where that is not known, what training has gained."""
    return torch.where(guess.isnan(), torch.maximum(start - clean, _LEAST * clean.abs()), guess - clean)


def losses_of(
    passes: Sequence[RunningPass], of_losses: float = 1.0, of_divergences: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The clean loss, and what the attack adds to the loss that is trained on, over the mean weight of all examples.

    Reported losses are multiplied by the one factor, divergences by the other.

    With a the loss under attack, c the clean loss, v and w the weights of perturbed and clean examples the second is
    2 v (a - c) / (v + w): a - c where both have the same weight, twice that where only perturbed ones are trained on.
    With a divergence of weight v in place of a - c it is 2 v / w times that. Without a clean pass, c is the loss of
    the first; where that is the only one, c is what its gradient says.
    """
    trained = [(each, each.request) for each in passes if isinstance(each.request, TrainPass)]
    last, request = [(each, request) for each, request in trained if not each.is_clean][-1]
    of_part = [each for each in passes if isinstance(each.request, GradientPass) and each.request.rows is request.rows]
    perturbed_loss = last.unweighted * of_losses
    if request.rows is not None and of_part:
        return _losses_of_a_part(of_part[0], last, request, perturbed_loss)
    if len(passes) == 1:
        relative = _to_first_order(last, last.forward_pass.tensor.delta()).clamp(max=1)
        return perturbed_loss * (1 - relative), 2 * perturbed_loss * relative
    seen = [each for each in passes if each.is_clean and not isinstance(each.request, ForwardPass)]
    clean = next((each for each in seen if each.is_training), (seen or passes)[0]).unweighted * of_losses
    weight = sum(request.weight for each, request in trained if each.is_clean)
    if request.weight == 0:
        share = sum(against.weight for against in request.against) / (weight or 1.0)
        return clean, last.unweighted * of_divergences * (2 * share)
    perturbed = sum(request.weight for each, request in trained if not each.is_clean)
    return clean, (perturbed_loss - clean) * (2 * perturbed / (perturbed + weight))


def _losses_of_a_part(first: RunningPass, last: RunningPass, request: TrainPass, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The same where a part of the examples is perturbed, and the rest of the same pass is clean.

    The gradient is of that part alone, and its loss a mean over it, or its share of a sum over the whole step: what the
    two passes report can't be subtracted. What the perturbation adds over the loss is the same either way, to first
    order <gradient, delta> / loss; the part's loss stands for that of all.
    """
    assert isinstance(request.delta, Tensor)
    assert request.rows is not None
    relative = _to_first_order(first, request.delta) * len(request.rows) / last.examples
    clean = loss / (1 + relative)
    return clean, 2 * clean * relative


def _to_first_order(running: RunningPass, delta: Tensor) -> Tensor:
    """By what part of a pass's loss a perturbation raises it, where that has the gradient that it has there."""
    gradient = running.forward_pass.tensor.gradient(running.scales.of_loss)
    return (gradient * delta).sum() / running.loss
