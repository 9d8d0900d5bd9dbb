"""The weights as a target: each matrix is perturbed where a module reads it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .calls import Draw, SharedCalls, TargetCall
from .geometry import Units, widen
from .target import Site, Target
from .watched import PerturbedTensor, WatchedForward

# The weights of one module, each by its name there and its place among all.
Own = list[tuple[str, int]]


@dataclass(frozen=True)
class Segments(Units):
    """Units of a flat vector: its parts, one after the other, such as the weights of a model, one unit a tensor.

    Args:
        sizes: the number of entries of each part.
        lengths: the Euclidean norm of what each part perturbs, (parts,): a step can be made relative to it.
    """

    scope: str = "tensor"
    sizes: tuple[int, ...] = ()
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        pass

    def count(self, values: Tensor) -> Tensor:
        return self.spread(widen(values).new_tensor(self.sizes))

    def spread(self, each: Tensor) -> Tensor:
        """One value a part, (parts,), as one value an entry."""
        return torch.cat([value.expand(size) for value, size in zip(each, self.sizes, strict=True)])

    def norms(self, values: Tensor, order: float) -> Tensor:
        return self.spread(torch.stack([torch.linalg.vector_norm(v, order) for v in values.split(self.sizes)]))


class Weights(Target):
    """The trainable weights of two dimensions or more; biases and the scales of norms stay as they are.

    A module sees `weight + leaf` while its forward runs; the parameter itself is not written. A perturbation is one
    flat vector, the weights one after the other, and a weight is a unit of its own: scope `tensor`.
    """

    scopes = ("tensor",)

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[nn.Parameter] = []
        self._readers: list[tuple[nn.Module, Own]] = []

    def __str__(self) -> str:
        return "'weights' (the model's weight matrices)"

    def new_pass(self, shared: SharedCalls, delta: Tensor | Draw | None, **settings: Any) -> WatchedForward:
        return _WeightPass(self._weights, shared, delta, **settings)

    def _end(self, forward_pass: WatchedForward) -> None:
        super()._end(forward_pass)
        # An interrupt (Ctrl-C) in the middle of a forward leaves it without the hook that follows.
        for module, own in self._readers:
            _put_back(own, module)

    def find_sites(self, model: nn.Module) -> list[Site]:
        places = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad and weight.dim() >= 2
        ]
        # A tied weight has one perturbation, wherever it is read.
        self._weights = list(dict.fromkeys(w for _, _, w in places))
        if not self._weights:
            raise ValueError(
                f"{type(model).__name__} has no trainable weight matrix: adv_target='weights' means nothing."
            )
        order = {w: i for i, w in enumerate(self._weights)}
        readers: dict[nn.Module, Own] = {}
        for module, name, weight in places:
            readers.setdefault(module, []).append((name, order[weight]))
        self._readers = list(readers.items())
        before = [Site(m, True, functools.partial(self._enter, own)) for m, own in self._readers]
        return [*before, *(Site(m, False, functools.partial(_put_back, own)) for m, own in self._readers)]

    def _enter(self, own: Own, module: nn.Module, *args: Any) -> None:
        seen = self._pass
        if isinstance(seen, _WeightPass) and seen.touches and seen.reads(module):
            for name, index in own:
                # Found before the parameter of that name, which stays what `state_dict` reads.
                # `functional_call` puts another tensor in the parameter's place.
                module.__dict__[name] = seen.moved(index, module._parameters.get(name))


def is_weights(target: str | Target) -> bool:
    """Whether `adv_target` means the model's weights."""
    return target == "weights" or isinstance(target, Weights)


def _put_back(own: Own, module: nn.Module, *rest: Any) -> None:
    for name, _ in own:
        module.__dict__.pop(name, None)


class _WeightPass(WatchedForward):
    """What one forward pass read: every weight, moved by its part of a flat perturbation."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        shared: SharedCalls,
        delta: Tensor | Draw | None,
        *,
        chosen: Tensor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(shared, **settings)
        self._weights = weights
        sizes = tuple(w.numel() for w in weights)
        norms = torch.stack([torch.linalg.vector_norm(w.detach()) for w in weights])
        units = Segments(sizes=sizes, lengths=norms)
        if delta is not None and not isinstance(delta, Tensor):
            delta = delta(TargetCall(weights[0].new_zeros(sum(sizes)), units, None, 0, 0))
        self.touches = self.takes_gradient or delta is not None
        # Modules called with autograd and without.
        self._graded: set[nn.Module] = set()
        self._others: set[nn.Module] = set()
        self._leaves: list[Tensor] = []
        for weight, part in zip(weights, [None] * len(weights) if delta is None else delta.split(sizes), strict=True):
            own = torch.zeros_like(weight) if part is None else part.view_as(weight).to(weight.dtype)
            self._leaves.append(own.detach().requires_grad_(self.takes_gradient))
        self._tensor = _FlatWeights(self._leaves, units)

    @property
    def reached(self) -> bool:
        return True

    def reads(self, module: nn.Module) -> bool:
        """Whether the module reads moved weights in a call that happens now."""
        own = self.in_loss() and self.with_autograd()
        if self.in_backward() and module in self._others and module not in self._graded:
            raise RuntimeError(
                "The loss runs the model without autograd and again in its backward pass (gradient caching), which "
                "adv_target='weights' can't follow. Choose a method that perturbs inputs, such as adv_method='fgm'."
            )
        (self._graded if own else self._others).add(module)
        return own

    def moved(self, index: int, weight: Tensor | None = None) -> Tensor:
        return (self._weights[index] if weight is None else weight) + self._leaves[index]

    @property
    def leaves(self) -> list[Tensor]:
        return self._leaves

    @property
    def tensor(self) -> PerturbedTensor:
        return self._tensor

    def example_norms(self) -> tuple[Tensor, Tensor]:
        lengths = self._tensor.units().lengths
        assert lengths is not None
        return lengths, torch.stack([torch.linalg.vector_norm(leaf.detach()) for leaf in self._leaves])


class _FlatWeights:
    """All weights as one flat vector."""

    def __init__(self, leaves: list[Tensor], units: Segments) -> None:
        self._leaves, self._units = leaves, units

    def gradient(self, scales: Mapping[int, Tensor]) -> Tensor:
        # A weight that this forward pass did not read has no direction.
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        return widen(torch.cat([g.flatten() for g in gradients])) / scales[0]

    def delta(self) -> Tensor:
        return torch.cat([leaf.detach().flatten() for leaf in self._leaves])

    def ids(self) -> None:
        return None

    def units(self) -> Segments:
        return self._units
