"""Accuracy over epsilon as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .evaluate import RobustnessReport


def plot_robustness(reports: Mapping[str, RobustnessReport], path: str | Path | None = None, title: str = "") -> Any:
    """Accuracy over epsilon: one panel an attack, one line a model.

    Args:
        reports: by the model's name, its report; all on the same grid and attacks.
        path: where to write the picture; None to write none.
        title: above the picture.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(reports.values()))
    figure = Figure(figsize=(3.6 * len(first.scores) + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(first.scores), sharey=True, squeeze=False)[0]
    for axis, attack in zip(axes, first.scores, strict=True):
        for name, report in reports.items():
            axis.plot((0.0, *report.epsilons), (report.clean, *report.scores[attack]), marker="o", label=name)
        axis.set_title(attack)
        axis.set_xlabel("epsilon (L2 norm per example)")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(first.metric.replace("_", " "))
    if first.metric == "accuracy":
        axes[0].set_ylim(0, 1)
    axes[-1].legend()
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
