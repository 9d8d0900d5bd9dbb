"""The evaluation beside foolbox: 10-step L2 PGD on the same model, the same texts, the same epsilons.

    .venv/bin/python benchmarks/evaluation.py --output runs/evaluation

foolbox attacks a function from `inputs_embeds` to logits. Ours and theirs run in turn; a figure is
the median of the rounds' ratios. Accuracies are those of each epsilon by itself. Needs `pip install foolbox`. Writes
`evaluation.json`.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import by_length, encode, new_model
from machine import machine, versions
from reviews import load_reviews, pretrained_model

from fgm_trainer import PGD
from fgm_trainer.robustness import evaluate_robustness

STEPS = 10


@dataclass
class EvaluationArguments:
    """What is measured."""

    epsilons: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4], metadata={"help": "The grid."})
    train_samples: int = field(default=1000, metadata={"help": "Movie snippets to train on first, plainly."})
    test_samples: int = field(default=64, metadata={"help": "Movie snippets that are attacked."})
    batch_size: int = field(default=32, metadata={"help": "Snippets a batch."})
    rounds: int = field(default=5, metadata={"help": "Rounds of the timing."})
    output: str = field(default="runs/evaluation", metadata={"help": "Where the figures go."})


def main() -> None:
    """Trains a model, attacks it by both, and compares."""
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    model, data, collate = trained(args)
    parts = {"batch_size": args.batch_size, "collate_fn": collate, "progress": False}
    attack = PGD(epsilon=1.0, steps=STEPS)

    def ours(epsilons: list[float]) -> list[float]:
        return list(evaluate_robustness(model, data, [attack], epsilons, **parts).scores[f"pgd-{STEPS}"])

    def theirs(epsilons: list[float]) -> list[float]:
        return by_foolbox(model, data, epsilons, args.batch_size, collate)

    def frozen(epsilons: list[float]) -> list[float]:
        model.requires_grad_(False)
        found = theirs(epsilons)
        model.requires_grad_(True)
        return found

    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "settings": vars(args)}
    figures["accuracy"] = {
        "epsilons": args.epsilons,
        "ours": [ours([epsilon])[0] for epsilon in args.epsilons],
        "foolbox": theirs(args.epsilons),
    }
    figures["foolbox_over_ours"] = timed(ours, {"foolbox": theirs, "foolbox, weights frozen": frozen}, args)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({name: figures[name] for name in ("accuracy", "foolbox_over_ours")}, indent=1))


def trained(args: EvaluationArguments) -> tuple[nn.Module, list[dict[str, Any]], Any]:
    """A model that reads reviews, and some that it has not read."""
    folder, reviews = pretrained_model(), load_reviews()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collate = DataCollatorWithPadding(tokenizer)
    settings = TrainingArguments(
        output_dir=args.output,
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    set_seed(0)
    train = encode(tokenizer, reviews.train[: args.train_samples])
    trainer = Trainer(model=new_model(folder, 0), args=settings, train_dataset=train, data_collator=collate)
    trainer.train()
    return trainer.model.eval(), by_length(encode(tokenizer, reviews.movies[: args.test_samples])), collate


class FromEmbeddings(nn.Module):
    """What foolbox takes: a function of one tensor."""

    def __init__(self, model: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits, (examples, classes)."""
        logits: Tensor = self.model(inputs_embeds=embeddings, attention_mask=self.mask).logits
        return logits


def by_foolbox(
    model: nn.Module, data: list[dict[str, Any]], epsilons: list[float], batch_size: int, collate: Any
) -> list[float]:
    """Accuracy at each epsilon."""
    import foolbox

    device = next(model.parameters()).device
    attack = foolbox.attacks.L2ProjectedGradientDescentAttack(rel_stepsize=2.5 / STEPS, steps=STEPS, random_start=False)
    right = torch.zeros(len(epsilons))
    for start in range(0, len(data), batch_size):
        batch = collate(data[start : start + batch_size]).to(device)
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(batch["input_ids"])
        # Bounds this wide never clip.
        function = FromEmbeddings(model, batch["attention_mask"]).eval()
        wrapped = foolbox.PyTorchModel(function, bounds=(-1e3, 1e3), device=device)
        _, _, fell = attack(wrapped, embeddings, batch["labels"], epsilons=epsilons)
        right += (~fell).sum(dim=1).cpu()
        model.zero_grad()
    return [value / len(data) for value in right.tolist()]


def timed(
    ours: Callable[[list[float]], Any], others: dict[str, Callable[[list[float]], Any]], args: EvaluationArguments
) -> dict[str, dict[str, float]]:
    """Of each other way the seconds for the whole grid over ours: median, least and most of the rounds."""
    rows: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(args.rounds):
        own = seconds(ours, args.epsilons)
        for name, other in others.items():
            rows[name].append(seconds(other, args.epsilons) / own)
    return {name: {"median": statistics.median(row), "least": min(row), "most": max(row)} for name, row in rows.items()}


def seconds(call: Callable[[list[float]], Any], epsilons: list[float]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call(epsilons)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
