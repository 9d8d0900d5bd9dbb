"""What an attack asks for and is sent, what a step is told, and what is kept between steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from ..perturbation.calls import Draw
from ..perturbation.divergence import Against, Outputs
from ..perturbation.geometry import Units


@dataclass(frozen=True)
class TrainPass:
    """A full pass at this perturbation (None: the clean inputs) whose weight gradients add up.

    Args:
        delta: the perturbation, or what draws it once the shape is known.
        weight: factor of the task's loss; 0 for a pass that is measured by divergences alone.
        against: divergences from earlier outputs that are added to the loss.
        masks: passes of a step that have the same name draw the same dropout masks.
        rows: where given, the examples that a perturbation, a tensor, is of, (chosen,); the others stay clean.
        then: of a step's last pass, what is told its result; there must be no other training pass before it.
    """

    delta: Tensor | Draw | None = None
    weight: float = 1.0
    against: tuple[Against, ...] = ()
    masks: str = ""
    rows: Tensor | None = None
    then: Callable[[PassResult], None] | None = None


@dataclass(frozen=True)
class GradientPass:
    """A pass for the gradient with respect to the perturbation alone: no weight gradients, a third cheaper.

    Args:
        delta, masks: as for `TrainPass`.
        against: where given, the gradient is that of these divergences and not of the task's loss.
        label: where given, the gradient is that of the loss with this label in place of the true one.
        rows: where given, the examples of the micro-batch that are run, (chosen,); everything here and in the result is
            of these alone.
    """

    delta: Tensor | Draw | None = None
    against: tuple[Against, ...] = ()
    masks: str = ""
    label: Tensor | int | str | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass for its outputs alone: no gradient.

    Args:
        delta, masks, rows: as for `GradientPass`.
        weights: by name, what to use in place of the model's weights.
    """

    delta: Tensor | Draw | None = None
    masks: str = ""
    weights: Mapping[str, Tensor] | None = None
    rows: Tensor | None = None


Request = TrainPass | GradientPass | ForwardPass


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Args:
        gradient: d(loss)/d(delta) of this micro-batch alone, (rows, positions, dimension), in float32 at least; zero
            after a `ForwardPass`, and where there is no token.
        units: the units over which norms are taken.
        loss: what `compute_loss` returned, unweighted and detached, or the divergence where the pass has none: a mean
            over the micro-batch; where the Trainer divides by the items of the whole optimizer step
            (`num_items_in_batch`), this micro-batch's part of that.
        applied: the perturbation as it was applied: drawn, clipped; None for the clean inputs.
        outputs: the model's logits, detached, for attacks that compare outputs.
        ids: the token ids, (rows, positions), where the target is a lookup.
    """

    gradient: Tensor
    units: Units
    loss: Tensor
    applied: Tensor | None = None
    outputs: Outputs = ()
    ids: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """The perturbation as it was applied, zero for the clean inputs."""
        if self.applied is not None:
            return self.applied
        return self.gradient.new_zeros(()).expand_as(self.gradient)


Passes = Generator[Request, PassResult, TrainPass]


class Total(Protocol):
    """Sums a tensor over all processes; to be called on all of them, equally often."""

    def __call__(self, tensor: Tensor, /) -> Tensor: ...

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on each of them in the same order; likewise."""


class Memory(Protocol):
    """What an attack keeps between optimizer steps: the same on all processes, saved with a checkpoint.

    `passes` runs once for each micro-batch on each process; what it finds it hands to `step.memory`, by whatever method
    the memory has for it (`token_aware.Table.keep`). `settle` makes that the same everywhere. In an evaluation
    `step.memory` is None.
    """

    def settle(self, model: nn.Module, total: Total) -> None:
        """Between two optimizer steps, where the former was attacked; also before the first of a run.

        Not before the first step after a checkpoint was loaded: what it makes of the model belongs into `state_dict`.

        Args:
            model: inside every wrapper.
            total: brings together what all processes have found.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is saved."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was saved."""


@dataclass(frozen=True)
class Step:
    """What a step is told.

    Args:
        epsilon: this step's epsilon, which a schedule may have lowered; a scalar tensor where it is `auto`.
        seed: of whatever is random in this step.
        memory: what `Attack.new_memory` made at the start of the run; None in an evaluation.
        examples: how many examples the micro-batch has.
    """

    epsilon: Any
    seed: int = 0
    memory: Any = None
    examples: int = 0
