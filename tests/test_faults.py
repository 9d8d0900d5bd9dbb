"""Faults at every point of a step leave weights, earlier gradients, hooks and flags as before the step."""

import copy
import os

import pytest
import torch
from models import fixed
from safetensors.torch import load_file
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from fgm_trainer import PGD, AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.arguments import AdversarialArguments
from fgm_trainer.perturbation.forward_pass import PerturbedForward


def tiny_bert(**settings):
    set_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=32, **shape | settings))


def tiny_bart(kind=BartForSequenceClassification, **settings):
    set_seed(0)
    shape = {"d_model": 16, "max_position_embeddings": 32, "eos_token_id": 2, "num_labels": 2}
    for side in ("encoder", "decoder"):
        shape |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    return kind(BartConfig(vocab_size=50, **shape | settings))


def examples(count=16, length=8):
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 50, (length,), generator=draw),
            "attention_mask": torch.tensor([1] * (length - i % 3) + [0] * (i % 3)),
            "labels": i % 2,
        }
        for i in range(count)
    ]


LOOKUP = "bert.embeddings.word_embeddings.weight"


def flags(path, kind=AdversarialTrainingArguments, **settings):
    common = {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    if issubclass(kind, AdversarialArguments):
        settings = fixed(**settings)
    return kind(**common | settings)


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Fault:
    """Raises in the pass-th forward pass of step `step` counted from the start, before, in or after it."""

    def __init__(self, trainer, error, at_pass, where):
        self.count, self.error, self.at_pass = 0, error, at_pass
        model = trainer.model
        if where == "before":
            model.register_forward_pre_hook(self.on_call)
        elif where == "inside":
            model.bert.encoder.layer[1].register_forward_hook(self.on_call)
        elif where == "in a leaf":
            leaf = model.bert.pooler.dense
            forward = leaf.forward

            def interrupted(values):
                self.on_call()
                return forward(values)

            leaf.forward = interrupted
        else:
            backward = trainer.accelerator.backward

            def after(*args, **kwargs):
                backward(*args, **kwargs)
                self.on_call()

            trainer.accelerator.backward = after

    def on_call(self, *args):
        self.count += 1
        if self.count == self.at_pass:
            raise self.error("injected")


@pytest.mark.parametrize("where", ["before", "inside", "in a leaf", "after"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at_pass", [1, 2, 3, 4])
@pytest.mark.parametrize("method", ["fgm", "pgd", "awp"])
def test_a_fault_leaves_weights_hooks_and_flags_as_before_the_step(tmp_path, method, where, error, at_pass):
    model = tiny_bert()
    trainer = AdversarialTrainer(model=model, args=flags(tmp_path, adv_method=method), train_dataset=examples())
    Fault(trainer, error, at_pass, where)
    before_hooks = hooks(model)
    seen = {}
    begin = trainer.callback_handler.on_step_begin

    def remember(*args, **kwargs):
        seen["weights"] = weights(model)
        return begin(*args, **kwargs)

    trainer.callback_handler.on_step_begin = remember
    with pytest.raises(error, match="injected"):
        trainer.train()
    same(weights(model), seen["weights"])
    assert hooks(model) == before_hooks
    assert trainer.accelerator.sync_gradients
    assert "compute_loss" not in vars(trainer)
    # What a module reads is the parameter that `state_dict` holds.
    assert all(getattr(m, n) is p for m in model.modules() for n, p in m.named_parameters(recurse=False))


@pytest.mark.parametrize("where", ["before", "inside", "after"])
def test_a_fault_in_the_clean_pass_leaves_gradients_and_random_state_as_stock_does(tmp_path, where):
    after = []
    for kind, arguments in ((Trainer, TrainingArguments), (AdversarialTrainer, AdversarialTrainingArguments)):
        trainer = kind(model=tiny_bert(), args=flags(tmp_path, arguments), train_dataset=examples())
        Fault(trainer, RuntimeError, 1, where)
        with pytest.raises(RuntimeError, match="injected"):
            trainer.train()
        gradients = {n: None if p.grad is None else p.grad.clone() for n, p in trainer.model.named_parameters()}
        after.append((gradients, torch.get_rng_state()))
    (stock, stock_state), (ours, state) = after
    assert torch.equal(stock_state, state)
    # The lookup's weight gets the gradients of all passes with the last one.
    assert ours.pop(LOOKUP) is None
    stock.pop(LOOKUP)
    for name, gradient in stock.items():
        assert (gradient is None) == (ours[name] is None), name
        if gradient is not None:
            assert torch.equal(gradient, ours[name]), name


@pytest.mark.parametrize("where", ["before", "inside"])
def test_a_fault_in_the_second_pass_leaves_the_gradients_of_the_first(tmp_path, where):
    """Only the clean pass's gradients are there: what stock has after one backward pass."""
    stock = Trainer(model=tiny_bert(), args=flags(tmp_path, TrainingArguments), train_dataset=examples())
    Fault(stock, RuntimeError, 1, "after")
    ours = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path), train_dataset=examples())
    Fault(ours, RuntimeError, 2, where)
    for trainer in (stock, ours):
        set_seed(1)
        with pytest.raises(RuntimeError, match="injected"):
            trainer.train()
    for (name, one), (_, other) in zip(stock.model.named_parameters(), ours.model.named_parameters(), strict=True):
        if name == LOOKUP:
            # It gets the gradients of all passes with the last one.
            assert other.grad is None
        else:
            assert torch.equal(one.grad, other.grad), name


def test_auto_find_batch_size_recovers_from_out_of_memory_in_the_second_pass(tmp_path):
    model = tiny_bert()
    args = flags(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=8)
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=examples())
    sizes, start = [], weights(model)

    def out_of_memory(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))
        if sizes == [8, 8]:
            same(weights(model), start)
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(out_of_memory, with_kwargs=True)
    trainer.train()
    assert sizes[:2] == [8, 8]
    assert sizes[2] < 8
    assert trainer.state.global_step == 4
    # The rest is what a run that starts at the smaller batch gives.
    fresh = AdversarialTrainer(
        model=tiny_bert(),
        args=flags(tmp_path, per_device_train_batch_size=sizes[2]),
        train_dataset=examples(),
    )
    fresh.train()
    assert fresh.state.global_step == 4


def poison(monkeypatch, value, rows):
    """Makes the gradient that arrives at the embeddings `value` in the given rows, in the clean pass of each step."""
    calls, meet = [], PerturbedForward.perturb

    def set_rows(gradient):
        gradient = gradient.clone()
        gradient[rows] = value
        return gradient

    def on_output(self, *args):
        calls.append(0)
        output = meet(self, *args).clone()
        if len(calls) % 2 == 1:
            output.register_hook(set_rows)
        return output

    monkeypatch.setattr(PerturbedForward, "perturb", on_output)


@pytest.mark.parametrize("scope", ["vocabulary", "example", "token"])
def test_a_gradient_that_is_not_finite_at_padding_alone_is_no_skipped_step(tmp_path, monkeypatch, scope):
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    poison(monkeypatch, float("nan"), (slice(None), slice(-1, None)))
    data = [row | {"attention_mask": [1] * (len(row["input_ids"]) - 1) + [0]} for row in examples()]
    trainer = AdversarialTrainer(model=model, args=flags(tmp_path, max_steps=1, adv_scope=scope), train_dataset=data)
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert line["adv_skipped"] == 0
    assert line["adv_delta_norm"] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scope", ["vocabulary", "example", "token"])
def test_a_non_finite_gradient_gives_no_perturbation_in_its_unit_and_is_counted(tmp_path, monkeypatch, value, scope):
    model = tiny_bert()
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    poison(monkeypatch, value, slice(0, 1))
    trainer = AdversarialTrainer(
        model=model, args=flags(tmp_path, max_steps=1, adv_scope=scope), train_dataset=examples()
    )
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert line["adv_skipped"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    # One of four examples is hit: the whole micro-batch is one unit in scope vocabulary.
    expected = {"vocabulary": 0.0, "example": 0.75}.get(scope)
    if expected is not None:
        assert line["adv_delta_norm"] == pytest.approx(expected, abs=1e-6)


def test_a_saved_checkpoint_has_exactly_the_stock_keys_and_the_model_no_hook(tmp_path):
    stock = Trainer(model=tiny_bert(), args=flags(tmp_path / "a", TrainingArguments), train_dataset=examples())
    ours = AdversarialTrainer(
        model=tiny_bert(),
        args=flags(tmp_path / "b", save_strategy="steps", save_steps=2, adv_method="pgd"),
        train_dataset=examples(),
    )
    before = hooks(ours.model)
    stock.train()
    stock.save_model()
    ours.train()
    saved = load_file(tmp_path / "b" / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == load_file(tmp_path / "a" / "model.safetensors").keys()
    same(saved, {k: v for k, v in weights(ours.model).items() if k in saved})
    assert hooks(ours.model) == before


@pytest.mark.usefixtures("resumable")
@pytest.mark.parametrize("attack", [{}, {"adv_method": "pgd"}, {"adv_method": "noise"}, {"adv_warmup": 0.9}])
def test_resume_is_bit_equal_to_an_uninterrupted_run(tmp_path, attack):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2} | attack
    whole = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path / "a", **settings), train_dataset=examples(40))
    whole.train()
    resumed = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path / "a", **settings), train_dataset=examples(40))
    resumed.train(resume_from_checkpoint=os.path.join(tmp_path, "a", "checkpoint-3"))
    same(weights(whole.model), weights(resumed.model))
    lines = [[h.get("adv_loss") for h in t.state.log_history if "adv_loss" in h] for t in (whole, resumed)]
    assert lines[0] == lines[1]


def test_load_best_model_at_end(tmp_path):
    args = flags(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), eval_dataset=examples(8))
    trainer.train()
    best = load_file(os.path.join(trainer.state.best_model_checkpoint, "model.safetensors"))
    same({k: v for k, v in weights(trainer.model).items() if k in best}, best)


def test_epsilon_zero_is_the_stock_trainer_bit_for_bit(tmp_path):
    stock = Trainer(model=tiny_bert(), args=flags(tmp_path, TrainingArguments), train_dataset=examples())
    ours = AdversarialTrainer(model=tiny_bert(), args=flags(tmp_path, adv_epsilon=0.0), train_dataset=examples())
    states = []
    for trainer in (stock, ours):
        set_seed(7)
        trainer.train()
        states.append(torch.get_rng_state())
    same(weights(stock.model), weights(ours.model))
    assert torch.equal(*states)
    names = [[sorted(h) for h in t.state.log_history] for t in (stock, ours)]
    assert names[0] == names[1]


def test_training_twice_and_evaluating_between_leaves_nothing_behind(tmp_path):
    model = tiny_bert()
    before = hooks(model)
    trainer = AdversarialTrainer(
        model=model, args=flags(tmp_path), train_dataset=examples(), eval_dataset=examples(8), attack=None
    )
    trainer.train()
    kept = copy.deepcopy(weights(model))
    report = trainer.evaluate_robustness(attacks=[PGD(epsilon=1.0, steps=2)], epsilons=[0.1, 0.5])
    same(weights(model), kept)
    assert hooks(model) == before
    assert report.examples == 8
    trainer.train()
    assert hooks(model) == before


def test_the_ratio_is_to_the_tokens_and_not_to_the_padding(tmp_path):
    model = tiny_bert()
    row = examples(3)[2]
    values = model.bert.embeddings.word_embeddings(row["input_ids"]).detach() * row["attention_mask"].unsqueeze(-1)
    settings = flags(tmp_path, max_steps=1, adv_scope="example")
    trainer = AdversarialTrainer(model=model, args=settings, train_dataset=[row] * 8)
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert line["adv_delta_ratio"] == pytest.approx(line["adv_delta_norm"] / values.norm().item(), rel=1e-5)


def test_what_the_valid_range_cuts_off_padding_is_no_part_of_the_logged_length(tmp_path):
    rows = []
    lookup = tiny_bert().bert.embeddings.word_embeddings
    for row in examples(8):
        values = 0.1 * lookup(row["input_ids"]).detach()
        values[~row["attention_mask"].bool()] = 3.0
        rows.append({"inputs_embeds": values, "attention_mask": row["attention_mask"], "labels": row["labels"]})
    assert any((row["inputs_embeds"] == 3).any() for row in rows)
    settings = flags(tmp_path, max_steps=1, adv_target="inputs_embeds", adv_epsilon=0.01, adv_clip=[-1.0, 1.0])
    trainer = AdversarialTrainer(model=tiny_bert(), args=settings, train_dataset=rows)
    trainer.train()
    line = next(h for h in trainer.state.log_history if "adv_loss" in h)
    assert line["adv_delta_norm"] == pytest.approx(0.01, rel=1e-4)
