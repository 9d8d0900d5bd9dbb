#!/usr/bin/env python
"""Supervised fine-tuning of a language model with LoRA: trl's `SFTTrainer`, attacked in its hidden layers.

That is latent adversarial training (Casper et al. 2024): the output of every decoder layer has a perturbation of its
own. `--adv_target word_embeddings` attacks the input instead.

Data are JSON lines as trl reads them: `text`, `prompt` and `completion`, or `messages`.

Example: python sft_lora.py --model_name_or_path MODEL --train_file train.jsonl --validation_file validation.jsonl
--adv_epsilon auto --do_train --do_eval --eval_robustness --output_dir runs/sft
"""

from __future__ import annotations

from dataclasses import dataclass

from json_lines import FileArguments, load, train_and_evaluate
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from fgm_trainer import AdversarialArguments, AdversarialTrainerMixin


@dataclass
class Training(AdversarialArguments, SFTConfig):
    """trl's flags and the adversarial ones."""


class AdversarialSFTTrainer(AdversarialTrainerMixin, SFTTrainer):
    """`SFTTrainer`, attacked."""


def main() -> None:
    """Runs what the flags ask for."""
    parser = HfArgumentParser((FileArguments, Training, ModelConfig))
    parser.set_defaults(use_peft=True, adv_target="model.layers.*")
    script, args, config = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    raw = load(script)
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
    # The Trainer's own target is attacked in the evaluation too: loss and perplexity of a token, lower is better.
    train_and_evaluate(trainer, script)


if __name__ == "__main__":
    main()
