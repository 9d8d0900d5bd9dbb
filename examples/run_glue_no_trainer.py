#!/usr/bin/env python
"""Adversarial fine-tuning on GLUE, or on own texts, in a hand-written loop: accelerate and `raw.Adversary`.

Example: accelerate launch run_glue_no_trainer.py --model_name_or_path bert-base-cased --task_name mrpc
--adv_epsilon 1.0 --output_dir runs/mrpc
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from glue_data import (
    DataTrainingArguments,
    ModelArguments,
    Prepared,
    load_model,
    load_splits,
    make_figures,
    need,
    parse,
    predictions_of,
    prepare,
    quiet_unless,
    splits_of,
    write_predictions,
)
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser, SchedulerType, get_scheduler

from fgm_trainer.arguments import AdversarialArguments
from fgm_trainer.loops import Adversary
from fgm_trainer.robustness import evaluate_robustness, print_robustness


@dataclass
class LoopArguments(AdversarialArguments):
    """The loop's own flags, by the names that `TrainingArguments` gives them, and the attack's."""

    output_dir: str | None = field(
        default=None, metadata={"help": "Where model and figures go; without it nothing is kept."}
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Training examples a process and batch."})
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Evaluated examples a process and batch."})
    learning_rate: float = field(default=5e-5, metadata={"help": "AdamW's learning rate at its peak."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay, of matrices."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "The gradient is clipped to this length; 0: never."})
    num_train_epochs: int = field(default=3, metadata={"help": "Times through the training data."})
    max_train_steps: int | None = field(default=None, metadata={"help": "Optimizer steps, in place of epochs."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches an optimizer step."})
    lr_scheduler_type: SchedulerType = field(default="linear", metadata={"help": "How the learning rate changes."})
    num_warmup_steps: int = field(default=0, metadata={"help": "Optimizer steps over which the learning rate rises."})
    seed: int = field(default=42, metadata={"help": "Of the new head, the order of the data, dropout and the attack."})


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Trains, evaluates after each epoch, and returns all figures."""
    parser = HfArgumentParser([ModelArguments, DataTrainingArguments, LoopArguments], description=__doc__)
    model_args, data_args, args = parse(parser, sys.argv[1:] if argv is None else argv)
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps)
    quiet_unless(accelerator.is_main_process)
    set_seed(args.seed)
    with accelerator.main_process_first():
        raw = load_splits(data_args, model_args)
        evaluated = splits_of(raw, "validation")
        predicted = splits_of(raw, "test") if data_args.test_file else []
        splits = [need(raw, "Training", "train"), *(need(raw, "Evaluation", split) for split, _ in evaluated)]
        multiple = None if accelerator.mixed_precision == "no" else 8
        prepared = prepare(model_args, data_args, raw, [*splits, *(split for split, _ in predicted)], multiple)
    prepared.model = load_model(model_args, prepared.config)
    figures = make_figures(data_args.task_name, prepared.labels, model_args.cache_dir)

    def evaluate(model: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for split, suffix in evaluated:
            predictions, references = predict(accelerator, model, prepared, split, args.per_device_eval_batch_size)
            found |= {f"eval_{name}{suffix}": value for name, value in figures(predictions, references).items()}
        return found

    model, found = train(accelerator, args, prepared, evaluate)
    if data_args.eval_robustness:
        found |= robustness(accelerator, model, prepared, evaluated[0][0], args, data_args)
    for split, suffix in predicted:
        predictions, _ = predict(accelerator, model, prepared, split, args.per_device_eval_batch_size)
        if args.output_dir is not None and accelerator.is_main_process:
            os.makedirs(args.output_dir, exist_ok=True)
            name = "_".join(filter(None, ("predict_results", data_args.task_name))) + suffix.replace("_", "-")
            write_predictions(os.path.join(args.output_dir, f"{name}.tsv"), predictions, prepared.labels)
    save(accelerator, model, prepared, args.output_dir, found)
    return found


def train(
    accelerator: Accelerator, args: LoopArguments, prepared: Prepared, evaluate: Callable[[Any], dict[str, float]]
) -> tuple[Any, dict[str, float]]:
    """The loop. Compared with a plain one, `adversary.backward` stands where the forward and backward pass stood."""
    optimizer = make_optimizer(prepared.model, args)
    loader = make_loader(prepared, "train", args.per_device_train_batch_size, shuffle=True)
    if accelerator.state.deepspeed_plugin is not None:
        # DeepSpeed clips by itself.
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
    model, optimizer, loader = accelerator.prepare(prepared.model, optimizer, loader)
    per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    total = args.max_train_steps or args.num_train_epochs * per_epoch
    rates = get_scheduler(args.lr_scheduler_type, optimizer, args.num_warmup_steps, total)

    attack, schedule = args.make_attack(), args.make_schedule()
    settings = {"target": args.adv_target, "epsilon_unit": args.adv_epsilon_unit, "seed": args.seed}
    settings |= {"strength": args.adv_strength, "recover": args.adv_recover}
    adversary = Adversary(model, attack, accelerator=accelerator, **settings)
    step, batches, loss_sum, found = 0, 0, torch.zeros((), device=accelerator.device), {}
    bar = tqdm(total=total, disable=not accelerator.is_local_main_process)
    for epoch in range(math.ceil(total / per_epoch)):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                # In place of: loss = model(**batch).loss; accelerator.backward(loss)
                loss = adversary.backward(batch, factor=schedule.factor(step, total))
                if accelerator.sync_gradients and args.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            loss_sum, batches = loss_sum + loss, batches + 1
            if accelerator.sync_gradients:
                if not accelerator.optimizer_step_was_skipped:
                    rates.step()
                step += 1
                bar.update()
                if step == total:
                    break
        found = evaluate(model)
        accelerator.print(f"epoch {epoch + 1}: {found}")
    bar.close()
    adversary.close()
    loss_mean = accelerator.reduce(loss_sum, reduction="mean").item() / batches
    return model, found | {"train_loss": loss_mean, "train_steps": step, "train_samples": len(prepared.splits["train"])}


def make_optimizer(model: Any, args: LoopArguments) -> torch.optim.Optimizer:
    """AdamW; biases and the weights of norms do not decay."""
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def make_loader(prepared: Prepared, split: str, size: int, shuffle: bool = False) -> DataLoader[Any]:
    """Batches of a split."""
    return DataLoader(prepared.splits[split], batch_size=size, shuffle=shuffle, collate_fn=prepared.collator)


@torch.no_grad()
def predict(accelerator: Accelerator, model: Any, prepared: Prepared, split: str, size: int) -> tuple[Any, Any]:
    """(predictions, references) of a split, over all processes; the references are None where it has no labels."""
    model.eval()
    logits, labels = [], []
    for batch in accelerator.prepare(make_loader(prepared, split, size)):
        output = model(**batch).logits
        logits.append(accelerator.gather_for_metrics(output).float().cpu())
        if "labels" in batch:
            labels.append(accelerator.gather_for_metrics(batch["labels"]).cpu())
    return predictions_of(torch.cat(logits).numpy(), prepared.labels), torch.cat(labels).numpy() if labels else None


def robustness(
    accelerator: Accelerator,
    model: Any,
    prepared: Prepared,
    split: str,
    args: LoopArguments,
    data_args: DataTrainingArguments,
) -> dict[str, float]:
    """Figures under attack; every process evaluates all of the split."""
    report = evaluate_robustness(
        accelerator.unwrap_model(model),
        prepared.splits[split],
        data_args.robustness_attacks,
        data_args.robustness_epsilons,
        # A model that was trained on perturbed weights is evaluated on perturbed inputs.
        target=None if args.adv_target == "weights" else args.adv_target,
        epsilon_unit=args.adv_epsilon_unit,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=prepared.collator,
        seed=args.seed,
        progress=accelerator.is_local_main_process,
    )
    if accelerator.is_main_process:
        print_robustness(report)
    return report.metrics() | {"robust_samples": report.examples}


def save(accelerator: Accelerator, model: Any, prepared: Prepared, folder: str | None, found: dict[str, float]) -> None:
    """The model, the tokenizer and all_results.json."""
    if folder is None:
        return
    accelerator.wait_for_everyone()
    inner = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    inner.save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=state)
    if accelerator.is_main_process:
        prepared.tokenizer.save_pretrained(folder)
        with open(os.path.join(folder, "all_results.json"), "w", encoding="utf-8") as file:
            json.dump(found, file, indent=4, sort_keys=True)


if __name__ == "__main__":
    main()
