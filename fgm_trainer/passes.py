"""What one forward pass met at its target, as one tensor.

The value goes on through the model as `value + leaf`. In a pass that only asks for the gradient the leaf is zero; in
an adversarial pass it is the perturbation. After the backward pass `leaf.grad` is the gradient. Where a lookup's weight
gets its gradient from the last pass of a step alone, the leaf of an earlier one is the moved value itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .geometry import Units, shared_entries, widen


@dataclass(frozen=True)
class Met:
    """What a call of the target met, for a perturbation that is drawn there and then.

    Args:
        value: the tensor to be perturbed, (rows, positions, dimension).
        units: its units.
        ids: where tokens are looked up, their ids, (rows, positions).
        vocabulary_size: and how many rows the lookup has.
        call: the number of the call in this forward pass, from 0.
    """

    value: Tensor
    units: Units
    ids: Tensor | None
    vocabulary_size: int
    call: int


# Noise has to be drawn where its shape is known, inside of the forward pass.
Draw = Callable[[Met], Tensor]


class Earlier:
    """What the earlier passes of a step owe the lookup's weight: gradients of its output, (rows, positions, dimension).

    The lookup is linear and sees the same ids in every pass, so the last pass can send their sum on: the weight's
    gradient, (V, D), is written once a step and not once a pass.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        """Adds one pass's, as the engine scaled it."""
        self.gradient = gradient if self.gradient is None else self.gradient + gradient


class Pass:
    """What one forward pass met at the target: its calls, in order, as one tensor.

    Several calls in one forward (two towers, R-Drop) are stacked along the rows, shorter ones padded at the end;
    the attack sees one tensor, and every call gets its own part back.

    Args:
        delta: the perturbation to add, (rows, positions, dimension), or what draws it, or None for none.
        gradient: whether the gradient with respect to the perturbation is wanted.
        scope: over which entries norms are taken.
        padding_id: the id that carries no token, where there is no attention mask.
        clip: the valid range of the tensor, two tensors that broadcast against it.
    """

    def __init__(
        self,
        delta: Tensor | Draw | None,
        gradient: bool,
        scope: str = "example",
        padding_id: int | None = None,
        clip: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self._delta, self.wanted, self._scope = delta, gradient, scope
        self._padding_id, self._clip = padding_id, clip
        self._chosen: tuple[Tensor, int] | None = None
        self._earlier: Earlier | None = None
        # The attention mask of the call in progress, (rows, positions): true where there is a token.
        self.mask: Tensor | None = None
        self._leaves: list[Tensor] = []
        self._deltas: list[Tensor | None] = []
        self._ids: list[Tensor | None] = []
        self._blank: list[Tensor | None] = []
        self._value_norms: list[Tensor] = []
        self._delta_norms: list[Tensor] = []
        self._vocabulary_size = 0
        self._row = self._used = 0
        self.calls = 0
        self.forward_done = False

    def part_of(self, chosen: tuple[Tensor, int] | None, earlier: Earlier | None) -> None:
        """Says what the pass is a part of.

        Args:
            chosen: the numbers of the examples that the perturbation is of, (chosen,), and how many examples there
                are; the others stay clean.
            earlier: where given, a pass whose gradient is wanted keeps it here in place of sending it on to the
                lookup's weight, and the last pass sends it on.
        """
        self._chosen, self._earlier = chosen, earlier

    def meet(self, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        """Called by the target's hook: the value that goes on through the model in place of `value`."""
        if not value.is_floating_point():
            raise TypeError(f"A perturbation can be added to floating-point numbers only; the target is {value.dtype}.")
        if self.forward_done:
            return self._again(value)
        self.calls += 1
        rows = slice(self._row, self._row + value.shape[0])
        self._row = rows.stop
        blank = self._find_blank(value, ids)
        self._ids.append(ids)
        self._blank.append(blank)
        self._vocabulary_size = vocabulary_size
        delta = None if self._delta is None else self._own_delta(self._delta, value, ids, blank)
        self._deltas.append(delta)
        leaf, moved = self._moved(value, delta, rows)
        self._leaves.append(leaf)
        return moved

    def _own_delta(self, delta: Tensor | Draw, value: Tensor, ids: Tensor | None, blank: Tensor | None) -> Tensor:
        """This call's own perturbation, as it is applied."""
        own = self._own_part(delta, value, ids, blank).to(value.dtype)
        value = value.detach()
        if self._clip is not None:
            own = _inside(value + own, *self._clip) - value
        self._value_norms.append(_row_norms(value, blank))
        self._delta_norms.append(_row_norms(own, blank))
        return own

    def _moved(self, value: Tensor, delta: Tensor | None, rows: slice) -> tuple[Tensor, Tensor]:
        """The leaf that the gradient is read from, and what goes on through the model."""
        if self.wanted and self._earlier is not None:
            # The way back ends here.
            leaf = (value if delta is None else value + delta).detach().requires_grad_()
            return leaf, leaf
        if self._earlier is not None:
            self._send_on(value, rows)
        if not self.wanted and delta is None:
            return value.detach(), value
        leaf = torch.zeros_like(value) if delta is None else delta
        if self.wanted:
            leaf = leaf.detach().requires_grad_()
        moved = value + leaf
        if self._clip is not None and delta is not None:
            # The sum may round to just outside: the value is the range's own, the gradient as if nothing were done.
            moved = _inside(moved.detach(), *self._clip) + (moved - moved.detach())
        return leaf, moved

    def check(self) -> None:
        """Raises RuntimeError unless every row of the perturbation was used."""
        if isinstance(self._delta, Tensor) and self._used != self._delta.shape[0]:
            raise RuntimeError(
                f"The first pass met {self._delta.shape[0]} rows at the target and this one {self._used}: the model "
                "must call the target equally often in every pass of a step."
            )

    @property
    def leaves(self) -> list[Tensor]:
        return self._leaves

    def gradient(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradients of `leaves`, stacked: (rows, positions, dimension), in float32 at least."""
        given = [g for g in gradients if g is not None]
        if not given:
            raise RuntimeError(
                "The loss does not depend on the tensor to be perturbed: no gradient arrived there. Choose an "
                "`adv_target` that lies on the way from the inputs to the loss."
            )
        if len(given) < len(gradients):
            # A call without a gradient (a teacher's, under no_grad) has no direction.
            pairs = zip(gradients, self._leaves, strict=True)
            given = [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]
        stacked = _stack(given)
        # A loss scale is divided out next, and what is left may be zero in float16.
        stacked = widen(stacked)
        if self._earlier is not None:
            self._earlier.add(stacked)
        return stacked

    def no_gradient(self) -> Tensor:
        """Zero, in the shape of `gradient`."""
        return torch.zeros_like(widen(_stack([leaf.detach() for leaf in self._leaves])))

    def units(self) -> Units:
        """The units of this micro-batch. Raises ValueError where the scope does not fit the tensor."""
        return self._units(self._leaves, self._ids, self._blank)

    def applied(self) -> Tensor | None:
        """The perturbation as it was applied, (rows, positions, dimension): drawn, in the target's type, clipped."""
        deltas = [delta.detach() for delta in self._deltas if delta is not None]
        return _stack(deltas) if deltas else None

    def ids(self) -> Tensor | None:
        """The ids that were looked up, (rows, positions); None where the target is no lookup."""
        ids = [i for i in self._ids if i is not None]
        return _stack(ids) if len(ids) == len(self._ids) else None

    def _units(self, leaves: list[Tensor], own_ids: list[Tensor | None], own_blank: list[Tensor | None]) -> Units:
        scope, dims = self._scope, leaves[0].dim()
        blank = _stack_blank(own_blank, leaves)
        if scope == "vocabulary":
            ids = [i for i in own_ids if i is not None]
            if len(ids) < len(leaves):
                raise ValueError("adv_scope 'vocabulary' exists for token lookups only; write adv_scope='example'.")
            entries = shared_entries(_stack(ids), blank, self._vocabulary_size)
            return Units(scope, blank, entries)
        if scope == "example" and dims < 3 and own_ids[0] is not None:
            raise ValueError(
                f"The lookup's output has shape {tuple(leaves[0].shape)}, several examples packed into one row: "
                "adv_scope 'example' would mean the pack. Write adv_scope='token' or 'vocabulary', or do not pack."
            )
        if scope == "token" and dims != 3 and own_ids[0] is None:
            raise ValueError(
                f"adv_scope 'token' needs a tensor (examples, positions, dimension); the target's is "
                f"{tuple(leaves[0].shape)}. Write adv_scope='example'."
            )
        return Units(scope, blank)

    def row_norms(self) -> tuple[Tensor, Tensor]:
        """The Euclidean norms of the clean tensor and of the perturbation, of each row's tokens: (rows,) both."""
        return _joined(self._value_norms), _joined(self._delta_norms)

    def _again(self, value: Tensor) -> Tensor:
        """Gradient checkpointing runs a layer's forward again inside the backward pass: the same leaf is added."""
        moves = self.wanted or self._delta is not None
        if not moves and self._earlier is None:
            return value
        if len(self._leaves) != 1:
            raise RuntimeError(
                f"The target is called {len(self._leaves)} times inside checkpointed layers, so a recomputation can't "
                "tell which call it repeats. Turn gradient checkpointing off or choose another adv_target."
            )
        if self._earlier is not None:
            if self.wanted:
                return self._leaves[0]
            self._send_on(value, slice(0, value.shape[0]))
        return value + self._leaves[0] if moves else value

    def _send_on(self, value: Tensor, rows: slice) -> None:
        """Adds what earlier passes kept to the gradient that this pass sends to the lookup."""
        assert self._earlier is not None
        if self._earlier.gradient is None or not value.requires_grad:
            return
        part = _cut(self._earlier.gradient, rows, value)
        value.register_hook(lambda gradient: gradient + part.to(gradient.dtype))

    def _own_part(self, delta: Tensor | Draw, value: Tensor, ids: Tensor | None, blank: Tensor | None) -> Tensor:
        if not isinstance(delta, Tensor):
            units = self._units([value], [ids], [blank])
            return delta(Met(value.detach(), units, ids, self._vocabulary_size, self.calls - 1))
        count = value.shape[0] if self._chosen is None else len(self._chosen[0])
        rows = slice(self._used, self._used + count)
        self._used = rows.stop
        part = _cut(delta, rows, value)
        if self._chosen is not None:
            part = _among_all(part, *self._chosen, value)
        if part.shape != value.shape:
            raise RuntimeError(
                f"The target's tensor has shape {tuple(value.shape)} but its perturbation has {tuple(part.shape)}: the "
                "model must call the target equally often, with equal shapes, in every pass of a step."
            )
        return part

    def _find_blank(self, value: Tensor, ids: Tensor | None) -> Tensor | None:
        """True where there is no token."""
        places = value.shape[:-1] if ids is None else ids.shape
        blank = None if self.mask is None or len(places) != 2 else self.mask.to(value.device) == 0
        if blank is not None and blank.shape[-1] == places[1] and blank.numel() == places.numel():
            return blank.view(places)
        if blank is not None and blank.shape[0] == places[0] and blank.shape[1] < places[1]:
            # Padded inside the model to a multiple of its window (Longformer).
            return nn.functional.pad(blank, (0, places[1] - blank.shape[1]), value=True)
        if ids is not None and self._padding_id is not None:
            return ids == self._padding_id
        return None


def _cut(stacked: Tensor, rows: slice, value: Tensor) -> Tensor:
    """The part of one call, whose value is given."""
    return stacked[rows] if stacked.dim() < 3 else stacked[rows, : value.shape[1]]


def _among_all(part: Tensor, chosen: Tensor, examples: int, value: Tensor) -> Tensor:
    """The perturbation of the chosen examples in the shape of the whole tensor, zero for the others."""
    if value.shape[0] != examples or part.shape != (len(chosen), *value.shape[1:]):
        raise RuntimeError(
            f"A part of the batch can be perturbed where the target has one row an example; here {examples} examples "
            f"are {value.shape[0]} rows. Choose a method that perturbs them all, such as adv_method='fgm'."
        )
    return part.new_zeros(value.shape).index_copy_(0, chosen.to(part.device), part)


def _inside(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    for bound in (low, high):
        # A range of three channels would silently make three channels of one.
        ends = zip(reversed(bound.shape), reversed(values.shape), strict=False)
        if bound.dim() > values.dim() or any(b not in (1, v) for b, v in ends):
            raise ValueError(
                f"The valid range has shape {tuple(bound.shape)}, which does not fit the target's "
                f"{tuple(values.shape)}: is the processor, with its `image_mean` and `image_std`, the one that made "
                "this tensor?"
            )
    return values.clamp(low.to(values), high.to(values))


def _row_norms(values: Tensor, blank: Tensor | None) -> Tensor:
    """The Euclidean norm of each row, over the positions that hold a token: (rows,), in float32 at least."""
    dtype = torch.float32 if values.dtype.itemsize < 4 else None
    dims = tuple(range(1, values.dim())) if blank is None else (-1,)
    norms: Tensor = torch.linalg.vector_norm(values, dim=dims, dtype=dtype)
    if blank is not None:
        norms = norms.masked_fill(blank, 0.0)
    return norms if norms.dim() == 1 else torch.linalg.vector_norm(norms, dim=1)


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _stack(tensors: list[Tensor], fill: float = 0) -> Tensor:
    if len(tensors) == 1:
        return tensors[0]
    if tensors[0].dim() == 1:
        return torch.cat(tensors)
    longest = max(t.shape[1] for t in tensors)
    padded = [torch.cat([t, t.new_full((t.shape[0], longest - t.shape[1], *t.shape[2:]), fill)], 1) for t in tensors]
    return torch.cat(padded)


def _stack_blank(blank: list[Tensor | None], leaves: list[Tensor]) -> Tensor | None:
    if len(leaves) == 1:
        return blank[0]
    # What is padded to stack calls of different lengths is blank as well.
    if all(b is None for b in blank) and (leaves[0].dim() != 3 or len({leaf.shape[1] for leaf in leaves}) == 1):
        return None
    pairs = zip(blank, leaves, strict=True)
    each = [leaf.new_zeros(leaf.shape[:-1], dtype=torch.bool) if b is None else b for b, leaf in pairs]
    return _stack(each, fill=True)
