"""Curves over epsilon as figures."""

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


def plot_epsilon(curve: Any, path: str | Path | None = None, title: str = "") -> Any:
    """Loss, and accuracy where there is one, over the logarithm of epsilon, and the suggestion.

    Args:
        curve: an `EpsilonCurve`.
        path: where to write the picture; None to write none.
        title: above the picture.

    Returns:
        The matplotlib figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"loss": (curve.loss, curve.clean_loss)}
    if curve.accuracy is not None and curve.clean_accuracy is not None:
        panels["accuracy"] = (curve.accuracy, curve.clean_accuracy)
    figure = Figure(figsize=(3.6 * len(panels) + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, (values, clean)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        axis.semilogx(curve.epsilons, values, marker="o", label="under attack")
        axis.axhline(clean, color="grey", linestyle="--", label="clean")
        if name == "loss" and curve.guess_loss is not None:
            axis.axhline(clean + curve.guess_loss, color="grey", linestyle=":", label="clean + guessing")
        if curve.suggestion is not None:
            axis.axvline(curve.suggestion, color="tab:red", label=f"suggestion {curve.suggestion:.3g}")
        axis.set_xlabel("epsilon" if curve.unit == "absolute" else "epsilon (mean embedding norms)")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.suptitle(title)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
