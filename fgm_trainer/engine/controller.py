"""Epsilon `auto`: found while training, so that the attack takes a given share of what there is to lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ForwardPass, TrainPass
from .driver import RunningPass
from .guessing import GuessingLoss

# The first step's epsilon, before the length of what is perturbed is known.
_FIRST = 1e-4
# Relative to that length: below which epsilon never falls, and where it starts.
_FLOOR, _START = 1e-5, 1e-3
# How much of the smoothed losses is kept from step to step, and the factors by which epsilon falls and rises at most.
_DECAY = 0.9
_FALL, _RISE = 0.5, 1.1
# Where it is smaller than at the start, it may rise faster.
_RETURN = 2.0
# Where the loss of guessing is not known: the steps whose mean loss takes its place, and the share of the clean loss
# that there is to lose at least.
_START_STEPS = 10
_LEAST = 0.1


class EpsilonController:
    """Steers epsilon so that the loss rises under attack by `strength` times what there is to lose.

    With c the clean loss, g what the attack adds to it (or the divergence, where a method trains on one), e epsilon and
    H the loss of guessing; c, g and e means over an optimizer step of all processes, smoothed over about ten steps:

        target    = strength * max(H - c, 0)
        epsilon <- epsilon * clip((target / g) * (e / epsilon), 0.5, 1.1)

    between a floor and a ceiling that are relative to the length of what is perturbed. It starts at 1e-3 times that,
    and may double where it is smaller. Where H is not known (language models, a loss of your own), H - c is what
    training has gained so far, and a tenth of c at least.

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
        ceiling: float = 0.1,
        most: float = math.inf,
    ) -> None:
        self._strength, self._guessing, self._ceiling, self._most = strength, guessing, ceiling, most
        names = ("clean", "added", "mean_epsilon", "weight", "start", "steps", "length")
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

    def observe(self, passes: Sequence[RunningPass], labels: Any, micro_batches: int = 1, rise: float = 1.0) -> None:
        """Notes an attacked micro-batch.

        Args:
            passes: all that were run, in order.
            labels: the batch's, None where it has none of its own.
            micro_batches: by how many the loop has divided the losses that it reported.
            rise: the part of `strength` that the next step shall have, by the schedule.
        """
        self._rise = rise
        perturbed = [each for each in passes if not each.is_clean]
        values, deltas = perturbed[-1].forward_pass.row_norms()
        moved = (deltas > 0) & (values > 0)
        relative = torch.where(moved, deltas / values, 0.0).sum()
        clean, added = clean_loss(passes) * micro_batches, added_loss(passes) * micro_batches
        self.note(clean, added, relative, moved.sum(), labels)

    def observe_clean(self, loss: Tensor, labels: Any, micro_batches: int = 1) -> None:
        """Notes a micro-batch without attack, arguments as for `observe`."""
        nothing = torch.zeros_like(self.epsilon)
        self.note(loss * micro_batches, nothing.log(), nothing, nothing, labels)

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

    def settle(self, model: nn.Module, total: Callable[[Tensor], Tensor]) -> None:
        """Between two optimizer steps: the next one's epsilon, from what was observed of the last."""
        if not self._observed:
            return
        sums, self._observed = total(torch.stack(self._observed).sum(0)), []
        count, clean, added, relative, rows = sums[:5]
        self._state["labels"] = self._state["labels"] + sums[5:]
        attacked = self._smooth(clean / count, added / count)
        steered = torch.where(attacked, self._steered(), self.epsilon)
        # A loss that an attack takes out of range.
        steered = torch.where(added.isnan() | (added == math.inf), self.epsilon * _FALL, steered)
        self._state["epsilon"] = self._within(steered, self.epsilon * rows / relative)

    def _smooth(self, clean: Tensor, added: Tensor) -> Tensor:
        """Takes a step's losses into the means; whether it had both."""
        state = self._state
        early = (state["steps"] < _START_STEPS) & clean.isfinite()
        start = state["start"] + (clean - state["start"]) / (state["steps"] + 1)
        state["start"], state["steps"] = torch.where(early, start, state["start"]), state["steps"] + early
        attacked = clean.isfinite() & added.isfinite()
        for name, value in (("clean", clean), ("added", added), ("mean_epsilon", self.epsilon), ("weight", 1.0)):
            state[name] = torch.where(attacked, _DECAY * state[name] + (1 - _DECAY) * value, state[name])
        return attacked

    def _steered(self) -> Tensor:
        state = self._state
        clean, added, epsilon = (state[name] / state["weight"] for name in ("clean", "added", "mean_epsilon"))
        target = self._rise * self._strength * self._to_lose(clean)
        # Where an attack lowers the loss, by chance, epsilon may rise; where it changes nothing at all, it need not.
        wanted = torch.where(added > 0, target / added * epsilon, torch.where(added == 0, self.epsilon, math.inf))
        rise = torch.where(self.epsilon < _START * state["length"], _RETURN, _RISE)
        factor = torch.minimum((wanted / self.epsilon).clamp(min=_FALL), rise)
        return self.epsilon * torch.where(target > 0, factor, _FALL)

    def _to_lose(self, clean: Tensor) -> Tensor:
        guess = self._guessing.loss(self._state["labels"])
        gained = torch.maximum(self._state["start"] - clean, _LEAST * clean.abs())
        return torch.where(guess.isnan(), gained, guess - clean)

    def _within(self, steered: Tensor, length: Tensor) -> Tensor:
        """Within floor and ceiling; where the length is seen for the first time, what epsilon starts with."""
        state = self._state
        first = (state["length"] == 0) & length.isfinite()
        known = state["length"] = torch.where(first, length, state["length"])
        within = torch.where(
            first | steered.isnan(), _START * known, steered.clamp(_FLOOR * known, self._ceiling * known)
        )
        return torch.where(known > 0, within.clamp(max=self._most), self.epsilon)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._state = {name: value.to(self.epsilon.device) for name, value in state.items()}


def clean_loss(passes: Sequence[RunningPass]) -> Tensor:
    """The loss of the clean inputs; of a method that never sees them, that of its first pass."""
    clean = [each for each in passes if each.is_clean and not isinstance(each.request, ForwardPass)]
    return next((each for each in clean if each.is_training), (clean or passes)[0]).unweighted


def added_loss(passes: Sequence[RunningPass]) -> Tensor:
    """What the last perturbation adds to the loss of the examples that have it, or the divergence that it makes."""
    last = [each for each in passes if each.is_training and not each.is_clean][-1]
    assert isinstance(last.request, TrainPass)
    if last.request.weight == 0:
        return last.unweighted
    added = last.unweighted - clean_loss(passes)
    return added if last.request.rows is None else added * (last.examples / len(last.request.rows))
