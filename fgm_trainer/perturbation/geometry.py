"""Norms, steps and balls: the mathematics of a perturbation, on torch alone.

A perturbation is a tensor of shape (rows, positions, dimension), or (rows, ...) where there are no
tokens. `Units` says over which of its entries one norm is taken; every function here works on each
unit by itself. Arithmetic is in float32 at least.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

SCOPES = ("vocabulary", "example", "token")
NORMS = ("l2", "linf", "max", "none")


@dataclass(frozen=True)
class Units:
    """The units of one micro-batch: the sets of entries over which one norm is taken.

    - `example`: one unit a row (Miyato et al. 2017, FreeLB), or the rows of one example where it has several.
    - `token`: one unit a position.
    - `vocabulary`: the whole micro-batch is one unit, in which every vocabulary entry counts once
      however often it occurs: the geometry of the weight of the lookup itself.

    Args:
        scope: one of `SCOPES`.
        padding: bool, (rows, positions), true where there is no token; None where there is one everywhere.
        entries: int64, (rows, positions): a flat position that stands for the vocabulary entry held
            here, the same for all positions that hold it; from `shared_entries`. Scope `vocabulary` only.
        examples: int64, (rows,): to which example each row belongs, where an example has several (choices, chunks,
            patches); None for one row an example. Scope `example` only.
    """

    scope: str
    padding: Tensor | None = None
    entries: Tensor | None = None
    examples: Tensor | None = None

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ValueError(f"scope must be one of {', '.join(SCOPES)}; found {self.scope!r}.")
        if self.scope == "vocabulary" and self.entries is None:
            raise ValueError("scope 'vocabulary' needs `entries`: it exists for token lookups only; write 'example'.")

    @property
    def blank(self) -> Tensor | None:
        """The name of `padding` in 0.1."""
        return self.padding

    def pool(self, gradient: Tensor) -> Tensor:
        """The gradient of each position's unit member, (rows, positions, dimension), zero where there is no token.

        In scope `vocabulary` a member is a vocabulary entry: its gradient is the sum over the positions that hold it.
        """
        return self.broadcast(self.members(self.only_tokens(widen(gradient))))

    def members(self, gradient: Tensor) -> Tensor:
        """As `pool`, but each member once: at the position that stands for it, zero at the others.

        Args:
            gradient: zero where there is no token.
        """
        if self.entries is None:
            return gradient
        flat = gradient.flatten(0, -2)
        return torch.zeros_like(flat).index_add_(0, self.entries.flatten(), flat).view_as(gradient)

    def broadcast(self, members: Tensor) -> Tensor:
        """What each member has, at all positions that hold it."""
        if self.entries is None:
            return members
        return members.flatten(0, -2).index_select(0, self.entries.flatten()).view_as(members)

    def share(self, values: Tensor) -> Tensor:
        """`values` with one value a unit member: all positions that hold a vocabulary entry get the same."""
        return self.only_tokens(self.broadcast(widen(values)))

    def euclidean(self, values: Tensor) -> Tensor:
        """The Euclidean norm of each unit, every member counted once, in a shape that broadcasts against `values`."""
        return self.norms(self.once(values), 2.0)

    def count(self, values: Tensor) -> Tensor:
        """The number of entries of each unit, every member counted once, in a shape that broadcasts."""
        ones = torch.ones_like(widen(values))
        counts = self.only_tokens(self.once(ones)).sum(dim=self._dims(values), keepdim=True)
        return counts if self.examples is None else self._over_examples(counts, 1.0)

    def only_tokens(self, values: Tensor) -> Tensor:
        """`values`, zero where there is no token."""
        # Filled, not multiplied: inf * 0 is NaN.
        return values if self.padding is None else values.masked_fill(self.padding.unsqueeze(-1), 0.0)

    def once(self, values: Tensor) -> Tensor:
        """`values`, in scope `vocabulary` each member once: at the position that stands for it, zero at the others."""
        if self.entries is None:
            return values
        own = _positions(self.entries).view_as(self.entries)
        return self.only_tokens(values.masked_fill((self.entries != own).unsqueeze(-1), 0.0))

    def norms(self, values: Tensor, order: float) -> Tensor:
        """The norm of all entries of each unit, in a shape that broadcasts against `values`."""
        norm: Tensor = torch.linalg.vector_norm(values, order, dim=self._dims(values), keepdim=True)
        return norm if self.examples is None else self._over_examples(norm, order)

    def _over_examples(self, norms: Tensor, order: float) -> Tensor:
        """The norm of each row's example, given that of each row; order 1 adds up."""
        assert self.examples is not None
        return by_example(norms, self.examples, order).index_select(0, self.examples)

    def _dims(self, values: Tensor) -> tuple[int, ...]:
        first = {"vocabulary": 0, "example": 1, "token": values.dim() - 1}[self.scope]
        return tuple(range(first, values.dim()))


def shared_entries(ids: Tensor, padding: Tensor | None, size: int) -> Tensor:
    """For every position a flat position that holds the same id, the same one for all of them.

    No (V, D) temporary: V integers map an id to one of its positions. Positions without a token keep apart
    from tokens of the same id (a padding id may also end a sentence).

    Args:
        ids: int64, (rows, positions).
        padding: bool, (rows, positions), true where there is no token; or None.
        size: V, more than the largest id.
    """
    own = _positions(ids)
    flat = ids.flatten().long()
    if padding is not None:
        flat = flat.masked_fill(padding.flatten(), size)
    # Several writes to one place: any of them may win, and all who read it see the same winner.
    holder = own.new_empty(size + 1).scatter_(0, flat, own)
    return holder.gather(0, flat).view_as(ids)


def ascent(gradient: Tensor, norm: str, units: Units) -> Tensor:
    """The unit step that raises the loss, for each unit.

    `l2` g/||g||_2 and `linf` sign(g) maximise <g, step> over the unit ball of their norm (the dual norm is
    attained). `max` is g/||g||_inf, not a dual-norm step: it keeps the proportions of g and makes its largest
    entry 1 (what FreeLB calls "linf"). `none` is g itself.

    A zero gradient gives a zero step. A unit whose gradient is not finite gives a zero step, and no other does.

    Args:
        gradient: dL/de, (rows, positions, dimension).
        norm: one of `NORMS`.
        units: the units of this micro-batch.

    Returns:
        A tensor of the gradient's shape, in float32 at least, zero where there is no token.
    """
    return steepest_ascent(units.only_tokens(widen(gradient)), norm, units)


def steepest_ascent(gradient: Tensor, norm: str, units: Units) -> Tensor:
    """`ascent` of a gradient that is in float32 at least, and zero already where there is no token."""
    return units.broadcast(_direction(units.members(gradient), norm, units))


def sample(like: Tensor, norm: str, units: Units, seed: int) -> Tensor:
    """A random direction of length 1 for each unit: Gaussian, then brought to that length.

    Args:
        like: gives shape, type and device.
        norm: the norm of which the length is 1; `none` counts as `l2`.
        units: the units of this micro-batch.
        seed: the same seed gives the same direction on the same kind of device; the global random state is
            neither read nor changed.
    """
    members = units.once(gaussian(like, units, seed))
    return units.broadcast(_direction(members, "l2" if norm == "none" else norm, units))


def uniform(like: Tensor, units: Units, seed: int) -> Tensor:
    """Noise from U(-1, 1) in every entry, the same for all positions of a unit member; arguments as for `sample`."""
    noise = torch.rand(like.shape, dtype=widen(like).dtype, device=like.device, generator=_generator(like, seed))
    return units.share(2 * noise - 1)


def gaussian(like: Tensor, units: Units, seed: int) -> Tensor:
    """Noise from N(0, 1) in every entry, the same for all positions of a unit member; arguments as for `sample`."""
    noise = torch.randn(like.shape, dtype=widen(like).dtype, device=like.device, generator=_generator(like, seed))
    return units.share(noise)


def length(perturbation: Tensor, norm: str, units: Units) -> Tensor:
    """The length of each unit, in a shape that broadcasts: largest entry for `linf` and `max`, else Euclidean."""
    perturbation = widen(perturbation)
    return units.norms(perturbation, math.inf) if norm in ("linf", "max") else units.euclidean(perturbation)


def project(perturbation: Tensor, epsilon: float, norm: str, units: Units) -> Tensor:
    """The nearest point of the ball of radius epsilon, for each unit; `none` has no ball and changes nothing.

    Args:
        perturbation: one value a unit member, as `ascent` and `sample` give it.
        epsilon: the radius, 0 or more.
        norm: one of `NORMS`; `max` shares the ball of `linf`.
        units: the units of this micro-batch.
    """
    perturbation = widen(perturbation)
    if norm == "none":
        return perturbation
    if norm in ("linf", "max"):
        return perturbation.clamp(-epsilon, epsilon)
    size = units.euclidean(perturbation)
    return perturbation * torch.where(size > epsilon, epsilon / size, 1.0)


def by_example(norms: Tensor, examples: Tensor, order: float = 2.0) -> Tensor:
    """The norm of each example, given that of each of its rows.

    Args:
        norms: (rows, ...).
        examples: int64, (rows,): to which example each row belongs.
        order: 1, 2 or infinity.

    Returns:
        A tensor of the shape of `norms`; what is beyond the number of examples is zero.
    """
    none = torch.zeros_like(norms)
    if order == math.inf:
        index = examples.view(-1, *[1] * (norms.dim() - 1)).expand_as(norms)
        return none.scatter_reduce(0, index, norms, "amax")
    return none.index_add(0, examples, norms.pow(order)).pow(1 / order)


def _direction(member: Tensor, norm: str, units: Units) -> Tensor:
    """The direction of what `Units.members` or `once` gave: each member once, zero elsewhere."""
    largest = units.norms(member, math.inf)
    # A unit whose largest entry is 0, infinite or NaN comes out as NaN or 0 throughout; NaN is then set to 0.
    if norm in ("none", "linf"):
        member = (member if norm == "none" else member.sign()) * (largest / largest)
    else:
        # Divided by the largest entry first: squares of very large or very small entries leave float32's range.
        member = member / largest
    if norm == "l2":
        member = member / units.norms(member, 2.0)
    return member.nan_to_num_(0.0)


def _positions(ids: Tensor) -> Tensor:
    """The flat position of each id: 0, 1, ... Those of plain tensors are kept: they are the same in every step."""
    make = _kept_positions if type(ids) is Tensor else torch.arange
    return make(ids.numel(), device=ids.device)


@functools.lru_cache(maxsize=16)
def _kept_positions(size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device)


def _generator(like: Tensor, seed: int) -> torch.Generator:
    return torch.Generator(device=like.device).manual_seed(seed)


def widen(values: Tensor) -> Tensor:
    """The values in float32 at least."""
    return values.float() if values.dtype.itemsize < 4 else values
