"""The places a perturbation can live in, and how `adv_target` names them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .batches import INPUT_TENSORS
from .forward_pass import PerturbedForward
from .geometry import SCOPES
from .lookups import (
    encoder_of,
    find_module,
    find_modules,
    input_embedding,
    input_lookups,
    is_lookup,
    padding_id_of,
    shared_lookups,
    vocabulary_size_of,
)
from .target import Site, Target
from .watched import WatchedForward
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
        self._inside_encoder, self._before_encoder = True, False

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

    def find_sites(self, model: nn.Module) -> list[Site]:
        encoder, tokens = None, True
        if self.module is not None:
            lookups = [find_module(model, self.module)]
            tokens = _looks_tokens_up(model, lookups[0])
        else:
            encoder, lookups = encoder_of(model), input_lookups(model)
        # Position and type ids look up as well, and their 0 is no padding.
        self._padding_id = padding_id_of(model) if tokens else None
        self._inside_encoder, around = encoder is None, []
        if encoder is not None:
            # Prompt tuning and BLIP-2 look tokens up themselves, and give the encoder embeddings.
            lookups = shared_lookups(model, lookups[0]) or lookups
            start = Site(model, True, self._start)
            around = [start, Site(encoder, True, self._enter), Site(encoder, False, self._leave)]
        return [*around, *self.mask_sites(model, set(lookups)), *(Site(m, False, self._on_lookup) for m in lookups)]

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._before_encoder = True

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside_encoder, self._before_encoder = True, False

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside_encoder = False

    def _on_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._pass is None or output is None:
            return None
        ids = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and not v.is_floating_point())
        if not (self._inside_encoder or (self._before_encoder and self._is_input(ids))):
            return None
        if isinstance(output, tuple):
            # I-BERT's comes with a scale.
            return (self._perturb_rows(module, output[0], ids), *output[1:])
        return self._perturb_rows(module, output, ids)

    def _perturb_rows(self, module: nn.Module, rows: Tensor, ids: Tensor) -> Tensor:
        if ids.shape != rows.shape[:-1]:
            # A bag of words: its output is of no one token.
            return self.perturb(module, rows)
        return self.perturb(module, rows, ids, vocabulary_size_of(module))

    def _is_input(self, ids: Tensor) -> bool:
        batch = None if self._pass is None else self._pass.batch
        return isinstance(batch, Mapping) and ids is batch.get("input_ids")


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

    def find_sites(self, model: nn.Module) -> list[Site]:
        modules = find_modules(model, self.module)
        self.expected = set(modules)
        return [*self.mask_sites(model, self.expected), *(Site(m, False, self._on_output) for m in modules)]

    def _on_output(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._pass is None or output is None:
            return None
        if isinstance(output, Tensor):
            return self.perturb(module, output)
        if isinstance(output, tuple) and isinstance(output[0], Tensor):
            return (self.perturb(module, output[0]), *output[1:])
        if isinstance(output, Mapping):
            name = next(k for k, v in output.items() if isinstance(v, Tensor))
            output[name] = self.perturb(module, output[name])  # type: ignore[index]  # a ModelOutput
            return output
        raise TypeError(
            f"adv_target {self.module!r} returns {type(output).__name__}, in which there is no tensor first. "
            "Name a module that returns a tensor, or a tuple with one at its head."
        )


class InputTensor(Target):
    """An input of the model, by its name: `inputs_embeds`, `pixel_values`, `input_values`.

    Args:
        name: the argument under which the model's forward takes it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        # Pixels bear more than embeddings do.
        self.ceiling = Target.ceiling if name == "inputs_embeds" else 0.5
        self._may_ask: list[Any] = []
        self._askers: list[Any] = []

    def __str__(self) -> str:
        return f"'{self.name}' (an input tensor)"

    def find_sites(self, model: nn.Module) -> list[Site]:
        # Wav2Vec2's kind asks its input for gradients, which only a tensor without a history can be asked for. The
        # perturbation asks already.
        self._may_ask = [m for m in model.modules() if isinstance(vars(m).get("_requires_grad"), bool)]
        places = list(inspect.signature(model.forward).parameters)
        place = places.index(self.name) if self.name in places else len(places)
        call = functools.partial(self._on_call, place)
        return [*self.mask_sites(model, {model}), Site(model, True, call)]

    def _begin(self, forward_pass: WatchedForward) -> None:
        super()._begin(forward_pass)
        # Now, since it may be frozen between two steps.
        self._askers = [m for m in self._may_ask if m._requires_grad]
        for module in self._askers:
            module._requires_grad = False

    def _end(self, forward_pass: WatchedForward) -> None:
        super()._end(forward_pass)
        for module in self._askers:
            module._requires_grad = True
        self._askers = []

    def _on_call(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen = self._pass
        if not isinstance(seen, PerturbedForward):
            return None
        if isinstance(kwargs.get(self.name), Tensor):
            return args, {**kwargs, self.name: seen.perturb(module, kwargs[self.name])}
        if place < len(args) and isinstance(args[place], Tensor):
            return (*args[:place], seen.perturb(module, args[place]), *args[place + 1 :]), kwargs
        return None


def find_target(name: str | Target, model: nn.Module) -> Target:
    """The target that `adv_target` names in `model`.

    Args:
        name: `word_embeddings`; `weights`; an input's name (`inputs_embeds`, `pixel_values`, ...); else a module path
            or a pattern of such. A `Target` stands for itself.
        model: the model inside every wrapper.

    Raises:
        ValueError: the model has no such module; near names are listed.
    """
    if isinstance(name, Target):
        return name
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
