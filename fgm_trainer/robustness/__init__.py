"""How robust a model is."""

from .attacked_batch import AttackedBatch, attack_batch
from .candidates import NearestTokens, WordNet, characters
from .embedders import evaluate_embedder
from .ensemble import Ensemble, Member, strong
from .evaluate import ATTACKS_TO_TRY, EPSILONS, evaluate_robustness
from .foolbox import Foolbox
from .plotting import plot_robustness, print_robustness
from .radius import RadiusReport, smallest_epsilons
from .report import Difference, RobustnessReport, compare
from .tasks import Outcome, Task
from .text import TextReport, attack_texts, print_texts

__all__ = [
    "ATTACKS_TO_TRY",
    "EPSILONS",
    "AttackedBatch",
    "Difference",
    "Ensemble",
    "Foolbox",
    "Member",
    "NearestTokens",
    "Outcome",
    "RadiusReport",
    "RobustnessReport",
    "Task",
    "TextReport",
    "WordNet",
    "attack_batch",
    "attack_texts",
    "characters",
    "compare",
    "evaluate_embedder",
    "evaluate_robustness",
    "plot_robustness",
    "print_robustness",
    "print_texts",
    "smallest_epsilons",
    "strong",
]
