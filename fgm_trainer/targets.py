"""The places a perturbation can live in, and how `adv_target` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .geometry import SCOPES
from .inspection import (
    encoder_of,
    find_module,
    find_modules,
    input_embedding,
    is_lookup,
    padding_id_of,
    shared_lookups,
    vocabulary_size_of,
)
from .target import Target, outside_graphs
from .weights import Weights


class EmbeddingOutput(Target):
    """The output of the input token lookup: what reads `word_embeddings`, whatever a model calls it.

    A lookup that has the input embedding's weight, directly or tied, is attacked where it is really called (BART's
    `get_input_embeddings()` returns a module that its forward never calls). In encoder-decoders only the encoder's
    lookups are attacked. A tied output head is not touched.

    Args:
        module: the lookup's module path, or None for `model.get_input_embeddings()`.
    """

    scopes = SCOPES

    def __init__(self, module: str | None = None) -> None:
        super().__init__()
        self.module = module
        self._inside_encoder = True

    def __str__(self) -> str:
        return f"'{self.module or 'word_embeddings'}' (the input token lookup)"

    def unreached(self, batch: Any) -> str:
        if isinstance(batch, Mapping) and batch.get("inputs_embeds") is not None and batch.get("input_ids") is None:
            return (
                "The batch holds `inputs_embeds` and no `input_ids`, so the model looks up no tokens and there is "
                "nothing to perturb at adv_target='word_embeddings'. Write adv_target='inputs_embeds' to perturb that "
                "tensor."
            )
        return super().unreached(batch) + " Name the module that looks the tokens up, as adv_target='path.to.module'."

    def _register(self, model: nn.Module) -> list[Any]:
        if self.module is not None:
            lookups = [find_module(model, self.module)]
            handles = []
            tokens = _looks_tokens_up(model, lookups[0])
        else:
            encoder = encoder_of(model)
            lookups = shared_lookups(encoder or model, input_embedding(model))
            if encoder is not None and not lookups:
                # Not tied: the encoder has a lookup of its own.
                lookups = [input_embedding(encoder)]
            handles = [] if encoder is None else self._register_encoder(encoder)
            tokens = True
        # Position and type ids look up as well, and their 0 is no padding.
        self._padding_id = padding_id_of(model) if tokens else None
        self.can_wait = all(isinstance(m, nn.Embedding) and not _is_sharded(m.weight) for m in lookups)
        hook = outside_graphs(self._on_lookup)
        handles += self._watch_masks(model, lookups)
        return handles + [m.register_forward_hook(hook, with_kwargs=True) for m in lookups]

    def _register_encoder(self, encoder: nn.Module) -> list[Any]:
        self._inside_encoder = False

        def enter(module: nn.Module, args: Any) -> None:
            self._inside_encoder = True

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._inside_encoder = False

        return [
            encoder.register_forward_pre_hook(enter),
            encoder.register_forward_hook(leave, always_call=True),
        ]

    def _on_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        if self._pass is None or not self._inside_encoder:
            return None
        ids = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point())
        return self._meet(self._pass, output, ids, vocabulary_size_of(module))


class ModuleOutput(Target):
    """The output of any module, by its path: latent adversarial training. Of a tuple, the first tensor.

    Args:
        module: a module path, such as `bert.encoder.layer.3`. A pattern such as `bert.encoder.layer.*` means several,
            each with a perturbation of its own; `*` does not reach across a dot.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def __str__(self) -> str:
        return f"'{self.module}' (a module's output)"

    def _register(self, model: nn.Module) -> list[Any]:
        modules = find_modules(model, self.module)
        handles = self._watch_masks(model, modules)
        return handles + [m.register_forward_hook(outside_graphs(self._on_output)) for m in modules]

    def _on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._pass is None:
            return None
        if isinstance(output, Tensor):
            return self._meet(self._pass, output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (self._meet(self._pass, output[0]), *output[1:])
        if isinstance(output, Mapping):
            name = next(k for k, v in output.items() if isinstance(v, Tensor))
            output[name] = self._meet(self._pass, output[name])  # type: ignore[index]  # a ModelOutput
            return output
        raise TypeError(
            f"adv_target {self.module!r} returns {type(output).__name__}, in which there is no tensor first. "
            "Name a module that returns a tensor, or a tuple with one at its head."
        )


class InputTensor(Target):
    """An input of the model, by its name: `inputs_embeds`, `pixel_values`, `input_values`.

    Args:
        name: the keyword under which the model's forward takes it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def __str__(self) -> str:
        return f"'{self.name}' (an input tensor)"

    def _register(self, model: nn.Module) -> list[Any]:
        hook = outside_graphs(self._on_call)
        return [*self._watch_masks(model, [model]), model.register_forward_pre_hook(hook, with_kwargs=True)]

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._pass is None or kwargs.get(self.name) is None:
            return None
        return args, {**kwargs, self.name: self._pass.meet(kwargs[self.name])}


INPUT_TENSORS = ("inputs_embeds", "pixel_values", "input_values", "input_features")


def find_target(name: str, model: nn.Module) -> Target:
    """The target that `adv_target` names in `model`.

    Args:
        name: `word_embeddings`; `weights`; an input's name (`inputs_embeds`, `pixel_values`, ...); else a module path
            or a pattern of such.
        model: the model inside every wrapper.

    Raises:
        ValueError: the model has no such module; near names are listed.
    """
    if name == "word_embeddings":
        input_embedding(model)
        return EmbeddingOutput()
    if name == "weights":
        return Weights()
    if name in INPUT_TENSORS:
        return InputTensor(name)
    modules = find_modules(model, name)
    return EmbeddingOutput(name) if len(modules) == 1 and is_lookup(modules[0]) else ModuleOutput(name)


def _looks_tokens_up(model: nn.Module, lookup: nn.Module) -> bool:
    try:
        return lookup in shared_lookups(model, input_embedding(model))
    except ValueError:
        # The model does not name its input embedding; whoever named this one may mean it.
        return True


def _is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")
