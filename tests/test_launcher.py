"""`python -m fgm_trainer` and `fgm_trainer.patch`: any script's Trainer is adversarial, and only as long as asked."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

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


def test_epsilon_0_of_the_arguments_is_no_error(tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with fgm_trainer.patch() as patched:
            weights_of(Defined, transformers.TrainingArguments(**settings(tmp_path), adv_epsilon=0))
        patched.check()
    finally:
        logger.removeHandler(caplog.handler)
    assert "Nothing was attacked" not in caplog.text


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


def state_of_the_process():
    """Everything that a patch may touch."""
    kinds = [transformers.Trainer, transformers.Seq2SeqTrainer, Defined]
    kinds += [transformers.TrainingArguments, transformers.Seq2SeqTrainingArguments, DefinedArguments]
    names = [getattr(transformers, kind.__name__, kind) for kind in kinds]
    return names, [dict(vars(kind)) for kind in kinds], [kind.__bases__ for kind in kinds], sys.argv, list(sys.path)


def test_within_the_context_and_not_after(tmp_path):
    flags = {"adv_epsilon": 0.5, "adv_warmup": 0.0}
    edited = AdversarialTrainingArguments(**settings(tmp_path), **flags)
    expected, _ = weights_of(AdversarialTrainer, edited)
    plain, _ = weights_of(transformers.Trainer, transformers.TrainingArguments(**settings(tmp_path)))
    before, earlier = state_of_the_process(), transformers.TrainingArguments(**settings(tmp_path))
    held, trainer, arguments = {"t": transformers.Trainer}, transformers.Trainer, transformers.TrainingArguments
    with fgm_trainer.patch(**flags) as patched:
        found, _ = weights_of(held["t"], arguments(**settings(tmp_path)))
        of_subclass, made = weights_of(Defined, DefinedArguments(**settings(tmp_path)))

        class Later(transformers.Trainer):
            pass

        of_later, _ = weights_of(Later, transformers.TrainingArguments(**settings(tmp_path)))
        # What is said here counts more than what a script says.
        own, _ = weights_of(Later, transformers.TrainingArguments(**settings(tmp_path), adv_epsilon=0.1))
        mixed, _ = weights_of(AdversarialTrainer, AdversarialTrainingArguments(**settings(tmp_path)))

        class Named(fgm_trainer.AdversarialTrainerMixin, transformers.Trainer):
            pass

        named, _ = weights_of(Named, transformers.TrainingArguments(**settings(tmp_path)))
        of_earlier, _ = weights_of(Defined, earlier)
    assert patched.trainers == ["Trainer", "Defined", "Later", "Later", "AdversarialTrainer", "Named", "Defined"]
    assert patched.steps == 21
    patched.check()
    for weights in (found, of_subclass, of_later, own, mixed, named, of_earlier):
        assert same(weights, expected)
    assert type(made).__name__ == "Defined"
    assert made.calls == 3
    assert state_of_the_process() == before
    for kind, args in ((Later, transformers.TrainingArguments), (Defined, DefinedArguments), (trainer, arguments)):
        assert same(weights_of(kind, args(**settings(tmp_path)))[0], plain)
    assert AdversarialTrainingArguments(**settings(tmp_path)).adv_epsilon is None
    with pytest.raises(TypeError, match="adv_epsilon"):
        transformers.TrainingArguments(**settings(tmp_path), adv_epsilon=0.1)


@pytest.mark.parametrize("kind", [transformers.Trainer, Defined, transformers.Seq2SeqTrainer], ids=lambda k: k.__name__)
def test_a_trainer_keeps_what_it_was_made_with(tmp_path, kind):
    """Made inside and trained after; made before and trained inside; by what is active when it trains, else its own."""
    arguments = transformers.TrainingArguments
    if kind is transformers.Seq2SeqTrainer:
        arguments = transformers.Seq2SeqTrainingArguments
    flags = {"adv_epsilon": 0.5, "adv_warmup": 0.0}
    edited = AdversarialTrainingArguments(**settings(tmp_path), **flags)
    expected, _ = weights_of(AdversarialTrainer, edited)

    def made():
        model = tiny("bert")
        return kind(model=model, args=arguments(**settings(tmp_path)), train_dataset=padded_data(model))

    before = made()
    with fgm_trainer.patch(**flags):
        within = made()
        before.evaluate(before.train_dataset)
        before.train()
    within.train()
    assert same(within.model.state_dict(), expected)
    assert same(before.model.state_dict(), expected)
    assert isinstance(within, (kind, AdversarialTrainer))
    report = within.evaluate_robustness(within.train_dataset, attacks=[fgm_trainer.FGM()], epsilons=[0.1])
    assert report.examples == 16


def test_classes_keep_their_relations(tmp_path):
    class Registers(type):
        pass

    @runtime_checkable
    class Saves(Protocol):
        def save_model(self): ...

    with fgm_trainer.patch(adv_epsilon=0.5):
        assert issubclass(transformers.Seq2SeqTrainer, transformers.Trainer)
        args = transformers.Seq2SeqTrainingArguments(**settings(tmp_path))
        assert isinstance(args, transformers.TrainingArguments)
        assert isinstance(DefinedArguments(**settings(tmp_path)), transformers.TrainingArguments)
        assert args.to_dict()["adv_epsilon"] == 0.5

        class Metaclass(transformers.Trainer, metaclass=Registers):
            pass

        class OfProtocol(transformers.Trainer, Saves):
            pass

        for kind in (Metaclass, OfProtocol, transformers.Seq2SeqTrainer):
            trainer = kind(model=tiny("bert"), args=args)
            assert isinstance(trainer, (transformers.Trainer, kind))
            assert isinstance(trainer, Saves)
            assert trainer.attack == fgm_trainer.FGM(epsilon=0.5)


def test_what_a_script_has_of_our_names_stays_its_own(tmp_path):
    @dataclass
    class Own(transformers.TrainingArguments):
        adv_epsilon: float = 0.1
        adv_weight: str = "w"

    class Named(transformers.Trainer):
        def __init__(self, *args, **kwargs):
            self.schedule, self._run = "before", "mine"
            super().__init__(*args, **kwargs)
            self.attack = "mine"

        def _prepare(self):
            raise AssertionError

        def _flags(self):
            raise AssertionError

    with fgm_trainer.patch(adv_warmup=0.0) as patched:
        args = Own(**settings(tmp_path), adv_epsilon=0.3, adv_weight="q", adv_method="pgd")
        assert (args.adv_epsilon, args.adv_weight, args.adv_method) == (0.3, "q", "pgd")
        _, trainer = weights_of(Named, args)
    assert (trainer.schedule, trainer._run, trainer.attack) == ("before", "mine", "mine")
    assert trainer._adv_run.plan.attack == fgm_trainer.PGD()
    assert patched.steps == 3
    assert Own(**settings(tmp_path)).adv_weight == "w"


def test_classes_that_come_with_conditions(tmp_path):
    registered = []

    class Registers(type):
        def __new__(cls, name, bases, namespace, *, task):
            registered.append(name)
            return super().__new__(cls, name, bases, namespace)

        def __init__(cls, name, bases, namespace, *, task):
            super().__init__(name, bases, namespace)

        def __eq__(cls, other):
            return cls is other

    class Base(transformers.Trainer):
        def __init_subclass__(cls, *, task, **kwargs):
            super().__init_subclass__(**kwargs)
            registered.append(cls.__name__)

    class Told(Base, task="x"):
        """Of older style."""

        def compute_loss(self, *args, **kwargs):
            return super(self.__class__, self).compute_loss(*args, **kwargs)

    class Metaclass(transformers.Trainer, metaclass=Registers, task="x"):
        pass

    before = list(registered)
    with fgm_trainer.patch(adv_epsilon=0.5, adv_warmup=0.0) as patched:
        args = transformers.TrainingArguments(**settings(tmp_path))
        expected, _ = weights_of(transformers.Trainer, args)
        for kind in (Told, Metaclass):
            found, trainer = weights_of(kind, args)
            assert same(found, expected)
            assert type(trainer).__doc__ == kind.__doc__
            assert isinstance(trainer, kind)
    assert patched.steps == 9
    assert registered == before


def test_a_class_of_arguments_of_an_earlier_patch(tmp_path):
    with fgm_trainer.patch():

        @dataclass
        class Late(transformers.TrainingArguments):
            own: int = 0

    with fgm_trainer.patch():
        assert Late(**settings(tmp_path), adv_epsilon=0.25).adv_epsilon == 0.25
        words = ["--output_dir", "out", "--adv_epsilon", "0.25", "--adv_method", "pgd"]
        (args,) = transformers.HfArgumentParser(Late).parse_args_into_dataclasses(words)
        assert (args.adv_epsilon, args.adv_method, args.own) == (0.25, "pgd", 0)


def test_what_was_kept_or_put_in_our_place(tmp_path):
    stock = transformers.Trainer.train
    patched = fgm_trainer.patch(adv_epsilon=0.5, adv_warmup=0.0)

    class Keeps(transformers.Trainer):
        fit = transformers.Trainer.train

    def foreign(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    transformers.Trainer.train = foreign
    try:
        patched.undo()
        assert transformers.Trainer.train is foreign
    finally:
        transformers.Trainer.train = stock
    plain, _ = weights_of(Keeps, transformers.TrainingArguments(**settings(tmp_path)))
    model = tiny("bert")
    Keeps(
        model=model, args=transformers.TrainingArguments(**settings(tmp_path)), train_dataset=padded_data(model)
    ).fit()
    assert same(model.state_dict(), plain)
    with pytest.raises(RuntimeError, match="This patch is over"):
        patched.__enter__()


def test_settings_of_a_method_that_the_script_names(tmp_path):
    with fgm_trainer.patch(adv_steps=5):
        args = transformers.TrainingArguments(**settings(tmp_path), adv_method="pgd")
        assert transformers.Trainer(model=tiny("bert"), args=args).attack == fgm_trainer.PGD(steps=5)
        with pytest.raises(ValueError, match="adv_steps is given, but the method 'fgm' has no such setting"):
            transformers.TrainingArguments(**settings(tmp_path))
    with pytest.raises(ValueError, match="adv_norm must be"):
        fgm_trainer.patch(adv_steps=5, adv_norm="l7")


def test_our_own_names_are_left_alone():
    """What the README tells to import, in a notebook in which a patch is active."""
    own = types.ModuleType("notebook")
    sys.modules["notebook"] = own
    try:
        with fgm_trainer.patch():
            own.Trainer, own.TrainingArguments = AdversarialTrainer, AdversarialTrainingArguments
        assert (own.Trainer, own.TrainingArguments) == (AdversarialTrainer, AdversarialTrainingArguments)
    finally:
        del sys.modules["notebook"]


def test_parsers_take_the_flags_from_words_and_files(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"output_dir": "out", "adv_epsilon": 0.25, "report_to": "none"}))
    with fgm_trainer.patch():
        for kind in (transformers.TrainingArguments, DefinedArguments, transformers.Seq2SeqTrainingArguments):
            parser = transformers.HfArgumentParser(kind)
            (args,) = parser.parse_json_file(str(tmp_path / "args.json"))
            assert args.adv_epsilon == 0.25
            words = ["--output_dir", "out", "--adv_clip", "0", "1", "--adv_target", "pixel_values", "--adv_recover"]
            (args,) = parser.parse_args_into_dataclasses([*words, "--adv_epsilon", "auto"])
            assert (args.adv_epsilon, args.adv_clip, args.adv_recover) == ("auto", [0.0, 1.0], True)
            with pytest.raises(ValueError, match="adv_norm must be one of"):
                kind(output_dir="out", adv_norm="l7")
            assert dataclasses.replace(args, adv_epsilon=0.5).adv_epsilon == 0.5


def test_an_error_puts_everything_back_and_a_second_undo_does_nothing(tmp_path):
    before, seen = state_of_the_process(), []

    def fails():
        with fgm_trainer.patch() as patched:
            seen.append(patched)
            assert state_of_the_process() != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert state_of_the_process() == before
    (patched,) = seen
    patched.undo()
    with pytest.raises(RuntimeError, match="no transformers Trainer was made"):
        patched.check()
    with pytest.raises(ValueError, match="adv_strength must be above 0"):
        fgm_trainer.patch(adv_strength=0.0)
    assert state_of_the_process() == before


def test_a_second_one_takes_the_place_of_the_first(tmp_path):
    before = state_of_the_process()
    first = fgm_trainer.patch(adv_epsilon=0.5, adv_norm="linf")
    with pytest.raises(ValueError, match="adv_epsilon must be"):
        fgm_trainer.patch(adv_epsilon=-1.0)
    assert transformers.TrainingArguments(**settings(tmp_path)).adv_epsilon == 0.5, "the first one stays"
    with fgm_trainer.patch(adv_method="pgd") as second:
        assert (second.flags.adv_method, second.flags.adv_epsilon, second.flags.adv_norm) == ("pgd", None, None)
        args = transformers.TrainingArguments(**settings(tmp_path))
        assert (args.adv_method, args.adv_epsilon) == ("pgd", None)
        trainer = Defined(model=tiny("bert"), args=args)
        assert trainer.attack == fgm_trainer.PGD()
        first.undo()
        assert transformers.TrainingArguments(**settings(tmp_path)).adv_method == "pgd"
    assert state_of_the_process() == before


def test_a_context_in_which_nothing_is_attacked_says_so(tmp_path, caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with fgm_trainer.patch():
            pass
        assert "no transformers Trainer was made" in caplog.text
        caplog.clear()
        with fgm_trainer.patch(adv_start=100):
            weights_of(Defined, transformers.TrainingArguments(**settings(tmp_path)))
        assert "Defined made no attacked training step" in caplog.text
        caplog.clear()
        with fgm_trainer.patch() as patched:
            Defined(model=tiny("bert"), args=transformers.TrainingArguments(**settings(tmp_path)))
        assert "Nothing was attacked" not in caplog.text, "it may train later"
        with pytest.raises(RuntimeError, match=r"Defined was made, and its train\(\) not called"):
            patched.check()
        with fgm_trainer.patch() as patched:
            args = transformers.TrainingArguments(**settings(tmp_path))
            Defined(model=tiny("bert"), args=args).evaluate(padded_data(tiny("bert")))
        patched.check()
    finally:
        logger.removeHandler(caplog.handler)


def test_arguments_are_saved_and_read(tmp_path):
    with fgm_trainer.patch(adv_epsilon=0.5):
        args = transformers.TrainingArguments(**settings(tmp_path))
        torch.save(args, tmp_path / "training_args.bin")
    # As stock arguments, which need no package of ours.
    read = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert type(read) is transformers.TrainingArguments
    assert read.adv_epsilon == 0.5
