"""Ways to a robust model for less than FGM's two passes: those that `fgm_trainer` has no method for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fgm_trainer import AdversarialTrainerMixin, PartialFGM
from fgm_trainer.attacks import Glance, Look, Passes, Step, Train


class LeastCertain(PartialFGM):
    """`partial_fgm` on the examples whose most likely class has the least probability, found in a forward pass."""

    @property
    def reads_outputs(self) -> bool:
        """The forward pass is for the model's outputs."""
        return True

    def passes(self, step: Step) -> Passes:
        """A forward pass, then `partial_fgm`'s."""
        seen = yield Glance()
        certainty = seen.outputs[0].softmax(-1).amax(-1)
        chosen = certainty.argsort()[: round(self.share * step.examples)]
        part = yield Look(rows=chosen)
        return Train(self.step(part, step.epsilon), rows=chosen)


class _TellsPasses(Trainer):
    """Knows whether a loss belongs to a training pass, or to one for the perturbation alone."""

    _trains = False

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A training pass."""
        self._trains = True
        try:
            return super().training_step(*args, **kwargs)
        finally:
            self._trains = False

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss, of a cheaper model where the pass only looks for the perturbation."""
        if self._trains:
            return super().compute_loss(model, *args, **kwargs)
        with self.cheaper(model):
            return super().compute_loss(model, *args, **kwargs)

    @contextmanager
    def cheaper(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's forward pass is cheaper than it should be."""
        yield


class LowPrecisionLook(AdversarialTrainerMixin, _TellsPasses):
    """The perturbation is found in bfloat16."""

    @contextmanager
    def cheaper(self, model: nn.Module) -> Iterator[None]:
        """Autocast, whatever the training passes do."""
        with torch.autocast(self.args.device.type, torch.bfloat16):
            yield


class ShallowLook(AdversarialTrainerMixin, _TellsPasses):
    """The perturbation is found in a model of every second layer."""

    @contextmanager
    def cheaper(self, model: nn.Module) -> Iterator[None]:
        """BERT's encoder with half of its layers, the first among them."""
        encoder: Any = self._inner(model).base_model.encoder
        layers = encoder.layer
        encoder.layer = nn.ModuleList(list(layers)[::2])
        try:
            yield
        finally:
            encoder.layer = layers


class Remembered(Trainer):
    """One pass a step: each token moves along the mean of the gradients that its vocabulary entry had so far.

    The same pass trains at the perturbation and renews the memory, an exponential mean (V, D) kept on the device.
    """

    epsilon = 0.2
    decay = 0.9

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._lookup: Any = self.model.get_input_embeddings()
        self._mean = torch.zeros_like(self._lookup.weight)
        self._handle = self._lookup.register_forward_hook(self._move)

    def _move(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not (module.training and torch.is_grad_enabled()):
            return None
        (ids,) = args
        direction = self._mean[ids] * (ids != 0).unsqueeze(-1)
        length = direction.flatten(1).norm(dim=1).view(-1, 1, 1)
        rise = min(1.0, (self.state.global_step + 1) / (0.5 * self.state.max_steps))
        output = output + rise * self.epsilon * direction / length.clamp(min=1e-12)

        def renew(gradient: Tensor) -> None:
            # Of one length an example, as FGM takes them.
            own = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1).clamp(min=1e-12)
            self._mean[ids.unique()] *= self.decay
            self._mean.index_add_(0, ids.flatten(), (1 - self.decay) * own.flatten(0, 1))

        output.register_hook(renew)
        return output
