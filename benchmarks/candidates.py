"""Ways to a robust model for less than FGM's two passes: those that `fgm_trainer` has no method for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

from fgm_trainer import AdversarialTrainerMixin, PartialFGM
from fgm_trainer.attacks import ForwardPass, GradientPass, Passes, Step, TrainPass
from fgm_trainer.engine.accelerate import bare


class LeastCertain(PartialFGM):
    """`partial_fgm` on the examples whose most likely class has the least probability, found in a forward pass."""

    @property
    def reads_outputs(self) -> bool:
        """The forward pass is for the model's outputs."""
        return True

    def passes(self, step: Step) -> Passes:
        """A forward pass, then `partial_fgm`'s."""
        seen = yield ForwardPass()
        certainty = seen.outputs[0].softmax(-1).amax(-1)
        chosen = certainty.argsort()[: round(self.share * step.examples)]
        part = yield GradientPass(rows=chosen)
        return TrainPass(self.step(part, step.epsilon), rows=chosen)


class _TellsPasses(Trainer):
    """Knows whether a loss belongs to a training pass, or to one for the perturbation alone."""

    running_pass: Any

    @property
    def _trains(self) -> bool:
        return self.running_pass is not None and self.running_pass.trains

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


class ByScore(PartialFGM):
    """`partial_fgm` on the examples that score highest; on random ones where one of the batch has no score yet."""

    # Of the batch at hand, one an example; the trainer puts them here.
    scores: ClassVar[list[float | None]] = []

    def passes(self, step: Step) -> Passes:
        """`partial_fgm`'s."""
        if None in self.scores:
            return (yield from super().passes(step))
        order = sorted(range(step.examples), key=lambda row: -self.scores[row])  # type: ignore[operator]
        chosen = torch.tensor(order[: round(self.share * step.examples)])
        part = yield GradientPass(rows=chosen)
        return TrainPass(self.step(part, step.epsilon), rows=chosen)


class LeastCertainBefore(AdversarialTrainerMixin, _TellsPasses):
    """`ByScore` by what the training passes of earlier epochs said of an example, which costs no pass.

    The score: how little probability the true class had when the example was last met.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # By an example's tokens, the probability of its class each time that it was met.
        self._known: dict[tuple[int, ...], list[float]] = {}
        self._rows: list[list[float]] = []

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Scores the batch first."""
        ids = [tuple(row[row != 0].tolist()) for row in inputs["input_ids"]]
        self._rows = [self._known.setdefault(own, []) for own in ids]
        ByScore.scores[:] = [self.score(row) for row in self._rows]
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Notes the probabilities, where the pass trains."""
        if not self._trains:
            return super().compute_loss(model, inputs, *args, **kwargs)
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, True, **kwargs)
        right = outputs.logits.detach().softmax(-1).gather(1, labels.view(-1, 1)).flatten()
        for row, value in zip(self._rows, right.tolist(), strict=True):
            row.append(value)
        return loss

    def score(self, met: list[float]) -> float | None:
        """From what is known of one example; None where that is not enough."""
        return -met[-1] if met else None


class JustMoved(LeastCertainBefore):
    """The score: by how much that probability changed between the last two times."""

    def score(self, met: list[float]) -> float | None:
        """As above."""
        return abs(met[-1] - met[-2]) if len(met) > 1 else None


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
        encoder: Any = bare(model, self.accelerator).base_model.encoder
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
