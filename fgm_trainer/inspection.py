"""Finding things in a model: modules by path, the lookups of tokens, the encoder."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from typing import Any

import torch
from torch import Tensor, nn


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`. Raises ValueError that lists near names."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    modules.pop("", None)
    if path in modules:
        return modules[path]
    ending = [name for name in modules if name.endswith("." + path)]
    near = (ending or difflib.get_close_matches(path, modules, n=5, cutoff=0.4) or list(modules))[:5]
    raise ValueError(f"adv_target={path!r}: {type(model).__name__} has no such module. Near names: {', '.join(near)}.")


def find_modules(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules whose paths match, a part between dots at a time. Raises ValueError that lists near names."""
    parts = pattern.split(".")
    found = [
        module
        for name, module in model.named_modules()
        if name.count(".") == len(parts) - 1 and all(map(fnmatch.fnmatchcase, name.split("."), parts))
    ]
    return found or [find_module(model, pattern)]


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that holds the input embedding. Raises ValueError where the model names none."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    if not isinstance(embedding, nn.Module) or not any(is_lookup(m) for m in embedding.modules()):
        raise ValueError(
            f"{type(model).__name__} has no token lookup at get_input_embeddings(), so adv_target='word_embeddings' "
            "means nothing here. Name a module path or an input tensor, such as adv_target='pixel_values'."
        )
    return embedding


def shared_lookups(model: nn.Module, lookup: nn.Module) -> list[nn.Module]:
    """The outermost modules in `model` that look tokens up in the weight of `lookup`."""
    weight = getattr(lookup, "weight", None)
    named = {
        name: module
        for name, module in model.named_modules()
        if module is lookup or (is_lookup(module) and weight is not None and getattr(module, "weight", None) is weight)
    }
    # An adapter's lookup wraps the one that it adapts: only the outer one is hooked.
    return [m for n, m in named.items() if not any(n.startswith(other + ".") for other in named)]


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a module inside it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


def is_lookup(module: nn.Module) -> bool:
    """Whether the module looks rows of a weight up."""
    return isinstance(module, nn.Embedding) or ("Embedding" in type(module).__name__ and hasattr(module, "weight"))


def vocabulary_size_of(module: nn.Module) -> int:
    """The number of rows of a lookup, or of the lookups that a wrapper holds."""
    rows: Any = getattr(module, "num_embeddings", None)
    if not rows:
        # An adapter's wrapper may hold several lookups of the same size.
        weight: Any = next(m for m in module.modules() if is_lookup(m)).weight
        rows = weight.shape[0]
    return int(rows)


def mean_embedding_norm(model: nn.Module) -> float:
    """The mean Euclidean norm of a token's embedding, over all entries of the lookup that are not zero.

    A weight that is sharded over processes is gathered for it, so all processes must call.

    Raises:
        ValueError: the model has no token lookup.
    """
    lookup = next(m for m in input_embedding(model).modules() if is_lookup(m))
    weight: Any = lookup.weight
    if hasattr(weight, "ds_id"):
        with importlib.import_module("deepspeed").zero.GatheredParameters([weight]):
            norms = _row_norms(weight)
    else:
        norms = _row_norms(weight.full_tensor() if hasattr(weight, "full_tensor") else weight)
    # Some lookups multiply what they read (Gemma, BART).
    scale: Any = getattr(lookup, "embed_scale", 1.0)
    return float(norms[norms > 0].mean()) * float(scale)


def _row_norms(weight: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=dtype)
    return norms


def padding_id_of(model: nn.Module) -> int | None:
    """The id that carries no token, or None."""
    padding_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    return padding_id if isinstance(padding_id, int) else None


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder, or None."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    for owner in (model, getattr(model, getattr(model, "base_model_prefix", ""), None)):
        if owner is not None and hasattr(owner, "get_encoder"):
            encoder = owner.get_encoder()  # type: ignore[operator]
            return encoder if isinstance(encoder, nn.Module) else None
    return None
