"""What a pass can be measured by besides the task's loss: how far the outputs have moved from other outputs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .batches import with_entries
from .geometry import widen

Outputs = tuple[Tensor, ...]
KINDS = ("kl", "symmetric")

# The keys of what sentence-transformers' models return.
_GIVEN_BY_SENTENCES = ("sentence_embedding", "scores")
# What transformers' classes are named after: the task that a model is for.
_TASK = re.compile(r"For[A-Z]|LMHead|DoubleHeads")
# Heads whose logits at a position predict the label of the next one. `ForConditionalGeneration` is also the name of
# encoder-decoders, which predict the label of their own position.
_PREDICTS_NEXT = re.compile(r"ForCausalLM|LMHead|DoubleHeads|ForConditionalGeneration")
# But for these: transformers leaves it to the user to shift their labels.
_DECODERS = (
    "Bart BigBirdPegasus Blenderbot BlenderbotSmall CpmAnt Marian MBart Mvp Pegasus PLBart ProphetNet TrOCR Whisper"
)
_PREDICTS_HERE = frozenset(f"{name}ForCausalLM" for name in _DECODERS.split()) | {
    "FlaubertWithLMHeadModel",
    "XLMWithLMHeadModel",
    "XLNetLMHeadModel",
}


def predicts_next(task: str) -> bool:
    """Whether a model's class is one whose positions predict the next one's label; encoders and decoders aside."""
    return _PREDICTS_NEXT.search(task) is not None and task not in _PREDICTS_HERE


@dataclass(frozen=True)
class Against:
    """The divergence of a pass's outputs from outputs that are given and fixed.

    For distributions p (given) and q (the pass's): `kl` is KL(p || q), `symmetric` KL(p || q) + KL(q || p). Where the
    model predicts a number both are (p - q)^2; where each class is a yes or no of its own, a sum over classes; of a
    text's embedding one minus the cosine.

    Args:
        outputs: the given logits, as an `PassResult` holds them.
        kind: one of `KINDS`.
        weight: factor of the divergence.
    """

    outputs: Outputs
    kind: str = "symmetric"
    weight: float = 1.0


def logits_of(outputs: Any, noted: Sequence[Tensor] = ()) -> Outputs:
    """The logits among a model's outputs.

    By name those with `logits` in it, else with `score`; without a name the first tensor of floats that is no single
    number, as Trainer has it. One that is alone may have any name.

    Args:
        outputs: what the loss comes with.
        noted: what `embeddings_noted` has, which counts where the loss comes with nothing.

    Raises:
        ValueError: there are none, or several tensors of which none is named so.
    """
    named = outputs if isinstance(outputs, Mapping) else dict(enumerate(outputs or ()))
    tensors = {
        str(k): v
        for k, v in named.items()
        if isinstance(v, Tensor) and v.is_floating_point() and v.dim() and k != "loss"
    }
    by_name = [[v for k, v in tensors.items() if word in k] for word in ("logits", "score")]
    alone = list(tensors.values())[:1]
    logits = by_name[0] or by_name[1] or alone or list(noted)
    if len(tensors) > 1 and logits is alone and isinstance(outputs, Mapping):
        raise ValueError(
            f"This method compares logits, and none of the model's outputs is named so: {', '.join(tensors)}. Let the "
            "model or compute_loss name them `logits`, or choose a method that compares nothing, such as "
            "adv_method='fgm'."
        )
    if not logits:
        raise ValueError(
            "This method compares the model's outputs, and there are none beside the loss. Let compute_loss(..., "
            "return_outputs=True), or the loop's loss_of, return (loss, outputs) with `logits` among them."
        )
    return tuple(logits)


@contextmanager
def embeddings_noted(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, what a model of sentence-transformers gives with autograd, call by call: embeddings, or scores of pairs.

    Its losses call it themselves, once for each column of texts, and return no outputs.
    """
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and isinstance(output, Mapping):
            found.extend(output[name] for name in _GIVEN_BY_SENTENCES if name in output)

    handle = model.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def divergence(outputs: Outputs, against: Sequence[Against], model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The weighted sum of the divergences, each a mean over examples (and positions), in float32 at least.

    Zero where no position counts. Nothing is read back from the device.

    Args:
        outputs: the pass's logits, each (examples, classes), (examples, positions, classes), or (examples,) for one
            logit an example.
        against: what they are compared with.
        model: the model, inside a wrapper or not; says what the logits are, and which positions' labels they predict.
        batch: the micro-batch with its labels and masks, as it was before a loss took any out.
    """
    total = torch.zeros((), device=outputs[0].device)
    for now, *before in zip(outputs, *(a.outputs for a in against), strict=True):
        now = _with_classes(now)
        problem, counted = problem_of(now, model, batch), counted_positions(now, model, batch)
        for reference, then in zip(against, before, strict=True):
            values = _apart(widen(now), widen(_with_classes(then)), reference.kind, problem)
            total = total + reference.weight * _mean(values, counted)
    return total


def problem_of(logits: Tensor, model: nn.Module, batch: Mapping[str, Any]) -> str:
    """What the logits are, one of the values of transformers' `config.problem_type`, or `embedding`.

    Where the configuration does not say, as transformers' heads find out: `regression` for one logit,
    `multi_label_classification` where each logit has a label of its own, else `single_label_classification`.

    Args:
        logits: (..., classes).
        model: the model.
        batch: the micro-batch with its labels.
    """
    if any(kind.__name__ == "SentenceTransformer" for module in model.modules() for kind in type(module).__mro__):
        return "embedding"
    said: str | None = _setting(model, "problem_type")
    if said is not None:
        return said
    if logits.shape[-1] == 1:
        return "regression"
    labels = batch.get("labels")
    each = isinstance(labels, Tensor) and labels.shape == logits.shape
    return "multi_label_classification" if each else "single_label_classification"


def counted_positions(logits: Tensor, model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """The positions that the loss counts: bool, (examples, positions); None where all count.

    Those whose label is not -100, where there is a label for each position. Else those with a token, by the mask of
    the side that the logits come from. Virtual tokens, which a wrapper puts in front, never count.

    Args:
        logits: (examples, positions, classes), or (examples, classes), of which all count.
        model: the model.
        batch: the micro-batch with its labels and masks.
    """
    places = logits.shape[:-1]
    if len(places) < 2:
        return None
    seq2seq, task = bool(_setting(model, "is_encoder_decoder")), _task_of(model)
    next_one = not seq2seq and predicts_next(task)
    # Only these may have more positions than labels, or fewer; elsewhere a length that differs means something else.
    aligned = seq2seq or next_one
    labels = batch.get("labels")
    # CTC has no label for each position, though there may be as many.
    if isinstance(labels, Tensor) and not labels.is_floating_point() and "ForCTC" not in task:
        labelled = labels != -100
        if next_one:
            # The last position predicts nothing.
            labelled = functional.pad(labelled[..., 1:], (0, 1))
        counted = _at_the_end(labelled, places, aligned)
        if counted is not None:
            return counted
    mask = batch.get("decoder_attention_mask" if seq2seq else "attention_mask")
    return _at_the_end(mask != 0, places, aligned) if isinstance(mask, Tensor) else None


def _at_the_end(counted: Tensor, places: torch.Size, aligned: bool) -> Tensor | None:
    """The last of the logits' positions are those of `counted`; None where it is of another shape."""
    if counted.dim() != len(places) or counted.shape[:-1] != places[:-1]:
        return None
    virtual = places[-1] - counted.shape[-1]
    if virtual == 0:
        return counted
    return functional.pad(counted, (virtual, 0)) if aligned else None


def _setting(model: nn.Module, name: str) -> Any:
    """What the configuration says, of the model or of the one that it wraps; None where none says anything."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return next((getattr(config, name) for config in configs if hasattr(config, name)), None)


def _task_of(model: nn.Module) -> str:
    """The name of the outermost class that says what the model is for, subclasses and wrappers seen through."""
    names = (kind.__name__ for module in model.modules() for kind in type(module).__mro__)
    # peft's names say what a wrapper was made for, not what it wraps.
    found = (name for name in names if _TASK.search(name) and not name.startswith("PeftModel"))
    return next(found, type(model).__name__)


def _with_classes(logits: Tensor) -> Tensor:
    """Logits of shape (examples,) are one logit an example."""
    return logits.unsqueeze(-1) if logits.dim() == 1 else logits


def _apart(now: Tensor, then: Tensor, kind: str, problem: str) -> Tensor:
    """The divergence of each example, or of each of its positions."""
    if problem == "regression":
        return (now - then).square().sum(-1)
    if problem == "embedding":
        # One minus the cosine, without its cancellation.
        return (functional.normalize(now, dim=-1) - functional.normalize(then, dim=-1)).square().sum(-1) / 2
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


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    if counted is None:
        return values.mean()
    counted = counted.to(values.device)
    # Chosen, not multiplied: what does not count may be NaN.
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp(min=1)


def relabelled(batch: Mapping[str, Any], label: Tensor | int | str, given: Mapping[str, Any]) -> Any:
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
    return with_entries(batch, {**batch, "labels": torch.where(labels == -100, labels, label)})
