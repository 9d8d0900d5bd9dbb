"""The weights as a target: each matrix is perturbed where a module reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .geometry import Segments, Units, widen
from .passes import Draw, Met, Pass
from .target import Target, outside_graphs


class Weights(Target):
    """The trainable weights of two dimensions or more; biases and the scales of norms stay as they are.

    A module sees `weight + leaf` while its forward runs; the parameter itself is not written. A perturbation is one
    flat vector, the weights one after the other, and a weight is a unit of its own: scope `tensor`.
    """

    scopes = ("tensor",)

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[nn.Parameter] = []
        # Each module that reads one of them: under which names, and the place of each among the weights.
        self._readers: list[tuple[nn.Module, list[tuple[str, int]]]] = []

    def __str__(self) -> str:
        return "'weights' (the model's weight matrices)"

    def forward_ended(self, seen: Pass, batch: Any) -> None:
        seen.forward_done = True

    def _new_pass(self, delta: Tensor | Draw | None, gradient: bool, scope: str) -> Pass:
        return _WeightPass(self._weights, delta, gradient)

    def _pass_ended(self) -> None:
        super()._pass_ended()
        # An interrupt (Ctrl-C) in the middle of a forward leaves it without the hook that follows.
        for module, own in self._readers:
            _put_back(module, own)

    def _register(self, model: nn.Module) -> list[Any]:
        places = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad and weight.dim() >= 2
        ]
        # A tied weight has one perturbation, wherever it is read.
        self._weights = list({id(w): w for _, _, w in places}.values())
        if not self._weights:
            raise ValueError(
                f"{type(model).__name__} has no trainable weight matrix: adv_target='weights' means nothing."
            )
        order = {id(w): i for i, w in enumerate(self._weights)}
        modules = {id(m): m for m, _, _ in places}.values()
        self._readers = [(m, [(n, order[id(w)]) for other, n, w in places if other is m]) for m in modules]
        handles = []
        for module, own in self._readers:

            def enter(module: nn.Module, args: Any, own: list[tuple[str, int]] = own) -> None:
                if isinstance(self._pass, _WeightPass) and self._pass.touches:
                    for name, index in own:
                        # Found before the parameter of that name, which stays what `state_dict` reads.
                        module.__dict__[name] = self._pass.moved(index)

            def leave(module: nn.Module, args: Any, output: Any, own: list[tuple[str, int]] = own) -> None:
                _put_back(module, own)

            handles.append(module.register_forward_pre_hook(outside_graphs(enter)))
            handles.append(module.register_forward_hook(outside_graphs(leave), always_call=True))
        return handles


def _put_back(module: nn.Module, names: list[tuple[str, int]]) -> None:
    for name, _ in names:
        module.__dict__.pop(name, None)


class _WeightPass(Pass):
    """What one forward pass read: every weight, moved by its part of a flat perturbation."""

    def __init__(self, weights: Sequence[Tensor], delta: Tensor | Draw | None, gradient: bool) -> None:
        super().__init__(None, gradient)
        self._weights = weights
        self.calls = 1
        sizes = tuple(w.numel() for w in weights)
        norms = torch.stack([torch.linalg.vector_norm(w.detach()) for w in weights])
        self._segments = Segments(sizes=sizes, lengths=norms)
        if delta is not None and not isinstance(delta, Tensor):
            delta = delta(Met(weights[0].new_zeros(sum(sizes)), self._segments, None, 0, 0))
        self._flat = delta
        self.touches = gradient or delta is not None
        for weight, part in zip(weights, [None] * len(weights) if delta is None else delta.split(sizes), strict=True):
            own = torch.zeros_like(weight) if part is None else part.view_as(weight).to(weight.dtype)
            self._leaves.append(own.detach().requires_grad_(gradient))

    def moved(self, index: int) -> Tensor:
        return self._weights[index] + self._leaves[index]

    def gradient(self, gradients: Sequence[Tensor | None]) -> Tensor:
        # A weight that this forward pass did not read has no direction.
        pairs = zip(gradients, self._leaves, strict=True)
        flat = torch.cat([(torch.zeros_like(leaf) if g is None else g).flatten() for g, leaf in pairs])
        return widen(flat)

    def units(self) -> Units:
        return self._segments

    def no_gradient(self) -> Tensor:
        return torch.zeros_like(torch.cat([leaf.detach().flatten() for leaf in self._leaves]))

    def applied(self) -> Tensor | None:
        return None if self._flat is None else torch.cat([leaf.detach().flatten() for leaf in self._leaves])

    def ids(self) -> Tensor | None:
        return None

    def row_norms(self) -> tuple[Tensor, Tensor]:
        assert self._flat is not None
        assert self._segments.lengths is not None
        parts = self._flat.split(self._segments.sizes)
        return self._segments.lengths, torch.stack([torch.linalg.vector_norm(p) for p in parts])
