"""What only a GPU shows: its figures are the processor's, a real GradScaler, nothing that a step waits for."""

import warnings

import pytest
import torch
from models import tiny
from test_faults import examples, flags, tiny_bert, weights
from transformers import Trainer, TrainingArguments

from fgm_trainer import ATTA, FGM, PGD, SMART, AdversarialTrainer, TokenAware
from fgm_trainer.robustness import evaluate_robustness

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: `make bench-gpu` runs it there")

# The others draw noise, which each kind of device draws in its own way.
WITHOUT_NOISE = ["fgm", "partial_fgm", "pgd", "awp"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trained(path, model, **settings):
    trainer = AdversarialTrainer(model=model, args=flags(path, **settings), train_dataset=examples())
    trainer.train()
    return trainer


@pytest.mark.parametrize("epsilon", [0.1, "auto"])
@pytest.mark.parametrize("method", WITHOUT_NOISE)
def test_weights_are_those_of_the_processor(tmp_path, method, epsilon):
    start = weights(tiny_bert(**NO_DROPOUT).double())
    on_gpu, on_cpu = (
        weights(
            trained(
                tmp_path, tiny_bert(**NO_DROPOUT).double(), adv_method=method, adv_epsilon=epsilon, use_cpu=use_cpu
            ).model.cpu()
        )
        for use_cpu in (False, True)
    )
    assert any(not torch.equal(value, start[name]) for name, value in on_cpu.items())
    for name, value in on_gpu.items():
        torch.testing.assert_close(value, on_cpu[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("epsilon", [0.1, "auto"])
@pytest.mark.parametrize("method", WITHOUT_NOISE)
def test_a_loss_scale_is_divided_out(tmp_path, method, epsilon):
    settings = {"adv_method": method, "adv_epsilon": epsilon, "adv_warmup": 0, "use_cpu": False, "max_steps": 8}
    half, single = (trained(tmp_path, tiny_bert(**NO_DROPOUT), fp16=fp16, **settings) for fp16 in (True, False))
    assert half.accelerator.scaler.get_scale() > 1
    lengths = [[e["adv_delta_norm"] for e in t.state.log_history if "adv_delta_norm" in e] for t in (half, single)]
    assert min(lengths[1]) > 0
    assert lengths[0] == pytest.approx(lengths[1], rel=0.05)


@pytest.mark.parametrize("epsilon", [0.1, "auto"])
@pytest.mark.parametrize("method", [*WITHOUT_NOISE, "freelb", "vat"])
def test_a_step_waits_no_more_often_than_its_stock_passes(tmp_path, method, epsilon):
    def waits(kind, arguments, **settings):
        args = flags(tmp_path, arguments, logging_strategy="no", use_cpu=False, **settings)
        trainer = kind(model=tiny_bert(), args=args, train_dataset=examples())
        step, seen = trainer.training_step, []

        def watched(*inner, **kwargs):
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loss = step(*inner, **kwargs)
            torch.cuda.set_sync_debug_mode("default")
            seen.append(sum("synchronizing" in str(each.message) for each in caught))
            return loss

        trainer.training_step = watched
        trainer.train()
        # What is looked up once, in the first step, is no wait of every step.
        return seen[-1]

    stock = waits(Trainer, TrainingArguments)
    ours = waits(AdversarialTrainer, type(flags(tmp_path)), adv_method=method, adv_epsilon=epsilon)
    assert ours <= 6 * stock


@pytest.mark.parametrize("attacks", [[PGD(epsilon=1.0, steps=5)], "strong"])
def test_an_evaluation_is_the_processor_s(attacks):
    torch.manual_seed(0)
    model = tiny("bert")
    rows = [{"input_ids": torch.randint(5, 30, (8,)), "labels": number % 3} for number in range(24)]
    reports = [evaluate_robustness(model.to(d), rows, attacks, [0.1, 1.0], progress=False) for d in ("cuda", "cpu")]
    assert reports[0].clean == reports[1].clean
    assert reports[0].scores == reports[1].scores


@pytest.mark.usefixtures("resumable")
@pytest.mark.parametrize("attack", [TokenAware(epsilon=1.0), SMART(epsilon=0.5, bregman=1.0), ATTA(epsilon=1.0), FGM()])
def test_what_is_remembered_comes_back_to_the_gpu(tmp_path, attack):
    def trainer():
        settings = {"adv_epsilon": None, "use_cpu": False, "max_steps": 9, "save_strategy": "steps", "save_steps": 7}
        args = flags(tmp_path, **settings)
        return AdversarialTrainer(model=tiny_bert(**NO_DROPOUT), args=args, train_dataset=examples(), attack=attack)

    whole, cut = trainer(), trainer()
    whole.train()
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(value, weights(cut.model)[name], rtol=1e-5, atol=1e-6)
