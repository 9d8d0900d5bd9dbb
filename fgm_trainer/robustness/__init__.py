"""How robust a model is."""

from .ensemble import Ensemble, Member, strong
from .evaluate import ATTACKS_TO_TRY, EPSILONS, evaluate_robustness
from .plotting import plot_robustness, print_robustness
from .radius import RadiusReport, smallest_epsilons
from .report import Difference, RobustnessReport, compare
from .text import NearestTokens, TextReport, attack_texts, characters, print_texts

__all__ = [
    "ATTACKS_TO_TRY",
    "EPSILONS",
    "Difference",
    "Ensemble",
    "Member",
    "NearestTokens",
    "RadiusReport",
    "RobustnessReport",
    "TextReport",
    "attack_texts",
    "characters",
    "compare",
    "evaluate_robustness",
    "plot_robustness",
    "print_robustness",
    "print_texts",
    "smallest_epsilons",
    "strong",
]
