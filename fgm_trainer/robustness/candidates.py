"""What a word may become: other letters, synonyms, or words that are near in the model's own lookup."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from ..perturbation.lookups import input_embedding

# (word, random numbers) -> other words, best guesses first.
Candidates = Callable[[str, random.Random], list[str]]

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

# Cyrillic and Greek letters that look like Latin ones.
HOMOGLYPHS = dict(
    zip("aceijopsxyvn", "\u0430\u0441\u0435\u0456\u0458\u043e\u0440\u0455\u0445\u0443\u03bd\u0578", strict=True)
)


def characters(word: str, draw: random.Random) -> list[str]:
    """The word with a letter swapped with the next, deleted, inserted, mistyped, or replaced by one that looks like it.

    First and last letters of words of four and more stay, since people read over the rest. What is inserted or mistyped
    is a neighbour on the keyboard.
    """
    if len(word) < 2:
        return []
    first, last = (1, len(word) - 1) if len(word) > 3 else (0, len(word))
    found = []
    for place in range(first, last):
        before, letter, after = word[:place], word[place], word[place + 1 :]
        near = [_like(letter, other) for other in _neighbours(letter.lower())]
        if place + 1 < last:
            found.append(before + after[0] + letter + after[1:])
        found.append(before + after)
        found += [before + letter + other + after for other in draw.sample(near, min(1, len(near)))]
        found += [before + other + after for other in draw.sample(near, min(1, len(near)))]
        if letter.lower() in HOMOGLYPHS:
            found.append(before + _like(letter, HOMOGLYPHS[letter.lower()]) + after)
    found = [other for other in dict.fromkeys(found) if other != word]
    draw.shuffle(found)
    return found


class NearestTokens:
    """Words whose embedding in the model's own lookup is nearest, by cosine.

    Args:
        model: the model.
        tokenizer: its tokenizer, with whole words among its tokens.
        count: how many.
        least: the least cosine.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, count: int = 12, least: float = 0.4) -> None:
        # Where a vocabulary marks the tokens that begin a word, those alone are whole words.
        tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        begin = [(token, number) for token, number in tokens if token[:1] in ("\u0120", "\u2581")]
        named = [(tokenizer.convert_tokens_to_string([token]).strip(), number) for token, number in begin or tokens]
        lookup: Any = input_embedding(model)
        weight = lookup.weight.detach().float().cpu()
        # A tokenizer may have more tokens than the lookup has rows.
        known = [(word, number) for word, number in reversed(named) if number < len(weight)]
        vocabulary = {word: number for word, number in known if word.isalpha() and len(word) > 1}
        self._words = list(vocabulary)
        self._rows = nn.functional.normalize(weight[list(vocabulary.values())], dim=1)
        self._places = {word: place for place, word in enumerate(self._words)}
        self._count, self._least = count, least

    def __call__(self, word: str, draw: random.Random) -> list[str]:
        place = self._places.get(word.lower(), self._places.get(word))
        if place is None:
            return []
        cosines = self._rows @ self._rows[place]
        best = cosines.topk(min(4 * self._count, len(cosines)))
        near = [self._words[i] for i in best.indices[best.values >= self._least].tolist()]
        others = [other for other in near if _stem(other) != _stem(word)]
        return [_cased(word, other) for other in others[: self._count]]


class WordNet:
    """Synonyms of WordNet, of a word's most frequent senses first (Ren et al. 2019 use them).

    An inflected word becomes a base form: "movies" may become "film". Words of one or two letters stay: "a" would be a
    vitamin. Needs nltk (extra `words`) and its WordNet.

    Args:
        count: how many.

    Raises:
        ImportError: nltk is not installed.
        ValueError: NLTK has no WordNet.
    """

    def __init__(self, count: int = 12) -> None:
        from nltk.corpus import wordnet

        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise ValueError(
                "NLTK finds no WordNet. Run `python -m nltk.downloader wordnet`, or set the environment variable "
                "NLTK_DATA to a folder that has corpora/wordnet."
            ) from error
        self._synsets, self._count = wordnet.synsets, count

    def __call__(self, word: str, draw: random.Random) -> list[str]:
        if len(word) < 3:
            return []
        lemmas = [lemma.name().replace("_", " ") for sense in self._synsets(word.lower()) for lemma in sense.lemmas()]
        others = dict.fromkeys(lemma.lower() for lemma in lemmas)
        return [_cased(word, other) for other in others if other != word.lower()][: self._count]


def _neighbours(letter: str) -> list[str]:
    for number, row in enumerate(KEYBOARD):
        place = row.find(letter)
        if place >= 0:
            rows = [KEYBOARD[n] for n in (number - 1, number, number + 1) if 0 <= n < len(KEYBOARD)]
            return sorted({r[p] for r in rows for p in (place - 1, place, place + 1) if 0 <= p < len(r)} - {letter})
    return []


def _like(letter: str, other: str) -> str:
    return other.upper() if letter.isupper() else other


def _cased(like: str, word: str) -> str:
    return word.upper() if like.isupper() and len(like) > 1 else word.capitalize() if like[0].isupper() else word


def _stem(word: str) -> str:
    return re.sub(r"(ing|ed|es|s|ly)$", "", word.lower())
