"""`fgm-train attack MODEL --data FILE` puts a checkpoint under attack, `fgm-train doctor MODEL` says what would be."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState, init_empty_weights
from accelerate.commands.config import config_args
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
)
from transformers.utils.peft_utils import find_adapter_config_file

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
LEAST = {"samples": 1, "max_length": 1, "batch_size": 1, "seed": 0}
# What comes with each extra.
EXTRAS = {"report": ("datasets", "matplotlib", "rich", "tqdm"), "words": ("nltk",)}
LIBRARIES = (
    *("torch", "transformers", "accelerate", "datasets", "peft"),
    *("trl", "sentence_transformers", "setfit", "optuna", "deepspeed"),
)
ENGINE = ("distributed_type", "num_processes", "use_cpu", "mixed_precision", "deepspeed_config", "fsdp_config")


@dataclass
class AttackArguments:
    """A classifier under attack on labelled texts of your own: a table, a picture and JSON."""

    data: str = field(metadata={"help": "A JSON, JSON lines or CSV file."})
    text: str | None = field(default=None, metadata={"help": "Its column of texts; `sentence` or `text` if left out."})
    text_pair: str | None = field(default=None, metadata={"help": "The column of second texts, where there are pairs."})
    label: str = field(
        default="label",
        metadata={
            "help": "The column of labels: numbers, or names of the model's; where it gives several, lists of those "
            "that hold."
        },
    )
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
        ValueError: flags that are wrong, or columns or labels that are not there.
    """
    kind: Any = AttackArguments
    parser = HfArgumentParser(kind, prog="fgm-train attack")
    parser.add_argument("model", help="a folder, or a name on the hub")
    args, named = parser.parse_args_into_dataclasses(list(words))
    kinds = (args.candidates or ["characters"]) if args.words else []
    check(args, kinds)
    texts, pairs, values = read(args)
    model, tokenizer = load(named.model)
    # Before the attack on embeddings, which takes a while: a dictionary may not be there, or the model no classifier.
    candidates = {name: CANDIDATES[name](model, tokenizer) for name in kinds}
    if args.words:
        check_classifier(model)
    labels = [label_of(value, model.config) for value in values]
    args.max_length = longest_of(args, model, tokenizer)
    encoded = tokenizer(texts, *([] if pairs is None else [pairs]), truncation=True, max_length=args.max_length)
    rows = [{name: column[i] for name, column in encoded.items()} | {"labels": label} for i, label in enumerate(labels)]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
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
    found = report.to_dict()
    for name, others in candidates.items():
        changed = attack_texts(model, tokenizer, texts, labels, others, max_length=args.max_length, seed=args.seed)
        print_texts(changed, 3, name)
        changed.save(folder / f"{name}.jsonl")
        found |= {key: value if value == value else None for key, value in changed.metrics(name).items()}
    (folder / "report.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    plot_robustness({Path(named.model).name: report}, folder / "robustness.png")
    print(f"Written to {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


def check(args: AttackArguments, kinds: Sequence[str]) -> None:
    """Raises ValueError with all that is wrong before anything is loaded."""
    problems = [
        f"--{name} must be {least} or more; found {getattr(args, name)}."
        for name, least in LEAST.items()
        if getattr(args, name) < least
    ]
    if args.attacks not in PRESETS:
        problems.append(f"--attacks is one of {', '.join(PRESETS)}; found {args.attacks}.")
    if not all(0 <= epsilon < float("inf") for epsilon in args.epsilons):
        problems.append(f"--epsilons must be finite numbers, 0 or more; found {', '.join(map(str, args.epsilons))}.")
    if not Path(args.data).is_file():
        problems.append(f"There is no file {args.data!r}.")
    if args.words and args.text_pair is not None:
        problems.append("--words can change single texts alone: leave it or --text_pair out.")
    if args.candidates and not args.words:
        problems.append("--candidates say what words become: add --words, or leave them out.")
    unknown = [name for name in kinds if name not in CANDIDATES]
    if unknown:
        problems.append(f"--candidates are of {', '.join(CANDIDATES)}; found {', '.join(unknown)}.")
    for extra in ("report", "words") if "wordnet" in kinds else ("report",):
        missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
        if missing:
            problems.append(f'{", ".join(missing)} must be installed: pip install "fgm_trainer[{extra}]"')
    if problems:
        raise ValueError("\n".join(problems))


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


def longest_of(args: AttackArguments, model: Any, tokenizer: Any) -> int:
    """How many tokens of a text are read. Raises ValueError where special tokens would leave it none."""
    found = min(args.max_length, longest(model, tokenizer))
    special = tokenizer.num_special_tokens_to_add(pair=args.text_pair is not None)
    if found <= special:
        raise ValueError(f"--max_length must be above {special}, the tokenizer's special tokens; found {found}.")
    return found


def read(args: AttackArguments) -> tuple[list[str], list[str] | None, list[Any]]:
    """The texts, the second texts and the labels of a sample of the file."""
    data = table(args.data)
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
    return list(map(str, data[text])), pairs, list(data[args.label])


def table(file: str) -> Any:
    """The rows of a file. Raises ValueError where it can't be read, or has none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    kind = "csv" if file.endswith((".csv", ".tsv")) else "json"
    more = {"delimiter": "\t"} if file.endswith(".tsv") else {}
    try:
        return load_dataset(kind, data_files=file, split="train", **more)
    except (DatasetGenerationError, StopIteration, ValueError) as error:
        # Of a file without rows datasets raises one of the others, without a cause.
        why = str(error.__cause__ or "there are no rows").strip()
    raise ValueError(
        f"{file} can't be read as {kind.upper()}: {why}. Give a table as .csv or .tsv, or JSON, a row a line or a list "
        "of rows."
    )


def label_of(value: Any, config: Any) -> Any:
    """A label as the model has it: a number of a regression model, else a class, or 1.0 and 0.0 for each of several.

    Raises:
        ValueError: there is no such class, or no list of those that hold.
    """
    if getattr(config, "problem_type", None) == "multi_label_classification":
        found = [class_of(each, config) for each in value] if isinstance(value, list) else None
        if found is None or len(set(found)) < len(found):
            raise ValueError(
                f"The model gives several labels a text; found {value!r}. Write a list of the labels that hold, each "
                "once; for data of another form there is fgm_trainer.robustness.evaluate_robustness."
            )
        return [float(number in found) for number in range(config.num_labels)]
    if config.num_labels > 1:
        return class_of(value, config)
    number = as_number(value)
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        raise ValueError(f"The model gives a number a text, and its labels are finite numbers; found {value!r}.")
    return float(number)


def class_of(value: Any, config: Any) -> int:
    """A class, given by number or name. Raises ValueError where there is none."""
    number = config.label2id.get(value, as_number(value)) if isinstance(value, str) else value
    if number not in range(config.num_labels):
        names = ", ".join(f"{number} {name}" for number, name in sorted(config.id2label.items()))
        raise ValueError(f"The model has no label {value!r}; it has {names}.")
    return int(number)


def doctor(words: Sequence[str]) -> None:
    """`fgm-train doctor [MODEL]`: versions, devices, the engine, and what would be attacked in a model."""
    parser = argparse.ArgumentParser(
        "fgm-train doctor", description="Says versions, devices, the engine, and what would be attacked in a model."
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="a folder, or a name on the hub; it needs no weights"
    )
    models = parser.parse_args(words).models
    print(f"fgm_trainer {__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            print(f"{name}: not installed")
    cards = torch.cuda.device_count()
    print(f"{cards} GPUs: start one process each, `accelerate launch`" if cards > 1 else f"{cards} GPUs")
    print(*engine(), sep="\n")
    for name in models:
        base = base_of(name)
        model = _bare(AutoConfig.from_pretrained(base))
        print(f"\n{name}: {type(model).__name__}" + (f", an adapter of {base}" if base != name else ""))
        try:
            target = find_target("word_embeddings", model)
            lookup = input_embedding(model)
            print(f"attacked: {path_of(model, lookup)}, {lookup}; scopes: {', '.join(target.scopes)}")
        except ValueError as error:
            print(f"can't be attacked: {error}")


def engine() -> Iterator[str]:
    """What accelerate makes of this process, and what `accelerate launch` would start by its default file."""
    state = PartialState()
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # What a launcher says to its processes: of FSDP and DeepSpeed there is no more yet.
    said = [
        f", {name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(("ACCELERATE_", "FSDP_"))
    ]
    here = f"distributed_type {state.distributed_type.value}, num_processes {state.num_processes}"
    yield f"engine: {here}, {state.device}, mixed_precision {precision}{''.join(said)}"
    file = config_args.default_config_file
    if not os.path.isfile(file):
        yield f"accelerate launch: its defaults; there is no {file}"
        return
    try:
        found = config_args.load_config_from_file(None).to_dict()
        yield f"accelerate launch: {', '.join(f'{name} {found[name]}' for name in ENGINE if found.get(name))} ({file})"
    except ValueError as error:
        yield f"accelerate launch: {error}"


def base_of(name: str) -> str:
    """Where the configuration is, as `from_pretrained` has it: that of an adapter is its base model's."""
    adapter = find_adapter_config_file(name)
    if adapter is None or (Path(name) / "config.json").is_file():
        return name
    base: str = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return base


def _bare(config: Any) -> PreTrainedModel:
    """The model that the checkpoint holds, without any weights."""
    kind = next((name for name in config.architectures or [] if hasattr(transformers, name)), None)
    with init_empty_weights():
        model: PreTrainedModel = AutoModel.from_config(config) if kind is None else getattr(transformers, kind)(config)
    return model
