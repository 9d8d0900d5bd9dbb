"""`fgm-train attack` and `fgm-train doctor`, on a saved checkpoint and files of every kind."""

import csv
import json
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config import config_args
from peft import LoraConfig
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
)

from fgm_trainer import commands
from fgm_trainer.launcher import main
from fgm_trainer.robustness import evaluate_robustness

WORDS = ["the", "film", "is", "good", "bad", "dull", "fine"]
NAMES = ["neg", "pos"]
ROWS = [
    {"review": f"the film is {WORDS[3 + i % 4]}" + " good" * (i % 3), "other": "is it", "kind": NAMES[i % 2]}
    for i in range(24)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes, **names))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    for name, delimiter in (("data.csv", ","), ("data.tsv", "\t")):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(row | {"kind": NAMES.index(row["kind"])} for row in ROWS)
    return folder


def run(world, data, *words, model="model"):
    given = ["--data", str(world / data), "--text", "review", "--label", "kind", "--output", str(world / "out"), *words]
    main(["attack", str(world / model), *given])
    return json.loads((world / "out" / "report.json").read_text())


# Of datasets 2, which leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("data", ["data.jsonl", "data.csv", "data.tsv"])
def test_the_figures_are_those_of_an_evaluation(world, data, capsys):
    found = run(world, data, "--epsilons", "0.1", "0.5", "--samples", "100")
    model = BertForSequenceClassification.from_pretrained(world / "model")
    tokenizer = BertTokenizerFast.from_pretrained(world / "model")
    rows = [dict(tokenizer(row["review"])) | {"labels": NAMES.index(row["kind"])} for row in ROWS]
    expected = evaluate_robustness(
        model, rows, epsilons=[0.1, 0.5], epsilon_unit="embedding", collate_fn=DataCollatorWithPadding(tokenizer)
    )
    assert found["clean"] == pytest.approx(expected.clean)
    for name in ("fgm", "pgd-10"):
        assert found["scores"][name] == pytest.approx(list(expected.scores[name]))
    assert 0 < found["scores"]["pgd-10"][1] < found["clean"] or found["clean"] > found["scores"]["pgd-10"][1] == 0
    assert (world / "out" / "robustness.png").stat().st_size > 1000
    assert "pgd-10" in capsys.readouterr().out


def test_pairs_samples_and_words(world):
    assert run(world, "data.jsonl", "--text_pair", "other", "--samples", "7")["examples"] == 7
    found = run(world, "data.jsonl", "--words", "--samples", "8", "--seed", "1")
    assert found["characters_accuracy"] == found["clean"]
    assert len((world / "out" / "characters.jsonl").read_text().splitlines()) == 8
    found = run(world, "data.jsonl", "--words", "--candidates", "characters", "nearest", "--samples", "3")
    assert found["characters_accuracy"] == found["nearest_accuracy"]
    assert found["characters_queries"] != found["nearest_queries"]
    assert len((world / "out" / "nearest.jsonl").read_text().splitlines()) == 3


def test_errors(world):
    with pytest.raises(SystemExit, match="has no column 'nothing'; it has review, other, kind"):
        run(world, "data.jsonl", "--text_pair", "nothing")
    (world / "strange.jsonl").write_text(json.dumps({"review": "the film", "kind": "odd"}))
    with pytest.raises(SystemExit, match="The model has no label 'odd'; it has 0 neg, 1 pos"):
        run(world, "strange.jsonl")
    with pytest.raises(SystemExit, match="can change single texts alone"):
        run(world, "data.jsonl", "--words", "--text_pair", "other")
    with pytest.raises(SystemExit, match="--candidates are of characters, nearest, wordnet; found letters"):
        run(world, "data.jsonl", "--words", "--candidates", "letters", "wordnet")
    with pytest.raises(SystemExit, match="--candidates say what words become: add --words"):
        run(world, "data.jsonl", "--candidates", "nearest")


def test_all_flags_that_are_wrong_are_named_before_anything_is_loaded():
    sizes = "--samples -3 --max_length 0 --batch_size 0 --seed -1"
    words = f"attack nowhere --data nothing.csv {sizes} --attacks slow --epsilons 0.1 nan --candidates nearest"
    with pytest.raises(SystemExit) as error:
        main(words.split())
    assert str(error.value).splitlines() == [
        "fgm_trainer: --samples must be 1 or more; found -3.",
        "--max_length must be 1 or more; found 0.",
        "--batch_size must be 1 or more; found 0.",
        "--seed must be 0 or more; found -1.",
        "--attacks is one of quick, strong; found slow.",
        "--epsilons must be finite numbers, 0 or more; found 0.1, nan.",
        "There is no file 'nothing.csv'.",
        "--candidates say what words become: add --words, or leave them out.",
    ]


def test_special_tokens_alone_are_no_text(world):
    for words in (["--max_length", "2"], ["--max_length", "3", "--text_pair", "other"]):
        with pytest.raises(SystemExit, match=f"--max_length must be above {words[1]}, the tokenizer's special tokens"):
            run(world, "data.jsonl", *words)
    assert run(world, "data.jsonl", "--max_length", "3", "--samples", "1", "--epsilons", "0.1")["examples"] == 1


# Some versions of datasets leave a file open that they can't read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("empty.jsonl", b"", "JSON: there are no rows. Give a table as .csv"),
        ("blank.jsonl", b"\n\n", "JSON: there are no rows"),
        ("cut.jsonl", b'{"review": "the film", "kind": 1}\n{"review": ', "JSON: JSON parse error.* in row 1"),
        ("data.parquet", b"PAR1\x00\x01\xff\xfePAR1", "JSON: JSON parse error.*JSON, a row a line or a list of rows"),
        ("empty.csv", b"", "CSV: No columns to parse"),
        ("heads.csv", b"review,kind\n", "CSV: there are no rows"),
        ("ragged.csv", b"review,kind\na,1\nb,2,3,4,5\n", "CSV: Error tokenizing data.* in line 3, saw 5. Give"),
    ],
)
def test_files_that_cannot_be_read(world, name, content, why):
    (world / name).write_bytes(content)
    with pytest.raises(SystemExit, match=f"{name} can't be read as {why}"):
        main(["attack", "nowhere", "--data", str(world / name), "--text", "review", "--label", "kind"])


@pytest.mark.parametrize("missing", ["datasets", "matplotlib", "rich", "tqdm"])
def test_what_is_not_installed_is_said_at_the_start(world, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setitem(sys.modules, "nltk", None)
    given = ["attack", "nowhere", "--data", str(world / "data.jsonl"), "--words", "--candidates"]
    with pytest.raises(SystemExit) as error:
        main([*given, "wordnet"])
    assert str(error.value).splitlines() == [
        f'fgm_trainer: {missing} must be installed: pip install "fgm_trainer[report]"',
        'nltk must be installed: pip install "fgm_trainer[words]"',
    ]
    with pytest.raises(SystemExit, match=r"\[report\]\"$"):
        main([*given, "characters"])


def test_a_failing_picture_leaves_the_figures(world, monkeypatch):
    def fail(*args):
        raise ValueError("no picture")

    monkeypatch.setattr(commands, "plot_robustness", fail)
    with pytest.raises(SystemExit, match="no picture"):
        run(world, "data.jsonl", "--samples", "2", "--epsilons", "0.1", "--output", str(world / "pictureless"))
    assert json.loads((world / "pictureless" / "report.json").read_text())["examples"] == 2


def test_a_checkpoint_without_a_head_is_refused(world):
    BertModel(BertConfig.from_pretrained(world / "model")).save_pretrained(world / "headless")
    BertTokenizerFast.from_pretrained(world / "model").save_pretrained(world / "headless")
    with pytest.raises(SystemExit, match=r"is no classifier: classifier.bias, classifier.weight would be random"):
        run(world, "data.jsonl", model="headless")
    with pytest.raises(SystemExit, match=r"There is no file 'nowhere\.jsonl'"):
        main(["attack", str(world / "model"), "--data", "nowhere.jsonl"])


def test_a_regression_model_has_numbers_for_labels(world):
    config = BertConfig.from_pretrained(world / "model", num_labels=1)
    BertForSequenceClassification(config).save_pretrained(world / "numbers")
    BertTokenizerFast.from_pretrained(world / "model").save_pretrained(world / "numbers")
    rows = [{"review": row["review"], "kind": i / 2} for i, row in enumerate(ROWS)]
    (world / "numbers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = run(world, "numbers.jsonl", "--epsilons", "0.1", model="numbers")
    assert found["metric"] == "squared_error"
    assert sorted(found["labels"]) == [i / 2 for i in range(len(ROWS))]
    with pytest.raises(SystemExit, match=r"its labels are finite numbers; found 'neg'\."):
        run(world, "data.jsonl", model="numbers")


def test_a_model_of_several_labels_has_lists_of_them(world):
    config = BertConfig.from_pretrained(world / "model", problem_type="multi_label_classification")
    model = BertForSequenceClassification.from_pretrained(world / "model", config=config).eval()
    model.save_pretrained(world / "several")
    tokenizer = BertTokenizerFast.from_pretrained(world / "model")
    tokenizer.save_pretrained(world / "several")
    lists, held = [["pos"], [], ["pos", "neg"], ["pos"]], [[0, 1], [0, 0], [1, 1], [0, 1]]
    rows = [{"review": row["review"], "kind": lists[i % 4]} for i, row in enumerate(ROWS)]
    (world / "several.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = run(world, "several.jsonl", "--epsilons", "0.5", model="several")
    with torch.no_grad():
        logits = model(**tokenizer([row["review"] for row in ROWS], padding=True, return_tensors="pt")).logits
    expected = torch.tensor(held * 6)
    assert found["clean"] == pytest.approx(((logits > 0) == expected).all(1).float().mean().item())
    assert sorted(found["labels"]) == sorted(held * 6)
    assert found["scores"]["pgd-10"][0] < found["clean"]
    for value in ("pos", [1, 1]):
        (world / "single.jsonl").write_text(json.dumps({"review": "the film", "kind": value}))
        with pytest.raises(SystemExit, match=r"several labels a text; found .*evaluate_robustness\."):
            run(world, "single.jsonl", model="several")


def test_the_doctor_says_what_would_be_attacked(world, capsys):
    main(["doctor", str(world / "model")])
    out = capsys.readouterr().out
    assert "BertForSequenceClassification" in out
    assert "attacked: bert.embeddings.word_embeddings, Embedding(12, 16, padding_idx=0)" in out
    for name in ("torch", "setfit", "optuna"):
        assert f"{name} {version(name)}\n" in out if find_spec(name) else f"{name}: not installed\n" in out


def test_the_doctor_has_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["doctor", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fgm-train doctor [-h] [MODEL ...]")


def test_the_doctor_looks_at_the_model_below_an_adapter(world, capsys):
    LoraConfig("SEQ_CLS", base_model_name_or_path=str(world / "model")).save_pretrained(world / "adapter")
    main(["doctor", str(world / "adapter")])
    out = capsys.readouterr().out
    assert f"{world / 'adapter'}: BertForSequenceClassification, an adapter of {world / 'model'}\nattacked: bert" in out


def test_the_doctor_says_what_accelerate_would_run(tmp_path, monkeypatch, capsys):
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("FSDP_VERSION", "2")
    main(["doctor"])
    out = capsys.readouterr().out
    state = PartialState()
    here = f"distributed_type {state.distributed_type.value}, num_processes {state.num_processes}, {state.device}"
    assert f"engine: {here}, mixed_precision bf16, " in out
    # Other tests may have left more of them.
    assert ", ACCELERATE_MIXED_PRECISION=bf16, " in out
    assert ", FSDP_VERSION=2" in out
    assert f"accelerate launch: its defaults; there is no {file}\n" in out
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 4\nmixed_precision: fp16\ndeepspeed_config: {zero_stage: 2}\n"
    )
    main(["doctor"])
    expected = "distributed_type DEEPSPEED, num_processes 4, mixed_precision fp16, deepspeed_config {'zero_stage': 2}"
    assert f"accelerate launch: {expected} ({file})\n" in capsys.readouterr().out
    file.write_text("distributed_type: NO\nspeed: high\n")
    main(["doctor"])
    assert "unknown keys (['speed'])" in capsys.readouterr().out
