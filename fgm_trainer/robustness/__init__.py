"""How robust a model is."""

from .evaluate import ATTACKS_TO_TRY, EPSILONS, RobustnessReport, evaluate_robustness
from .plotting import plot_robustness

__all__ = [
    "ATTACKS_TO_TRY",
    "EPSILONS",
    "RobustnessReport",
    "evaluate_robustness",
    "plot_robustness",
]
