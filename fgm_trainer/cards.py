"""The model card: how the model was attacked in training and what it stands, for people and as metadata."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from .perturbation.weights import is_weights
from .plan import Plan
from .robustness import RobustnessReport, plot_robustness

TAGS = ("adversarial-training", "fgm_trainer")
PICTURE = "robustness.png"
# What a model is for, by a part of its class's name.
_TASKS = {
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "MultipleChoice": "multiple-choice",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
    "Seq2SeqLM": "text2text-generation",
    "ConditionalGeneration": "text2text-generation",
    "CausalLM": "text-generation",
    "LMHead": "text-generation",
    "SentenceTransformer": "sentence-similarity",
}
_OTHER = "other"


def add_to_card(folder: str | Path, plan: Plan, scope: str, reports: Mapping[str, RobustnessReport], kind: str) -> None:
    """Adds the attack's settings and, where there are reports, accuracies under attack to the card of a Trainer.

    Args:
        folder: where the card is, as `README.md`; a picture is put beside it where matplotlib is installed.
        plan: how the model was attacked.
        scope: the attack's, resolved.
        reports: of the evaluations, by the name of the data; `""` where there is one without a name.
        kind: the name of the model's class.
    """
    task = next((task for part, task in _TASKS.items() if part in kind), _OTHER)
    folder = Path(folder)
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    data = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    known = list(data.eval_results or [])
    found = [result for name, report in reports.items() for result in _results(name, report, known, task)]
    if found:
        data.model_name = data.model_name or folder.resolve().name
        data.eval_results = known + found
    sections = [_settings(plan, scope), *(_section(name, report, task, plan) for name, report in reports.items())]
    if reports and importlib.util.find_spec("matplotlib") is not None:
        first = next(iter(reports.values()))
        plot_robustness({folder.resolve().name: first}, folder / PICTURE)
        sections.append(f"![{first.metric} over epsilon]({PICTURE})\n")
    card.text = "\n".join([card.text.rstrip("\n"), "", *sections])
    card.save(folder / "README.md")


def _settings(plan: Plan, scope: str) -> str:
    rows = plan.attack.settings() | {"scope": scope, "target": str(plan.target), "epsilon_unit": plan.epsilon_unit}
    rows |= vars(plan.schedule) | ({"strength": plan.strength} if plan.steers else {})
    return _table("Adversarial training", ["setting", "value"], [[name, str(value)] for name, value in rows.items()])


def _section(name: str, report: RobustnessReport, task: str, plan: Plan) -> str:
    heads, *rows = report.table()
    text = _table(f"Robustness{f' on {name}' if name else ''}", heads, rows)
    of = f"{report.metric.replace('_', ' ').capitalize()} of {report.examples} examples"
    text += f"\n{of}{', with 95 % intervals' if report.is_share else ''}; epsilon is the length of the perturbation.\n"
    if report.metric == "accuracy" and not report.further and task == "text-classification":
        text += "To attack the model again, on texts of your own:\n\n"
        text += "```bash\nfgm-train attack MODEL --data FILE --attacks strong\n```\n"
        return text
    named = isinstance(plan.target, str) and not is_weights(plan.target)
    target = f", target={plan.target!r}" if named else ""
    grid = ", ".join(f"{epsilon:g}" for epsilon in report.epsilons)
    text += "To attack the model again, on examples of your own with labels:\n\n"
    text += "```python\nfrom fgm_trainer.robustness import evaluate_robustness\n\n"
    text += f"evaluate_robustness(model, examples, epsilons=[{grid}]{target}, collate_fn=collate)\n```\n"
    return text


def _table(title: str, heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join([f"## {title}\n", *(f"| {' | '.join(line)} |" for line in lines), ""])


def _results(name: str, report: RobustnessReport, known: list[EvalResult], task: str) -> list[EvalResult]:
    """One entry of the model index for each attack and epsilon, of the data that the card names."""
    task = known[0].task_type if known else task
    # Entries are told apart by the data's type, not by its name.
    data_type = name or (known[0].dataset_type if known else "custom")
    data_name = name or (known[0].dataset_name if known else "evaluation data")
    return [
        EvalResult(
            task_type=task,
            dataset_type=data_type,
            dataset_name=data_name,
            metric_type=report.metric,
            metric_name=f"{report.metric} under {attack} of length {epsilon:g}",
            metric_value=round(score, 4),
        )
        for attack, scores in report.scores.items()
        for epsilon, score in zip(report.epsilons, scores, strict=True)
    ]
