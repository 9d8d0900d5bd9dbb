"""What goes around an attack: the unit of epsilon, schedules, targets by pattern, what is kept between steps."""

import copy
import re

import pytest
import torch
from models import batches, distance, padded_data, tiny, train, weights
from test_faults import examples, flags, hooks, same, tiny_bert
from transformers import TrainerCallback

from fgm_trainer import AWP, FGM, PGD, SMART, VAT, AdversarialTrainer, FreeLB, TokenAware, loops
from fgm_trainer.checkpoint import STATE_FILE
from fgm_trainer.engine.kept import Kept
from fgm_trainer.perturbation.lookups import mean_embedding_norm
from fgm_trainer.perturbation.target import Site, Target


def trained(path, attack=None, data=None, model=None, **settings):
    model = model or tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    trainer = AdversarialTrainer(
        model=model, args=flags(path, adv_epsilon=None, **settings), train_dataset=data or examples(), attack=attack
    )
    trainer.train()
    return trainer


# The unit of epsilon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [
        FGM(epsilon=0.5),
        PGD(epsilon=0.5, step_size=0.2, scope="example"),
        FreeLB(epsilon=0.5, init=0.3),
        VAT(epsilon=0.5, xi=0.1),
    ],
    ids=lambda a: a.name,
)
def test_an_embedding_is_the_unit_of_all_lengths(tmp_path, attack):
    lookup = tiny_bert().get_input_embeddings().weight
    # Row by row, the padding's zero row left out.
    lengths = [row.norm().item() for row in lookup if row.abs().sum() > 0]
    unit = sum(lengths) / len(lengths)
    given = trained(tmp_path, attack, adv_epsilon_unit="embedding")
    by_hand = trained(tmp_path, attack.in_units(unit))
    for name, weight in given.model.named_parameters():
        torch.testing.assert_close(weight, by_hand.model.get_parameter(name), rtol=0, atol=1e-6)
    absolute = trained(tmp_path, attack)
    assert distance(absolute.model, given.model) > 1e-5
    assert given.state.log_history[0]["adv_delta_norm"] != absolute.state.log_history[0]["adv_delta_norm"]


def test_the_unit_counts_the_scale_of_the_lookup():
    model = tiny("llama")
    lookup = model.get_input_embeddings()
    plain = mean_embedding_norm(model)
    lookup.register_forward_hook(lambda module, args, output: 3.0 * output)
    assert mean_embedding_norm(model) == pytest.approx(3 * plain)


@pytest.mark.usefixtures("resumable")
def test_the_unit_is_measured_once_and_travels_with_the_checkpoint(tmp_path):
    settings = {"adv_epsilon_unit": "embedding", "save_strategy": "steps", "save_steps": 2}
    attack = FGM(epsilon=2.0)
    whole = trained(tmp_path, attack, **settings)
    assert (tmp_path / "checkpoint-2" / STATE_FILE).exists()
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    again = AdversarialTrainer(
        model=model, args=flags(tmp_path, adv_epsilon=None, **settings), train_dataset=examples(), attack=attack
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    same(dict(again.model.state_dict()), dict(whole.model.state_dict()))


def test_a_unit_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"adv_epsilon_unit must be one of absolute, embedding; found 'token'\."):
        flags(tmp_path, adv_epsilon_unit="token")
    with pytest.raises(ValueError, match=r"epsilon_unit must be one of absolute, embedding; found 'token'\."):
        loops.Adversary(tiny_bert(), FGM(epsilon=1.0), epsilon_unit="token")


# Schedules ---------------------------------------------------------------------------------------------------------


class Epsilons(TrainerCallback):
    """The length that was applied, step by step."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.seen.append(logs.get("adv_delta_norm", 0.0))


def lengths(path, schedule, **settings):
    seen = Epsilons()
    args = flags(path, max_steps=10, adv_epsilon=None, **settings)
    attack = FGM(epsilon=2.0, scope="example")
    parts = {"train_dataset": examples(40), "callbacks": [seen], "epsilon_schedule": schedule}
    AdversarialTrainer(model=tiny_bert(), args=args, attack=attack, **parts).train()
    return seen.seen


def test_a_schedule_is_any_function_of_progress(tmp_path):
    assert lengths(tmp_path, lambda p: p) == pytest.approx([2.0 * k / 10 for k in range(10)], rel=1e-5)
    triangle = lengths(tmp_path, lambda p: 1 - abs(2 * p - 1))
    assert triangle == pytest.approx([2.0 * (1 - abs(k / 5 - 1)) for k in range(10)], rel=1e-5)
    every = lengths(tmp_path, lambda p: 1.0, adv_every=3)
    assert every == pytest.approx([2.0 if k % 3 == 0 else 0.0 for k in range(10)], rel=1e-5)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_a_schedule_that_gives_no_epsilon(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"epsilon_schedule must give a finite number, 0 or more; at 0 it gave"):
        lengths(tmp_path, lambda p: wrong)


def test_two_schedules_are_one_too_many(tmp_path):
    with pytest.raises(ValueError, match=r"epsilon_schedule takes the place of adv_start \(0.2\) and adv_warmup"):
        lengths(tmp_path, lambda p: 1.0, adv_start=0.2)


# Targets -----------------------------------------------------------------------------------------------------------


def test_a_pattern_perturbs_several_modules_each_by_its_own_gradient():
    model = tiny("bert")
    data = padded_data(model)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    epsilon = 0.7
    train(ours, data, adv_target="bert.encoder.layer.*", adv_epsilon=epsilon)
    layers = theirs.bert.encoder.layer
    assert len(layers) >= 2
    theirs.train()
    for batch in batches(data, 4):
        theirs.zero_grad()
        tokens = batch["attention_mask"][:, :, None]
        leaves = [torch.zeros(*batch["input_ids"].shape, theirs.config.hidden_size).double() for _ in layers]

        def moved(leaves, batch=batch):
            handles = []
            for layer, leaf in zip(layers, leaves, strict=True):

                def hook(module, args, output, leaf=leaf):
                    return (output[0] + leaf, *output[1:]) if isinstance(output, tuple) else output + leaf

                handles.append(layer.register_forward_hook(hook))
            loss = theirs(**batch).loss
            for handle in handles:
                handle.remove()
            return loss

        loss = moved([leaf.requires_grad_() for leaf in leaves])
        loss.backward()
        deltas = [leaf.grad * tokens for leaf in leaves]
        deltas = [epsilon * d / (d**2).sum((1, 2), keepdim=True).sqrt() for d in deltas]
        moved(deltas).backward()
        with torch.no_grad():
            for weight in theirs.parameters():
                if weight.grad is not None:
                    weight -= 0.1 * weight.grad
    assert distance(ours, theirs) < 1e-9
    assert distance(weights(model), ours) > 1e-3


class Values(Target):
    """What the second layer's attention makes values of, as docs/architecture.md has a target of one's own."""

    def find_sites(self, model):
        module = model.bert.encoder.layer[1].attention.self.value
        return [*self.mask_sites(model, {module}), Site(module, False, self.on_values)]

    def on_values(self, module, args, kwargs, output):
        return self.perturb(module, output)


def test_a_target_of_ones_own(tmp_path):
    found = {}
    for target in ("bert.encoder.layer.1.attention.self.value", Values()):
        args = flags(tmp_path, adv_scope="token")
        trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), target=target)
        trainer.train()
        found[str(type(target))] = trainer.model.state_dict(), trainer.state.log_history[0]["adv_delta_ratio"]
    (by_path, ratio), (own, own_ratio) = found.values()
    assert ratio == own_ratio > 0
    for name, value in by_path.items():
        assert torch.equal(own[name], value)


def test_a_star_does_not_reach_across_a_dot(tmp_path):
    message = r"adv_target='bert.encoder.\*.\*.nothing': .* has no such module"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, adv_target="bert.encoder.*.*.nothing")


def test_weights_are_perturbed_where_they_are_read_and_never_written(tmp_path):
    class Watched(AdversarialTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            loss = super().compute_loss(model, inputs, **kwargs)
            same(before, dict(model.state_dict()))
            return loss

    model = tiny_bert()
    trainer = Watched(model=model, args=flags(tmp_path, adv_method="awp"), train_dataset=examples())
    trainer.train()
    assert trainer.state.log_history[0]["adv_delta_ratio"] == pytest.approx(AWP(epsilon=5e-3).epsilon, rel=1e-4)
    assert sum(hooks(model)) == 0
    assert not [m for m in model.modules() if "weight" in m.__dict__]


def test_weights_are_as_before_when_a_forward_pass_fails(tmp_path):
    model = tiny_bert()
    before = weights(model)
    calls = []

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("injected")

    model.bert.encoder.layer[0].register_forward_hook(fail)
    trainer = AdversarialTrainer(model=model, args=flags(tmp_path, adv_method="awp"), train_dataset=examples())
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    same(before, weights(model))
    assert not [m for m in model.modules() if "weight" in m.__dict__]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adv_target": "weights", "torch_compile": True}, "adv_target='weights' can't be compiled"),
        ({"adv_method": "awp", "adv_scope": "example"}, "adv_scope 'example' does not exist at adv_target 'weights'"),
        ({"adv_method": "awp", "adv_target": "word_embeddings"}, "awp perturbs weights: leave adv_target out"),
        ({"adv_targeted": "2"}, "adv_targeted=2 is no class of the model, which has 2."),
        ({"adv_targeted": "nowhere"}, "adv_targeted='nowhere' is neither a class nor 'least_likely'"),
        ({"adv_targeted": 1, "adv_method": "vat"}, "VAT: targeted must be left out: this method's direction does not"),
        ({"adv_targeted": -1}, "targeted must be a class (0 or more), 'least_likely' or a column; found -1."),
        ({"adv_method": "vat", "adv_clean_weight": 0.0}, "VAT: clean_weight must be above 0"),
        ({"adv_method": "freelb", "adv_clean_weight": 0.5}, "clean_weight has no effect without a clean pass"),
        ({"adv_method": "token_aware", "adv_steps": 1}, "steps must be 2 or more, or nothing is ever remembered"),
        ({"adv_method": "token_aware", "adv_target": "bert.encoder.layer.0"}, "must be a token lookup"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(tmp_path, **settings)


# What is kept between steps ----------------------------------------------------------------------------------------

KEEPING = [TokenAware(epsilon=1.0), SMART(epsilon=0.5, step_size=0.5, sigma=0.1, bregman=1.0)]


@pytest.mark.usefixtures("resumable")
@pytest.mark.parametrize("attack", KEEPING, ids=lambda a: a.name)
def test_resume_with_a_memory_is_bit_equal(tmp_path, attack):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "a", attack, **settings)
    cut = AdversarialTrainer(
        model=tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        args=flags(tmp_path / "a", adv_epsilon=None, **settings),
        train_dataset=examples(),
        attack=attack,
    )
    cut.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    same(dict(cut.model.state_dict()), dict(whole.model.state_dict()))
    # The memory matters: without it the weights are others.
    (tmp_path / "a" / "checkpoint-2" / STATE_FILE).unlink()
    cut.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert distance(cut.model, whole.model) > 1e-7


def test_a_checkpoint_has_the_file_only_where_there_is_something_to_keep(tmp_path):
    trained(tmp_path, FGM(epsilon=1.0), save_strategy="steps", save_steps=2)
    assert not (tmp_path / "checkpoint-2" / STATE_FILE).exists()


@pytest.mark.parametrize("attack", KEEPING, ids=lambda a: a.name)
def test_two_micro_batches_are_one_step_of_the_memory(attack, monkeypatch):
    """The row of a token is the mean over the positions of the whole optimizer step, however it is split."""
    settled = []

    settle = Kept.settle

    def counting(kept, *args):
        settled.append(kept.due)
        settle(kept, *args)

    monkeypatch.setattr(Kept, "settle", counting)
    model = tiny("bert")
    train(model, padded_data(model), batch=2, accumulate=2, extra={"attack": attack})
    assert settled == [True] * 4


@pytest.mark.parametrize("attack", KEEPING, ids=lambda a: a.name)
def test_a_loop_of_ones_own_keeps_the_same(tmp_path, attack):
    """`loops.Adversary` in a plain loop gives the trainer's weights: the same memory at the same steps."""
    model = tiny("bert")
    data = padded_data(model)
    ours, loop = copy.deepcopy(model), copy.deepcopy(model)
    unseeded = copy.copy(attack)
    train(ours, data, extra={"attack": unseeded})
    adversary = loops.Adversary(loop, unseeded)
    adversary._next_seed = iter([hash((42, step, 0)) % 2**63 for step in range(4)]).__next__
    adversary.memory.__dict__.update(attack.new_memory(42).__dict__)
    loop.train()
    for batch in batches(data, 4):
        adversary.backward(batch)
        with torch.no_grad():
            for weight in loop.parameters():
                if weight.grad is not None:
                    weight -= 0.1 * weight.grad
        loop.zero_grad()
    assert distance(ours, loop) < 1e-9
