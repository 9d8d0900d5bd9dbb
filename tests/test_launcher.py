"""`python -m fgm_trainer` and `fgm_trainer.patch`: any script's Trainer is adversarial, and only as long as asked."""

import logging
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from models import padded_data, tiny
from safetensors.torch import load_file

import fgm_trainer
from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
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
    assert "fgm_trainer: AdversarialTrainer attacks word_embeddings: method fgm, epsilon 0.5" in found.stderr
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
    assert found.stderr.count("fgm_trainer: AdversarialTrainer attacks") == 1
    run(*torchrun, scripts / "edited.py", *flags, tmp_path / "edited")
    assert same(saved(tmp_path / "stock"), saved(tmp_path / "edited"))


@pytest.mark.parametrize(
    ("code", "words", "message"),
    [
        ("import torch", [], "Nothing was attacked: no transformers Trainer was made"),
        pytest.param(
            STOCK,
            ["--output_dir", "out", *FLAGS.split(), "--adv_start", "100"],
            "AdversarialTrainer made no attacked training step.",
            marks=pytest.mark.slow,
        ),
        pytest.param("import sys; sys.exit(3)", [], None, marks=pytest.mark.slow),
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


def test_what_is_no_script(capsys):
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


# In a process of one's own --------------------------------------------------------------------------------------------


class Defined(transformers.Trainer):
    """A subclass that is there before, with a step of its own."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().training_step(model, inputs, *args, **kwargs)


@dataclass
class DefinedArguments(transformers.TrainingArguments):
    own: int = field(default=3)


def settings(folder, **more):
    plain = {"max_steps": 3, "learning_rate": 0.1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return plain | {"output_dir": str(folder), "dataloader_pin_memory": False, "save_strategy": "no"} | more


def weights_of(kind, args, **more):
    model = tiny("bert")
    trainer = kind(model=model, args=args, train_dataset=padded_data(model), **more)
    trainer.train()
    return model.state_dict(), trainer


def test_within_the_context_and_not_after(tmp_path):
    flags = {"adv_epsilon": 0.5, "adv_warmup": 0.0}
    edited = AdversarialTrainingArguments(**settings(tmp_path), **flags)
    expected, _ = weights_of(AdversarialTrainer, edited)
    plain, _ = weights_of(transformers.Trainer, transformers.TrainingArguments(**settings(tmp_path)))
    module = types.ModuleType("imported_before")
    module.Trainer, module.Arguments = transformers.Trainer, transformers.TrainingArguments
    sys.modules["imported_before"] = module
    names = ("Trainer", "Seq2SeqTrainer", "TrainingArguments", "Seq2SeqTrainingArguments")
    before = [getattr(transformers, name) for name in names]
    try:
        with fgm_trainer.patch(**flags) as patched:
            found, _ = weights_of(module.Trainer, module.Arguments(**settings(tmp_path)))
            of_subclass, trainer = weights_of(Defined, DefinedArguments(**settings(tmp_path)))

            class Later(transformers.Trainer):
                pass

            of_later, _ = weights_of(Later, transformers.TrainingArguments(**settings(tmp_path)))
            # What is said here counts more than what a script says.
            own, _ = weights_of(Later, transformers.TrainingArguments(**settings(tmp_path), adv_epsilon=0.1))
            mixed, _ = weights_of(AdversarialTrainer, AdversarialTrainingArguments(**settings(tmp_path)))

            class Named(fgm_trainer.AdversarialTrainerMixin, transformers.Trainer):
                pass

            named, _ = weights_of(Named, transformers.TrainingArguments(**settings(tmp_path)))
        assert patched.trainers == ["AdversarialTrainer", "Defined", "Later", "Later", "Named"]
        assert patched.steps == 18
        patched.check()
        assert same(found, expected)
        assert same(of_subclass, expected)
        assert same(of_later, expected)
        assert same(own, expected)
        assert same(mixed, expected)
        assert same(named, expected)
        assert Named.__mro__[1:3] == (fgm_trainer.AdversarialTrainerMixin, transformers.Trainer)
        assert same(weights_of(Named, edited)[0], expected)
        assert trainer.calls == 3
        assert [getattr(transformers, name) for name in names] == before
        assert module.Trainer is transformers.trainer.Trainer is before[0]
        assert Defined.__bases__ == Later.__bases__ == (transformers.Trainer,)
        for kind, args in ((Later, transformers.TrainingArguments), (Defined, DefinedArguments)):
            assert same(weights_of(kind, args(**settings(tmp_path)))[0], plain)
        assert AdversarialTrainingArguments(**settings(tmp_path)).adv_epsilon is None
    finally:
        del sys.modules["imported_before"]


def test_a_class_that_can_not_be_swapped_is_named(caplog):
    class Plain(transformers.Trainer):
        pass

    class Mixed(fgm_trainer.AdversarialTrainerMixin, Plain):
        pass

    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with fgm_trainer.patch():
            assert Mixed.__mro__[2] is Plain
            assert Plain.__bases__ != (transformers.Trainer,)
    finally:
        logger.removeHandler(caplog.handler)
    assert "Plain stays as it is, since a subclass of it has AdversarialTrainerMixin" in caplog.text


def test_an_error_puts_everything_back_and_a_second_undo_does_nothing():
    seen = []

    def fails():
        with fgm_trainer.patch() as patched:
            seen.extend([patched, transformers.Trainer])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    patched, adversarial = seen
    assert issubclass(adversarial, AdversarialTrainer)
    trainer = transformers.Trainer
    assert not issubclass(trainer, AdversarialTrainer)
    patched.undo()
    assert transformers.Trainer is trainer
    with pytest.raises(RuntimeError, match="no transformers Trainer was made"):
        patched.check()
    with pytest.raises(ValueError, match="adv_strength must be above 0"):
        fgm_trainer.patch(adv_strength=0.0)
    assert transformers.Trainer is trainer


def test_a_second_one_takes_the_place_of_the_first():
    trainer = transformers.Trainer
    first = fgm_trainer.patch(adv_epsilon=0.5)
    with fgm_trainer.patch(adv_method="pgd"):
        args = transformers.TrainingArguments(output_dir="out", report_to="none", use_cpu=True)
        assert (args.adv_method, args.adv_epsilon) == ("pgd", None)
        first.undo()
        assert transformers.Trainer is not trainer
    assert transformers.Trainer is trainer


def test_arguments_are_saved_and_read(tmp_path):
    with fgm_trainer.patch(adv_epsilon=0.5):
        args = transformers.TrainingArguments(**settings(tmp_path))
        torch.save(args, tmp_path / "training_args.bin")
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).adv_epsilon == 0.5
