"""What a pass can be measured by besides the task's loss: how far the outputs have moved from other outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .geometry import widen

Outputs = tuple[Tensor, ...]
KINDS = ("kl", "symmetric")


@dataclass(frozen=True)
class Against:
    """The divergence of a pass's outputs from outputs that are given and fixed.

    For distributions p (given) and q (the pass's): `kl` is KL(p || q), `symmetric` KL(p || q) + KL(q || p). Where the
    model predicts a number both are (p - q)^2; where each class is a yes or no of its own, a sum over classes.

    Args:
        outputs: the given logits, as an `Answer` holds them.
        kind: one of `KINDS`.
        weight: factor of the divergence.
    """

    outputs: Outputs
    kind: str = "symmetric"
    weight: float = 1.0


def logits_of(outputs: Any) -> Outputs:
    """The logits among a model's outputs: those named so, else the first tensor of floats that is no single number.

    Raises:
        ValueError: there are none.
    """
    named = outputs if isinstance(outputs, Mapping) else dict(enumerate(outputs or ()))
    tensors = {
        str(k): v
        for k, v in named.items()
        if isinstance(v, Tensor) and v.is_floating_point() and v.dim() and k != "loss"
    }
    logits = [v for k, v in tensors.items() if k.endswith("logits")] or list(tensors.values())[:1]
    if not logits:
        raise ValueError(
            "This method compares the model's outputs, and there are none beside the loss. Let compute_loss(..., "
            "return_outputs=True), or the loop's loss_of, return (loss, outputs) with `logits` among them."
        )
    return tuple(logits)


def detached(outputs: Outputs) -> Outputs:
    """The same numbers without their graph."""
    return tuple(o.detach() for o in outputs)


def problem_of(model: Any) -> str | None:
    """The model's `config.problem_type`, which transformers settles in the first forward pass with labels."""
    return getattr(getattr(model, "config", None), "problem_type", None)


def divergence(outputs: Outputs, against: Sequence[Against], problem: str | None, mask: Tensor | None) -> Tensor:
    """The weighted sum of the divergences, each a mean over examples (and tokens), in float32 at least.

    Args:
        outputs: the pass's logits, each (examples, classes) or (examples, positions, classes).
        against: what they are compared with.
        problem: the model's `config.problem_type`.
        mask: the batch's attention mask; positions without a token do not count.
    """
    total = torch.zeros((), device=outputs[0].device)
    for reference in against:
        for now, then in zip(outputs, reference.outputs, strict=True):
            total = total + reference.weight * _mean(_apart(widen(now), widen(then), reference.kind, problem), mask)
    return total


def _apart(now: Tensor, then: Tensor, kind: str, problem: str | None) -> Tensor:
    """The divergence of each example, or of each of its positions."""
    if now.shape[-1] == 1 or problem == "regression":
        return (now - then).square().sum(-1)
    if problem == "multi_label_classification":
        # Each class is a distribution of its own, over yes and no.
        now, then = torch.stack([now, -now], -1), torch.stack([then, -then], -1)
        log_q, log_p = functional.logsigmoid(now), functional.logsigmoid(then)
        return _kl(log_p, log_q, kind).sum(-1)
    return _kl(then.log_softmax(-1), now.log_softmax(-1), kind)


def _kl(log_p: Tensor, log_q: Tensor, kind: str) -> Tensor:
    apart = log_p - log_q
    # A class that is masked out (-inf) has no share.
    apart = torch.where(torch.isfinite(apart), apart, 0.0)
    factor = log_p.exp() if kind == "kl" else log_p.exp() - log_q.exp()
    return (factor * apart).sum(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    mask = mask.to(values)
    return (values * mask).sum() / mask.sum().clamp(min=1)


def relabelled(batch: Mapping[str, Any], label: Tensor | int | str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with the label that an attack leads to; labels of -100 stay.

    Args:
        batch: the model's inputs, with `labels`.
        label: classes, one class, or the name of a column.
        given: the batch with its further columns.

    Raises:
        ValueError: there are no class labels, or no such column.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ValueError(
            "adv_targeted leads towards another class, so the batch must hold whole numbers as `labels`; found "
            f"{'none' if labels is None else labels.dtype}."
        )
    if isinstance(label, str):
        if label not in given:
            raise ValueError(
                f"adv_targeted={label!r} is neither a class nor 'least_likely', and the batch has no such column; "
                f"it holds {', '.join(given)}."
            )
        label = given[label]
    label = torch.as_tensor(label, device=labels.device).to(labels.dtype)
    if label.dim() and label.shape != labels.shape:
        raise ValueError(
            f"adv_targeted gives labels of shape {tuple(label.shape)}; `labels` has {tuple(labels.shape)}."
        )
    return {**batch, "labels": torch.where(labels == -100, labels, label)}
