"""Finding things in a model: modules by path, the lookups of tokens, the encoder."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# What an adapter (peft) calls the module that it wraps.
_ADAPTED = ("base_layer", "original_module", "token_adapter")
_NO_TOKENS = re.compile("pos|type|segment")
_LISTED = 8
_NUMBERS_AT_ONCE = 2**24


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module at `path`, as `find_modules`."""
    return find_modules(model, path)[0]


def find_modules(model: nn.Module, pattern: str) -> list[nn.Module]:
    """The modules whose paths match, a part between dots at a time.

    Whole paths win; then whole paths in the model inside its wrappers (peft's `base_model.model.`), so that what is
    right for the bare model stays right; then paths that end like this, of which a pattern takes all.

    Args:
        model: the model, wrapped or not.
        pattern: a path, or a pattern with `*`, which does not reach across a dot.

    Raises:
        ValueError: no module matches, and near names are listed; or a path without `*` is the end of several.
    """
    parts = pattern.split(".")
    # A shared module has several names.
    paths = {name: m for name, m in model.named_modules(remove_duplicate=False) if name}
    starts = {
        name: own[: -len(parts)]
        for name in paths
        if len(own := name.split(".")) >= len(parts) and all(map(fnmatch.fnmatchcase, own[-len(parts) :], parts))
    }
    for wrapper in _wrappers(model):
        if whole := [paths[name] for name, start in starts.items() if start == wrapper]:
            return list(dict.fromkeys(whole))
    literal = not any(sign in pattern for sign in "*?[")
    if literal and (handed_on := _attribute(model, pattern)) is not None:
        return [handed_on]
    found = list(dict.fromkeys(paths[name] for name in starts))
    if not found:
        near = difflib.get_close_matches(pattern, paths, n=5, cutoff=0.4) or list(paths)[:5]
        raise ValueError(
            f"adv_target={pattern!r}: {type(model).__name__} has no such module. Near names: {', '.join(near)}."
        )
    if literal and len(found) > 1:
        raise ValueError(
            f"adv_target={pattern!r} fits several modules of {type(model).__name__}: {', '.join(starts)}. "
            f"Write the whole path of one of them; '*.{pattern}' would mean all."
        )
    return found


def _wrappers(model: nn.Module) -> Iterator[list[str]]:
    """The path of the model inside each of the wrappers around it: whatever has one child."""
    path: list[str] = []
    yield path
    while len(model._modules) == 1:
        ((name, child),) = model._modules.items()
        if child is None:
            return
        path, model = [*path, name], child
        yield path


def _attribute(model: nn.Module, path: str) -> nn.Module | None:
    """The module that the path gives in Python: wrappers inside the model hand on what they wrap."""
    try:
        found = operator.attrgetter(path)(model)
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) and found in model.modules() else None


def path_of(model: nn.Module, module: nn.Module) -> str:
    """The path of a module inside the model; the model's class for the model itself."""
    return next((name for name, m in model.named_modules() if m is module), "") or type(module).__name__


def input_embedding(model: nn.Module) -> nn.Module:
    """The module that holds the input embedding.

    It is what the model's own `get_input_embeddings()` returns; failing that, what modules inside it return by theirs,
    if they agree; if none does, the model's only lookup. Nothing is guessed from names: the wrong lookup would be
    attacked silently.

    Raises:
        ValueError: there is no token lookup, or several that may be meant, which are listed.
    """
    named = _named_embeddings(model)
    # Patches (of a vision model, say) are no tokens, and such a model's lookups hold positions.
    candidates = {path: m for path, m in named.items() if any(is_lookup(part) for part in m.modules())}
    if not named:
        candidates = _outermost(model, is_lookup)
    different = _by_weight(candidates.values())
    only_path = next(iter(candidates), "").rpartition(".")[2]
    if len(different) == 1 and (named or not _NO_TOKENS.search(only_path)):
        return different[0]
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no token lookup at get_input_embeddings(), so adv_target='word_embeddings' "
            "means nothing here. Name a module path or an input tensor, such as adv_target='pixel_values'. (loops.FGM "
            "moves rows of a lookup; loops.Adversary takes any such target.)"
        )
    listed = [f"{path or type(m).__name__} ({_size_of(m)})" for path, m in candidates.items()]
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    raise ValueError(
        f"{type(model).__name__} has no token lookup at get_input_embeddings(), and what looks tokens up inside it "
        f"can't be told: {', '.join(listed[:_LISTED])}{more}. Name it by its path: adv_target='path', or for "
        "loops.FGM, FGM(model, target='path')."
    )


def _named_embeddings(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """What the outermost modules that have a `get_input_embeddings()` return by it, by the modules' paths."""
    try:
        embedding = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        embedding = None
    if isinstance(embedding, nn.Module):
        return {path: embedding}
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        found |= _named_embeddings(child, f"{path}.{name}" if path else name)
    return found


def _outermost(model: nn.Module, sought: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """The modules sought that are in no other one, by path: an adapter's lookup wraps the one that it adapts."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if sought(module) and not any(not outer or name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def _by_weight(lookups: Iterable[nn.Module]) -> list[nn.Module]:
    """One lookup for each weight."""
    found: list[nn.Module] = []
    for lookup in lookups:
        if not any(lookup is other or same_weight(weight_of(lookup), weight_of(other)) for other in found):
            found.append(lookup)
    return found


def _size_of(lookup: nn.Module) -> str:
    weight = weight_of(lookup)
    return type(lookup).__name__ if weight is None else " x ".join(map(str, weight.shape))


def input_lookups(model: nn.Module) -> list[nn.Module]:
    """The modules that look the input's tokens up; in an encoder-decoder those of the encoder.

    Raises:
        ValueError: as `input_embedding`.
    """
    encoder = encoder_of(model)
    lookups = shared_lookups(encoder or model, input_embedding(model))
    # Not tied: the encoder has a lookup of its own.
    return lookups if lookups or encoder is None else [input_embedding(encoder)]


def shared_lookups(model: nn.Module, lookup: nn.Module) -> list[nn.Module]:
    """The outermost modules in `model` that look tokens up in the weight of `lookup`."""
    weight = weight_of(lookup)

    def shares(module: nn.Module) -> bool:
        return module is lookup or (is_lookup(module) and same_weight(weight_of(module), weight))

    return list(_outermost(model, shares).values())


def same_weight(one: Any, other: Any) -> bool:
    """Whether two tensors are one in memory: `load_state_dict(assign=True)` makes two objects of a tied weight."""
    if one is None or other is None:
        return False
    plain = all(type(w) in (Tensor, nn.Parameter) and w.numel() and not w.is_meta for w in (one, other))
    return one is other or (plain and one.device == other.device and one.data_ptr() == other.data_ptr())


def table_of(lookup: nn.Module) -> nn.Module:
    """The module inside a lookup that has the rows. An adapter's may have several: the original, and copies."""
    tables = [m for m in lookup.modules() if _is_table(m)] or [lookup]
    tables = [m for m in tables if {"weight"} & {*m._parameters, *m._buffers}] or tables
    if len(tables) == 1:
        return tables[0]
    handed_on = getattr(lookup, "weight", None)

    def in_use(table: nn.Module) -> tuple[bool, bool]:
        return any(p.requires_grad for p in table.parameters(recurse=False)), table.weight is handed_on

    return max(tables, key=in_use)


def weight_of(lookup: nn.Module) -> Any:
    """The tensor of a lookup's rows, or None."""
    return getattr(table_of(lookup), "weight", None)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to the model or to a module inside it."""
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


def is_lookup(module: nn.Module) -> bool:
    """Whether the module looks rows of a weight up, itself or as an adapter around such a module."""
    adapted = [module._modules.get(name) for name in _ADAPTED]
    return _is_table(module) or any(is_lookup(m) for m in adapted if m is not None)


def _is_table(module: nn.Module) -> bool:
    if isinstance(module, nn.Embedding):
        return True
    # A projection of patches looks nothing up, and a bag has no row for each id.
    other = isinstance(module, nn.Linear | _ConvNd | nn.EmbeddingBag)
    return "Embedding" in type(module).__name__ and hasattr(module, "weight") and not other


def vocabulary_size_of(module: nn.Module) -> int:
    """The number of rows of a lookup, or of the lookups that a wrapper holds."""
    rows: Any = getattr(module, "num_embeddings", None)
    if not rows:
        # An adapter's wrapper may hold several lookups of the same size.
        weight: Any = next(m for m in module.modules() if _is_table(m)).weight
        rows = weight.shape[0]
    return int(rows)


def mean_embedding_norm(model: nn.Module) -> float:
    """The mean Euclidean norm of a token's embedding, over all entries of the lookup that are not zero.

    It is measured where epsilon is, at the lookup's output: scales and adapters count. Of a weight that is sharded over
    processes the rows are gathered and scaled, so all processes must call; an adapter's part is left out there.

    Raises:
        ValueError: the model has no token lookup, one that can't be called with ids alone, or one that is all zero.
    """
    lookup = input_lookups(model)[0]
    weight = weight_of(lookup)
    if hasattr(weight, "ds_id"):
        with importlib.import_module("deepspeed").zero.GatheredParameters([weight]):
            norms, scale = _row_norms(weight), _scale_of(lookup)
    elif hasattr(weight, "full_tensor"):
        norms, scale = _row_norms(weight.full_tensor()), _scale_of(lookup)
    else:
        norms, scale = _output_norms(lookup, weight), 1.0
    norms = norms[norms > 0]
    if not len(norms):
        raise ValueError(
            f"All entries of the token lookup {path_of(model, lookup)} are zero, so their mean norm is no unit. "
            "Choose epsilon_unit='absolute', or load the weights first."
        )
    return float(norms.mean()) * scale


def is_sharded(weight: Any) -> bool:
    """Whether a weight is spread over processes: by DeepSpeed's ZeRO-3, or a DTensor of FSDP2."""
    return hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")


def _row_norms(rows: Tensor) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=dtype)


def _scale_of(lookup: nn.Module) -> float:
    """What some lookups multiply the rows by (Gemma, BART), through adapters."""
    scales: list[Any] = [m.embed_scale for m in lookup.modules() if hasattr(m, "embed_scale")]
    return float(scales[0]) if scales else 1.0


def _output_norms(lookup: nn.Module, weight: Tensor) -> Tensor:
    """The norm of what the lookup returns for each id."""
    ids = torch.arange(vocabulary_size_of(lookup), device="cpu" if weight.is_meta else weight.device)
    with undisturbed(lookup):
        try:
            # A part at a time: the whole would be a second lookup in memory.
            parts = ids[None].split(max(1, _NUMBERS_AT_ONCE // weight.shape[-1]), dim=1)
            return torch.cat([_row_norms(lookup(part)).flatten() for part in parts])
        except TypeError as error:
            raise ValueError(
                f"epsilon_unit='embedding' looks every entry up, and {type(lookup).__name__} can't be called with ids "
                "alone. Choose epsilon_unit='absolute'."
            ) from error


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, and every module's own mode afterwards.

    The flags are set, not `eval()` called: some adapters (loralib's) write their weights in it.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def undisturbed(lookup: nn.Module) -> Iterator[None]:
    """Inside, the lookup is called in eval mode, without gradients; weights and random state are put back."""
    # `max_norm` shortens the rows in place when they are looked up.
    shortened = [m.weight for m in lookup.modules() if isinstance(m, nn.Embedding) and m.max_norm is not None]
    kept = [weight.detach().clone() for weight in shortened]
    devices = {w.device for w in lookup.parameters() if w.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(list(devices)), eval_mode(lookup):
        try:
            yield
        finally:
            for weight, values in zip(shortened, kept, strict=True):
                weight.copy_(values)


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
