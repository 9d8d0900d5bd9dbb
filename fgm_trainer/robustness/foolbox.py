"""Attacks of foolbox (Rauber et al. 2017) on whatever a target perturbs: embeddings as well as pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.dropout import random_state_kept
from ..perturbation.clipping import fitted, within
from ..perturbation.divergence import logits_of
from ..perturbation.forward_pass import PerturbedForward
from ..perturbation.target import Target


@dataclass(frozen=True)
class Foolbox:
    """An attack of foolbox among those of `evaluate_robustness`.

        evaluate_robustness(model, data, [PGD(steps=10), Foolbox(foolbox.attacks.L2DeepFoolAttack())], [0.1, 0.2])

    It needs a classifier of one label an example, and a target that is called once. Padding and what lies outside of a
    valid range is put back. Lengths are those of an example, in the norm of the attack.

    Args:
        attack: the attack; its own targets are the true labels.
        label: what the report calls it; None for the attack's class.
    """

    attack: Any
    label: str | None = None

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self.label or type(self.attack).__name__

    def outputs(self, model: nn.Module, place: Target, batch: Mapping[str, Any], epsilon: float, seed: int) -> Any:
        """What the model says of the attacked examples.

        Args:
            model: the model, in eval mode.
            place: its target, attached.
            batch: the model's inputs, with `labels`.
            epsilon: the length, in the units of the target.
            seed: of what the attack draws.

        Raises:
            ValueError: the target is called more than once, or labels are no classes.
        """
        given = batch.get("labels")
        if not isinstance(given, Tensor) or given.is_floating_point() or given.numel() != len(given):
            shape = f"{tuple(given.shape)} of {given.dtype}" if isinstance(given, Tensor) else "no tensor"
            raise ValueError(f"foolbox attacks classifiers with one label an example; here labels are {shape}.")
        labels, function = given.flatten(), _FromValue(model, place, batch)
        if len(function.clean) != len(labels):
            raise ValueError(
                f"foolbox attacks one row an example; {place} has {len(function.clean)} for {len(labels)} examples."
            )
        with _weights_frozen(model), torch.enable_grad(), random_state_kept(labels.device):
            torch.manual_seed(seed)
            found = self._found(function, function.clean, labels, epsilon)
            return function.outputs(found)

    def _found(self, function: _FromValue, clean: Tensor, labels: Tensor, epsilon: float) -> Tensor:
        import foolbox

        # Where there is no valid range, one that no perturbation of this length can leave.
        low, high = clean.min().item() - epsilon, clean.max().item() + epsilon
        clip = function.place.clip
        if clip is not None:
            low, high = clip[0].min().item(), clip[1].max().item()
        wrapped = foolbox.PyTorchModel(function, bounds=(low, high), device=clean.device)
        _, found, _ = self.attack(wrapped, clean, labels, epsilons=epsilon)
        return found if clip is None else within(found, clean, *fitted(clip, clean))


class _FromValue(nn.Module):
    """A model as a function of what its target perturbs, (examples, ...), to logits; the rest of the batch is fixed."""

    def __init__(self, model: nn.Module, place: Target, batch: Mapping[str, Any]) -> None:
        super().__init__()
        self.__dict__["_called"], self.place, self._batch = model, place, batch
        inserted, _ = self._run(None)
        self.clean = inserted.seen[0].detach()
        self.eval()

    def forward(self, value: Tensor) -> Tensor:
        """The logits, (examples, classes)."""
        return logits_of(self._run(value)[1])[0]

    @torch.no_grad()
    def outputs(self, value: Tensor) -> Any:
        """All that the model returns."""
        return self._run(value)[1]

    def _run(self, value: Tensor | None) -> tuple[_Inserted, Any]:
        inserted = _Inserted(self.place.shared_calls("example"), value)
        with self.place.perturbed(inserted), inserted.loss_of(self._batch):
            outputs = self.__dict__["_called"](**self._batch)
        if len(inserted.seen) != 1:
            raise ValueError(f"foolbox attacks one tensor; {self.place} is called {len(inserted.seen)} times.")
        return inserted, outputs


class _Inserted(PerturbedForward):
    """A forward pass in which a value stands in the place of the target's, but for padding."""

    def __init__(self, shared: Any, value: Tensor | None) -> None:
        super().__init__(shared)
        self.seen: list[Tensor] = []
        self._value = value

    def perturb(self, module: nn.Module, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        self.seen.append(value)
        if self._value is None:
            return value
        padding = self.shared.padding_of(value, ids, self.masks)
        inserted = self._value.to(value.dtype)
        return inserted if padding is None else torch.where(padding[..., None], value, inserted)


@contextmanager
def _weights_frozen(model: nn.Module) -> Iterator[None]:
    """Foolbox goes back to the weights as well, and would leave gradients there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
