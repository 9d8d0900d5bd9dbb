"""A Trainer's model under attack, on the data and with the parts that the Trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .engine.accelerate import bare, whole_copies
from .perturbation.weights import is_weights
from .plan import Plan
from .robustness import RobustnessReport, evaluate_embedder, evaluate_robustness
from .robustness.embedders import is_embedder
from .robustness.evaluate import by_name, columns_of


def dataset_of(trainer: Any, given: Any) -> Any:
    """What `Trainer.evaluate` would evaluate on: the data set, or a dictionary of several.

    Args:
        trainer: the Trainer.
        given: a data set, a dictionary of data sets, the name of one of the Trainer's own, or None for its own.

    Raises:
        ValueError: there is none.
    """
    dataset = trainer.eval_dataset if given is None else given
    if isinstance(dataset, str):
        own = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {}
        if dataset not in own:
            names = ", ".join(own) or "none, since eval_dataset is no dictionary"
            raise ValueError(f"The Trainer's eval_dataset has no data set {dataset!r}; it has: {names}.")
        dataset = own[dataset]
    if dataset is None:
        raise ValueError("evaluate_robustness needs a data set: pass eval_dataset here or to the Trainer.")
    return dataset


def evaluate_trainer(trainer: Any, plan: Plan, dataset: Any, **kwargs: Any) -> RobustnessReport:
    """`evaluate_robustness`, or `evaluate_embedder`, with the Trainer's parts where `kwargs` have none."""
    model, args = _on_its_device(trainer), trainer.args
    collate = kwargs.pop("collate_fn", trainer.data_collator)
    embeds = is_embedder(model)
    if not embeds:
        collate = _with_columns(trainer, collate, columns_of(by_name(kwargs.get("attacks", "quick"))))
    parts: dict[str, Any] = {
        "batch_size": args.eval_batch_size,
        # A model that was trained on perturbed weights is evaluated on perturbed inputs.
        "target": None if is_weights(plan.target) else plan.target,
        "epsilon_unit": plan.epsilon_unit,
        "clip": plan.clip,
        "accelerator": trainer.accelerator if whole_copies(model, trainer.accelerator) else None,
        "progress": not args.disable_tqdm and trainer.is_local_process_zero(),
        "seed": args.seed,
        "collate_fn": collate,
    }
    evaluate: Any = evaluate_embedder if embeds else evaluate_robustness
    return evaluate(model, dataset, **parts | kwargs)


def _with_columns(trainer: Any, collate: Any, columns: set[Any]) -> Any:
    """The Trainer's collator, which drops what the model's forward does not take, but for what attacks read."""
    trainer._set_signature_columns_if_needed()
    known = trainer._signature_columns
    try:
        trainer._signature_columns = known and [*known, *(name for name in columns if isinstance(name, str))]
        return trainer._get_collator_with_removed_columns(collate, description="evaluation")
    finally:
        trainer._signature_columns = known


def _on_its_device(trainer: Any) -> nn.Module:
    model = bare(trainer.model_wrapped, trainer.accelerator)
    if trainer.place_model_on_device and next(model.parameters()).device != trainer.args.device:
        # With full evaluation in half precision Trainer has not moved the model yet.
        model.to(trainer.args.device)
    return model
