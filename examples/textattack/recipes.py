"""TextAttack's attacks, as far as they need no download. `offline.prepare` must have run before this is imported."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from textattack import Attack
from textattack.attack_recipes import DeepWordBugGao2018, Pruthi2019
from textattack.constraints.pre_transformation import RepeatModification, StopwordModification
from textattack.goal_functions import UntargetedClassification
from textattack.models.wrappers import ModelWrapper
from textattack.search_methods import GreedyWordSwapWIR
from textattack.transformations import (
    CompositeTransformation,
    WordSwapHomoglyphSwap,
    WordSwapNeighboringCharacterSwap,
    WordSwapRandomCharacterDeletion,
    WordSwapRandomCharacterInsertion,
    WordSwapWordNet,
)


class Classifier(ModelWrapper):
    """Probabilities of texts. TextAttack's own wrapper pads every text to the tokenizer's limit, often 512 tokens."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model.eval(), tokenizer, max_length

    @torch.no_grad()
    def __call__(self, text_input_list: list[str], **_: Any) -> torch.Tensor:
        """Rows of probabilities, (texts, classes)."""
        inputs = self.tokenizer(
            text_input_list, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        # In float64, since TextAttack checks that rows add up to 1 within 1e-6.
        return self.model(**inputs.to(self.model.device)).logits.double().softmax(-1)


class WordNetSwap(WordSwapWordNet):
    """Synonyms out of the English WordNet alone, in an order that is the same in every process."""

    def __init__(self) -> None:
        # Not the base class's, which downloads the other languages.
        self.language = "eng"

    def _get_replacement_words(self, word: str, random: bool = False) -> list[str]:
        return sorted(super()._get_replacement_words(word))


class LookAlikes(WordSwapHomoglyphSwap):
    """A letter replaced by one that looks like it."""

    def __init__(self) -> None:
        # TextAttack 0.3.11 opens a file that its wheel lacks. What is set until then is all that word swaps read.
        with contextlib.suppress(FileNotFoundError):
            super().__init__()


def deepwordbug(model: Classifier) -> Attack:
    """Gao et al. 2018: a letter of an important word swapped, replaced, deleted or inserted."""
    return DeepWordBugGao2018.build(model)


def pruthi(model: Classifier) -> Attack:
    """Pruthi et al. 2019: the best single typo within one word."""
    return Pruthi2019.build(model)


def textbugger(model: Classifier) -> Attack:
    """Li et al. 2019, its four changes of letters: a space, a deletion, a swap, a letter that looks alike.

    Left out for want of their data: neighbours in counter-fitted vectors, and the sentence encoder that refuses texts
    which have moved too far.
    """
    inside = {"random_one": True, "skip_first_char": True, "skip_last_char": True}
    transformation = CompositeTransformation(
        [
            WordSwapRandomCharacterInsertion(letters_to_insert=" ", **inside),
            WordSwapRandomCharacterDeletion(**inside),
            WordSwapNeighboringCharacterSwap(**inside),
            LookAlikes(),
        ]
    )
    return _attack(model, transformation, GreedyWordSwapWIR(wir_method="delete"))


def pwws(model: Classifier) -> Attack:
    """Ren et al. 2019: synonyms of WordNet, the words with the greatest effect first."""
    return _attack(model, WordNetSwap(), GreedyWordSwapWIR(wir_method="weighted-saliency"))


def _attack(model: Classifier, transformation: Any, search: Any) -> Attack:
    constraints = [RepeatModification(), StopwordModification()]
    return Attack(UntargetedClassification(model), constraints, transformation, search)


RECIPES = {"deepwordbug": deepwordbug, "pruthi": pruthi, "textbugger": textbugger, "pwws": pwws}
