"""The GLUE scripts, run as a user runs them, on a model of a few thousand weights; and their metric."""

from __future__ import annotations

import json
import shlex
import sys

import glue_world
import numpy as np
import pytest
from glue_world import EXAMPLES, FAST, review, run, same_weights, saved_results, write_jsonl, write_parquet
from transformers import BertConfig, BertForSequenceClassification

world = glue_world.world


def test_the_suite_finds_the_examples():
    assert {"run_glue.py", "run_glue_no_trainer.py", "glue_metric.py"} <= {p.name for p in EXAMPLES.iterdir()}


@pytest.fixture(scope="module")
def trained(world):
    """A full run: trained with an attack that warms up, evaluated, attacked, predicted."""
    out = world / "trained"
    output = run(
        "run_glue.py", world, "--model_name_or_path", world / "model", "--task_name", "sst2",
        "--train_file", world / "single.csv", "--validation_file", world / "single.jsonl",
        "--test_file", world / "unlabelled.jsonl", "--do_train", "--do_eval", "--do_predict",
        "--eval_robustness", "--robustness_epsilons", "0.5", "2", "--adv_epsilon", "0.3", "--adv_warmup", "2",
        "--save_steps", "3", "--output_dir", out, *FAST,
    )  # fmt: skip
    return out, output


# The Trainer script ---------------------------------------------------------------------------------------------------


def test_trains_evaluates_attacks_and_predicts(trained):
    out, output = trained
    results = saved_results(out)
    assert results["train_samples"] == results["eval_samples"] == results["robust_samples"] == 32
    assert {f"robust_{a}_{e}" for a in ("noise", "fgm", "pgd-10") for e in ("0.5", "2")} < results.keys()
    assert results["robust_clean"] == pytest.approx(results["eval_accuracy"])
    assert 0 <= results["robust_fgm_2"] <= results["robust_fgm_0.5"] <= results["robust_clean"]
    assert "epsilon 0.5" in output, "the table"
    assert "adv_delta_norm" in output
    lines = (out / "predict_results_sst2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == list("01234")
    assert {line.split("\t")[1] for line in lines[1:]} <= {"negative", "positive"}
    assert json.loads((out / "config.json").read_text())["label2id"] == {"negative": 0, "positive": 1}


def test_the_model_card_names_the_attack_and_no_folder(trained, world):
    card = (trained[0] / "README.md").read_text()
    assert "GLUE SST2" in card
    for row in ("| method | fgm |", "| epsilon | 0.3 |", "| warmup | 2.0 |", "| target | word_embeddings |"):
        assert row in card
    assert str(world) not in card


@pytest.mark.slow
def test_resuming_gives_the_same_weights(trained, world):
    out = world / "resumed"
    run(
        "run_glue.py", world, "--model_name_or_path", world / "model", "--task_name", "sst2",
        "--train_file", world / "single.csv", "--do_train", "--adv_epsilon", "0.3", "--adv_warmup", "2",
        "--resume_from_checkpoint", trained[0] / "checkpoint-3", "--output_dir", out, *FAST,
    )  # fmt: skip
    assert same_weights(trained[0], out)


def test_epsilon_0_is_the_stock_trainer(world, trained):
    """The second run of the same script has `AdversarialTrainer` replaced by transformers' own `Trainer`."""
    two_runs = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import transformers
import run_glue
run_glue.main(sys.argv[1:] + ["--output_dir", "epsilon_0"])
run_glue.AdversarialTrainer = transformers.Trainer
run_glue.main(sys.argv[1:] + ["--output_dir", "stock"])
"""
    flags = ["--model_name_or_path", world / "model", "--task_name", "sst2", "--train_file", world / "single.csv"]
    run("", world, *flags, "--do_train", "--adv_epsilon", "0", *FAST, before=two_runs)
    assert same_weights(world / "epsilon_0", world / "stock")
    assert not same_weights(world / "epsilon_0", trained[0]), "the comparison sees an attack"
    assert "Adversarial training" not in (world / "epsilon_0" / "README.md").read_text()


@pytest.mark.slow
def test_regression_from_a_json_file_of_flags(world):
    out = world / "regression"
    flags = {
        "model_name_or_path": str(world / "model"),
        "train_file": str(world / "pairs.parquet"),
        "validation_file": str(world / "pairs.jsonl"),
        "test_file": str(world / "pairs.jsonl"),
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "eval_robustness": True,
        "robustness_epsilons": [0.5],
        "max_steps": 2,
        "max_eval_samples": 20,
        "max_seq_length": 16,
        "report_to": "none",
        "output_dir": str(out),
    }
    (world / "flags.json").write_text(json.dumps(flags))
    output = run("run_glue.py", world, world / "flags.json")
    results = saved_results(out)
    assert {"eval_mse", "eval_pearson", "eval_spearmanr", "predict_pearson"} < results.keys()
    assert results["eval_samples"] == 20
    assert results["robust_clean"] == pytest.approx(results["eval_mse"], rel=1e-4)
    assert results["robust_pgd-10_0.5"] >= results["robust_clean"]
    assert "  pearson" in output, "the table"
    predictions = (out / "predict_results.tsv").read_text().splitlines()[1:]
    assert len(predictions) == 32
    assert all(float(line.split("\t")[1]) is not None for line in predictions)


@pytest.mark.slow
def test_mnli_is_evaluated_and_predicted_twice(world):
    data = world / "mnli" / "data"
    data.mkdir(parents=True)
    rows = [{"premise": review(i)["sentence"], "hypothesis": "a film", "label": i % 3} for i in range(12)]
    hidden = [row | {"label": -1} for row in rows[:4]]
    parts = {"train": rows, "validation_matched": rows[:6], "validation_mismatched": rows[6:]}
    for split, part in (parts | {"test_matched": hidden, "test_mismatched": hidden}).items():
        write_parquet(data / f"{split}-00000-of-00001.parquet", part)
    out = world / "mnli_out"
    run(
        "run_glue.py", world, "--model_name_or_path", world / "model", "--task_name", "mnli",
        "--dataset_name", world / "mnli", "--do_train", "--do_eval", "--do_predict", "--output_dir", out, *FAST,
    )  # fmt: skip
    results = saved_results(out)
    assert {"eval_accuracy", "eval_accuracy_mm"} < results.keys()
    assert "predict_accuracy" not in results, "-1 is no label"
    names = {p.name for p in out.glob("*.tsv")}
    assert names == {"predict_results_mnli.tsv", "predict_results_mnli-mm.tsv"}


@pytest.mark.slow
def test_an_output_folder_with_content_is_not_overwritten_unasked(world):
    out = world / "full"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    (out / "all_results.json").write_text('{"stale": 1}')
    flags = ["--model_name_or_path", world / "model", "--train_file", world / "single.tsv", "--do_train", *FAST]
    error = run("run_glue.py", world, *flags, "--output_dir", out, fails=True)
    assert error.splitlines()[-1].endswith("is not empty: pass another, or --overwrite_output_dir.")
    run("run_glue.py", world, *flags, "--output_dir", out, "--overwrite_output_dir")
    assert "stale" not in saved_results(out)


# Without a network ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("script", ["run_glue.py", "run_glue_no_trainer.py"])
@pytest.mark.parametrize("missing", ["model", "data set"])
def test_a_hub_name_without_a_network_is_one_sentence(world, script, missing):
    train = ["--do_train", "--report_to", "none"] if script == "run_glue.py" else []
    data = ["--train_file", world / "single.csv", "--validation_file", world / "single.csv"]
    model = (
        ["--model_name_or_path", "bert-base-cased"] if missing == "model" else ["--model_name_or_path", world / "model"]
    )
    flags = [*model, "--task_name", "sst2", *(data if missing == "model" else []), *train]
    error = run(script, world, *flags, "--output_dir", world / "none", fails=True)
    assert "Traceback" not in error
    sentences = [line for line in error.splitlines() if "Hugging Face hub" in line]
    instead = "--model_name_or_path" if missing == "model" else "--train_file and --validation_file"
    assert len(sentences) == 1
    assert sentences[0].startswith(f"The {missing} ")
    assert instead in sentences[0]


# The hand-written loop ------------------------------------------------------------------------------------------------


LOOP = shlex.split(
    "--pad_to_max_length False --max_seq_length 16 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
    "--max_train_steps 8 --learning_rate 1e-2"
)


def test_the_loop_trains_evaluates_attacks_and_predicts(world):
    out = world / "loop"
    run(
        "run_glue_no_trainer.py", world, "--model_name_or_path", world / "model", "--task_name", "mrpc",
        "--train_file", _as_pairs(world), "--validation_file", _as_pairs(world), "--test_file", _as_pairs(world),
        "--eval_robustness", "--robustness_epsilons", "0.5", "--adv_epsilon", "0.3", "--adv_every", "2",
        "--output_dir", out, *LOOP,
    )  # fmt: skip
    results = saved_results(out)
    assert {"eval_accuracy", "eval_f1", "eval_combined_score", "robust_clean", "robust_pgd-10_0.5"} < results.keys()
    assert results["train_steps"] == 8
    assert results["train_loss"] > 0
    assert len((out / "predict_results_mrpc.tsv").read_text().splitlines()) == 33
    assert BertForSequenceClassification.from_pretrained(out).config.id2label[1] == "equivalent"


def _as_pairs(world):
    path = world / "mrpc.jsonl"
    rows = [review(i) for i in range(32)]
    write_jsonl(path, [{"sentence1": r["sentence"], "sentence2": "a film", "label": r["label"]} for r in rows])
    return path


@pytest.mark.slow
def test_the_loop_at_epsilon_0_is_a_plain_loop(world):
    """The second run of the same script has the adversary replaced by a forward and a backward pass."""
    two_runs = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import run_glue_no_trainer as script

class Plain:
    def __init__(self, model, attack, accelerator, **rest):
        self.model, self.accelerator = model, accelerator
    def backward(self, batch, factor):
        loss = self.model(**batch).loss
        self.accelerator.backward(loss)
        return loss.detach()
    def close(self):
        pass

script.main(sys.argv[1:] + ["--output_dir", "loop_0", "--adv_epsilon", "0"])
script.main(sys.argv[1:] + ["--output_dir", "loop_1", "--adv_epsilon", "1"])
script.Adversary = Plain
script.main(sys.argv[1:] + ["--output_dir", "loop_plain", "--adv_epsilon", "0"])
"""
    files = ["--train_file", world / "pairs.jsonl", "--validation_file", world / "pairs.jsonl"]
    run("", world, "--model_name_or_path", world / "model", "--task_name", "stsb", *files, *LOOP, before=two_runs)
    assert same_weights(world / "loop_0", world / "loop_plain")
    assert not same_weights(world / "loop_1", world / "loop_plain"), "the comparison sees an attack"
    assert {"eval_pearson", "eval_spearmanr"} < saved_results(world / "loop_0").keys()


# The shared module, in this process -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def glue_data():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import glue_data

        yield glue_data
    finally:
        sys.path.remove(str(EXAMPLES))


# Some releases of datasets leave a csv file for the garbage collector to close.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["single.csv", "single.tsv", "single.jsonl", "pairs.parquet"])
def test_every_kind_of_file_is_read(glue_data, world, name, tmp_path):
    data = glue_data._load_file(str(world / name), str(tmp_path))
    assert len(data) == 32
    assert data[0]["label"] == 0
    column = "sentence1" if name.startswith("pairs") else "sentence"
    assert [r[column] for r in data] == [review(i)["sentence"] for i in range(32)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_cells_that_look_missing_or_quoted_stay_text(glue_data, tmp_path):
    (tmp_path / "odd.tsv").write_text('sentence\tlabel\n"half a quote\t1\nNA\t0\nnull\t1\n')
    data = glue_data._load_file(str(tmp_path / "odd.tsv"), str(tmp_path))
    assert data["sentence"][:] == ['"half a quote', "NA", "null"]
    assert data["label"][:] == [1, 0, 1]


def _raw(**splits):
    from datasets import Dataset, DatasetDict

    return DatasetDict({name: Dataset.from_dict(columns) for name, columns in splits.items()})


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"label": [0], "text": ["a"]}, ("text",)),
        ({"idx": [0], "label": [0], "question": ["a"], "answer": ["b"], "more": ["c"]}, ("question", "answer")),
        ({"title": ["a"], "sentence1": ["b"], "sentence2": ["c"], "label": [0]}, ("sentence1", "sentence2")),
    ],
)
def test_text_columns_are_found(glue_data, columns, expected):
    assert glue_data.text_columns(_raw(train=columns), None) == expected


def test_missing_text_columns_are_said(glue_data):
    with pytest.raises(SystemExit, match=r"Task qqp needs the column question2; the train data has question1, label\."):
        glue_data.text_columns(_raw(train={"question1": ["a"], "label": [0]}), "qqp")


def test_labels_follow_the_data_or_the_model(glue_data):
    words = _raw(train={"label": ["no", "yes", "no"]})
    assert glue_data.find_labels(words, None, BertConfig()).ids == {"no": 0, "yes": 1}
    trained = BertConfig(id2label={0: "YES", 1: "NO"}, label2id={"YES": 0, "NO": 1})
    assert glue_data.find_labels(words, None, trained).ids == {"no": 1, "yes": 0}
    assert glue_data.find_labels(words, None, trained).names == ("YES", "NO")
    numbers = _raw(train={"label": [10, 9]})
    assert glue_data.find_labels(numbers, None, BertConfig()).names == ("9", "10")
    only_ones = _raw(validation={"label": [1]})
    assert glue_data.find_labels(only_ones, None, BertConfig()).encode(1, "validation") == 1
    assert glue_data.find_labels(_raw(train={"label": [0.5]}), None, BertConfig()).regression
    rte = glue_data.find_labels(words, "rte", BertConfig())
    assert [rte.encode(v, "train") for v in (0, "entailment", 1.0)] == [0, 0, 1]
    assert rte.encode(-1, "test") is None


def test_wrong_labels_are_said(glue_data):
    labels = glue_data.find_labels(_raw(train={"label": ["no", "yes"]}), None, BertConfig())
    with pytest.raises(
        SystemExit, match=r"The validation data has the label 'maybe', which is not among .*: no, yes\."
    ):
        labels.encode("maybe", "validation")
    with pytest.raises(SystemExit, match="no two different labels"):
        glue_data.find_labels(_raw(train={"label": ["no", "no"]}), None, BertConfig())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, r"No data is named: pass --task_name, --dataset_name, or --train_file and --validation_file\."),
        ({"task_name": "glue"}, r"There is no GLUE task 'glue'; there are: cola, mnli, .*wnli\."),
        ({"train_file": "a.txt"}, r"--train_file must end in one of csv, tsv, json, jsonl, parquet; found 'a.txt'\."),
        ({"train_file": "none.csv"}, r"--train_file: there is no file 'none.csv'\."),
        ({"train_file": "a.csv", "dataset_name": "b"}, r"The data is given twice"),
    ],
)
def test_wrong_flags_are_said(glue_data, flags, message):
    with pytest.raises(ValueError, match=message):
        glue_data.DataTrainingArguments(**flags)


# The metric -----------------------------------------------------------------------------------------------------------

# Of 8: 3 true and 2 false positives, 1 false negative, 2 true negatives.
REFERENCES = [1, 1, 1, 1, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 1, 0, 1, 1, 0, 0]
ACCURACY = {"accuracy": 5 / 8}
ACCURACY_AND_F1 = ACCURACY | {"f1": 6 / 9}
MATTHEWS = {"matthews_correlation": (3 * 2 - 2 * 1) / np.sqrt(5 * 4 * 4 * 3)}


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    import evaluate

    cache = tmp_path_factory.mktemp("metrics")

    def compute(task, references, predictions):
        loaded = evaluate.load(str(EXAMPLES / "glue_metric.py"), task, cache_dir=str(cache), keep_in_memory=True)
        return loaded.compute(references=references, predictions=predictions)

    return compute


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("cola", MATTHEWS),
        ("mnli", ACCURACY),
        ("mrpc", ACCURACY_AND_F1),
        ("qnli", ACCURACY),
        ("qqp", ACCURACY_AND_F1),
        ("rte", ACCURACY),
        ("sst2", ACCURACY),
        ("wnli", ACCURACY),
        ("classification", ACCURACY),
    ],
)
def test_metric_of_labels(metric, task, expected):
    assert metric(task, REFERENCES, PREDICTIONS) == pytest.approx(expected)


def test_metric_of_numbers(metric):
    # Centred (-1.5, -.5, .5, 1.5) and (-2, -1, 3, 0): covariance 5, squares 5 and 14. Ranks differ by 0, 0, 1, -1.
    expected = {"pearson": 5 / np.sqrt(5 * 14), "spearmanr": 1 - 6 * 2 / (4 * 15)}
    references, predictions = [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 5.0, 2.0]
    assert metric("stsb", references, predictions) == pytest.approx(expected)
    assert metric("regression", references, predictions) == pytest.approx(expected | {"mse": (1 + 1 + 4 + 4) / 4})


def test_metric_is_finite_where_a_figure_is_not_defined(metric):
    assert metric("stsb", [1.0, 2.0], [3.0, 3.0]) == {"pearson": 0, "spearmanr": 0}
    assert metric("cola", [0, 1], [1, 1]) == {"matthews_correlation": 0}
    assert metric("mrpc", [0, 0], [0, 0]) == {"accuracy": 1, "f1": 0}


def test_metric_of_another_task(metric):
    with pytest.raises(ValueError, match="There is no GLUE task 'squad'"):
        metric("squad", [1], [1])
