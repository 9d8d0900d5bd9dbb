"""Token-aware virtual adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..perturbation.calls import TargetCall
from ..perturbation.geometry import Units, ascent, project
from .base import AUTO, Iterated
from .freelb import start_noise
from .registry import register
from .requests import Memory, Passes, PassResult, Step, Total, TrainPass


@register("token_aware")
@dataclass(frozen=True, kw_only=True)
class TokenAware(Iterated):
    """TAVAT: FreeLB, and a perturbation for each vocabulary entry that is remembered from step to step.

    Idea: some tokens matter more than others, and a batch is too short to find out which; so what a token got is the
    start of what it gets the next time.

    Equation (Li and Qiu 2021, algorithm 1): the input is moved by delta + eta. delta as in FreeLB. eta_i starts from
    the table's row of token i; eta_i <- n_i * (eta_i + step_size * g_i / ||g_i||), n_i = its length over the longest
    one's in the example, then projected; at the end of the optimizer step the table's row is the mean of the eta_i at
    its positions.

    Cost: 2 full passes, one for each of `steps`.

    Defaults: epsilon `auto`, 2 steps, step_size epsilon / 2, init epsilon. Published, (step_size, init, epsilon, steps)
    of BERT-base: RTE .02/.16/.14/2, CoLA .02/.1/.2/3, MRPC .05/.1/.2/2, STS-B .1/.1/.28/2, SST-2 .05/.2/.5/2, QNLI
    .02/.1/.3/2, QQP .2/.32/.7/2, MNLI .1/.3/.4/2.

    Limits: delta and eta may each be as long as epsilon, so an example may move by twice that. The table and its sums
    are three float32 tensors of the lookup's shape, summed over processes once an optimizer step. Where paper and
    public code differ: the loss is a mean over the steps, as in the paper; the last pass's gradient moves nothing, as
    in the code; delta and eta are projected each by itself, as in the paper. The code adds what all positions of a
    token found onto its row, so that frequent tokens grow; here the row becomes their mean.

    Citation: L. Li, X. Qiu, "Token-Aware Virtual Adversarial Training in Natural Language Understanding", AAAI 2021,
    arXiv 2004.14543.

    Args:
        steps: the number of perturbed passes.
        step_size: the length of one step; None for epsilon / 2.
        init: the noise at the start, before the division by the square root of its size; None for epsilon.
    """

    steps: int = 2
    init: float | None = None
    default_scope: ClassVar[str] = "example"
    lengths: ClassVar[tuple[str, ...]] = ("epsilon", "step_size", "init")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.steps == 1:
            found.append("steps must be 2 or more, or nothing is ever remembered; found 1.")
        if self.clean_weight != 1.0:
            found.append("clean_weight has no effect: this method has no clean pass.")
        return found

    def new_memory(self, seed: int) -> Memory:
        # With epsilon `auto` nothing is known of its size yet.
        init = 0.0 if self.epsilon == AUTO else float(self.epsilon)
        return Table(seed, init if self.init is None else self.init)

    def reach(self, epsilon: float) -> float:
        return 2 * epsilon

    def passes(self, step: Step) -> Passes:
        size = step.epsilon / 2 if self.step_size is None else self.step_size
        init = step.epsilon if self.init is None else self.init
        table = step.memory or Table(step.seed, init)
        assert isinstance(table, Table)

        def start(at: TargetCall) -> Tensor:
            if at.ids is None:
                raise ValueError(
                    "token_aware remembers a perturbation for each token: adv_target must be a token lookup."
                )
            instance = project(start_noise(at, init, step.seed), step.epsilon, self.norm, at.units)
            return instance + remembered(at.ids, at.vocabulary_size, at.value, at.units)

        def remembered(ids: Tensor, size: int, like: Tensor, units: Units) -> Tensor:
            return project(units.share(table.read(ids, size, like)), step.epsilon, self.norm, units)

        result = yield TrainPass(start, weight=1 / self.steps)
        assert result.ids is not None
        eta = remembered(result.ids, 0, result.gradient, result.units)
        delta = result.delta - eta
        for number in range(self.steps - 1):
            if number:
                result = yield TrainPass(delta + eta, weight=1 / self.steps)
            eta = project(self._renewed(eta, result, size), step.epsilon, self.norm, result.units)
            delta = project(delta + self.step(result, size), step.epsilon, self.norm, result.units)
        assert result.ids is not None
        table.keep(result.ids, eta, result.units.padding)
        return TrainPass(delta + eta, weight=1 / self.steps)

    def _renewed(self, eta: Tensor, result: PassResult, size: float) -> Tensor:
        """Eta after a step of its own; a token's share is its length over that of the longest in the example."""
        along = ascent(result.units.pool(result.gradient), self.norm, Units("token", result.units.padding))
        eta = eta + size * along
        lengths: Tensor = torch.linalg.vector_norm(eta, dim=-1, keepdim=True)
        # In scope `vocabulary` the micro-batch is what an example is elsewhere: an entry has one perturbation in it.
        first = 0 if result.units.scope == "vocabulary" else 1
        return eta * lengths / lengths.amax(dim=tuple(range(first, lengths.dim())), keepdim=True).clamp(min=1e-30)


class Table:
    """One perturbation for each vocabulary entry, (V, D), and what the current optimizer step has found for it."""

    def __init__(self, seed: int, init: float) -> None:
        self._seed, self._init = seed, init
        self._rows: Tensor | None = None
        self._sums: Tensor | None = None
        self._counts: Tensor | None = None

    def read(self, ids: Tensor, vocabulary_size: int, like: Tensor) -> Tensor:
        """The rows of these ids, (rows, positions, D), in float32 at least."""
        if self._rows is None:
            shape = vocabulary_size, like.shape[-1]
            # Drawn on the CPU: every process, on whatever device, has the same.
            noise = torch.rand(shape, generator=torch.Generator().manual_seed(self._seed))
            self._rows = ((2 * noise - 1) * self._init / shape[1] ** 0.5).to(like.device)
        # From a checkpoint it comes on the CPU.
        self._rows = self._rows.to(like.device, torch.promote_types(like.dtype, self._rows.dtype))
        return self._rows[ids]

    def keep(self, ids: Tensor, values: Tensor, padding: Tensor | None) -> None:
        """Adds what a micro-batch has found to the optimizer step's sums."""
        assert self._rows is not None
        if self._sums is None or self._counts is None:
            self._sums, self._counts = torch.zeros_like(self._rows), self._rows.new_zeros(len(self._rows))
        flat = ids.flatten()
        there = values.new_ones(len(flat)) if padding is None else (~padding).flatten().to(values)
        self._sums.index_add_(0, flat, (values.flatten(0, -2) * there[:, None]).to(self._sums))
        self._counts.index_add_(0, flat, there.to(self._counts))

    def settle(self, model: nn.Module, total: Total) -> None:
        if self._rows is None or self._sums is None or self._counts is None:
            return
        sums, counts = total(self._sums), total(self._counts)[:, None]
        self._rows = torch.where(counts > 0, sums / counts.clamp(min=1), self._rows)
        self._sums = self._counts = None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = state["rows"]
