"""`fgm_trainer.patch`: every Trainer is adversarial, and only as long as asked; nothing else changes."""

import dataclasses
import json
import logging
import sys
import types
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import pytest
import torch
import transformers
from models import padded_data, tiny
from test_launcher import same

import fgm_trainer
from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments


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
