"""`fgm-train attack` and `fgm-train doctor`, on a saved checkpoint and files of every kind."""

import csv
import json
from importlib.metadata import version

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    DataCollatorWithPadding,
)

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


def run(world, data, *words):
    given = ["--data", str(world / data), "--text", "review", "--label", "kind", "--output", str(world / "out"), *words]
    main(["attack", str(world / "model"), *given])
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


def test_a_checkpoint_without_a_head_is_refused(world):
    BertModel(BertConfig.from_pretrained(world / "model")).save_pretrained(world / "headless")
    BertTokenizerFast.from_pretrained(world / "model").save_pretrained(world / "headless")
    with pytest.raises(SystemExit, match=r"is no classifier: classifier.bias, classifier.weight would be random"):
        main(["attack", str(world / "headless"), "--data", str(world / "data.jsonl")])
    with pytest.raises(SystemExit, match=r"There is no file 'nowhere\.jsonl'"):
        main(["attack", str(world / "model"), "--data", "nowhere.jsonl"])


def test_a_regression_model_has_numbers_for_labels(world):
    config = BertConfig.from_pretrained(world / "model", num_labels=1)
    BertForSequenceClassification(config).save_pretrained(world / "numbers")
    BertTokenizerFast.from_pretrained(world / "model").save_pretrained(world / "numbers")
    rows = [{"review": row["review"], "kind": i / 2} for i, row in enumerate(ROWS)]
    (world / "numbers.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = ["--data", str(world / "numbers.jsonl"), "--text", "review", "--label", "kind", "--epsilons", "0.1"]
    main(["attack", str(world / "numbers"), *words, "--output", str(world / "out")])
    found = json.loads((world / "out" / "report.json").read_text())
    assert found["metric"] == "squared_error"
    assert sorted(found["labels"]) == [i / 2 for i in range(len(ROWS))]


def test_the_doctor_says_what_would_be_attacked(world, capsys):
    main(["doctor", str(world / "model")])
    out = capsys.readouterr().out
    assert "BertForSequenceClassification" in out
    assert "attacked: bert.embeddings.word_embeddings, Embedding(12, 16, padding_idx=0)" in out
    assert f"torch {version('torch')}" in out
