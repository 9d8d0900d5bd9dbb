"""What adversarial training can't be run with, found before it starts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn
from transformers import Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .attacks import AUTO, Attack
from .engine.accelerate import FSDP1, Engine
from .perturbation.lookups import input_embedding, is_compiled
from .perturbation.target import Target
from .perturbation.targets import find_target
from .perturbation.weights import is_weights

_STEPS_IN_BACKWARD = ("lomo", "adalomo", "layerwise")
# Where `_generates` does not show it.
_STEPS_TWICE = (
    "GRPOTrainer", "RLOOTrainer", "OnlineDPOTrainer", "PPOTrainer", "A2POTrainer", "AsyncGRPOTrainer",
    "AsyncDistillationTrainer", "SDFTTrainer", "SDPOTrainer", "IWOPDTrainer",
)  # fmt: skip


def refuse(trainer: Any, model: nn.Module | None, attack: Attack, target: str | Target, epsilon_unit: str) -> None:
    """Raises ValueError, one message with every problem of model, arguments and engine.

    Args:
        trainer: the trainer.
        model: its model inside every wrapper; None where it makes one later.
        attack: what it shall be trained with.
        target: what is perturbed, as `adv_target`.
        epsilon_unit: one of `EPSILON_UNITS`.
    """
    problems = [*_of_the_arguments(trainer, attack, target), *_of_the_engine(trainer)]
    if model is not None:
        problems = [*_of_the_model(model, attack, target, epsilon_unit), *problems]
        if attack.needs_whole_weights or is_weights(target):
            problems += _raised_by(lambda: Engine(trainer.accelerator, model, model).refuse_spread_weights(attack.name))
    if problems:
        raise ValueError("\n".join(["Adversarial training can't start:", *map("- ".__add__, problems)]))


def _of_the_model(model: nn.Module, attack: Attack, target: str | Target, epsilon_unit: str) -> Iterator[str]:
    yield from _raised_by(lambda: find_target(target, model).resolve_scope(attack.scope, attack.preferred_scope))
    if epsilon_unit == "embedding":
        yield from _raised_by(lambda: input_embedding(model))
    classes, label = getattr(getattr(model, "config", None), "num_labels", None), attack.targeted
    classifies = "Classification" in type(model).__name__
    if classifies and isinstance(label, int) and isinstance(classes, int) and label >= classes:
        yield f"adv_targeted={label} is no class of the model, which has {classes}."
    if label == "least_likely" and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        yield (
            "adv_targeted='least_likely' is for classification: a language model predicts the next position's "
            "label. Name a column of the data that holds the targets."
        )


def _of_the_arguments(trainer: Any, attack: Attack, target: str | Target) -> Iterator[str]:
    args = trainer.args
    if getattr(args, "adv_recover", False) and attack.epsilon == AUTO:
        yield "adv_recover lowers a fixed adv_epsilon, and 'auto' recovers anyway: leave it out, or give adv_epsilon."
    compiled = args.torch_compile or (trainer.model is not None and is_compiled(trainer.model))
    if is_weights(target) and compiled:
        yield "adv_target='weights' can't be compiled: leave torch_compile out."
    optimizer = str(getattr(args.optim, "value", args.optim))
    given = type(trainer.optimizer).__name__ if trainer.optimizer is not None else ""
    if any(part in name.lower() for part in _STEPS_IN_BACKWARD for name in (optimizer, given)):
        yield (
            f"optim={optimizer!r}{given and f' ({given})'} steps inside the backward pass, so the clean pass would "
            "change the weights before the adversarial one. Choose an optimizer that steps afterwards, such as "
            "optim='adamw_torch'."
        )
    if twice := steps_twice(type(trainer)):
        yield (
            f"{twice[0]} counts its training steps or generates the texts that it trains on, and a step has several "
            "passes: each would be counted, or train on other texts. Train with a trainer of given data, such as SFT "
            "or DPO. Texts that are only shown belong into a callback."
        )
    checkpointing = getattr(args, "gradient_checkpointing_kwargs", None) or {}
    reentrant = checkpointing.get("use_reentrant", _reentrant_by_default())
    if args.gradient_checkpointing and reentrant and _takes_gradient_passes(attack):
        yield (
            f"{attack.name!r} takes gradients with respect to the perturbation alone, which reentrant "
            "gradient checkpointing can't give. Write gradient_checkpointing_kwargs={'use_reentrant': False}."
        )


def steps_twice(kind: type) -> list[str]:
    """The classes of a trainer, by name, that count their own steps or generate what they train on."""
    return [c.__name__ for c in kind.__mro__ if c.__name__ in _STEPS_TWICE or _generates(c)]


def _generates(kind: type) -> bool:
    """Whether a step generates: by the names that the methods of this very class call."""
    if kind.__module__.partition(".")[0] in ("transformers", __package__):
        return False
    steps = [vars(kind).get(name) for name in ("training_step", "_prepare_inputs", "compute_loss")]
    code = [inspect.unwrap(step).__code__ for step in steps if inspect.isfunction(step)]
    return any("generate" in name for each in code for name in each.co_names)


def _takes_gradient_passes(attack: Attack) -> bool:
    return attack.looks or attack.clean_weight == 0 or attack.targeted is not None


def _of_the_engine(trainer: Trainer) -> Iterator[str]:
    if trainer.args.n_gpu > 1:
        yield (
            f"torch.nn.DataParallel over {trainer.args.n_gpu} GPUs is not supported: its replicas carry no hooks' "
            "state. Start one process a GPU: `accelerate launch script.py ...` or `torchrun --nproc_per_node "
            f"{trainer.args.n_gpu} script.py ...`."
        )
    split = [kind for kind in ("tp", "cp", "sp") if getattr(trainer, f"get_{kind}_size", lambda: 1)() > 1]
    if split:
        yield (
            f"{', '.join(f'{kind}_size' for kind in split)} above 1 splits one example over processes, each of "
            "which would take its norm over a part and draw its own noise. Spread the batch instead: DDP, FSDP2 "
            "or DeepSpeed ZeRO."
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.accelerator.distributed_type == DistributedType.FSDP and getattr(plugin, "fsdp_version", 2) == 1:
        yield FSDP1
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and not _deepspeed_can_wait():
        yield (
            "With DeepSpeed this release of accelerate steps the optimizer in every backward pass, the clean one "
            "too. Install accelerate 1.8 or newer."
        )


def _raised_by(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ValueError as error:
        return [str(error)]
    return []


def _reentrant_by_default() -> bool:
    return int(transformers.__version__.split(".")[0]) < 5


def _deepspeed_can_wait() -> bool:
    return "sync_gradients" in inspect.signature(DeepSpeedEngineWrapper.backward).parameters
