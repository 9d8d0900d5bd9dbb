"""The adversarial examples of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attacks import AUTO, Attack, Step
from ..engine.accelerate import bare
from ..engine.driver import unit_of
from ..perturbation.batches import copied, examples_in, without_column
from ..perturbation.clipping import fitted, within
from ..perturbation.target import Target
from ..perturbation.targets import InputTensor, find_target
from ..perturbation.weights import is_weights
from .data import on_device
from .passes import LossOf, evaluating, passes_of


@dataclass(frozen=True)
class AttackedBatch:
    """What `attack_batch` made.

    Args:
        delta: the perturbation as it was applied, of the shape of the target's tensor: (rows, positions, dimension) for
            embeddings, (rows, channels, height, width) for pixels.
        inputs: the batch. Where the target is an input tensor it stands here perturbed: the adversarial examples.
            Elsewhere the model has them only while `delta` is added inside of it.
        outputs: what the model returned for the adversarial examples, detached.
        loss: the loss there, scalar.
    """

    delta: Tensor
    inputs: dict[str, Any]
    outputs: Any
    loss: Tensor


def attack_batch(
    model: nn.Module,
    batch: Mapping[str, Any],
    attack: Attack,
    *,
    target: str | Target | None = None,
    epsilon_unit: str = "absolute",
    clip: tuple[Tensor, Tensor] | None = None,
    loss_of: LossOf | None = None,
    seed: int = 0,
) -> AttackedBatch:
    """Attacks the examples of a batch, in eval mode.

    Args:
        model: the model, wrapped or not.
        batch: its inputs with `labels`, and the column that a targeted attack reads.
        attack: the attack, with a fixed epsilon; it works in scope `example` unless it names another.
        target: what is perturbed, as `adv_target`; None for the input token lookup.
        epsilon_unit: `absolute`, or `embedding`: epsilon in units of the mean norm of a token's embedding.
        clip: the valid range of an input tensor (`valid_range`).
        loss_of: (model, inputs) -> (loss, outputs); None for the model's own loss.
        seed: of whatever the attack draws.

    Returns:
        An `AttackedBatch`. The model's weights, `.grad`s, mode and hooks are as before.

    Raises:
        ValueError: the attack has no fixed epsilon, perturbs weights, or the model does not have the target.
    """
    if attack.epsilon == AUTO:
        raise ValueError(
            f"epsilon 'auto' is found while a model trains, and here none does: write {type(attack).__name__}("
            "epsilon=0.2), say."
        )
    model = bare(model, None)
    place = find_target(target or attack.default_target, model)
    if is_weights(place):
        raise ValueError(f"{attack.name} would perturb weights, not the examples of a batch: name another target.")
    own = attack.in_units(unit_of(epsilon_unit, model))
    batch = on_device(batch, model)
    step = Step(own.epsilon, seed, examples=examples_in(batch))
    with evaluating(model, place, clip):
        last = passes_of(model, place, batch, own, step, place.resolve_scope(attack.scope, "example"), loss_of)[-1]
        delta, bounds = last.forward_pass.tensor.delta(), place.clip
    inputs = dict(without_column(batch, attack.targeted))
    return AttackedBatch(delta, _perturbed(inputs, place, delta, bounds), _detached(last.outputs), last.loss)


def _perturbed(
    inputs: dict[str, Any], place: Target, delta: Tensor, clip: tuple[Tensor, Tensor] | None
) -> dict[str, Any]:
    """The inputs, the perturbed tensor among them as the model saw it."""
    if not isinstance(place, InputTensor):
        return inputs
    clean = inputs[place.name]
    moved = clean + delta.to(clean)
    return inputs | {place.name: moved if clip is None else within(moved, clean, *fitted(clip, clean))}


def _detached(outputs: Any) -> Any:
    found = copied(outputs, Tensor.detach)
    # Of a `ModelOutput` that makes a plain dictionary.
    return type(outputs)(**found) if hasattr(outputs, "to_tuple") else found
