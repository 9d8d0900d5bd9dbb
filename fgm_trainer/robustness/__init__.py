"""How robust a model is, and how large the perturbation should be that it is trained with."""

from .epsilon import EpsilonCurve, choose_batches, find_epsilon, suggest
from .evaluate import ATTACKS_TO_TRY, EPSILONS, RobustnessReport, evaluate_robustness
from .plotting import plot_epsilon, plot_robustness

__all__ = [
    "ATTACKS_TO_TRY",
    "EPSILONS",
    "EpsilonCurve",
    "RobustnessReport",
    "choose_batches",
    "evaluate_robustness",
    "find_epsilon",
    "plot_epsilon",
    "plot_robustness",
    "suggest",
]
