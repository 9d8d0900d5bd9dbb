"""Trains the demo's two models and saves them, and the held-out reviews beside them: what `attack.py` attacks.

Runs in the package's own environment. What is there is not made again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer, DataCollatorWithPadding, HfArgumentParser

# The demo is a script, not a package. Appended, since this folder's own name must not hide the library's.
sys.path.append(str(Path(__file__).resolve().parent.parent))
from demo import MODELS, DemoArguments, encode, train_model
from reviews import FetchError, load_reviews, pretrained_model


def main() -> None:
    """Writes `plain/`, `adversarial/` and `reviews.jsonl` into the output folder."""
    parser = HfArgumentParser(DemoArguments)
    parser.set_defaults(output_dir="runs/textattack")
    (args,) = parser.parse_args_into_dataclasses()
    folder, reviews, output = pretrained_model(), load_reviews(), Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in reviews.movies]
    (output / "reviews.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train = encode(tokenizer, reviews.train[: args.train_samples])
    for name, epsilon in zip(MODELS, ("0", args.adv_epsilon), strict=True):
        if (output / name / "config.json").exists():
            continue
        print(f"{name}: training on {len(train)} movie snippets", flush=True)
        model = train_model(args, args.seed, epsilon, folder, train, DataCollatorWithPadding(tokenizer))
        tokenizer.save_pretrained(output / name)
        model.save_pretrained(output / name)


if __name__ == "__main__":
    try:
        main()
    except FetchError as error:
        sys.exit(f"checkpoints: {error}")
