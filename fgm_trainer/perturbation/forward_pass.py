"""One forward pass of the model with its target perturbed.

The value goes on through the model as `value + leaf`. In a pass for the gradient the leaf is zero; in an adversarial
pass it is the perturbation. After the backward pass `leaf.grad` is the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .calls import Call, Draw, SharedCalls, TargetCall, examples_of, repeated_call
from .clipping import fitted, outside, within
from .deferral import Looked, Owed, is_plain_lookup, send_the_rest, sent_on
from .geometry import widen
from .parts import OTHER_CALLS, part_of
from .stacking import StackedCalls, example_norms, row_norms
from .watched import WatchedForward

# Embeddings of tokens differ in length by less.
_OUTLIERS = 4.0


class PerturbedForward(WatchedForward):
    """A forward pass in which the calls of the target are perturbed.

    Args:
        shared: what it shares with the other passes of the micro-batch.
        delta: the perturbation to add, (rows, positions, dimension), or what draws it, or None for none.
        gradient: whether the gradient with respect to the perturbation is wanted.
        trains: whether weights get gradients from it.
        chosen: where given, the examples that the perturbation is of, (chosen,); the others stay clean.
    """

    def __init__(
        self,
        shared: SharedCalls,
        delta: Tensor | Draw | None = None,
        *,
        gradient: bool = False,
        trains: bool = False,
        chosen: Tensor | None = None,
    ) -> None:
        super().__init__(shared, gradient=gradient, trains=trains)
        self._delta, self._chosen = delta, chosen
        self._defers = shared.defers and trains

    def perturb(self, module: nn.Module, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        """Called by the target's hook: the value that goes on through the model in place of `value`."""
        if self.in_backward():
            # A reference inside of what is run again (checkpointing) is none of the loss's calls there, either.
            return self._again(module, value, ids) if self.with_autograd() else value
        if not self.in_loss():
            return value
        if not value.is_floating_point():
            raise TypeError(f"A perturbation can be added to floating-point numbers only; the target is {value.dtype}.")
        call = self._noted(module, value, ids, vocabulary_size)
        if self.shared.is_perturbed(call.key):
            call.delta = self._own_delta(call, value)
            value = self._moved(call, value)
        self.calls.append(call)
        return value

    def _noted(self, module: nn.Module, value: Tensor, ids: Tensor | None, vocabulary_size: int) -> Call:
        graded, shared = self.with_autograd(), self.shared
        number = sum(call.key[0] is module and call.graded == graded for call in self.calls)
        # Where the model is called with as many rows, a row is a sequence.
        as_called = any(isinstance(mask, Tensor) and mask.shape[0] == value.shape[0] for mask in self.masks)
        is_sequences = not graded or shared.scope != "example" or ids is not None or as_called
        examples, count = examples_of(self.batch, value, is_sequences)
        padding = shared.padding_of(value, ids, self.masks)
        return Call((module, number, graded), value.shape, ids, vocabulary_size, padding, examples, count, self.losses)

    def _own_delta(self, call: Call, value: Tensor) -> Tensor | None:
        """This call's own perturbation, as it is applied."""
        part, value, clip = self._own_part(call, value), value.detach(), self.shared.clip
        if clip is not None:
            low, high = fitted(clip, value)
            self.shared.outside.append(outside(value, low, high, call.padding))
        if part is None:
            return None
        part = part.to(value.dtype)
        if clip is not None:
            part = within(value + part, value, low, high) - value
        call.norms = row_norms(value, call.padding, _OUTLIERS), row_norms(part, call.padding)
        return part

    def _own_part(self, call: Call, value: Tensor) -> Tensor | None:
        if self._delta is None:
            return None
        if isinstance(self._delta, Tensor):
            return part_of(self._delta, self.shared, call, self._chosen, self.batch)
        if not call.graded:
            raise RuntimeError(_DRAWN_TOO_LATE)
        units = StackedCalls(self.shared.scope, [(call, call)]).units()
        number = sum(other.graded for other in self.calls)
        return self._delta(TargetCall(value.detach(), units, call.ids, call.vocabulary_size, number))

    def _moved(self, call: Call, value: Tensor) -> Tensor:
        """What goes on through the model in place of `value`.

        It is value + leaf, and the gradient is read at the leaf. In two cases a lookup's way back differs: an earlier
        pass ends it here (the leaf is the moved value itself), and the last one brings along what those kept.
        """
        if self._defers and call.ids is not None:
            if self.takes_gradient and (call.deferred or is_plain_lookup(call.key[0])):
                # The way back ends here. A copy: the model may write to what it is given.
                call.deferred = True
                if call.leaf is None:
                    call.leaf = (value if call.delta is None else value + call.delta).detach().requires_grad_()
                return call.leaf.clone()
            if not self.takes_gradient:
                value = sent_on(call.key[0], value, call.ids, self.shared.owed.get(call.key, []))
        if not self.takes_gradient and call.delta is None:
            call.leaf = value.detach()
            return value
        if call.leaf is None:
            leaf = torch.zeros_like(value) if call.delta is None else call.delta
            call.leaf = leaf.detach().requires_grad_() if self.takes_gradient else leaf
        moved = value + call.leaf
        if self.shared.clip is not None and call.delta is not None:
            # The sum may round to just outside: the value is the range's own, the gradient as if nothing were done.
            inside = within(moved.detach(), value.detach(), *fitted(self.shared.clip, value))
            moved = inside + (moved - moved.detach())
        return moved

    def _again(self, module: nn.Module, value: Tensor, ids: Tensor | None) -> Tensor:
        """A call inside of the backward pass repeats one of the forward pass: the same leaf is added."""
        call = repeated_call(self.calls, module, value, ids)
        if call is None:
            return value
        call.repeated = True
        if not call.graded:
            _note_cached(self.shared, call, self._delta is not None, self.takes_gradient and not self.trains)
        return self._moved(call, value)

    # What came of it --------------------------------------------------------------------------------------------------

    @property
    def own(self) -> list[Call]:
        """The calls that are perturbed."""
        return [call for call in self.calls if self.shared.is_perturbed(call.key)]

    @property
    def leaves(self) -> list[Tensor]:
        return [call.leaf for call in self.own if call.leaf is not None]

    @property
    def tensor(self) -> StackedCalls:
        own = {call.key: call for call in self.own}
        layout = self.shared.layout or {}
        return StackedCalls(self.shared.scope, [(first, own.get(key)) for key, first in layout.items()])

    def example_norms(self) -> tuple[Tensor, Tensor]:
        return example_norms(self.own)

    def end(self) -> None:
        shared = self.shared
        if self.takes_gradient:
            _refuse_no_gradient(shared, self.own, self.calls)
        if self.takes_gradient and not shared.layout:
            shared.idle |= {call.key for call in self.own if call.gradient is None}
        own = {call.key: call for call in self.own}
        if not shared.layout:
            shared.layout = own
        elif isinstance(self._delta, Tensor) and not shared.stochastic and own.keys() != shared.layout.keys():
            raise RuntimeError(OTHER_CALLS)
        if self._defers and not self.takes_gradient:
            send_the_rest(shared.owed)
            return
        for call in own.values():
            call.looked = None if call.ids is None else Looked(call.ids)
            if call.deferred and call.gradient is not None:
                _owe(shared.owed.setdefault(call.key, []), call, widen(call.gradient))
        if shared.scope == "vocabulary" and self._chosen is None:
            # What comes next is a perturbation of these ids.
            shared.layout = {key: own.get(key, first) for key, first in shared.layout.items()}


def _refuse_no_gradient(shared: SharedCalls, own: list[Call], calls: list[Call]) -> None:
    own = [call for call in own if call.leaf is not None]
    if any(call.gradient is not None for call in own) or (shared.stochastic and not own):
        return
    if any(call.key in shared.cached for call in own):
        raise RuntimeError(_CACHED)
    if not any(call.graded for call in calls):
        raise RuntimeError(_WITHOUT_AUTOGRAD)
    raise RuntimeError(
        "The loss does not depend on the tensor to be perturbed: no gradient arrived there. Choose an "
        "`adv_target` that lies on the way from the inputs to the loss."
    )


def _note_cached(shared: SharedCalls, call: Call, moved: bool, trains_nothing: bool) -> None:
    """A call without autograd that the backward pass runs again."""
    if call.key not in shared.cached:
        if moved:
            raise RuntimeError(_DRAWN_TOO_LATE)
        shared.cached.add(call.key)
    if trains_nothing:
        raise RuntimeError(_CACHED)


def _owe(owed: list[Owed], call: Call, gradient: Tensor) -> None:
    assert call.ids is not None
    assert call.looked is not None
    if owed and owed[-1].looked.are(call.ids):
        owed[-1].gradient = owed[-1].gradient + gradient
    else:
        owed.append(Owed(call.looked, gradient))


_CACHED = (
    "The loss runs the model again in its backward pass (gradient caching), which can't give the gradient with respect "
    "to the perturbation alone. Choose a method whose passes all train, such as adv_method='fgm'."
)
_WITHOUT_AUTOGRAD = (
    "The loss does not depend on the tensor to be perturbed: that is computed without autograd. Where the loss caches "
    "gradients, choose a method whose passes all train on the whole batch, such as adv_method='fgm'; where a part of "
    "the model runs under no_grad, choose an `adv_target` behind it."
)
_DRAWN_TOO_LATE = (
    "The loss runs the model without autograd and again in its backward pass (gradient caching), so noise can't be "
    "drawn for the first pass of the step. Choose a method that starts at the clean inputs, such as adv_method='fgm'."
)
