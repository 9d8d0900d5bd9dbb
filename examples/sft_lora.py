#!/usr/bin/env python
"""Supervised fine-tuning of a language model with LoRA: trl's `SFTTrainer`, attacked in its hidden layers.

That is latent adversarial training (Casper et al. 2024): the output of every decoder layer has a perturbation of its
own. `--adv_target word_embeddings` attacks the input instead.

Data are JSON lines as trl reads them: `text`, `prompt` and `completion`, or `messages`.

Example: python sft_lora.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/sft
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from fgm_trainer import AdversarialArguments, AdversarialTrainerMixin
from fgm_trainer.robustness import EPSILONS, print_robustness


@dataclass
class ScriptArguments:
    """Data and evaluation."""

    train_file: str = field(metadata={"help": "JSON lines to train on."})
    validation_file: str = field(metadata={"help": "JSON lines to evaluate on."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first of them only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first of them only."})
    eval_robustness: bool = field(default=False, metadata={"help": "Loss and perplexity under attack."})
    robustness_epsilons: list[float] = field(default_factory=lambda: list(EPSILONS), metadata={"help": "Their sizes."})


@dataclass
class Training(AdversarialArguments, SFTConfig):
    """trl's flags and the adversarial ones."""


class AdversarialSFTTrainer(AdversarialTrainerMixin, SFTTrainer):
    """`SFTTrainer`, attacked."""


def main() -> None:
    """Runs what the flags ask for."""
    parser = HfArgumentParser((ScriptArguments, Training, ModelConfig))
    parser.set_defaults(use_peft=True, adv_target="model.layers.*")
    script, args, config = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load_dataset("json", data_files={"train": script.train_file, "validation": script.validation_file})
    for split, most in (("train", script.max_train_samples), ("validation", script.max_eval_samples)):
        raw[split] = raw[split].select(range(min(most or len(raw[split]), len(raw[split]))))
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=config.dtype or "auto")
    trainer = AdversarialSFTTrainer(
        model=model,
        args=args,
        train_dataset=raw["train"],
        eval_dataset=raw["validation"],
        processing_class=tokenizer,
        peft_config=get_peft_config(config),
    )
    if args.do_train:
        trainer.save_metrics("train", trainer.train().metrics)
        trainer.save_model()
        trainer.save_state()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if script.eval_robustness:
        # The Trainer's own target is attacked here too. Loss and perplexity are of tokens, lower is better.
        report = trainer.evaluate_robustness(epsilons=script.robustness_epsilons)
        print_robustness(report)
        trainer.save_metrics("robust", report.metrics())


if __name__ == "__main__":
    main()
