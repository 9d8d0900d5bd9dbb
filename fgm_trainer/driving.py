"""What every driver of an attack does, whoever owns the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .attacks import Answer, Attack, Glance, Look, Train
from .inspection import mean_embedding_norm
from .objective import Outputs, detached, divergence, logits_of, problem_of, relabelled
from .passes import Pass
from .target import Target, glance, look

EPSILON_UNITS = ("absolute", "embedding")


def answer_look(
    request: Look | Glance,
    attack: Attack,
    place: Target,
    scope: str,
    model: nn.Module,
    inputs: Mapping[str, Any],
    given: Mapping[str, Any],
    loss_of: Callable[[nn.Module, Mapping[str, Any]], tuple[Tensor, Any]],
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Answer:
    """A pass that trains nothing.

    Args:
        request: what the attack asks for.
        attack: the attack, which says whether it reads outputs.
        place: its attached target.
        scope: its scope, settled.
        model: the model inside every wrapper.
        inputs: what the model is given.
        given: the same with the column that a targeted attack reads.
        loss_of: (model, inputs) -> (loss, outputs).
        scaled: multiplies the objective by the loss scale of half precision, for the way back alone.
    """
    outputs: Outputs = ()
    against = request.against if isinstance(request, Look) else ()
    own = model
    if request.rows is not None:
        size = examples_in(inputs)
        inputs, given = (rows_of(batch, request.rows, size) for batch in (inputs, given))
    if isinstance(request, Look) and request.label is not None:
        inputs = relabelled(inputs, request.label, given)
    if isinstance(request, Glance) and request.weights:
        model = _Reweighted(model, request.weights)

    def objective_of() -> Tensor:
        nonlocal outputs
        loss, found = loss_of(model, inputs)
        if attack.reads_outputs:
            outputs = logits_of(found)
        if against:
            return divergence(outputs, against, problem_of(own), inputs.get("attention_mask"))
        return loss

    if isinstance(request, Glance):
        seen, gradient, loss = glance(place, inputs, request.delta, objective_of, scope)
    else:
        seen, gradient, loss = look(place, inputs, request.delta, objective_of, scope, scaled)
    return answer_from(seen, gradient, loss, detached(outputs))


def answer_from(seen: Pass, gradient: Tensor, loss: Tensor, outputs: Outputs) -> Answer:
    """What an attack is told of a pass."""
    units = seen.units()
    return Answer(units.only_tokens(gradient), units, loss, seen.applied(), outputs, seen.ids())


def examples_in(batch: Mapping[str, Any]) -> int:
    """How many examples a batch has: the length of its first tensor."""
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return value.shape[0]
    return 0


def chosen_in(batch: Mapping[str, Any], request: Train) -> tuple[Tensor, int] | None:
    """The examples that a perturbation is of, and how many there are; None where it is of all."""
    return None if request.rows is None else (request.rows, examples_in(batch))


def rows_of(batch: Mapping[str, Any], chosen: Tensor, size: int) -> dict[str, Any]:
    """The batch with the chosen examples alone; what has not one entry for each of the `size` examples stays."""
    return {
        k: v[chosen.to(v.device)] if isinstance(v, Tensor) and v.dim() and v.shape[0] == size else v
        for k, v in batch.items()
    }


class _Reweighted(nn.Module):
    """The model called with other weights; its own are not touched."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        # Not registered: this is no module of its own.
        self.__dict__["_model"], self.__dict__["_weights"] = model, weights
        self.__dict__["config"] = getattr(model, "config", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._model, dict(self._weights), args, kwargs)  # type: ignore[arg-type]


def refuse_spread_weights(attack: Attack, target: object, model: nn.Module, accelerator: Any) -> None:
    """Raises ValueError where whole weights are needed and the engine spreads them or their gradients."""
    if not attack.needs_whole_weights and target != "weights":
        return
    spread = any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())
    # accelerate's DistributedType: by its value, since the core runs without accelerate.
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", None)
    if spread or kind in ("DEEPSPEED", "FSDP"):
        raise ValueError(
            f"{attack.name!r} needs whole weights on every process, and this engine spreads them or their gradients. "
            "Run it on one process or under DDP."
        )


def unit_of(name: str, model: nn.Module) -> float:
    """What an epsilon is multiplied by. Raises ValueError for a name that is none of `EPSILON_UNITS`."""
    if name not in EPSILON_UNITS:
        raise ValueError(f"epsilon_unit must be one of {', '.join(EPSILON_UNITS)}; found {name!r}.")
    return mean_embedding_norm(model) if name == "embedding" else 1.0


def gradients_wait(place: Target, accelerator: Any) -> bool:
    """Whether what the earlier passes of a micro-batch owe the lookup's weight can wait for the last one.

    Not under engines that reduce the gradients of every pass: they expect each weight's in each of them.
    """
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", None)
    return place.can_wait and place.clip is None and kind not in ("DEEPSPEED", "FSDP")


class LocalGradients:
    """A context for all passes of a step but the last: gradients add up on this process, and no optimizer steps.

    DeepSpeed's backward steps the optimizer whenever `sync_gradients` is set; DDP reduces gradients in every backward
    outside of `no_sync`. FSDP2 scatters them in every pass, since to keep them whole would cost the memory that it
    saves; with replicas of the shards (HSDP) only the last pass sums over the replicas.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: the model as the accelerator prepared it.
    """

    # A class that is made once: a generator takes several times as many calls in every step.
    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self.accelerator, self.model = accelerator, model
        bare: Any = getattr(model, "_orig_mod", model)
        self._without_sums = bare.no_sync if isinstance(bare, DistributedDataParallel) else nullcontext
        self._replicated: Any = bare if hasattr(bare, "set_requires_all_reduce") else None
        self._entered: list[tuple[bool, Any]] = []

    def __enter__(self) -> None:
        no_sync = self._without_sums()
        no_sync.__enter__()
        self._entered.append((self.accelerator.sync_gradients, no_sync))
        self._tell_passes_apart(False)

    def __exit__(self, *error: Any) -> None:
        sync, no_sync = self._entered[-1]
        self._tell_passes_apart(sync)
        self._entered.pop()
        no_sync.__exit__(*error)

    def _tell_passes_apart(self, sync: bool) -> None:
        self.accelerator.sync_gradients = sync
        # Where this is not the last micro-batch, the loop around has already put the sum off.
        if self._replicated is not None and self._entered[-1][0]:
            self._replicated.set_requires_all_reduce(sync)


def scaled_as_the_engine_would(accelerator: Any, loss: Tensor) -> Tensor:
    """The loss times the loss scale of half precision, without which small gradients are zeros there."""
    scaler = getattr(accelerator, "scaler", None)
    if scaler is not None:
        scaled: Tensor = scaler.scale(loss)
        return scaled
    deepspeed = getattr(accelerator, "deepspeed_engine_wrapped", None)
    return loss if deepspeed is None else loss * getattr(deepspeed.engine.optimizer, "loss_scale", 1.0)
