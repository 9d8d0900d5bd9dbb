"""FGM in place on the lookup's weight: the interface of the snippet that circulates, done right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .perturbation import geometry
from .perturbation.hooks import Hook
from .perturbation.lookups import (
    find_module,
    input_embedding,
    is_lookup,
    is_sharded,
    path_of,
    same_weight,
    shared_lookups,
    table_of,
    undisturbed,
    weight_of,
)


class FGM:
    """FGM on the lookup's weight, with the interface of the snippet that circulates: changing the import is all.

    ```python
    fgm = FGM(model)
    for batch in loader:
        model(**batch).loss.backward()
        fgm.attack()                       # moves rows of the input embedding, in place
        model(**batch).loss.backward()     # gradients add up
        fgm.restore()                      # bit for bit as before
        optimizer.step()
        optimizer.zero_grad()
    ```

    `with fgm.attack(): ...` restores whatever happens. Unlike the snippet, the direction is the gradient of the last
    backward pass alone, not of what `weight.grad` has accumulated, and only rows that were looked up are touched and
    kept. It works on a frozen embedding, and finds the input embedding of any model, also inside a module of your own.

    Every attack asks the lookup for its weight anew, and whether it reads the rows that are to move: weights may be
    loaded, resized or converted in between.

    Args:
        model: the model, before any wrapper. Make the `FGM` before the first forward pass: a hook on the lookup
            records the gradient. `close()` removes it.
        target: the lookup, or a module in which there is just one, or the path of either; None finds the model's.

    Raises:
        ValueError: the model has no lookup, or several that may be meant; its weight is tied to another module (an
            in-place write would move that one too), is no plain floating-point parameter (quantised, parametrized, a
            tensor subclass), or is sharded over processes.
    """

    def __init__(self, model: nn.Module, target: nn.Module | str | None = None) -> None:
        lookup = _lookup_at(model, target)
        self._model = model
        self._lookups = shared_lookups(model, lookup)
        self._met: list[_Read] = []
        _refuse(model, self._lookups, lookup, was_read=False)
        self._backward_pass = -1
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._handles = [m.register_forward_hook(Hook(self._on_lookup), with_kwargs=True) for m in self._lookups]

    def attack(self, epsilon: float = 1.0, emb_name: str | None = None) -> FGM:
        """Moves the rows of the input embedding by epsilon * G / ||G||_F, G the last backward pass's gradient.

        Args:
            epsilon: the Frobenius norm of the whole perturbation.
            emb_name: a part of the weight's name, as in the snippet; None finds it.

        Returns:
            Itself, for `with`.

        Raises:
            ValueError: `emb_name` matches nothing, or more than the lookup's weight; epsilon is no number 0 or more;
                the weight has become one that can't be moved in place.
            RuntimeError: a second attack before `restore()`, or no backward pass through the lookup since the last
                one; or the model does not read the weight where it would be moved. All is as before then.
        """
        if self._kept is not None:
            raise RuntimeError("attack() was called twice: call restore() before the next attack.")
        check_epsilon(epsilon)
        lookup = self._lookup_that_was_read()
        _refuse(self._model, self._lookups, lookup, was_read=True)
        table = table_of(lookup)
        weight: Tensor = table.weight  # type: ignore[assignment]
        if emb_name is not None:
            _check_name(self._model, emb_name, weight)
        rows, delta = _step(self._met, epsilon, getattr(table, "padding_idx", None))
        with torch.no_grad():
            self._kept = weight, rows, weight[rows].clone()
            try:
                _check_reads(self._model, self._met, weight, rows[delta.any(-1)])
                weight[rows] += delta.to(weight.dtype)
            except BaseException:
                self.restore()
                raise
        return self

    def restore(self) -> None:
        """Puts the rows back, bit for bit. Raises RuntimeError without an attack."""
        if self._kept is None:
            raise RuntimeError("restore() without attack(): there is nothing to put back.")
        weight, rows, values = self._kept
        with torch.no_grad():
            weight[rows] = values
        self._kept, self._met = None, []

    def close(self) -> None:
        """Puts back what is moved and removes the hook."""
        if self._kept is not None:
            self.restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> FGM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._kept is not None:
            self.restore()

    def _on_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if not torch.is_grad_enabled() or self._kept is not None:
            return None
        ids = _ids_in(module, args, kwargs)
        shape = getattr(output, "shape", ())
        if shape[:-1] != ids.shape:
            raise RuntimeError(
                f"loops.FGM needs one row for each id: {path_of(self._model, module)} was called with ids of shape "
                f"{tuple(ids.shape)} and returned {type(output).__name__}{tuple(shape)}. {_USE_INSTEAD}"
            )
        if not output.requires_grad:
            # A frozen embedding, as under LoRA: its output is where the gradient starts to matter. A copy goes on: the
            # model may write to what it is given.
            source = output.detach().requires_grad_()
            output = source.clone()
        else:
            source = output

        def keep(gradient: Tensor) -> None:
            if self._backward_pass != (this := torch._C._current_graph_task_id()):
                # What an earlier backward pass left is of no use any more.
                self._met, self._backward_pass = [], this
            self._met.append(_Read(module, args, kwargs, ids, gradient.detach()))

        source.register_hook(keep)
        return output

    def _lookup_that_was_read(self) -> nn.Module:
        """The lookup that the last backward pass went through."""
        present = {id(m) for m in self._model.modules()}
        if not self._met or any(id(read.lookup) not in present for read in self._met):
            raise RuntimeError(
                "attack() needs a backward pass through the token lookup first: make FGM(model) before the forward "
                "pass, and call loss.backward() before attack(). If that was done, the model does not call the lookup "
                f"that FGM found, {self._hooked()}: make FGM(model) anew after a lookup was replaced or adapted, or "
                "name the one that is called, FGM(model, target='path')."
            )
        first = self._met[0].lookup
        others = [read.lookup for read in self._met if read.lookup is not first]
        if any(not same_weight(weight_of(first), weight_of(other)) for other in others):
            raise RuntimeError(
                f"The lookups {self._hooked()} shared one weight when FGM was made, and have weights of their own now "
                "(load_state_dict(assign=True) unties them). Tie them again, model.tie_weights(), or make FGM anew."
            )
        return first

    def _hooked(self) -> str:
        return ", ".join(path_of(self._model, m) for m in self._lookups)


@dataclass
class _Read:
    """One call of a lookup: its arguments, the ids among them, and the gradient of what it returned."""

    lookup: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: Tensor
    gradient: Tensor

    def again(self) -> Tensor:
        """What the same call returns now."""
        with undisturbed(self.lookup):
            output: Tensor = self.lookup(*self.args, **self.kwargs)
        return output


_USE_INSTEAD = "Use fgm_trainer.loops.Adversary or AdversarialTrainer, which perturb what the lookup returns."


def _lookup_at(model: nn.Module, target: nn.Module | str | None) -> nn.Module:
    if target is None:
        return input_embedding(model)
    module = find_module(model, target) if isinstance(target, str) else target
    if not any(m is module for m in model.modules()):
        raise ValueError(f"target is a {type(module).__name__} that is no module of {type(model).__name__}.")
    # Whoever names a module by hand may have written it by hand, under any name.
    by_hand = "weight" in module._parameters and not isinstance(module, nn.Linear)
    return module if by_hand or is_lookup(module) else input_embedding(module)


def _unmovable(table: nn.Module, weight: Any) -> str:
    """What makes a weight one whose rows can't be moved in place, or nothing."""
    if not any(weight is own for own in (*table._parameters.values(), *table._buffers.values())):
        return "no parameter but computed from others (a parametrization, weight norm, pruning)"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"a {type(weight).__name__} and no plain parameter"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"quantised to {str(weight.dtype).removeprefix('torch.')}"
    return "" if weight.dim() == 2 else f"no matrix with a row for each id but of shape {tuple(weight.shape)}"


def _ids_in(lookup: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    ids = [v for v in tensors if not v.is_floating_point() and v.dtype != torch.bool]
    if not ids:
        raise RuntimeError(
            f"loops.FGM moves rows that are looked up by ids, and {type(lookup).__name__} was called without any. "
            + _USE_INSTEAD
        )
    return ids[0]


def check_epsilon(epsilon: float) -> None:
    """Raises ValueError unless epsilon is a finite number, 0 or more."""
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be a finite number, 0 or more; found {epsilon!r}.")


def _refuse(model: nn.Module, lookups: list[nn.Module], lookup: nn.Module, was_read: bool) -> None:
    weight = weight_of(lookup)
    if is_sharded(weight):
        raise ValueError(
            "The input embedding's weight is sharded over processes, so its rows can't be moved in place. "
            "Use fgm_trainer.loops.Adversary or AdversarialTrainer."
        )
    found = _unmovable(table_of(lookup), weight)
    if not found and was_read and weight.is_meta:
        # Before the first pass it may yet be loaded.
        found = "on the meta device, offloaded until it is read"
    if found:
        raise ValueError(
            f"The input embedding's weight ({path_of(model, table_of(lookup))}) is {found}, so its rows "
            f"can't be moved in place. {_USE_INSTEAD}"
        )
    inside = {id(child) for m in lookups for child in m.modules()}
    tied = [
        n
        for n, m in model.named_modules()
        if id(m) not in inside and any(same_weight(p, weight) for p in m.parameters(recurse=False))
    ]
    if tied:
        raise ValueError(
            f"The input embedding's weight is tied to {', '.join(tied)}: moving it in place would move that too. "
            "Use fgm_trainer.loops.Adversary or AdversarialTrainer, which perturb the lookup alone."
        )


def _check_name(model: nn.Module, emb_name: str, weight: Tensor) -> None:
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    matched = {n: p for n, p in model.named_parameters() if emb_name in n}
    own = [n for n, p in model.named_parameters() if same_weight(p, weight)]
    if list(matched) != own:
        found = ", ".join(matched) or "nothing"
        raise ValueError(
            f"emb_name={emb_name!r} must match the input embedding's weight alone, {', '.join(own)}; "
            f"it matches {found}. "
            f"Leave emb_name out, or choose among: {', '.join(n for n in names if 'emb' in n or n in own)}."
        )


def _step(reads: list[_Read], epsilon: float, padding: int | None) -> tuple[Tensor, Tensor]:
    """The rows that were looked up, and what each moves by."""
    ids = torch.cat([read.ids.flatten() for read in reads])
    gradients = torch.cat([read.gradient.flatten(0, -2) for read in reads])
    rows, place = ids.unique(return_inverse=True)
    pooled = gradients.new_zeros(len(rows), gradients.shape[-1]).index_add_(0, place, gradients)
    if padding is not None:
        # The weight's own gradient is zero at the padding row.
        pooled[rows == padding] = 0
    return rows, epsilon * geometry.ascent(pooled[None], "l2", geometry.Units("example"))[0]


def _check_reads(model: nn.Module, reads: list[_Read], weight: Tensor, rows: Tensor) -> None:
    """Raises RuntimeError unless what the lookups return changes with each of the weight's rows.

    The rows are put far away for it: a small step may be lost in a lookup that rounds, a long one in one that
    normalises. The caller puts them back.
    """
    before = [read.again() for read in reads]
    values = weight[rows]
    stretch = torch.linspace(1, 2, values.shape[-1], dtype=values.dtype, device=values.device)
    weight[rows] = -(values + torch.where(values < 0, -1, 1)) * stretch
    after = [read.again() for read in reads]
    unread = [r.ids[(old == new).all(-1)] for r, old, new in zip(reads, before, after, strict=True)]
    ids = torch.cat(unread).unique()
    ids = ids[torch.isin(ids, rows)].tolist()
    weight[rows] = values
    if ids:
        name, more = _name_of(model, weight), ", ..." if len(ids) > 5 else ""
        raise RuntimeError(
            f"The model does not read {name} where it would be moved: what the lookup returns for "
            f"{', '.join(map(str, ids[:5]))}{more} does not depend on it (an adapter such as peft's "
            f"trainable_token_indices, a quantised or cached lookup, a mask). {_USE_INSTEAD}"
        )


def _name_of(model: nn.Module, weight: Tensor) -> str:
    named = model.named_parameters()
    return next((name for name, p in named if same_weight(p, weight)), "the lookup's weight")
