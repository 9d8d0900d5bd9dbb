"""What both GLUE scripts share: flags of model and data, loading, labels, tokenising, figures."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    default_data_collator,
)

logger = logging.getLogger(__name__)

HUB_GLUE = "nyu-mll/glue"
METRIC = str(Path(__file__).with_name("glue_metric.py"))
_MISSING = ("", "None", "nan")


@dataclass(frozen=True)
class Task:
    """A GLUE task: its text columns, and its labels in GLUE's order (none: regression)."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] = ()


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    "cola": Task(("sentence",), ("unacceptable", "acceptable")),
    "mnli": Task(("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "mrpc": Task(_PAIR, ("not_equivalent", "equivalent")),
    "qnli": Task(("question", "sentence"), _ENTAILMENT),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": Task(_PAIR, _ENTAILMENT),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "stsb": Task(_PAIR),
    "wnli": Task(_PAIR, ("not_entailment", "entailment")),
}

# By a file's ending: the builder of `datasets`, and its settings. A cell "NA" or "null" is text, and GLUE's tsv files
# quote nothing: read with quotes, a sentence that starts with one would swallow the lines after it.
_CSV = {"keep_default_na": False}
FILE_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", _CSV),
    "tsv": ("csv", {**_CSV, "sep": "\t", "quoting": 3}),
    "json": ("json", {}),
    "jsonl": ("json", {}),
    "parquet": ("parquet", {}),
}


# Flags ------------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer to start from."""

    model_name_or_path: str = field(metadata={"help": "A local folder, or a name on the Hugging Face hub."})
    config_name: str | None = field(default=None, metadata={"help": "The configuration, where it is not the model's."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "The tokenizer, where it is not the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data sets are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use the tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for private models and data sets on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code that comes from the hub."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Start a head of another size anew, in place of an error."}
    )


@dataclass
class DataTrainingArguments:
    """Which data to train, evaluate and predict on. A wrong combination is a ValueError that says what to pass."""

    task_name: str | None = field(default=None, metadata={"help": f"A GLUE task: {', '.join(TASKS)}."})
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the hub or a local folder, in place of the hub's GLUE; with task_name its columns "
            "are the task's."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The data set's configuration."})
    max_seq_length: int = field(default=128, metadata={"help": "Texts are cut to this many tokens."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again, whatever is cached."})
    pad_to_max_length: bool = field(
        default=True,
        metadata={"help": "Pad everything to max_seq_length; False pads each batch to its longest, which is faster."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use the first so many of each eval split."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict the first so many of each split."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": f"Training data: {', '.join(FILE_KINDS)}. The label is in column `label` (floats: regression); "
            "the text in the task's columns, else in sentence1 and sentence2, else in the first one or two of text."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Data to evaluate on, as train_file."})
    test_file: str | None = field(default=None, metadata={"help": "Data to predict, as train_file; needs no label."})
    eval_robustness: bool = field(
        default=False,
        metadata={"help": "Also evaluate under attack, on the validation split (MNLI: matched): robust_* figures."},
    )
    robustness_attacks: str = field(
        default="quick",
        metadata={
            "help": "What eval_robustness attacks with: `quick`, or `strong` at many times the cost.",
            "choices": ["quick", "strong"],
        },
    )
    robustness_epsilons: list[float] = field(
        default_factory=lambda: [0.1, 0.2, 0.4],
        metadata={"help": "The L2 lengths of the perturbation of an example that eval_robustness tries."},
    )

    def __post_init__(self) -> None:
        self.task_name = self.task_name and self.task_name.lower()
        if self.task_name is not None and self.task_name not in TASKS:
            raise ValueError(f"There is no GLUE task {self.task_name!r}; there are: {', '.join(TASKS)}.")
        files = self.files()
        if not (self.task_name or self.dataset_name or files):
            raise ValueError(
                "No data is named: pass --task_name, --dataset_name, or --train_file and --validation_file."
            )
        if self.dataset_name and files:
            raise ValueError("The data is given twice: pass --dataset_name or files, not both.")
        for split, path in files.items():
            if _ending(path) not in FILE_KINDS:
                raise ValueError(f"--{split}_file must end in one of {', '.join(FILE_KINDS)}; found {path!r}.")
            if not os.path.isfile(path):
                raise ValueError(f"--{split}_file: there is no file {path!r}.")

    def files(self) -> dict[str, str]:
        """The user's own files by split."""
        given = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in given.items() if path}


def parse(parser: Any, argv: list[str]) -> tuple[Any, ...]:
    """The dataclasses, from flags or from one .json file; a mistake ends the script with its sentence alone."""
    try:
        if len(argv) == 1 and argv[0].endswith(".json"):
            return parser.parse_json_file(os.path.abspath(argv[0]))
        return parser.parse_args_into_dataclasses(argv)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None


# Loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def from_hub(what: str, name: str, instead: str) -> Iterator[None]:
    """Where a hub name can't be had, the script ends with one sentence on what to pass instead."""
    verbosity = hub_logging.get_verbosity()
    # The hub's client tells of each retry; without a network that is all there is on the screen.
    hub_logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError) as error:
        if os.path.exists(name) or not (isinstance(error, OSError) or _offline(error)):
            raise
        raise SystemExit(
            f"The {what} {name!r} is no local folder and could not be fetched from the Hugging Face hub (no such "
            f"name, or no network): pass {instead}."
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def _offline(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def load_splits(data: DataTrainingArguments, model: ModelArguments) -> DatasetDict:
    """The raw splits: from the user's files, a data set, or the hub's GLUE."""
    if data.files():
        return DatasetDict({split: _load_file(path, model.cache_dir) for split, path in data.files().items()})
    name = data.dataset_name or HUB_GLUE
    config = data.dataset_config_name if data.dataset_name else data.task_name
    instead = "--train_file and --validation_file, or a local folder as --dataset_name"
    with from_hub("data set", name, instead):
        return load_dataset(name, config, cache_dir=model.cache_dir, token=model.token)


def _load_file(path: str, cache_dir: str | None) -> Dataset:
    builder, settings = FILE_KINDS[_ending(path)]
    return load_dataset(builder, data_files=path, split="train", cache_dir=cache_dir, **settings)


def _ending(path: str) -> str:
    return path.rsplit(".", 1)[-1].lower()


def splits_of(raw: Any, kind: str) -> list[tuple[str, str]]:
    """(split, suffix of its figures) for kind `validation` or `test`: MNLI has a matched and a mismatched one."""
    both = [(f"{kind}_matched", ""), (f"{kind}_mismatched", "_mm")]
    return [pair for pair in both if pair[0] in raw] or [(kind, "")]


def need(raw: Any, what: str, split: str) -> str:
    """The split; ends the script where it is not there."""
    if split not in raw:
        file = f"--{split.split('_')[0]}_file"
        raise SystemExit(f"{what} needs a {split} split, and the data has {', '.join(raw)} only: pass {file}.")
    return split


def text_columns(raw: DatasetDict, task: str | None) -> tuple[str, ...]:
    """The one or two columns that hold text."""
    for split, dataset in raw.items():
        missing = set(TASKS[task].columns if task else ()) - set(dataset.column_names)
        if missing:
            raise SystemExit(
                f"Task {task} needs the column {', '.join(sorted(missing))}; the {split} data has "
                f"{', '.join(dataset.column_names)}."
            )
    if task:
        return TASKS[task].columns
    first = next(iter(raw.values()))
    if set(_PAIR) <= set(first.column_names):
        return _PAIR
    text = [name for name, kind in first.features.items() if _is_text(kind) and name != "label"]
    if not text:
        raise SystemExit(f"No column of the data holds text; there are: {', '.join(first.column_names)}.")
    return tuple(text[:2])


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", "") in ("string", "large_string")


# Labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """What the model predicts.

    Args:
        ids: from a label as it stands in the data, as text, to the model's id; empty for regression.
        names: by the model's id, the label's name; empty for regression.
    """

    ids: dict[str, int]
    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        return not self.names

    def encode(self, value: Any, split: str) -> float | int | None:
        """The model's id of a label, or the number to predict; None for a test label that is not known."""
        key = _as_text(value)
        if key in self.ids:
            return self.ids[key]
        if self.regression and key not in _MISSING:
            return float(key)
        if split.startswith("test"):
            return None
        known = ", ".join(self.ids) or "numbers"
        raise SystemExit(f"The {split} data has the label {value!r}, which is not among the known ones: {known}.")


def _as_text(value: Any) -> str:
    # A column of whole numbers with a gap in it is read as floats.
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _train_first(split: str) -> bool:
    return split != "train"


def find_labels(raw: DatasetDict, task: str | None, config: Any) -> Labels:
    """The labels of the task or of the data, in the model's own order where the model was trained on them."""
    own = {} if _generic(config) else {name.lower(): i for name, i in _named(config).items()}
    labelled = sorted((s for s in raw if "label" in raw[s].column_names), key=_train_first)
    if task is None and not labelled:
        return _labels_of_model(config)
    kind = None if task else raw[labelled[0]].features["label"]
    if (task and not TASKS[task].labels) or str(getattr(kind, "dtype", "")).startswith("float"):
        return Labels({}, ())
    if task or isinstance(kind, ClassLabel):
        names = list(TASKS[task].labels if task else kind.names)
        keys = {str(i): i for i in range(len(names))} | {n: i for i, n in enumerate(names) if not n.isdigit()}
    else:
        values = [v for v in raw[labelled[0]].unique("label") if _as_text(v) not in _MISSING]
        names = [_as_text(v) for v in sorted(values)]
        keys = {name: i for i, name in enumerate(names)}
    if set(map(str.lower, names)) <= set(own):
        by_id = {i: name for name, i in _named(config).items()}
        return Labels({k: own[names[i].lower()] for k, i in keys.items()}, tuple(by_id[i] for i in sorted(by_id)))
    if "train" not in raw and kind is not None and all(n.isdigit() and int(n) < config.num_labels for n in names):
        # Without training, whole numbers are the model's own ids, whether or not all of them occur.
        return Labels({str(i): i for i in range(config.num_labels)}, _labels_of_model(config).names)
    if own and config.num_labels == len(names):
        logger.warning(f"The model's labels are {', '.join(_named(config))}, the data's {', '.join(names)}: ignored.")
    if len(names) < 2:
        raise SystemExit(f"The {labelled[0]} data has no two different labels, so there is nothing to learn: {names}.")
    return Labels(keys, tuple(names))


def _labels_of_model(config: Any) -> Labels:
    if config.num_labels == 1:
        return Labels({}, ())
    names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return Labels({name: i for i, name in enumerate(names)}, names)


def _named(config: Any) -> dict[str, int]:
    return {str(name): int(i) for name, i in (config.label2id or {}).items()}


def _generic(config: Any) -> bool:
    return all(name == f"LABEL_{i}" for name, i in _named(config).items())


# Model and tokens -------------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """Everything that a loop needs.

    Args:
        config: the model's, with a head for `labels`.
        tokenizer: its tokenizer.
        labels: what it predicts.
        splits: tokenised; with a column `label` where the data has labels.
        collator: makes a batch.
        model: `load_model` puts it here.
    """

    config: Any
    tokenizer: Any
    labels: Labels
    splits: dict[str, Dataset]
    collator: Callable[[list[Any]], Any]
    model: Any = None


def prepare(
    model: ModelArguments, data: DataTrainingArguments, raw: DatasetDict, splits: list[str], multiple: int | None = None
) -> Prepared:
    """Loads the tokenizer and tokenises `splits`; batches are padded to a multiple of `multiple`."""
    columns = text_columns(raw, data.task_name)
    name = model.model_name_or_path
    with from_hub(*_advice(model, "config_name")):
        config = AutoConfig.from_pretrained(model.config_name or name, **_where(model))
    with from_hub(*_advice(model, "tokenizer_name")):
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer_name or name, use_fast=model.use_fast_tokenizer, **_where(model)
        )
    labels = find_labels(raw, data.task_name, config)
    _set_head(config, labels)
    tokens = {split: _tokenise(raw[split], split, columns, labels, tokenizer, data) for split in splits}
    padded = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)
    return Prepared(config, tokenizer, labels, tokens, default_data_collator if data.pad_to_max_length else padded)


def load_model(model: ModelArguments, config: Any) -> Any:
    """The model. Under ZeRO-3 the processes load it together: never call this where one of them goes first."""
    with from_hub(*_advice(model, "model_name_or_path")):
        return AutoModelForSequenceClassification.from_pretrained(
            model.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=model.ignore_mismatched_sizes,
            **_where(model),
        )


def _where(model: ModelArguments) -> dict[str, Any]:
    return {
        "cache_dir": model.cache_dir,
        "revision": model.model_revision,
        "token": model.token,
        "trust_remote_code": model.trust_remote_code,
    }


def _advice(model: ModelArguments, flag: str) -> tuple[str, str, str]:
    """`from_hub`'s arguments for a flag; where it is left out, the model's name stands in for it."""
    flag = flag if getattr(model, flag) else "model_name_or_path"
    what = {"config_name": "configuration", "tokenizer_name": "tokenizer"}.get(flag, "model")
    return what, getattr(model, flag), f"a local folder that holds the {what} as --{flag}"


def _set_head(config: Any, labels: Labels) -> None:
    config.num_labels = len(labels.names) or 1
    if labels.regression:
        config.problem_type = "regression"
        return
    config.problem_type = "single_label_classification"
    config.id2label = dict(enumerate(labels.names))
    config.label2id = {name: i for i, name in enumerate(labels.names)}


def _tokenise(
    raw: Dataset, split: str, columns: tuple[str, ...], labels: Labels, tokenizer: Any, data: DataTrainingArguments
) -> Dataset:
    limits = {"train": data.max_train_samples, "test": data.max_predict_samples}
    most = limits.get(split.split("_")[0], data.max_eval_samples)
    if most is not None:
        raw = raw.select(range(min(most, len(raw))))
    length = min(data.max_seq_length, tokenizer.model_max_length)

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [["" if text is None else str(text) for text in batch[column]] for column in columns]
        padding = "max_length" if data.pad_to_max_length else False
        encoded = dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True))
        if "label" in batch:
            encoded["label"] = [labels.encode(value, split) for value in batch["label"]]
        return encoded

    tokens = raw.map(
        encode,
        batched=True,
        remove_columns=raw.column_names,
        load_from_cache_file=not data.overwrite_cache,
        desc=f"Tokenising {split}",
    )
    if "label" in tokens.column_names and split.startswith("test"):
        found = set(tokens["label"])
        # GLUE's public test splits carry -1 in place of every label.
        return tokens.remove_columns("label") if None in found or found == {-1.0} else tokens
    return tokens


# Figures ----------------------------------------------------------------------------------------------------------


def predictions_of(logits: Any, labels: Labels) -> np.ndarray:
    """Label ids, or for regression the numbers. Some models return more than logits; these come first."""
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    return logits.reshape(len(logits)) if labels.regression else logits.argmax(axis=1)


def make_figures(task: str | None, labels: Labels, cache_dir: str | None) -> Callable[[Any, Any], dict[str, float]]:
    """(predictions, references) -> the task's figures, and `combined_score`, their mean, where there are several."""
    name = task or ("regression" if labels.regression else "classification")
    metric = evaluate.load(METRIC, name, cache_dir=cache_dir, keep_in_memory=True)

    def figures(predictions: Any, references: Any) -> dict[str, float]:
        found: dict[str, float] = metric.compute(predictions=predictions, references=references)
        scores = [value for key, value in found.items() if key != "mse"]
        return found | ({"combined_score": float(np.mean(scores))} if len(scores) > 1 else {})

    return figures


def write_predictions(path: str, predictions: np.ndarray, labels: Labels) -> None:
    """A tsv of index and prediction, the label by its name."""
    shown = [f"{value:.3f}" if labels.regression else labels.names[value] for value in predictions]
    lines = [f"{index}\t{value}" for index, value in enumerate(shown)]
    Path(path).write_text("\n".join(["index\tprediction", *lines, ""]), encoding="utf-8")


def quiet_unless(main_process: bool) -> None:
    """One process speaks and shows bars; the others keep to errors."""
    level = logging.WARNING if main_process else logging.ERROR
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=level)
    if not main_process:
        datasets.disable_progress_bars()
