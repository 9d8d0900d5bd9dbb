"""Every refusal says what is wrong, what was found and what to write instead, before anything is trained."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from test_faults import examples, flags, same, tiny_bert, weights
from test_trainer import CHECKPOINTING
from transformers import HfArgumentParser, Trainer

from fgm_trainer import FGM, PGD, AdversarialTrainer, AdversarialTrainerMixin, AdversarialTrainingArguments
from fgm_trainer.compatibility import _of_the_engine
from fgm_trainer.perturbation.weights import Weights
from fgm_trainer.trainer import AdversarialTrainer as Direct

BAD_FLAGS = [
    ({"adv_epsilon": -1.0}, "adv_epsilon must be a finite number, 0 or more, or 'auto'; found -1.0."),
    ({"adv_epsilon": float("nan")}, "adv_epsilon must be a finite number, 0 or more, or 'auto'; found nan."),
    ({"adv_epsilon": float("inf")}, "adv_epsilon must be a finite number, 0 or more, or 'auto'; found inf."),
    ({"adv_weight": -0.5}, "adv_weight must be a finite number, 0 or more; found -0.5."),
    ({"adv_weight": 0.0}, "adv_weight must be above 0; to train without an attack write adv_epsilon=0."),
    ({"adv_clean_weight": -1.0}, "adv_clean_weight must be a finite number, 0 or more; found -1.0."),
    ({"adv_start": 1.5}, "adv_start is a fraction below 1 or a whole number of optimizer steps; found 1.5."),
    ({"adv_warmup": -0.1}, "adv_warmup must be a finite number, 0 or more; found -0.1."),
    ({"adv_every": 0}, "adv_every must be a whole number, 1 or more; found 0."),
    ({"adv_scope": "batch"}, "adv_scope must be one of vocabulary, example, token; found 'batch'."),
    ({"adv_norm": "l3"}, "adv_norm must be one of l2, linf, max, none; found 'l3'."),
    ({"adv_method": "fgn"}, "There is no attack 'fgn'; registered are: "),
    ({"adv_method": "fgn"}, "Did you mean 'fgm'?"),
    ({"adv_steps": 3}, "adv_steps is given, but the method 'fgm' has no such setting; its own settings are: none."),
    ({"adv_method": "pgd", "adv_steps": 0}, "steps must be a whole number, 1 or more; found 0."),
    ({"adv_kwargs": "{broken"}, "adv_kwargs must be a JSON object; found '{broken'"),
    (
        {"adv_method": "pgd", "adv_steps": 3, "adv_kwargs": '{"steps": 4}'},
        "steps is given twice: adv_steps and adv_kwargs['steps']. Leave one out.",
    ),
    ({"adv_kwargs": '{"lam": 1}'}, "adv_kwargs['lam'] is given, but the method 'fgm' has no such setting"),
    (
        {"adv_scope": "vocabulary", "adv_target": "pixel_values"},
        "adv_scope='vocabulary' exists for token lookups only, and adv_target is 'pixel_values'",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BAD_FLAGS)
def test_a_bad_flag(tmp_path, settings, message):
    with pytest.raises(ValueError, match="Adversarial training can't be configured like this:") as error:
        flags(tmp_path, **settings)
    assert message in str(error.value)


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(ValueError, match="Adversarial training") as error:
        flags(tmp_path, adv_epsilon=-1.0, adv_every=0, adv_scope="batch", adv_method="fgn", adv_weight=-2.0)
    assert str(error.value).count("\n- ") == 5


def test_the_flags_parse_from_a_command_line(tmp_path):
    (args,) = HfArgumentParser(AdversarialTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--adv_epsilon", "0.5", "--adv_method", "pgd", "--adv_steps", "4"]
        + ["--adv_scope", "example", "--adv_warmup", "0.1", "--adv_same_dropout", "--adv_kwargs", '{"step_size": 0.2}']
        + ["--report_to", "none", "--use_cpu"]
    )
    assert args.make_attack() == PGD(epsilon=0.5, scope="example", steps=4, step_size=0.2)
    assert args.adv_same_dropout


def refused(tmp_path, message, model=None, data=None, kind=AdversarialTrainer, change=None, **settings):
    """Training is refused with `message` and leaves the weights alone."""
    model = model or tiny_bert()
    arguments = {"attack": settings.pop("attack")} if "attack" in settings else {}
    trainer = kind(model=model, args=flags(tmp_path, **settings), train_dataset=data or examples(), **arguments)
    if change:
        change(trainer)
    before = weights(model)
    with pytest.raises((ValueError, RuntimeError)) as error:
        trainer.train()
    assert message in str(error.value), str(error.value)
    same(weights(model), before)


def test_an_unknown_target_lists_near_names(tmp_path):
    refused(
        tmp_path,
        "adv_target='encoder.layers.1': BertForSequenceClassification has no such module. "
        "Near names: bert.encoder.layer.1, ",
        adv_target="encoder.layers.1",
    )


def test_a_scope_that_the_target_does_not_have(tmp_path):
    settings = {"adv_scope": "vocabulary", "adv_target": "bert.encoder.layer.0"}
    refused(tmp_path, "adv_scope 'vocabulary' does not exist at adv_target 'bert.encoder.layer.0'", **settings)


def test_a_training_step_that_goes_around_compute_loss(tmp_path):
    class Around(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Attacked(AdversarialTrainerMixin, Around):
        """The mixin in front of it."""

    refused(tmp_path, "Attacked.training_step does not call self.compute_loss", kind=Attacked)


def test_reentrant_checkpointing_switched_on_at_the_model(tmp_path):
    model = tiny_bert()
    getattr(model, f"{CHECKPOINTING}_enable")({"use_reentrant": True})
    refused(tmp_path, "Reentrant gradient checkpointing can't give", model=model, adv_method="pgd")


def test_data_parallel(tmp_path):
    def pretend(trainer):
        trainer.args._n_gpu = 2

    refused(tmp_path, "torch.nn.DataParallel over 2 GPUs is not supported", change=pretend)
    refused(tmp_path, "torchrun --nproc_per_node 2", change=pretend)


@pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_backward(tmp_path, name):
    refused(tmp_path, f"optim='{name}' steps inside the backward pass", optim=name, optim_target_modules="all-linear")


def test_reentrant_checkpointing_with_look_passes(tmp_path):
    refused(
        tmp_path,
        "Write gradient_checkpointing_kwargs={'use_reentrant': False}.",
        adv_method="pgd",
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    )


def test_reentrant_checkpointing_with_a_targeted_attack(tmp_path):
    refused(
        tmp_path,
        "Adversarial training can't start:\n- 'fgm' takes gradients with respect to the perturbation alone",
        adv_targeted="1",
        **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    )


def test_weights_as_an_object_are_refused_as_by_name(tmp_path):
    for target in ("weights", Weights()):
        args = flags(tmp_path, torch_compile=True, adv_method="awp")
        trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), target=target)
        with pytest.raises(ValueError, match="adv_target='weights' can't be compiled"):
            trainer.train()


@pytest.mark.parametrize(("version", "says"), [(1, "- FSDP1 keeps weights flat"), (2, None)])
def test_fsdp1(tmp_path, monkeypatch, version, says):
    """accelerate has no FSDP on CPU, so a Trainer is told that it runs on it."""
    trainer = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path), train_dataset=examples())
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.FSDP)
    monkeypatch.setitem(trainer.accelerator.state.__dict__, "fsdp_plugin", SimpleNamespace(fsdp_version=version))
    if says is None:
        assert list(_of_the_engine(trainer)) == []
        return
    with pytest.raises(ValueError, match=says):
        trainer.train()


def test_a_trainer_that_counts_its_steps(tmp_path):
    class GRPOTrainer(Direct):
        """Only the name matters."""

    refused(tmp_path, "GRPOTrainer counts its training steps", kind=GRPOTrainer)


def test_an_example_split_over_processes(tmp_path):
    def pretend(trainer):
        trainer.get_cp_size = lambda: 2

    refused(tmp_path, "cp_size above 1 splits one example over processes", change=pretend)


def test_deepspeed_with_an_accelerate_that_steps_in_every_backward_pass(tmp_path, monkeypatch):
    from accelerate.utils.deepspeed import DeepSpeedEngineWrapper

    def pretend(trainer):
        # The signature before accelerate 1.8.
        monkeypatch.setattr(DeepSpeedEngineWrapper, "backward", lambda self, loss, **kwargs: None)
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", DistributedType.DEEPSPEED)

    refused(tmp_path, "Install accelerate 1.8 or newer.", change=pretend)


def test_two_problems_of_the_model_come_at_once(tmp_path):
    def pretend(trainer):
        trainer.args._n_gpu = 2

    refused(tmp_path, "has no such module", change=pretend, adv_target="nowhere")
    refused(tmp_path, "DataParallel", change=pretend, adv_target="nowhere")


@pytest.mark.parametrize("start", [0, 2])
def test_inputs_embeds_alone_at_the_first_batch(tmp_path, start):
    data = [{"inputs_embeds": torch.randn(6, 16), "labels": i % 2} for i in range(8)]
    refused(tmp_path, "Write adv_target='inputs_embeds' to perturb that tensor.", data=data, adv_start=start)


@pytest.mark.parametrize("start", [0, 2])
def test_a_target_that_no_forward_pass_reaches(tmp_path, start):
    model = tiny_bert()
    model.spare = torch.nn.Linear(2, 2)
    refused(
        tmp_path,
        "The forward pass never reached the target 'spare' (a module's output): nothing would be perturbed.",
        model=model,
        adv_target="spare",
        adv_start=start,
    )


@pytest.mark.parametrize("trains", [True, False])
def test_a_target_that_the_loss_does_not_depend_on(tmp_path, trains):
    model = tiny_bert()
    model.spare = torch.nn.Linear(16, 2)

    def call_for_nothing(module, args, output):
        model.spare(output[0])

    model.bert.encoder.register_forward_hook(call_for_nothing)
    refused(
        tmp_path,
        "The loss does not depend on the tensor to be perturbed",
        model=model,
        adv_target="spare",
        adv_clean_weight=float(trains),
    )


def test_a_target_that_is_called_a_changing_number_of_times(tmp_path):
    calls = []

    class Changing(AdversarialTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            calls.append(0)
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + (model.get_input_embeddings()(inputs["input_ids"]).sum() if len(calls) % 2 else 0)

    trainer = Changing(model=tiny_bert(), args=flags(tmp_path), train_dataset=examples())
    with pytest.raises(RuntimeError, match="must call the target equally often in every pass of a step"):
        trainer.train()


def test_an_attack_given_twice(tmp_path):
    with pytest.raises(ValueError, match=r"The attack is given twice: .* in the arguments, adv_epsilon, adv_norm\."):
        AdversarialTrainer(
            model=tiny_bert(), args=flags(tmp_path, adv_epsilon=0.5, adv_norm="linf"), attack=FGM(epsilon=1.0)
        )


def test_an_attack_with_bad_numbers():
    with pytest.raises(ValueError, match=r"FGM: epsilon must be a finite number, 0 or more, or 'auto'; found -1\."):
        FGM(epsilon=-1)


def test_a_model_without_a_lookup(tmp_path):
    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(4, 2)

    refused(tmp_path, "Bare has no token lookup at get_input_embeddings()", model=Bare())


def test_a_training_step_that_never_reaches_the_attack(tmp_path):
    class Mine(AdversarialTrainer):
        def training_step(self, model, inputs, *rest):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            self.accelerator.backward(loss)
            return loss.detach()

    trainer = Mine(model=tiny_bert(), args=flags(tmp_path, logging_steps=1), train_dataset=examples(8))
    with pytest.raises(RuntimeError, match="Mine trains without the attack: its training_step never calls"):
        trainer.train()


def test_a_part_of_a_batch_whose_loss_is_computed_in_parts(tmp_path):
    class Splitting(Trainer):
        def training_step(self, model, inputs, *rest):
            inputs = self._prepare_inputs(inputs)
            half = len(inputs["labels"]) // 2
            for part in (slice(0, half), slice(half, None)):
                loss = self.compute_loss(model, {name: value[part] for name, value in inputs.items()}) / 2
                self.accelerator.backward(loss)
            return loss.detach()

    class Mine(AdversarialTrainerMixin, Splitting):
        pass

    arguments = flags(tmp_path, adv_method="partial_fgm", per_device_train_batch_size=8)
    trainer = Mine(model=tiny_bert(), args=arguments, train_dataset=examples(8))
    with pytest.raises(RuntimeError, match="here one of 4 of its 8 examples is"):
        trainer.train()


def test_evaluate_robustness_without_data(tmp_path):
    trainer = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path))
    with pytest.raises(ValueError, match="evaluate_robustness needs a data set"):
        trainer.evaluate_robustness()


def test_the_mixin_is_exported_for_any_trainer():
    assert issubclass(AdversarialTrainer, AdversarialTrainerMixin)
