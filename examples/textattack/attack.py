"""TextAttack's attacks on saved checkpoints, and the package's own attack of characters on the same texts.

Runs in an environment of its own, `.venv-textattack`; `make textattack` makes it. docs/textattack.md has figures.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import Outcome, figures, read, table, write
from offline import MissingError, prepare, wordnet
from rich.console import Console
from tqdm.auto import tqdm

from fgm_trainer.commands import load
from fgm_trainer.robustness import attack_texts, characters
from fgm_trainer.robustness.text import longest

# The package's own attack: with its default, at most 30 % of the words, and without a limit, as DeepWordBug has none.
OWN = {"characters": 0.3, "characters-all": 1.0}
DEFAULT = ("deepwordbug", *OWN, "textbugger", "pwws")
# It tries every letter of every word, which takes as long as all others together.
SLOW = ("pruthi",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes every line that is not there yet, and prints all that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path, help="folders with a classifier and its tokenizer")
    parser.add_argument("--data", type=Path, default=Path("runs/textattack/reviews.jsonl"), help="JSON lines")
    parser.add_argument("--texts", type=int, default=100, help="the first so many are attacked")
    parser.add_argument("--attacks", nargs="+", choices=DEFAULT + SLOW, default=list(DEFAULT))
    parser.add_argument("--max-length", type=int, default=128, help="tokens a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/textattack.jsonl"))
    args = parser.parse_args(arguments)

    prepare()
    console, attacks, left_out = Console(), list(args.attacks), ""
    if "pwws" in attacks:
        try:
            wordnet()
        except MissingError as error:
            attacks.remove("pwws")
            left_out = f"pwws is left out. {error}"
    lines = [json.loads(line) for line in args.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    data = [(line["sentence"], int(line["label"])) for line in lines[: args.texts]]
    made = read(args.output)
    wanted = []
    for folder in args.models:
        for attack in attacks:
            asked = {"model": str(folder), "attack": attack, "texts": len(data), "seed": args.seed}
            asked |= {"max_length": args.max_length, "made_of": digest(data, folder)}
            row = next((each for each in made if asked.items() <= each.items()), None)
            if row is None:
                start = time.perf_counter()
                found = run(attack, folder, data, args.max_length, args.seed)
                row = asked | figures(found) | {"seconds": round(time.perf_counter() - start, 1)}
                made.append(row)
                write(args.output, row)
            wanted.append(row)
    console.width = max(console.width, 120)
    console.print(table(wanted), f"All lines: {args.output}", sep="\n")
    # Last, where progress bars don't push it out of sight. The message of a tool may have brackets.
    if left_out:
        console.print(left_out, style="bold red", markup=False)


def run(attack: str, folder: Path, data: list[tuple[str, int]], max_length: int, seed: int) -> list[Outcome]:
    """The outcome of every text."""
    model, tokenizer = load(str(folder))
    max_length = min(max_length, longest(model, tokenizer))
    if attack not in OWN:
        return with_textattack(attack, model, tokenizer, data, max_length, seed)
    texts, labels = zip(*data, strict=True)
    report = attack_texts(
        model, tokenizer, texts, labels, characters, most_changed=OWN[attack], max_length=max_length, seed=seed
    )
    return [(not each.skipped, each.fooled, each.changed / max(each.words, 1), each.queries) for each in report.results]


def with_textattack(
    attack: str, model: Any, tokenizer: Any, data: list[tuple[str, int]], max_length: int, seed: int
) -> list[Outcome]:
    """The outcome of every text under a recipe of TextAttack."""
    # Only here, after `prepare`, which importing TextAttack depends on.
    import recipes
    from textattack.attack_results import SkippedAttackResult, SuccessfulAttackResult
    from textattack.shared.utils import logger

    logger.setLevel("ERROR")
    attacker = recipes.RECIPES[attack](recipes.Classifier(model, tokenizer, max_length))
    found: list[Outcome] = []
    for number, (text, label) in enumerate(tqdm(data, desc=attack)):
        # A seed for each text, so that a text's outcome does not depend on how many there are.
        draw = random.Random(f"{seed} {number}")
        random.seed(draw.random())
        np.random.seed(draw.getrandbits(32))
        result = attacker.attack(text, label)
        before, after = (each.attacked_text.words for each in (result.original_result, result.perturbed_result))
        # Not the places that differ: a space put into a word moves all words behind it.
        blocks = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
        changed = sum(end - begin for kind, begin, end, *_ in blocks if kind != "equal") / max(len(before), 1)
        right, fooled = not isinstance(result, SkippedAttackResult), isinstance(result, SuccessfulAttackResult)
        found.append((right, fooled, changed, result.num_queries))
    return found


def digest(data: list[tuple[str, int]], folder: Path) -> str:
    """Changes with the texts and with the weights, so that a line of others is not taken for this one."""
    found = hashlib.sha256(json.dumps(data).encode())
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


if __name__ == "__main__":
    main()
