"""Where a perturbation lives: a tensor inside the model's forward pass, reached by a hook.

The hook returns `tensor + leaf`. In a pass that only asks for the gradient the leaf is zero; in an adversarial
pass it is the perturbation. After the backward pass `leaf.grad` is the gradient. No weight is ever written, so
none can be left perturbed, and `weight.grad`, which may hold earlier micro-batches, is never read.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .geometry import SCOPES
from .inspection import (
    encoder_of,
    find_module,
    input_embedding,
    is_compiled,
    is_lookup,
    padding_id_of,
    shared_lookups,
    vocabulary_size_of,
)
from .passes import Pass


class Target:
    """A tensor inside the model's forward pass that a perturbation is added to.

    `attach(model)` registers the hooks, `detach()` removes them; `record(...)` is one pass.
    """

    scopes: tuple[str, ...] = ("example", "token")

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._pass: Pass | None = None
        self._padding_id: int | None = None
        self._positions_first = False
        self.model: nn.Module | None = None

    def settle(self, scope: str | None, preferred: str) -> str:
        """The scope to use: the one asked for, else the preferred one where it exists here, else the target's first.

        Raises:
            ValueError: the scope asked for does not exist here.
        """
        if scope is None:
            return preferred if preferred in self.scopes else self.scopes[0]
        if scope not in self.scopes:
            raise ValueError(
                f"adv_scope {scope!r} does not exist at adv_target {self}; choose one of: {', '.join(self.scopes)}."
            )
        return scope

    def forward_ended(self, seen: Pass, batch: Any) -> None:
        """To be called when the loss is there. Raises RuntimeError where the forward pass did not meet the target."""
        if not seen.calls:
            raise RuntimeError(self.unreached(batch))
        seen.check()
        seen.forward_done = True

    def attach(self, model: nn.Module, called: nn.Module | None = None) -> None:
        """Registers the hooks on the unwrapped `model`; raises ValueError if it does not have the target.

        Args:
            model: the model inside every wrapper.
            called: what the forward passes call, wrappers included: only `torch.compile`'s tells of itself.
        """
        self.detach()
        if is_compiled(model if called is None else called):
            # Code compiled earlier, for this model or for another of its shape, does not know of hooks registered now.
            torch.compiler.reset()
        # XLNet computes on (positions, examples, dimension).
        self._positions_first = getattr(getattr(model, "config", None), "model_type", None) == "xlnet"
        self._handles = self._register(model)
        self.model = model

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.model, self._pass = [], None, None

    @contextmanager
    def record(self, delta: Tensor | None = None, *, gradient: bool) -> Iterator[Pass]:
        """One pass: inside, the target's tensor is moved by `delta`; the yielded `Pass` says what was met."""
        self._pass = Pass(delta, gradient, self._padding_id)
        try:
            yield self._pass
        finally:
            self._pass = None

    def unreached(self, batch: Any) -> str:
        """Why a forward pass on this batch may not have met the target."""
        return f"The forward pass never reached the target {self}: nothing would be perturbed."

    def _register(self, model: nn.Module) -> list[Any]:
        raise NotImplementedError

    def _meet(self, seen: Pass, value: Tensor, ids: Tensor | None = None, vocabulary_size: int = 0) -> Tensor:
        if not self._positions_first:
            return seen.meet(value, ids, vocabulary_size)
        ids = None if ids is None else ids.transpose(0, 1)
        return seen.meet(value.transpose(0, 1), ids, vocabulary_size).transpose(0, 1)

    def _watch_masks(self, model: nn.Module, inside: Sequence[nn.Module]) -> list[Any]:
        """Hooks that note the attention mask with which the modules around `inside` are called, the innermost's last.

        The mask of the batch would not do: two towers have one each, R-Drop doubles it, a decoder has its own.
        """
        handles = []
        for module in model.modules():
            within = list(module.modules())
            if not any(m is other for m in inside for other in within):
                continue
            places = list(inspect.signature(module.forward).parameters)
            if "attention_mask" in places:
                hook = _outside_graphs(functools.partial(self._on_masked_call, places.index("attention_mask")))
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles

    def _on_masked_call(self, place: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._pass is None:
            return
        mask = args[place] if place < len(args) else kwargs.get("attention_mask")
        if (
            isinstance(mask, Tensor)
            and mask.dim() in (2, 3)
            and not (mask.dim() == 3 and mask.shape[1] == mask.shape[2])
        ):
            self._pass.mask = mask
        elif kwargs.get("encoder_hidden_states") is not None:
            # A decoder without a mask of its own: the encoder's says nothing of its positions.
            self._pass.mask = None


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
        hook = _outside_graphs(self._on_lookup)
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
        module: a module path, such as `bert.encoder.layer.3`.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def __str__(self) -> str:
        return f"'{self.module}' (a module's output)"

    def _register(self, model: nn.Module) -> list[Any]:
        module = find_module(model, self.module)
        handles = self._watch_masks(model, [module])
        return [*handles, module.register_forward_hook(_outside_graphs(self._on_output))]

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
        hook = _outside_graphs(self._on_call)
        return [*self._watch_masks(model, [model]), model.register_forward_pre_hook(hook, with_kwargs=True)]

    def _on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._pass is None or kwargs.get(self.name) is None:
            return None
        return args, {**kwargs, self.name: self._pass.meet(kwargs[self.name])}


INPUT_TENSORS = ("inputs_embeds", "pixel_values", "input_values", "input_features")


def find_target(name: str, model: nn.Module) -> Target:
    """The target that `adv_target` names in `model`.

    Args:
        name: `word_embeddings`; an input's name (`inputs_embeds`, `pixel_values`, ...); else a module path.
        model: the model inside every wrapper.

    Raises:
        ValueError: the model has no such module; near names are listed.
    """
    if name == "word_embeddings":
        input_embedding(model)
        return EmbeddingOutput()
    if name in INPUT_TENSORS:
        return InputTensor(name)
    module = find_module(model, name)
    return EmbeddingOutput(name) if is_lookup(module) else ModuleOutput(name)


def look(
    target: Target,
    batch: Any,
    delta: Tensor | None,
    loss_of: Callable[[], Tensor],
    scaled: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> tuple[Pass, Tensor, Tensor]:
    """The gradient of the loss with respect to the perturbation alone: no weight gradient is computed or touched.

    Args:
        target: an attached target.
        batch: the model's inputs, for the message where they never reach the target.
        delta: where the gradient is taken; None for zero.
        loss_of: runs the forward pass and returns the loss, a scalar.
        scaled: multiplies the loss by the loss scale of half precision, for the way back alone.

    Returns:
        The pass, the gradient dL/d(delta) and the loss. Running statistics of batch norms stay as they are.
    """
    with target.record(delta, gradient=True) as seen, torch.enable_grad(), _still_statistics(target.model):
        loss = loss_of()
        target.forward_ended(seen, batch)
        # As the first entry: d(what the way back starts from) / d(loss).
        leaves = [loss, *seen.leaves]
        try:
            scale, *gradients = torch.autograd.grad(scaled(loss), leaves, allow_unused=True)
        except RuntimeError as error:
            if "reentrant" not in str(error):
                raise
            raise RuntimeError(
                "Reentrant gradient checkpointing can't give the gradient with respect to the perturbation alone. "
                "Enable it with use_reentrant=False."
            ) from error
        return seen, seen.gradient(gradients) / scale, loss.detach()


@contextmanager
def _still_statistics(model: nn.Module | None) -> Iterator[None]:
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training] if model is not None else []
    tracked = [m.track_running_stats for m in norms]
    try:
        for module in norms:
            module.track_running_stats = False
        yield
    finally:
        for module, flag in zip(norms, tracked, strict=True):
            module.track_running_stats = flag


def _outside_graphs(hook: Callable[..., Any]) -> Callable[..., Any]:
    # A hook keeps state from call to call, which a compiled graph can't. Whether the model is compiled does not matter:
    # it does not know of a `torch.compile` around it, or of one that comes later.
    outside: Callable[..., Any] = torch.compiler.disable(hook)
    return outside


def _looks_tokens_up(model: nn.Module, lookup: nn.Module) -> bool:
    try:
        return lookup in shared_lookups(model, input_embedding(model))
    except ValueError:
        # The model does not name its input embedding; whoever named this one may mean it.
        return True
