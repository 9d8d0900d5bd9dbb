"""FGM along the gradient that each example had an epoch ago: one pass a step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..perturbation.calls import TargetCall
from ..perturbation.geometry import steepest_ascent, widen
from .partial_fgm import PartialFGM
from .registry import register
from .requests import Memory, Passes, PassResult, Step, Total, TrainPass

_NO_IDS = "atta knows an example by its tokens: adv_target must be a token lookup."


@register("atta")
@dataclass(frozen=True, kw_only=True)
class ATTA(PartialFGM):
    """Adversarial training with transferable examples: one pass a step, along a gradient of the last epoch.

    Idea: what fools a model fools the one of an epoch later as well. The gradient at an example's embeddings is a
    by-product of the pass that trains on it; remembered, it says where to move the example when it is met again.

    Equation: delta_i = epsilon * g_i / ||g_i||_2 (Miyato et al. 2017, eq. 5), with g_i of the pass that last trained on
    example i (Zheng et al. 2020, with a step that starts anew in place of one that goes on from the last). Of g_i one
    sign an entry is kept, and one length a token.

    Cost: 1 full pass. While most examples are met for the first time also share of a pass without weight gradients, as
    `partial_fgm`.

    Defaults: epsilon `auto`, share 0.4, 4,096 megabytes. Published, for images: 8/255 (CIFAR-10) and 0.3 (MNIST) in
    `linf`. docs/performance.md measures it against FGM.

    Limits: in the first epoch, and on data that never comes back (streams, random masks), it is `partial_fgm`. An
    example is known by its tokens, so the target must be a token lookup. Every process remembers all examples: a byte
    for eight entries of an embedding, 100 for a token of 768; what was met longest ago is dropped where `megabytes` are
    full. A checkpoint has them in its state file. The device is waited for once a micro-batch. Clean and adversarial
    examples have the same weight, and `weight` is that of both.

    Citation: H. Zheng, Z. Zhang, J. Gu, H. Lee, A. Prakash, "Efficient Adversarial Training with Transferable
    Adversarial Examples", CVPR 2020, arXiv 1912.11969.

    Args:
        share: the part of the examples that is attacked while most are new.
        megabytes: what is remembered at most, on each process.
    """

    megabytes: int = 4096

    def problems(self) -> list[str]:
        found = super().problems()
        if not isinstance(self.megabytes, int) or self.megabytes < 1:
            found.append(f"megabytes must be a whole number, 1 or more; found {self.megabytes!r}.")
        if self.targeted is not None:
            found.append("targeted must be left out: what is remembered is the gradient of the true label.")
        return found

    def new_memory(self, seed: int) -> Memory:
        return Gradients(self.megabytes * 2**20)

    def remark(self, memory: Any) -> str | None:
        if not memory.meets_new:
            return None
        return (
            "adv_method='atta' met no example twice, so it was 'partial_fgm': it remembers gradients from one epoch to "
            "the next. Train for several epochs."
        )

    def passes(self, step: Step) -> Passes:
        memory = step.memory
        if memory is None or memory.meets_new:
            last = yield from super().passes(step)
        else:
            last = TrainPass(lambda call: self._remembered(memory, call, step.epsilon))
        return last if memory is None else replace(last, then=memory.note)

    def _remembered(self, memory: Gradients, call: TargetCall, size: Any) -> Tensor:
        return size * steepest_ascent(memory.gradient(call), self.norm, call.units)


@dataclass(frozen=True)
class Gradient:
    """Of one example's tokens: the length of each, (tokens,), and the signs, eight a byte: uint8, (tokens, bytes)."""

    lengths: Tensor
    signs: Tensor

    @property
    def size(self) -> int:
        """In bytes."""
        return self.lengths.nbytes + self.signs.nbytes


class Gradients:
    """The gradient that each example had when it was last met, by its tokens.

    Args:
        most: bytes that are kept; what was met longest ago goes first.

    Attributes:
        meets_new: whether most examples of the last optimizer step were met for the first time.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, 0
        self._known: dict[int, Gradient] = {}
        self._noted: list[tuple[Tensor, Tensor | None, Gradient]] = []
        self.meets_new = True

    def gradient(self, call: TargetCall) -> Tensor:
        """What is remembered of the examples of a call, in its shape; zero for those that are not known."""
        found = torch.zeros_like(widen(call.value))
        if call.ids is None:
            raise ValueError(_NO_IDS)
        # On the host, where the memory is: the device is waited for here.
        rows = [(self._known.get(key), places) for key, places in _examples(call.ids, call.units.padding)]
        known = [(gradient, places) for gradient, places in rows if gradient is not None]
        if not known:
            return found
        lengths = torch.cat([gradient.lengths for gradient, _ in known]).to(found)
        signs = torch.cat([gradient.signs for gradient, _ in known]).to(found.device)
        places = torch.cat([places for _, places in known]).to(found.device)
        values = unpacked(signs, found.shape[-1]).to(found) * lengths[:, None] / found.shape[-1] ** 0.5
        return found.flatten(0, 1).index_copy_(0, places, values).view_as(found)

    def note(self, result: PassResult) -> None:
        """The gradient of a micro-batch. It stays on the device until the step is over."""
        if result.ids is None:
            raise ValueError(_NO_IDS)
        packed_gradient = Gradient(torch.linalg.vector_norm(result.gradient, dim=-1).float(), packed(result.gradient))
        self._noted.append((result.ids, result.units.padding, packed_gradient))

    def settle(self, model: nn.Module, total: Total) -> None:
        found: list[tuple[int, Gradient]] = []
        for ids, padding, gradient in self._noted:
            lengths, signs = gradient.lengths.flatten().cpu(), gradient.signs.flatten(0, 1).cpu()
            found += [(key, Gradient(lengths[places], signs[places])) for key, places in _examples(ids, padding)]
        self._noted = []
        # An example may meet another process in the next epoch.
        found = total.gathered(found)
        if found:
            self.meets_new = 2 * sum(key not in self._known for key, _ in found) > len(found)
        for key, gradient in found:
            self._keep(key, gradient)

    def _keep(self, key: int, gradient: Gradient) -> None:
        before = self._known.pop(key, None)
        self._known[key] = gradient
        self._size += gradient.size - (0 if before is None else before.size)
        while self._size > self._most:
            self._size -= self._known.pop(next(iter(self._known))).size

    def state_dict(self) -> dict[str, Any]:
        known = list(self._known.values())
        return {
            "meets_new": self.meets_new,
            "keys": torch.tensor(list(self._known), dtype=torch.int64),
            "tokens": torch.tensor([len(each.lengths) for each in known], dtype=torch.int64),
            "lengths": torch.cat([each.lengths for each in known]) if known else torch.zeros(0),
            "signs": torch.cat([each.signs for each in known]) if known else torch.zeros(0, 0, dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.meets_new, self._known, self._size = state["meets_new"], {}, 0
        tokens = state["tokens"].tolist()
        parts = zip(state["lengths"].split(tokens), state["signs"].split(tokens), strict=True)
        for key, (lengths, signs) in zip(state["keys"].tolist(), parts, strict=True):
            # Copies: a part of a tensor would hold on to the whole.
            self._keep(key, Gradient(lengths.clone(), signs.clone()))


def packed(values: Tensor) -> Tensor:
    """The signs of the last dimension, eight a byte: uint8, (..., bytes)."""
    bits = (nn.functional.pad(values, (0, -values.shape[-1] % 8)) > 0).unflatten(-1, (-1, 8))
    return (bits * _powers(values)).sum(-1, dtype=torch.uint8)


def unpacked(signs: Tensor, size: int) -> Tensor:
    """What `packed` was given: 1 and -1, int8, (..., size)."""
    bits = signs.unsqueeze(-1).bitwise_and(_powers(signs)) != 0
    return 2 * bits.flatten(-2)[..., :size].to(torch.int8) - 1


def _powers(like: Tensor) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=like.device)


def _examples(ids: Tensor, padding: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Of each row a number for its tokens, and the places of these among all positions; on the host."""
    rows = ids.cpu()
    real = torch.ones_like(rows, dtype=torch.bool) if padding is None else ~padding.cpu()
    for number, (row, there) in enumerate(zip(rows, real, strict=True)):
        digest = hashlib.blake2b(row[there].numpy().tobytes(), digest_size=8).digest()
        yield int.from_bytes(digest, "little", signed=True), number * rows.shape[1] + there.nonzero().flatten()
