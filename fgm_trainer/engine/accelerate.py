"""What accelerate, DeepSpeed, FSDP and gradient scalers need of a step with several passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..perturbation.lookups import is_sharded

FSDP1 = (
    "FSDP1 keeps weights flat, where a module can't be called by itself. Use FSDP2: fsdp_version=2 of accelerate's "
    "plugin, fsdp_config={'fsdp_version': 2} of TrainingArguments, or torch's fully_shard."
)


def bare(model: nn.Module, accelerator: Any) -> nn.Module:
    """The model inside the wrappers of the engine and of torch.compile, its autocast kept."""
    inner = model if accelerator is None else accelerator.unwrap_model(model)
    return getattr(inner, "_orig_mod", inner)


def whole_copies(model: nn.Module, accelerator: Any) -> bool:
    """Whether there are several processes, each with all of the model's weights."""
    kind = getattr(getattr(accelerator, "distributed_type", None), "value", "")
    return kind.startswith("MULTI") and not any(map(is_sharded, model.parameters()))


class AllProcesses:
    """A `Total` over an accelerator's processes; without one there is this process alone."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __call__(self, tensor: Tensor, /) -> Tensor:
        if self._accelerator is None:
            return tensor
        return self._accelerator.reduce(tensor, reduction="sum")

    def gathered(self, items: list[Any]) -> list[Any]:
        """The items of all processes, on each of them."""
        if self._accelerator is None:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))


class Engine:
    """What runs the backward passes.

    Args:
        accelerator: the `accelerate.Accelerator`; None for a plain loop on one process.
        wrapped: the model as the accelerator prepared it.
        model: the model inside every wrapper.
    """

    def __init__(self, accelerator: Any, wrapped: nn.Module, model: nn.Module) -> None:
        self.accelerator, self.wrapped, self.model = accelerator, wrapped, model
        # accelerate's DistributedType: by its value, since the core runs without accelerate.
        self._kind = getattr(getattr(accelerator, "distributed_type", None), "value", None)
        self._local = None if accelerator is None else LocalGradients(accelerator, wrapped)

    def local_gradients(self) -> AbstractContextManager[None]:
        """A context for all passes of a step but the last (`LocalGradients`)."""
        return nullcontext() if self._local is None else self._local

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """The backward pass of a training pass."""
        if self.accelerator is None:
            loss.backward()
        else:
            self.accelerator.backward(loss, **kwargs)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the loss scale of half precision, without which small gradients are zeros there."""
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            return scaler.scale(loss)
        deepspeed = getattr(self.accelerator, "deepspeed_engine_wrapped", None)
        return loss if deepspeed is None else loss * getattr(deepspeed.engine.optimizer, "loss_scale", 1.0)

    def divides_by(self, backward_arguments: dict[str, Any]) -> int:
        """What `backward`, or the engine inside it, divides a loss by."""
        if self._kind != "DEEPSPEED":
            return int(self.accelerator.gradient_accumulation_steps)
        if not backward_arguments.get("scale_wrt_gas", True):
            return 1
        return int(self.accelerator.deepspeed_engine_wrapped.engine.gradient_accumulation_steps())

    @property
    def defers(self) -> bool:
        """Whether what the earlier passes of a micro-batch owe the lookup's weight can wait for the last one.

        Not under engines that reduce the gradients of every pass: they expect each weight's in each of them.
        """
        return self._kind not in ("DEEPSPEED", "FSDP") and not any(map(is_sharded, self.model.parameters()))

    def refuse_flat_weights(self) -> None:
        """Raises ValueError under FSDP1."""
        if any(type(module).__name__ == "FullyShardedDataParallel" for module in self.wrapped.modules()):
            raise ValueError(FSDP1)

    def refuse_spread_weights(self, name: str) -> None:
        """Raises ValueError where weights or their gradients are spread over processes; `name` needs them whole."""
        if not self.defers:
            raise ValueError(
                f"{name!r} needs whole weights on every process, and this engine spreads them or their gradients. "
                "Run it on one process or under DDP."
            )


class LocalGradients:
    """A context for all passes of a step but the last: gradients add up on this process, and no optimizer steps.

    DeepSpeed's backward steps the optimizer whenever `sync_gradients` is set; DDP reduces gradients in every backward
    outside of `no_sync`. FSDP2 scatters them in every pass, since to keep them whole would cost the memory that it
    saves; with replicas of the shards (HSDP) only the last pass sums over the replicas.

    Args:
        accelerator: the `accelerate.Accelerator`.
        model: the model as the accelerator prepared it.
    """

    # A class that is made once: a generator takes several times as many calls in every step.
    def __init__(self, accelerator: Any, model: nn.Module) -> None:
        self._accelerator = accelerator
        bare: Any = getattr(model, "_orig_mod", model)
        self._without_sums = bare.no_sync if isinstance(bare, DistributedDataParallel) else nullcontext
        self._replicated: Any = bare if hasattr(bare, "set_requires_all_reduce") else None
        self._entered: list[tuple[bool, Any]] = []

    def __enter__(self) -> None:
        no_sync = self._without_sums()
        no_sync.__enter__()
        self._entered.append((self._accelerator.sync_gradients, no_sync))
        self._tell_passes_apart(False)

    def __exit__(self, *error: Any) -> None:
        sync, no_sync = self._entered[-1]
        self._tell_passes_apart(sync)
        self._entered.pop()
        no_sync.__exit__(*error)

    def _tell_passes_apart(self, sync: bool) -> None:
        self._accelerator.sync_gradients = sync
        # Where this is not the last micro-batch, the loop around has already put the sum off.
        if self._replicated is not None and self._entered[-1][0]:
            self._replicated.set_requires_all_reduce(sync)
