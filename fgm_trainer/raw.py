"""For hand-written loops: the snippet's interface done right, and the driver for accelerate loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from . import attacks, geometry
from .attacks import Answer, Glance, Look, Step, Train, run
from .driving import (
    LocalGradients,
    answer_from,
    answer_look,
    chosen_in,
    examples_in,
    gradients_wait,
    refuse_spread_weights,
    scaled_as_the_engine_would,
    unit_of,
)
from .inspection import input_embedding, shared_lookups
from .objective import detached, divergence, logits_of, problem_of
from .passes import Earlier
from .randomness import Masks
from .target import Target
from .targets import find_target

LossOf = Callable[[nn.Module, Mapping[str, Any]], Any]


class FGM:
    """FGM on the lookup's weight, with the interface of the snippet that circulates: changing the import is all.

    ```python
    fgm = FGM(model)
    for batch in loader:
        model(**batch).loss.backward()
        fgm.attack()                       # moves rows of the input embedding, in place
        model(**batch).loss.backward()     # gradients add up
        fgm.restore()                      # bit for bit as before
        optimizer.step()
        optimizer.zero_grad()
    ```

    `with fgm.attack(): ...` restores whatever happens. Unlike the snippet, the direction is the gradient of the last
    backward pass alone, not of what `weight.grad` has accumulated, and only rows that were looked up are touched and
    kept. It works on a frozen embedding, and finds the input embedding of any model.

    Args:
        model: the model, before any wrapper. Make the `FGM` before the first forward pass: a hook on the lookup
            records the gradient. `close()` removes it.

    Raises:
        ValueError: the model has no lookup, its weight is tied to another module (an in-place write would move that
            one too), or the weight is sharded over processes.
    """

    def __init__(self, model: nn.Module) -> None:
        lookup = input_embedding(model)
        self._model = model
        inside: list[nn.Module] = [m for m in lookup.modules() if isinstance(m, nn.Embedding)] or [lookup]
        # An adapter's wrapper holds the original, frozen, and the copy that is in use.
        used = next((m for m in inside if any(p.requires_grad for p in m.parameters(recurse=False))), inside[0])
        self._weight: Tensor = used.weight  # type: ignore[assignment]
        self._padding: int | None = getattr(used, "padding_idx", None)
        lookups = shared_lookups(model, lookup)
        self._refuse(model, lookups)
        self._met: list[tuple[Tensor, Tensor]] = []
        self._backward_pass = -1
        self._kept: tuple[Tensor, Tensor] | None = None
        self._handles = [m.register_forward_hook(self._on_lookup, with_kwargs=True) for m in lookups]

    def attack(self, epsilon: float = 1.0, emb_name: str | None = None) -> FGM:
        """Moves the rows of the input embedding by epsilon * G / ||G||_F, G the last backward pass's gradient.

        Args:
            epsilon: the Frobenius norm of the whole perturbation.
            emb_name: a part of the weight's name, as in the snippet; None finds it.

        Returns:
            Itself, for `with`.

        Raises:
            ValueError: `emb_name` matches nothing, or more than the lookup's weight; epsilon is no number 0 or more.
            RuntimeError: a second attack before `restore()`, or no backward pass since the last one.
        """
        if self._kept is not None:
            raise RuntimeError("attack() was called twice: call restore() before the next attack.")
        _check_epsilon(epsilon)
        if emb_name is not None:
            self._check_name(emb_name)
        if not self._met:
            raise RuntimeError(
                "attack() needs a backward pass through the token lookup first: make FGM(model) before the forward "
                "pass, and call loss.backward() before attack()."
            )
        ids = torch.cat([i.flatten() for i, _ in self._met])
        gradients = torch.cat([g.flatten(0, -2) for _, g in self._met])
        rows, place = ids.unique(return_inverse=True)
        pooled = gradients.new_zeros(len(rows), gradients.shape[-1]).index_add_(0, place, gradients)
        if self._padding is not None:
            # The weight's own gradient is zero at the padding row.
            pooled[rows == self._padding] = 0
        delta = epsilon * geometry.ascent(pooled[None], "l2", geometry.Units("example"))[0]
        with torch.no_grad():
            self._kept = rows, self._weight[rows].clone()
            self._weight[rows] += delta.to(self._weight.dtype)
        return self

    def restore(self) -> None:
        """Puts the rows back, bit for bit. Raises RuntimeError without an attack."""
        if self._kept is None:
            raise RuntimeError("restore() without attack(): there is nothing to put back.")
        rows, values = self._kept
        with torch.no_grad():
            self._weight[rows] = values
        self._kept, self._met = None, []

    def close(self) -> None:
        """Puts back what is moved and removes the hook."""
        if self._kept is not None:
            self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> FGM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._kept is not None:
            self.restore()

    def _on_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if not torch.is_grad_enabled() or self._kept is not None:
            return None
        ids = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point())
        if not output.requires_grad:
            # A frozen embedding, as under LoRA: its output is where the gradient starts to matter.
            output = output.detach().requires_grad_()

        def keep(gradient: Tensor) -> None:
            if self._backward_pass != (this := torch._C._current_graph_task_id()):
                # What an earlier backward pass left is of no use any more.
                self._met, self._backward_pass = [], this
            self._met.append((ids, gradient.detach()))

        output.register_hook(keep)
        return output

    def _check_name(self, emb_name: str) -> None:
        names = [n for n, _ in self._model.named_parameters(remove_duplicate=False)]
        matched = {n: p for n, p in self._model.named_parameters() if emb_name in n}
        own = [n for n, p in self._model.named_parameters() if p is self._weight]
        if list(matched) != own:
            found = ", ".join(matched) or "nothing"
            raise ValueError(
                f"emb_name={emb_name!r} must match the input embedding's weight alone, {', '.join(own)}; "
                f"it matches {found}. "
                f"Leave emb_name out, or choose among: {', '.join(n for n in names if 'emb' in n or n in own)}."
            )

    def _refuse(self, model: nn.Module, lookups: list[nn.Module]) -> None:
        inside = {id(child) for m in lookups for child in m.modules()}
        tied = [
            n
            for n, m in model.named_modules()
            if id(m) not in inside and any(p is self._weight for p in m.parameters(recurse=False))
        ]
        if tied:
            raise ValueError(
                f"The input embedding's weight is tied to {', '.join(tied)}: moving it in place would move that too. "
                "Use fgm_trainer.raw.Adversary or AdversarialTrainer, which perturb the lookup alone."
            )
        if hasattr(self._weight, "ds_id") or hasattr(self._weight, "device_mesh"):
            raise ValueError(
                "The input embedding's weight is sharded over processes, so its rows can't be moved in place. "
                "Use fgm_trainer.raw.Adversary or AdversarialTrainer."
            )


class Adversary:
    """The driver of an attack for a loop of your own, with or without accelerate.

    ```python
    adversary = Adversary(model, FGM(epsilon=1.0), accelerator=accelerator)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = adversary.backward(batch)   # in place of: loss = model(**batch).loss; accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    ```

    Args:
        model: the model, as `accelerator.prepare` returned it.
        attack: the attack.
        target: what is perturbed, as `adv_target`.
        accelerator: the `accelerate.Accelerator`; None for a plain loop on one process.
        seed: of whatever the attack draws.
        epsilon_unit: `absolute`, or `embedding` for the mean norm of a token's embedding.
        clip: the valid range of an input tensor (`clipping.valid_range`).

    `memory` is what the attack keeps between steps, or None: save its `state_dict()` beside your own.

    Raises:
        ValueError: the model does not have the target, or the scope does not exist there.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: attacks.Attack,
        *,
        target: str | Target | None = None,
        accelerator: Any = None,
        seed: int = 0,
        epsilon_unit: str = "absolute",
        clip: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._model, self._attack, self._accelerator, self._seed = model, attack, accelerator, seed
        inner = model if accelerator is None else accelerator.unwrap_model(model)
        self._inner: nn.Module = getattr(inner, "_orig_mod", inner)
        target = target or attack.default_target
        self._place = target if isinstance(target, Target) else find_target(target, self._inner)
        refuse_spread_weights(attack, target, self._inner, accelerator)
        self._unit = unit_of(epsilon_unit, self._inner)
        self.memory = self._memory = attack.in_units(self._unit).new_memory(seed)
        self._steps_next = True
        self._scope = self._place.settle(attack.scope, attack.default_scope)
        self._place.attach(self._inner, model)
        self._place.clip = clip or self._place.clip
        self._gradients_wait = gradients_wait(self._place, accelerator)
        self._local = None if accelerator is None else LocalGradients(accelerator, model)
        self._count = 0

    def backward(
        self,
        batch: Mapping[str, Any],
        loss_of: LossOf | None = None,
        *,
        epsilon: float | None = None,
    ) -> Tensor:
        """All passes of one micro-batch; afterwards the weights' gradients are complete.

        Args:
            batch: the model's inputs.
            loss_of: (model, batch) -> the loss, or (loss, outputs) with `logits` for an attack that compares outputs;
                None for what the model returns.
            epsilon: this step's epsilon; None for the attack's. 0 makes one stock pass.

        Returns:
            The loss of the first training pass, detached.
        """
        loss_of = loss_of or _model_loss
        epsilon = self._attack.epsilon if epsilon is None else epsilon
        _check_epsilon(epsilon)
        inputs = {name: value for name, value in batch.items() if name != self._attack.targeted}
        if epsilon == 0:
            loss, _ = _pair(loss_of(self._model, inputs))
            self._backward(loss)
            return loss.detach()
        if self._memory is not None and self._steps_next:
            total = (
                _alone if self._accelerator is None else functools.partial(self._accelerator.reduce, reduction="sum")
            )
            self._memory.settle(self._inner, total)
        self._steps_next = self._accelerator is None or self._accelerator.sync_gradients
        passes = _Passes(self, inputs, batch, loss_of)
        scaled = replace(self._attack, epsilon=epsilon).in_units(self._unit)
        step = Step(scaled.epsilon, self._next_seed(), self._memory, examples_in(inputs))
        run(scaled, step, passes.train, passes.look)
        return passes.losses[0]

    def close(self) -> None:
        """Removes the hooks."""
        self._place.detach()

    def _next_seed(self) -> int:
        """Differs by micro-batch over all processes: N processes draw as accumulation over N does."""
        shared = self._accelerator
        rank, world = (0, 1) if shared is None else (shared.process_index, shared.num_processes)
        batch, self._count = self._count * world + rank, self._count + 1
        return hash((self._seed, batch)) % 2**63

    def _backward(self, loss: Tensor) -> None:
        if self._accelerator is None:
            loss.backward()
        else:
            self._accelerator.backward(loss)


class _Passes:
    """The passes of one micro-batch in a loop of one's own."""

    def __init__(
        self, adversary: Adversary, inputs: Mapping[str, Any], given: Mapping[str, Any], loss_of: LossOf
    ) -> None:
        self._owner, self._inputs, self._given, self._loss_of = adversary, inputs, given, loss_of
        self._masks = Masks(next(adversary._inner.parameters()).device)
        self._earlier = Earlier() if adversary._gradients_wait else None
        self.losses: list[Tensor] = []

    def train(self, request: Train, last: bool) -> Answer | None:
        owner = self._owner
        scale: list[Tensor] = []
        local = nullcontext() if last or owner._local is None else owner._local
        chosen = chosen_in(self._inputs, request)
        recorded = owner._place.record(
            request.delta, gradient=not last, scope=owner._scope, chosen=chosen, earlier=self._earlier
        )
        with self._masks.drawn(request.masks), local, recorded as seen:
            loss, found = _pair(self._loss_of(owner._model, self._inputs))
            outputs = logits_of(found) if owner._attack.reads_outputs else ()
            owner._place.forward_ended(seen, self._inputs)
            measure = loss
            objective = loss * request.weight
            if request.against:
                mask = self._inputs.get("attention_mask")
                measure = divergence(outputs, request.against, problem_of(owner._inner), mask)
                # A loss of weight 0 is left out: 0 times NaN is NaN.
                objective = measure if request.weight == 0 else objective + measure
            measure.register_hook(scale.append)
            owner._backward(objective)
        reported = (loss if request.weight else measure).detach()
        if request.weight:
            self.losses.append(reported)
        if last:
            return None
        gradient = seen.gradient([leaf.grad for leaf in seen.leaves]) / scale[0]
        return answer_from(seen, gradient, reported, detached(outputs))

    def look(self, request: Look | Glance) -> Answer:
        owner = self._owner
        scaled = functools.partial(scaled_as_the_engine_would, owner._accelerator)

        def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
            return _pair(self._loss_of(model, batch))

        with self._masks.drawn(request.masks):
            return answer_look(
                request,
                owner._attack,
                owner._place,
                owner._scope,
                owner._inner,
                self._inputs,
                self._given,
                loss_of,
                scaled,
            )


def _model_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
    outputs = model(**batch)
    return (outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]), outputs


def _pair(result: Any) -> tuple[Tensor, Any]:
    return result if isinstance(result, tuple) else (result, None)


def _alone(values: Tensor) -> Tensor:
    return values


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number, 0 or more; found {epsilon!r}.")
