"""Figures of an attack, their lines and their table."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

from rich import box
from rich.table import Table

from fgm_trainer.robustness.report import wilson

# Of a text: whether the model was right, whether it was fooled, the share of changed words, queries.
Outcome = tuple[bool, bool, float, int]


def figures(outcomes: list[Outcome]) -> dict[str, Any]:
    """TextAttack's figures: of all texts the accuracies, of attacked texts the success rate and the queries."""
    attacked = [each for each in outcomes if each[0]]
    fooled = [each for each in attacked if each[1]]
    under_attack = (len(attacked) - len(fooled)) / len(outcomes)
    return {
        "original_accuracy": len(attacked) / len(outcomes),
        "accuracy_under_attack": under_attack,
        "interval": wilson(under_attack, len(outcomes)),
        "success_rate": len(fooled) / len(attacked) if attacked else None,
        "words_changed": mean(share for _, _, share, _ in fooled) if fooled else None,
        "queries": mean(queries for *_, queries in attacked) if attacked else None,
        "stand": [number for number, (right, fell, *_) in enumerate(outcomes) if right and not fell],
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """All figures in percent, except for queries."""
    grid = Table(box=box.MARKDOWN)
    names = ("model", "attack", "accuracy", "under attack (95 %)", "success rate", "words changed", "queries")
    for number, name in enumerate(names):
        grid.add_column(name, justify="left" if number < 2 else "right")
    for row in rows:
        low, high = (f"{100 * bound:.0f}" for bound in row["interval"])
        under_attack = f"{percent(row['accuracy_under_attack'])} ({low} to {high})"
        shares = [percent(row[name]) for name in ("success_rate", "words_changed")]
        queries = "-" if row["queries"] is None else f"{row['queries']:.0f}"
        cells = (percent(row["original_accuracy"]), under_attack, *shares, queries)
        grid.add_row(Path(row["model"]).name, row["attack"], *cells)
    return grid


def percent(share: float | None) -> str:
    """With one decimal; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path: Path, row: dict[str, Any]) -> None:
    """Appends a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
