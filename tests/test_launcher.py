"""`python -m fgm_trainer`: any script's Trainer is adversarial."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fgm_trainer
from fgm_trainer.launcher import flags_in, main

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser
from {module} import {trainer} as Trainer, {arguments} as TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BertForSequenceClassification(BertConfig(**sizes))
data = [dict(input_ids=[5 + (7 * i + j) % 40 for j in range(6)], labels=i % 2) for i in range(32)]
trainer = Trainer(model=model, args=args, train_dataset=data)
if args.do_train:
    trainer.train()
trainer.save_model()
"""
STOCK = SCRIPT.format(module="transformers", trainer="Trainer", arguments="TrainingArguments")
EDITED = SCRIPT.format(module="fgm_trainer", trainer="AdversarialTrainer", arguments="AdversarialTrainingArguments")
FLAGS = "--do_train --max_steps 4 --learning_rate 0.1 --report_to none --disable_tqdm true --use_cpu true"
FLAGS += " --dataloader_pin_memory false --per_device_train_batch_size 4 --optim sgd"


def run(*words, code=0, **environment):
    found = subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )
    assert found.returncode == code, found.stderr
    return found


def launched(script, out, *words, **settings):
    return run("-m", "fgm_trainer", script, *FLAGS.split(), "--output_dir", out, *words, **settings)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "stock.py").write_text(STOCK)
    (folder / "edited.py").write_text(EDITED)
    (folder / "own_parser.py").write_text(
        STOCK.replace("(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()", OWN_PARSER)
    )
    return folder


OWN_PARSER = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
args = TrainingArguments(
    parser.parse_args().output_dir, do_train=True, max_steps=4, learning_rate=0.1, report_to="none", use_cpu=True,
    disable_tqdm=True, dataloader_pin_memory=False, per_device_train_batch_size=4, optim="sgd",
)
"""


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved(folder):
    return load_file(folder / "model.safetensors")


def test_a_script_as_it_is_gives_the_weights_of_the_edited_one(scripts, tmp_path):
    attack = ["--adv_epsilon", "0.5", "--adv_warmup", "0"]
    run(scripts / "edited.py", *FLAGS.split(), "--output_dir", tmp_path / "edited", *attack)
    found = launched(scripts / "stock.py", tmp_path / "stock", *attack)
    assert "fgm_trainer: Trainer attacks word_embeddings: method fgm, epsilon 0.5" in found.stderr
    expected = saved(tmp_path / "edited")
    assert same(saved(tmp_path / "stock"), expected)
    # Flags of a parser that does not know them.
    run("-m", "fgm_trainer", scripts / "own_parser.py", "--output_dir", tmp_path / "own", *attack)
    assert same(saved(tmp_path / "own"), expected)


@pytest.mark.slow
def test_a_module_the_environment_and_epsilon_0(scripts, tmp_path):
    run(scripts / "edited.py", *FLAGS.split(), "--output_dir", tmp_path / "edited", "--adv_epsilon", "0.5")
    words = ["-m", "fgm_trainer", "-m", "stock", *FLAGS.split(), "--output_dir", tmp_path / "module"]
    run(*words, FGM_TRAINER_EPSILON="0.5", PYTHONPATH=f"{ROOT}:{scripts}")
    assert same(saved(tmp_path / "module"), saved(tmp_path / "edited"))
    launched(scripts / "stock.py", tmp_path / "none", "--adv_epsilon", "0")
    run(scripts / "stock.py", *FLAGS.split(), "--output_dir", tmp_path / "plain")
    assert same(saved(tmp_path / "plain"), saved(tmp_path / "none"))
    assert not same(saved(tmp_path / "plain"), saved(tmp_path / "edited"))


@pytest.mark.slow
def test_two_processes_of_torchrun(scripts, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    flags = [*FLAGS.split(), "--ddp_backend", "gloo", "--adv_epsilon", "0.5", "--output_dir"]
    found = run(*torchrun, "-m", "fgm_trainer", scripts / "stock.py", *flags, tmp_path / "stock")
    assert found.stderr.count("fgm_trainer: Trainer attacks") == 1
    run(*torchrun, scripts / "edited.py", *flags, tmp_path / "edited")
    assert same(saved(tmp_path / "stock"), saved(tmp_path / "edited"))


@pytest.mark.slow
def test_accelerate_launch(scripts, tmp_path):
    words = [*FLAGS.split(), "--adv_epsilon", "0.5", "--output_dir"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "fgm_trainer"]
    found = run(*launch, scripts / "stock.py", *words, tmp_path / "stock")
    assert "fgm_trainer: Trainer attacks word_embeddings" in found.stderr
    run(scripts / "edited.py", *words, tmp_path / "edited")
    assert same(saved(tmp_path / "stock"), saved(tmp_path / "edited"))


LOOP = """
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
Trainer(model=BertForSequenceClassification(BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1,
    num_attention_heads=1, intermediate_size=4)), args=TrainingArguments("out", report_to="none", use_cpu=True))
"""


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        ("import torch", [], "Nothing was attacked: no transformers Trainer was made"),
        pytest.param(
            STOCK,
            ["--output_dir", "out", *FLAGS.split(), "--adv_start", "100"],
            "Trainer made no attacked training step.",
            marks=pytest.mark.slow,
        ),
        pytest.param("import sys; sys.exit(3)", [], None, marks=pytest.mark.slow),
        pytest.param(
            LOOP, [], "Trainer was made, and its train() not called. A loop of its own", marks=pytest.mark.slow
        ),
        pytest.param(
            "import torch",
            ["--adv_epsilon=-1", "--adv_norm", "l7"],
            "- adv_norm must be one of l2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_attacks_nothing_is_an_error(tmp_path, monkeypatch, code, words, message):
    (tmp_path / "script.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    found = run("-m", "fgm_trainer", "script.py", *words, code=3 if message is None else 1)
    assert message is None or message in found.stderr
    assert "Traceback" not in found.stderr


def test_help_and_a_flag_that_looks_like_ours(tmp_path, monkeypatch, capsys):
    """The script's own help is no run in which nothing was attacked; the process is as before."""
    (tmp_path / "script.py").write_text("import argparse, sys; print(sys.argv[1:])")
    before = sys.argv, list(sys.path)
    main([str(tmp_path / "script.py"), "--help"])
    with pytest.raises(SystemExit, match="no transformers Trainer was made"):
        main([str(tmp_path / "script.py"), "--adv_epslion=3", "--advice", "x", "--adv_strength", "2"])
    out, err = capsys.readouterr()
    assert out.splitlines() == ["['--help']", "['--adv_epslion=3', '--advice', 'x']"]
    assert err.splitlines() == ["fgm_trainer: --adv_epslion is left to the script. Did you mean --adv_epsilon?"]
    assert (sys.argv, sys.path) == before
    monkeypatch.setenv("FGM_TRAINER_EPSLION", "0.3")
    with pytest.raises(SystemExit, match=r"FGM_TRAINER_EPSLION \(FGM_TRAINER_EPSILON\?\)"):
        main([str(tmp_path / "script.py")])


def test_what_is_no_script(capsys):
    with pytest.raises(SystemExit, match="flags come after it: SCRIPT --adv_epsilon"):
        main(["--adv_epsilon", "0.3", "a.py"])
    with pytest.raises(SystemExit, match=r"there is no script 'nowhere\.py'"):
        main(["nowhere.py"])
    main(["--version"])
    assert capsys.readouterr().out.strip() == fgm_trainer.__version__
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "usage:" in capsys.readouterr().out


def test_flags_are_taken_out_of_the_command_line(monkeypatch):
    monkeypatch.setenv("FGM_TRAINER_CLIP", "0  1")
    monkeypatch.setenv("FGM_TRAINER_METHOD", "pgd")
    monkeypatch.setenv("FGM_TRAINER_KWARGS", '{"share": 0.5}')
    monkeypatch.setenv("FGM_TRAINER_EPSILON", "")
    words = ["--adv", "x", "--adv_method", "fgm", "--adv_recover", "a.json", "--adv_same_dropout", "false", "--help"]
    flags, rest = flags_in(words)
    assert flags == {
        "adv_clip": [0.0, 1.0],
        "adv_method": "fgm",
        "adv_recover": True,
        "adv_same_dropout": False,
        "adv_kwargs": '{"share": 0.5}',
    }
    assert rest == ["--adv", "x", "a.json", "--help"]
