"""One forward pass of the model with its target perturbed.

The value goes on through the model as `value + leaf`. In a pass for the gradient the leaf is zero; in an adversarial
pass it is the perturbation. After the backward pass `leaf.grad` is the gradient.

Only calls that the loss is made of are perturbed. A call outside of the loss (a probe, a teacher after the step) goes
through as it is, and so does one without autograd inside of it (reference logits), unless it is run again in the
backward pass: then it was a part of the loss after all (gradient caching, checkpointing).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction

from .batches import example_of_rows, examples_in
from .clipping import fitted, outside, within
from .deferral import Looked, Owed, is_plain_lookup, send_the_rest, sent_on
from .geometry import Units, by_example, shared_entries, widen
from .stacking import cut, joined, row_norms, stack


@dataclass(frozen=True)
class TargetCall:
    """A call of the target, for a perturbation that is drawn there and then.

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


# Its name in 0.1.
Met = TargetCall

# Noise has to be drawn where its shape is known, inside of the forward pass.
Draw = Callable[[TargetCall], Tensor]

# The positions of a call have nothing to do with the masks around it.
BARRIER = "barrier"

# Which call of the target: of which module, and the how many-th in the pass (from -1 downwards without autograd).
Key = tuple[nn.Module, int]


@dataclass(eq=False)
class Call:
    """One call of the target in one forward pass."""

    key: Key
    shape: torch.Size
    ids: Tensor | None
    vocabulary_size: int
    padding: Tensor | None
    # To which example of the loss's batch each row belongs, None for one row an example; and how many there are.
    examples: Tensor | None
    example_count: int
    # Which loss of the pass it belongs to.
    loss: int
    # Whether autograd was on, so that the loss depends on it.
    graded: bool
    delta: Tensor | None = None
    leaf: Tensor | None = None
    # Whether `leaf` is the moved value itself, so that the way back ends here.
    deferred: bool = False
    repeated: bool = False
    norms: tuple[Tensor, Tensor] | None = None
    # Its ids, kept when the pass was over.
    looked: Looked | None = None


@dataclass
class StepCalls:
    """What the passes of one micro-batch share.

    Args:
        scope: over which entries norms are taken.
        padding_id: the id that carries no token, where there is no attention mask.
        pads_inside: whether the model pads its input to a multiple of its window (Longformer).
        clip: the valid range of the tensor, two tensors that broadcast against it.
        stochastic: whether a pass may leave a module out (layer drop).
        defers: whether the gradients that earlier passes owe a lookup's weight are sent on by the last pass.

    Attributes:
        layout: the calls of the first pass, each with its part of the stacked perturbation.
        cached: calls without autograd that the backward pass runs again.
        idle: calls with autograd that the loss does not depend on (a probe inside of it).
        owed: by call, what earlier passes owe the lookup's weight, as the engine scaled it.
        outside: whether a clean value was outside of `clip`, read later.
    """

    scope: str = "example"
    padding_id: int | None = None
    pads_inside: bool = False
    clip: tuple[Tensor, Tensor] | None = None
    stochastic: bool = False
    defers: bool = False
    layout: dict[Key, Call] | None = None
    cached: set[Key] = field(default_factory=set)
    idle: set[Key] = field(default_factory=set)
    owed: dict[Key, list[Owed]] = field(default_factory=dict)
    outside: list[Tensor] = field(default_factory=list)


class PerturbedForward:
    """One forward pass: the calls of the target in it, in order, as one tensor.

    Several calls in one forward (two towers, R-Drop) are stacked along the rows, shorter ones padded at the end;
    the attack sees one tensor, and every call gets its own part back.

    Args:
        step: what it shares with the other passes of the micro-batch.
        delta: the perturbation to add, (rows, positions, dimension), or what draws it, or None for none.
        gradient: whether the gradient with respect to the perturbation is wanted.
        trains: whether weights get gradients from it.
        chosen: where given, the examples that the perturbation is of, (chosen,); the others stay clean.
    """

    def __init__(
        self,
        step: StepCalls,
        delta: Tensor | Draw | None = None,
        *,
        gradient: bool = False,
        trains: bool = False,
        chosen: Tensor | None = None,
    ) -> None:
        self.step, self.wanted, self._delta, self._chosen = step, gradient, delta, chosen
        self._trains, self._defers = trains, step.defers and trains
        # The attention masks of the calls in progress, (rows, positions): true where there is a token; outermost first.
        # None where a call has none, `BARRIER` where those around it say nothing of its positions.
        self.masks: list[Tensor | str | None] = []
        self.calls: list[Call] = []
        self._counts: dict[tuple[nn.Module, bool], int] = {}
        self._batch: Any = None
        self._open = False
        self._grad_mode = True
        self.losses = 0
        # Of the target's hooks, which are there for this pass alone.
        self.handles: list[Any] = []

    # Which calls are its own ------------------------------------------------------------------------------------------

    @contextmanager
    def loss_of(self, batch: Any) -> Iterator[None]:
        """Inside, a loss is computed; a pass may have several (a batch in parts)."""
        self._batch, self._open, self._grad_mode = batch, True, torch.is_grad_enabled()
        before, counts = len(self.calls), dict(self._counts)
        try:
            yield
            self.losses += 1
        except BaseException:
            # It may be tried again.
            self._counts, self.calls[before:], self.masks = counts, [], []
            raise
        finally:
            self._open = False

    def is_own(self) -> bool:
        """Whether a call that happens now may be one that the loss is made of."""
        return self._with_autograd() if self.in_backward() else self._open and self._with_autograd()

    @staticmethod
    def in_backward() -> bool:
        """Whether autograd is on its way back."""
        return bool(torch._C._current_graph_task_id() != -1)

    def _with_autograd(self) -> bool:
        return torch.is_grad_enabled() or not self._grad_mode or _in_reentrant_checkpoint()

    @property
    def reached(self) -> bool:
        """Whether the target was called for the last loss."""
        return bool(self.reached_modules)

    @property
    def has_references(self) -> bool:
        """Whether the target was called without autograd for the last loss."""
        return any(not call.graded for call in self.calls if call.loss == self.losses - 1)

    @property
    def reached_modules(self) -> frozenset[nn.Module]:
        """The modules that were called for the last loss."""
        return frozenset(call.key[0] for call in self.calls if call.loss == self.losses - 1)

    # Where the value is perturbed -------------------------------------------------------------------------------------

    def perturb(self, module: nn.Module, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        """Called by the target's hook: the value that goes on through the model in place of `value`."""
        if self.in_backward():
            # A reference inside of what is run again (checkpointing) is none of the loss's calls there, either.
            return self._again(module, value, ids) if self._with_autograd() else value
        if not self._open:
            return value
        if not value.is_floating_point():
            raise TypeError(f"A perturbation can be added to floating-point numbers only; the target is {value.dtype}.")
        # Counted apart: a reference may be asked in one pass and not in the next.
        graded = self._with_autograd()
        number = self._counts.get((module, graded), 0)
        self._counts[module, graded] = number + 1
        call = Call(
            (module, number if graded else ~number),
            value.shape,
            ids,
            vocabulary_size,
            _find_padding(value, ids, self.masks, self.step),
            *self._examples_of(value, ids, graded),
            self.losses,
            graded,
        )
        moves = (call.graded and call.key not in self.step.idle) or call.key in self.step.cached
        if moves:
            call.delta = self._own_delta(call, value)
        self.calls.append(call)
        return self._moved(call, value) if moves else value

    def _examples_of(self, value: Tensor, ids: Tensor | None, must: bool) -> tuple[Tensor | None, int]:
        examples, rows = examples_in(self._batch), value.shape[0]
        if rows == examples:
            return None, rows
        found = example_of_rows(self._batch, rows)
        if found is not None:
            return found.to(value.device), examples
        tokens = self._batch.get("input_ids") if isinstance(self._batch, Mapping) else None
        if isinstance(tokens, Tensor) and len(tokens) == rows:
            # Pairs with one label each: an example of the model's own is a row.
            return None, rows
        # Where the model is called with as many rows, a row is a sequence: a batch that the loss doubled, say.
        masks = [mask for mask in self.masks if isinstance(mask, Tensor)]
        sequences = ids is not None or any(mask.shape[0] == rows for mask in masks)
        if must and self.step.scope == "example" and not sequences:
            raise ValueError(
                f"The target's tensor has {rows} rows for {examples} examples, and which row belongs to which example "
                "is not known, so adv_scope 'example' has no meaning here. Write adv_scope='token' where a row is a "
                "position, or choose an adv_target with one row an example."
            )
        return None, rows

    def _own_delta(self, call: Call, value: Tensor) -> Tensor | None:
        """This call's own perturbation, as it is applied."""
        part = self._own_part(call, value)
        value = value.detach()
        if self.step.clip is not None:
            low, high = fitted(self.step.clip, value)
            self.step.outside.append(outside(value, low, high, call.padding))
        if part is None:
            return None
        part = part.to(value.dtype)
        if self.step.clip is not None:
            part = within(value + part, value, low, high) - value
        call.norms = row_norms(value, call.padding), row_norms(part, call.padding)
        return part

    def _own_part(self, call: Call, value: Tensor) -> Tensor | None:
        if self._delta is None:
            return None
        if not isinstance(self._delta, Tensor):
            if not call.graded:
                raise RuntimeError(_DRAWN_TOO_LATE)
            own = sum(other.graded for other in self.calls)
            return self._delta(TargetCall(value.detach(), self._units([call]), call.ids, call.vocabulary_size, own))
        layout = self.step.layout or {}
        first = layout.get(call.key)
        if self.step.stochastic and (first is None or len(self._delta) != sum(c.shape[0] for c in layout.values())):
            # Left out when the perturbation was made.
            return None
        if first is None:
            raise RuntimeError(_OTHER_CALLS)
        start = sum(other.shape[0] for other in list(layout.values())[: list(layout).index(call.key)])
        part = cut(self._delta, slice(start, start + first.shape[0]), first.shape)
        if self.step.scope == "vocabulary" and self._chosen is None:
            part = _following_ids(self._delta, part, list(layout.values()), call)
        if self._chosen is not None:
            part = _among_all(part, self._chosen, examples_in(self._batch), call, value)
        if part.shape != value.shape:
            raise RuntimeError(
                f"The target's tensor has shape {tuple(value.shape)} but its perturbation has {tuple(part.shape)}: the "
                "model must call the target equally often, with equal shapes, in every pass of a step."
            )
        return part

    def _moved(self, call: Call, value: Tensor) -> Tensor:
        """What goes on through the model; the leaf that the gradient is read from."""
        if self._defers and call.ids is not None:
            if self.wanted and (call.deferred or is_plain_lookup(call.key[0])):
                # The way back ends here. A copy: the model may write to what it is given.
                call.deferred = True
                if call.leaf is None:
                    call.leaf = (value if call.delta is None else value + call.delta).detach().requires_grad_()
                return call.leaf.clone()
            if not self.wanted:
                value = sent_on(call.key[0], value, call.ids, self.step.owed.get(call.key, []))
        if not self.wanted and call.delta is None:
            call.leaf = value.detach()
            return value
        if call.leaf is None:
            leaf = torch.zeros_like(value) if call.delta is None else call.delta
            call.leaf = leaf.detach().requires_grad_() if self.wanted else leaf
        moved = value + call.leaf
        if self.step.clip is not None and call.delta is not None:
            # The sum may round to just outside: the value is the range's own, the gradient as if nothing were done.
            inside = within(moved.detach(), value.detach(), *fitted(self.step.clip, value))
            moved = inside + (moved - moved.detach())
        return moved

    def _again(self, module: nn.Module, value: Tensor, ids: Tensor | None) -> Tensor:
        """A call inside of the backward pass repeats one of the forward pass: the same leaf is added."""
        call = self._repeated(module, value, ids)
        if call is None:
            return value
        call.repeated = True
        if not call.graded and call.key not in self.step.cached:
            if self._delta is not None:
                raise RuntimeError(_DRAWN_TOO_LATE)
            self.step.cached.add(call.key)
        if not call.graded and self.wanted and not self._trains:
            raise RuntimeError(_CACHED)
        return self._moved(call, value)

    def _repeated(self, module: nn.Module, value: Tensor, ids: Tensor | None) -> Call | None:
        """The call of the forward pass that this one repeats."""
        calls = [c for c in self.calls if c.key[0] is module and c.shape == value.shape]
        if len(calls) > 1 and ids is not None:
            calls = [c for c in calls if c.ids is not None and torch.equal(c.ids, ids)]
            calls = [c for c in calls if not c.repeated] or calls
        # What was a reference is run again by gradient caching alone, which has no other calls.
        calls = [c for c in calls if c.graded] or calls
        if len(calls) > 1 and ids is None:
            raise RuntimeError(
                f"The target is called {len(calls)} times and run again in the backward pass (gradient checkpointing, "
                "gradient caching), which can't tell which call it repeats. Turn that off or choose another adv_target."
            )
        # Checkpointing repeats the last call first, gradient caching the first.
        return (calls[-1] if calls[-1].graded else calls[0]) if calls else None

    # What came of it --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """The pass is over, backward too. Raises RuntimeError unless every part of the perturbation was used."""
        step = self.step
        if self.wanted and not step.layout:
            reached = [call for call in self._own() if call.leaf is not None and call.leaf.grad is not None]
            step.idle |= {call.key for call in self._own()} - {call.key for call in reached} if reached else set()
        own = {call.key: call for call in self._own()}
        if not step.layout:
            step.layout = own
        elif isinstance(self._delta, Tensor) and not step.stochastic and own.keys() != step.layout.keys():
            raise RuntimeError(_OTHER_CALLS)
        if self._defers and not self.wanted:
            send_the_rest(self.step.owed)
            return
        for call in self._own():
            if call.ids is not None:
                call.looked = Looked(call.ids)
            if call.deferred and call.leaf is not None and call.leaf.grad is not None:
                self._owe(call, widen(call.leaf.grad))
        if step.scope == "vocabulary" and self._chosen is None:
            # What comes next is a perturbation of these ids.
            step.layout = {key: own.get(key, first) for key, first in step.layout.items()}

    def _owe(self, call: Call, gradient: Tensor) -> None:
        assert call.ids is not None
        assert call.looked is not None
        owed = self.step.owed.setdefault(call.key, [])
        if owed and owed[-1].looked.are(call.ids):
            owed[-1].gradient = owed[-1].gradient + gradient
        else:
            owed.append(Owed(call.looked, gradient))

    def _own(self) -> list[Call]:
        step = self.step
        return [c for c in self.calls if (c.graded and c.key not in step.idle) or c.key in step.cached]

    def _planned(self) -> list[tuple[Call, Call | None]]:
        """The calls of the step's first pass, in order, each with the call of this pass."""
        own = {call.key: call for call in self._own()}
        return [(first, own.get(key)) for key, first in (self.step.layout or {}).items()]

    @property
    def leaves(self) -> list[Tensor]:
        """What the gradient is read from, of every call so far."""
        return [call.leaf for call in self._own() if call.leaf is not None]

    def gradient(self, scales: Mapping[int, Tensor]) -> Tensor:
        """The gradients of `leaves`, stacked: (rows, positions, dimension), in float32 at least.

        Args:
            scales: of each loss of the pass, what its gradients were multiplied by on the way.
        """
        found = [call for call in self._own() if call.leaf is not None]
        if all(call.leaf.grad is None for call in found) and (found or not self.step.stochastic):  # type: ignore[union-attr]
            if any(call.key in self.step.cached for call in found):
                raise RuntimeError(_CACHED)
            raise RuntimeError(
                "The loss does not depend on the tensor to be perturbed: no gradient arrived there. Choose an "
                "`adv_target` that lies on the way from the inputs to the loss."
            )
        # A loss scale is divided out after widening: what is left may be zero in float16.
        return self._stacked(
            lambda call: (
                None if call.leaf is None or call.leaf.grad is None else widen(call.leaf.grad) / scales[call.loss]
            )
        )

    def no_gradient(self) -> Tensor:
        """Zero, in the shape of `gradient`."""
        return self._stacked(lambda call: None)

    def _stacked(self, value_of: Callable[[Call], Tensor | None]) -> Tensor:
        parts = []
        for first, call in self._planned():
            value = None if call is None else value_of(call)
            leaf = first.leaf if call is None or call.leaf is None else call.leaf
            assert leaf is not None
            # A call without a gradient has no direction.
            parts.append(torch.zeros_like(widen(leaf.detach())) if value is None else value)
        # Where the first pass left the only layer out, nothing is perturbed in this step.
        return stack(parts) if parts else torch.zeros(1, 1, 1)

    def units(self) -> Units:
        """The units of this micro-batch. Raises ValueError where the scope does not fit the tensor."""
        return self._units([first if call is None else call for first, call in self._planned()])

    def _units(self, calls: list[Call]) -> Units:
        scope = self.step.scope
        if not calls:
            return Units("example")
        shapes, padding = [call.shape for call in calls], _stack_padding(calls)
        if scope == "vocabulary":
            ids = [call.ids for call in calls if call.ids is not None]
            if len(ids) < len(calls):
                raise ValueError("adv_scope 'vocabulary' exists for token lookups only; write adv_scope='example'.")
            return Units(scope, padding, shared_entries(stack(ids), padding, calls[0].vocabulary_size))
        dims, lookup = len(shapes[0]), calls[0].ids is not None
        if scope == "example" and dims < 3 and lookup:
            raise ValueError(
                f"The lookup's output has shape {tuple(shapes[0])}, several examples packed into one row: "
                "adv_scope 'example' would mean the pack. Write adv_scope='token' or 'vocabulary', or do not pack."
            )
        if scope == "token" and dims != 3 and not lookup:
            raise ValueError(
                f"adv_scope 'token' needs a tensor (examples, positions, dimension); the target's is "
                f"{tuple(shapes[0])}. Write adv_scope='example'."
            )
        return Units(scope, padding, examples=_stack_examples(calls) if scope == "example" else None)

    def applied(self) -> Tensor | None:
        """The perturbation as it was applied, (rows, positions, dimension): drawn, in the target's type, clipped."""
        if self._delta is None:
            return None
        return self._stacked(lambda call: None if call.delta is None else call.delta.detach())

    def ids(self) -> Tensor | None:
        """The ids that were looked up, (rows, positions); None where the target is no lookup."""
        calls = [first if call is None else call for first, call in self._planned()]
        ids = [call.ids for call in calls if call.ids is not None]
        return stack(ids) if ids and len(ids) == len(calls) else None

    def row_norms(self) -> tuple[Tensor, Tensor]:
        """The Euclidean norms of each example's tokens, clean, and of their perturbation: (examples,) both."""
        calls = [call for call in self._own() if call.norms is not None]
        if not calls:
            return torch.zeros(0), torch.zeros(0)
        values, deltas = (
            joined(list(norms)) for norms in zip(*[call.norms for call in calls if call.norms], strict=True)
        )
        examples = _stack_examples(calls)
        if examples is None:
            return values, deltas
        number = sum(call.example_count for call in calls)
        return by_example(values, examples)[:number], by_example(deltas, examples)[:number]


_OTHER_CALLS = (
    "The model must call the target equally often in every pass of a step; this pass calls it more or less often than "
    "the first."
)
_CACHED = (
    "The loss runs the model again in its backward pass (gradient caching), which can't give the gradient with respect "
    "to the perturbation alone. Choose a method whose passes all train, such as adv_method='fgm'."
)
_DRAWN_TOO_LATE = (
    "The loss runs the model without autograd and again in its backward pass (gradient caching), so noise can't be "
    "drawn for the first pass of the step. Choose a method that starts at the clean inputs, such as adv_method='fgm'."
)


def _in_reentrant_checkpoint() -> bool:
    """Reentrant checkpointing runs a layer without autograd first; only who calls tells it from a reference's pass."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is _REENTRANT:
            return True
        frame = frame.f_back
    return False


_REENTRANT = CheckpointFunction.forward.__code__


def _find_padding(
    value: Tensor, ids: Tensor | None, around: list[Tensor | str | None], step: StepCalls
) -> Tensor | None:
    """True where there is no token."""
    places = value.shape[:-1] if ids is None else ids.shape
    barrier = max((i for i, mask in enumerate(around) if mask is BARRIER), default=-1)
    masks = [mask for mask in around[barrier + 1 :] if isinstance(mask, Tensor)]
    if len(places) == 2:
        # The innermost that fits: a wrapper may call what is inside with virtual tokens in front (prefix tuning).
        for mask in reversed(masks):
            if mask.shape[-1] == places[1] and mask.numel() == places.numel():
                return (mask.to(value.device) == 0).view(places)
        if masks and step.pads_inside and masks[-1].shape[0] == places[0] and masks[-1].shape[1] < places[1]:
            padding = masks[-1].to(value.device) == 0
            return nn.functional.pad(padding, (0, places[1] - padding.shape[1]), value=True)
    if ids is not None and step.padding_id is not None:
        return ids == step.padding_id
    return None


def _following_ids(delta: Tensor, part: Tensor, earlier: list[Call], call: Call) -> Tensor:
    """The perturbation of the earlier pass's vocabulary entries where this pass looks them up.

    Integers of the size of the vocabulary map an id to one of its positions; an entry that was not there has none.

    Args:
        delta: the perturbation of all calls, stacked.
        part: that of the same call.
        earlier: the calls of the earlier pass.
        call: the call of this pass.
    """
    assert call.ids is not None
    first = next(other for other in earlier if other.key == call.key)
    if first.looked is not None and first.looked.are(call.ids):
        return part
    size = call.vocabulary_size
    entries, parts, start = [], [], 0
    for other in earlier:
        assert other.looked is not None
        ids = other.looked.ids.flatten().long()
        entries.append(ids if other.padding is None else ids.masked_fill(other.padding.flatten(), size))
        parts.append(cut(delta, slice(start, start + other.shape[0]), other.shape).flatten(0, -2))
        start += other.shape[0]
    flat, part = torch.cat(entries), torch.cat(parts)
    nowhere = flat.numel()
    holder = flat.new_full((size + 1,), nowhere).scatter_(0, flat, torch.arange(nowhere, device=flat.device))
    holder[size] = nowhere
    at = holder[call.ids.long()]
    if call.padding is not None:
        at = at.masked_fill(call.padding, nowhere)
    rows = torch.cat([part, part.new_zeros(1, part.shape[-1])])
    return rows[at]


def _among_all(part: Tensor, chosen: Tensor, examples: int, call: Call, value: Tensor) -> Tensor:
    """The perturbation of the chosen examples in the shape of the whole tensor, zero for the others."""
    several, rest = divmod(value.shape[0], max(examples, 1))
    known = several == 1 or call.examples is not None
    if rest or not known or part.shape != (len(chosen) * several, *value.shape[1:]):
        raise RuntimeError(
            f"A part of the batch can be perturbed where the target has one row an example, or as many for each; here "
            f"{examples} examples are {value.shape[0]} rows. Choose a method that perturbs them all, such as "
            "adv_method='fgm'."
        )
    rows = chosen.to(part.device)
    if several > 1:
        rows = (rows[:, None] * several + torch.arange(several, device=part.device)).flatten()
    return part.new_zeros(value.shape).index_copy_(0, rows, part)


def _stack_padding(calls: list[Call]) -> Tensor | None:
    if len(calls) == 1:
        return calls[0].padding
    # What is padded to stack calls of different lengths is padding as well.
    first = calls[0].shape
    if all(c.padding is None for c in calls) and (len(first) != 3 or len({c.shape[1] for c in calls}) == 1):
        return None
    like: Any = calls[0].leaf
    each = [like.new_zeros(c.shape[:-1], dtype=torch.bool) if c.padding is None else c.padding for c in calls]
    return stack(each, fill=True)


def _stack_examples(calls: list[Call]) -> Tensor | None:
    """To which example each row of the stacked calls belongs; every call has examples of its own."""
    if all(call.examples is None for call in calls):
        return None
    like = next(call.examples for call in calls if call.examples is not None)
    each, before = [], 0
    for call in calls:
        own = torch.arange(call.shape[0], device=like.device) if call.examples is None else call.examples
        each.append(own + before)
        before += call.example_count
    return torch.cat(each)
