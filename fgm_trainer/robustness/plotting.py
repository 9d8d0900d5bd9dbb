"""Accuracy over epsilon as a figure, and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report import RobustnessReport


def plot_robustness(
    reports: Mapping[str, RobustnessReport],
    path: str | Path | None = None,
    title: str = "",
    attack: str | None = None,
) -> Any:
    """Accuracy over epsilon: one panel an attack, one line a model, accuracies with their 95 % intervals as bands.

    Args:
        reports: by the model's name, its report; all on the same grid and attacks.
        path: where to write the picture; None to write none.
        title: above the picture.
        attack: the one attack to draw, with noise, where there is a row of it, as a thin line; None for a panel each.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(reports.values()))
    attacks = list(first.scores) if attack is None else [attack]
    figure = Figure(figsize=(3.6 * len(attacks) + (0.6 if attack is None else 1.8), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(attacks), sharey=True, squeeze=False)[0]
    for axis, shown in zip(axes, attacks, strict=True):
        for name, report in reports.items():
            grid = (0.0, *report.epsilons)
            (line,) = axis.plot(grid, (report.clean, *report.scores[shown]), marker="o", label=name)
            if report.is_share:
                low, high = zip(*report.intervals(), *report.intervals(shown), strict=True)
                axis.fill_between(grid, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            if attack is not None and "noise" in report.scores:
                noise = (report.clean, *report.scores["noise"])
                axis.plot(grid, noise, color=line.get_color(), linewidth=0.8, linestyle="--", label=f"{name}, noise")
        axis.set_title(shown)
        axis.set_xlabel("epsilon")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(first.metric.replace("_", " "))
    if first.is_share:
        axes[0].set_ylim(0, 1)
    axes[-1].legend()
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def print_robustness(reports: RobustnessReport | Mapping[str, RobustnessReport]) -> None:
    """Prints a table of accuracies with their 95 % intervals. Needs rich.

    Args:
        reports: one report, a row an attack and a column an epsilon; or, by the model's name, several models' on the
            same examples, a row an attack and epsilon and a column a model.
    """
    from rich.console import Console
    from rich.table import Table

    each = {"": reports} if isinstance(reports, RobustnessReport) else reports
    first = next(iter(each.values()))
    (head, *others), *rows = first.table() if each is not reports else _side_by_side(each)
    table = Table(title=f"{first.metric.replace('_', ' ')} of {first.examples} examples")
    table.add_column(head)
    for other in others:
        table.add_column(other, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    # What is cut off at the right can't be had otherwise.
    console.width = max(console.width, 26 * len(table.columns))
    signs = [f"Masked gradients{name and f' of {name}'}? {sign}" for name, r in each.items() for sign in r.masking]
    console.print(table, *signs, sep="\n")


def _side_by_side(reports: Mapping[str, RobustnessReport]) -> list[list[str]]:
    """The heads, and a row an attack and epsilon."""
    first = next(iter(reports.values()))
    rows = [["attack", "epsilon", *reports], ["clean", "", *(report.cells()[0] for report in reports.values())]]
    for attack in first.scores:
        columns = [report.cells(attack) for report in reports.values()]
        rows += [[attack, f"{e:g}", *cells] for e, *cells in zip(first.epsilons, *columns, strict=True)]
    return rows
