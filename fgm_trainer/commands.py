"""`fgm-train attack MODEL --data FILE` puts a checkpoint under attack, `fgm-train doctor MODEL` says what would be."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
)

from . import __version__
from .arguments import as_number
from .perturbation.lookups import input_embedding, path_of
from .perturbation.targets import find_target
from .robustness import (
    NearestTokens,
    WordNet,
    attack_texts,
    characters,
    evaluate_robustness,
    plot_robustness,
    print_robustness,
    print_texts,
)
from .robustness.candidates import Candidates
from .robustness.evaluate import EPSILONS, PRESETS
from .robustness.text import check_classifier, longest

TEXT_COLUMNS = ("sentence", "text")
CANDIDATES: dict[str, Callable[[Any, Any], Candidates]] = {
    "characters": lambda model, tokenizer: characters,
    "nearest": NearestTokens,
    "wordnet": lambda model, tokenizer: WordNet(),
}
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "sentence_transformers", "deepspeed")


@dataclass
class AttackArguments:
    """A classifier under attack on labelled texts of your own: a table, a picture and JSON."""

    data: str = field(metadata={"help": "A JSON, JSON lines or CSV file."})
    text: str | None = field(default=None, metadata={"help": "Its column of texts; `sentence` or `text` if left out."})
    text_pair: str | None = field(default=None, metadata={"help": "The column of second texts, where there are pairs."})
    label: str = field(default="label", metadata={"help": "The column of labels: numbers, or names of the model's."})
    attacks: str = field(default="quick", metadata={"help": f"One of {', '.join(PRESETS)}."})
    epsilons: list[float] = field(
        default_factory=lambda: list(EPSILONS),
        metadata={"help": "Lengths of the perturbation, in units of the mean norm of a token's embedding."},
    )
    samples: int = field(default=400, metadata={"help": "At most so many rows, drawn by `seed`."})
    words: bool = field(default=False, metadata={"help": "Change words of the texts too (single texts)."})
    candidates: list[str] | None = field(
        default=None,
        metadata={"help": f"What their words become: {', '.join(CANDIDATES)}; each is an attack of its own."},
    )
    max_length: int = field(default=128, metadata={"help": "Tokens a text."})
    batch_size: int = field(default=32, metadata={"help": "Rows a batch."})
    seed: int = field(default=0, metadata={"help": "Of the sample and of the attacks."})
    output: str = field(default="robustness", metadata={"help": "A folder for the report and the picture."})


def attack(words: Sequence[str]) -> None:
    """`fgm-train attack MODEL --data FILE`.

    Raises:
        ValueError: columns or labels that are not there.
    """
    kind: Any = AttackArguments
    parser = HfArgumentParser(kind, prog="fgm-train attack")
    parser.add_argument("model", help="a folder, or a name on the hub")
    args, named = parser.parse_args_into_dataclasses(list(words))
    if args.words and args.text_pair is not None:
        raise ValueError("--words can change single texts alone: leave it or --text_pair out.")
    if args.candidates and not args.words:
        raise ValueError("--candidates say what words become: add --words, or leave them out.")
    kinds = (args.candidates or ["characters"]) if args.words else []
    unknown = [name for name in kinds if name not in CANDIDATES]
    if unknown:
        raise ValueError(f"--candidates are of {', '.join(CANDIDATES)}; found {', '.join(unknown)}.")
    model, tokenizer = load(named.model)
    # Before the attack on embeddings, which takes a while: a dictionary may not be there, or the model no classifier.
    candidates = {name: CANDIDATES[name](model, tokenizer) for name in kinds}
    if args.words:
        check_classifier(model)
    texts, pairs, labels = read(args, model.config)
    args.max_length = min(args.max_length, longest(model, tokenizer))
    encoded = tokenizer(texts, *([] if pairs is None else [pairs]), truncation=True, max_length=args.max_length)
    rows = [{name: column[i] for name, column in encoded.items()} | {"labels": label} for i, label in enumerate(labels)]
    report = evaluate_robustness(
        model,
        rows,
        args.attacks,
        args.epsilons,
        epsilon_unit="embedding",
        batch_size=args.batch_size,
        collate_fn=DataCollatorWithPadding(tokenizer),
        seed=args.seed,
    )
    print_robustness(report)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    found = report.to_dict()
    for name, others in candidates.items():
        changed = attack_texts(model, tokenizer, texts, labels, others, max_length=args.max_length, seed=args.seed)
        print_texts(changed, 3, name)
        changed.save(folder / f"{name}.jsonl")
        found |= {key: value if value == value else None for key, value in changed.metrics(name).items()}
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    plot_robustness({Path(named.model).name: report}, folder / "robustness.png")
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def load(name: str) -> tuple[Any, Any]:
    """A classifier and its tokenizer. Raises ValueError where the checkpoint has no head."""
    model, said = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True)
    if said["missing_keys"]:
        missing = ", ".join(sorted(said["missing_keys"]))
        raise ValueError(f"{name} is no classifier: {missing} would be random. Give a checkpoint that was trained.")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def read(args: AttackArguments, config: Any) -> tuple[list[str], list[str] | None, list[Any]]:
    """The texts, the second texts and the labels of a sample of the file."""
    from datasets import load_dataset

    if not Path(args.data).is_file():
        raise ValueError(f"There is no file {args.data!r}.")
    kind = "csv" if args.data.endswith((".csv", ".tsv")) else "json"
    more = {"delimiter": "\t"} if args.data.endswith(".tsv") else {}
    data = load_dataset(kind, data_files=args.data, split="train", **more)
    text = args.text or next((name for name in TEXT_COLUMNS if name in data.column_names), TEXT_COLUMNS[0])
    columns = [name for name in (text, args.text_pair, args.label) if name is not None]
    missing = [name for name in columns if name not in data.column_names]
    if missing:
        raise ValueError(
            f"{args.data} has no column {', '.join(map(repr, missing))}; it has {', '.join(data.column_names)}. "
            "Name the columns by --text, --text_pair and --label."
        )
    empty = [i for name in columns for i, value in enumerate(data[name]) if value is None]
    if empty:
        raise ValueError(f"Row {empty[0] + 1} of {args.data} has an empty text or label, as {len(empty)} in all.")
    data = data.shuffle(seed=args.seed).select(range(min(args.samples, len(data))))
    pairs = None if args.text_pair is None else list(map(str, data[args.text_pair]))
    return list(map(str, data[text])), pairs, [label_of(value, config) for value in data[args.label]]


def label_of(value: Any, config: Any) -> float | int:
    """A label as the model has it: a number of a regression model, else a class, given by number or name.

    Raises:
        ValueError: there is no such class.
    """
    if isinstance(value, str):
        value = config.label2id.get(value, as_number(value))
    if isinstance(value, (int, float)) and config.num_labels == 1:
        return float(value)
    if not isinstance(value, (int, float)) or value != int(value) or not 0 <= value < config.num_labels:
        names = ", ".join(f"{number} {name}" for number, name in sorted(config.id2label.items()))
        raise ValueError(f"The model has no label {value!r}; it has {names}.")
    return int(value)


def doctor(words: Sequence[str]) -> None:
    """`fgm-train doctor MODEL`: versions, devices, and what would be attacked in this model. No weights are needed."""
    print(f"fgm_trainer {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: not installed")
    cards = torch.cuda.device_count()
    print(f"{cards} GPUs: start one process each, `accelerate launch`" if cards > 1 else f"{cards} GPUs")
    for name in words:
        config = AutoConfig.from_pretrained(name)
        model = _bare(config)
        print(f"\n{name}: {type(model).__name__}")
        try:
            target = find_target("word_embeddings", model)
            lookup = input_embedding(model)
            print(f"attacked: {path_of(model, lookup)}, {lookup}; scopes: {', '.join(target.scopes)}")
        except ValueError as error:
            print(f"can't be attacked: {error}")


def _bare(config: Any) -> PreTrainedModel:
    """The model that the checkpoint holds, without any weights."""
    kind = next((name for name in config.architectures or [] if hasattr(transformers, name)), None)
    with init_empty_weights():
        model: PreTrainedModel = AutoModel.from_config(config) if kind is None else getattr(transformers, kind)(config)
    return model
