"""What people use today, written from its published equations: `Trainer`s whose `training_step` is replaced.

Each is as its snippet circulates, with what that costs, and for one step on one device or under DDP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fgm_trainer import FGM, PGD, AdversarialTrainer, FreeLB


class InPlaceFGM(Trainer):
    """FGM in the weight of the lookup: copy the weight, move it along its gradient, pass again, put the copy back.

    delta = epsilon * G / ||G||_F (Miyato et al. 2017, eq. 5, with the whole weight in place of one example).
    """

    epsilon = 1.0

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Two passes."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        weight = lookup(self, model).weight
        copy = weight.data.clone()
        norm = torch.norm(weight.grad)
        if norm != 0 and not torch.isnan(norm):
            weight.data.add_(self.epsilon * weight.grad / norm)
        super().training_step(model, inputs, *args, **kwargs)
        weight.data = copy
        return loss


class InPlacePGD(Trainer):
    """PGD in the weight of the lookup, every pass a full one, with a copy of all gradients of the clean pass.

    delta <- project(delta + alpha * G / ||G||_F) (Madry et al. 2018, eq. 3).
    """

    epsilon = 1.0
    step_size = 0.5
    steps = 3

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """One pass more than steps."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        weight = lookup(self, model).weight
        copy = weight.data.clone()
        gradients = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        for number in range(self.steps):
            norm = torch.norm(weight.grad)
            if norm != 0 and not torch.isnan(norm):
                weight.data.add_(self.step_size * weight.grad / norm)
                moved = weight.data - copy
                if torch.norm(moved) > self.epsilon:
                    weight.data = copy + self.epsilon * moved / torch.norm(moved)
            if number < self.steps - 1:
                model.zero_grad()
            else:
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient
            super().training_step(model, inputs, *args, **kwargs)
        weight.data = copy
        return loss


class EmbedsFreeLB(Trainer):
    """FreeLB on `inputs_embeds`: every ascent step is a full pass that trains with a share of 1 / steps.

    delta <- project(delta + alpha * g / ||g||), for each example (Zhu et al. 2020, algorithm 1).
    """

    epsilon = 0.2
    step_size = 0.1
    steps = 3

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As many passes as steps."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        ids = inputs["input_ids"]
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        mask = inputs["attention_mask"].unsqueeze(-1)
        embedding = lookup(self, model)
        delta = torch.zeros(*ids.shape, embedding.weight.shape[1], device=ids.device)
        noise = delta.uniform_(-1, 1) * mask
        delta = noise * self.epsilon / (inputs["attention_mask"].sum(1) * delta.shape[-1]).sqrt().view(-1, 1, 1)
        total = torch.zeros((), device=ids.device)
        for _ in range(self.steps):
            delta.requires_grad_()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, {**rest, "inputs_embeds": embedding(ids) + delta}) / self.steps
            self.accelerator.backward(loss)
            total += loss.detach()
            assert delta.grad is not None
            gradient = delta.grad
            delta = delta.detach() + self.step_size * gradient / lengths(gradient).clamp(min=1e-8)
            delta = delta * (self.epsilon / lengths(delta).clamp(min=1e-8)).clamp(max=1)
        return total


def lookup(trainer: Trainer, model: nn.Module) -> nn.Embedding:
    """The token embedding inside whatever wraps the model."""
    found: Any = trainer.accelerator.unwrap_model(model)
    embedding: nn.Embedding = found.get_input_embeddings()
    return embedding


def lengths(values: Tensor) -> Tensor:
    """The Euclidean norm of each example, in a shape that broadcasts."""
    return values.flatten(1).norm(dim=1).view(-1, 1, 1)


# What is measured beside the stock Trainer: a class, and what else it is given.
TRAININGS: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "stock": (Trainer, {}),
    "fgm": (AdversarialTrainer, {"attack": FGM(epsilon=1.0)}),
    "fgm in place": (InPlaceFGM, {}),
    "pgd-3": (AdversarialTrainer, {"attack": PGD(epsilon=1.0, steps=3)}),
    "pgd-3 in place": (InPlacePGD, {}),
    "freelb-3": (AdversarialTrainer, {"attack": FreeLB(epsilon=0.2, steps=3)}),
    "freelb-3 on embeds": (EmbedsFreeLB, {}),
}
