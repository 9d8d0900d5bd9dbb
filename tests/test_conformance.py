"""Every method at every target in every scope, in a real model: what all of them must keep to."""

import itertools

import pytest
import torch
from models import attack_of
from test_faults import examples, flags, hooks, same, tiny_bert, weights
from test_precision import INPUT_ATTACKS, VISIBLE
from transformers import TrainerCallback
from transformers.data.data_collator import default_data_collator

from fgm_trainer import FGM, AdversarialTrainer
from fgm_trainer.attacks import ATTACKS
from fgm_trainer.perturbation.forward_pass import PerturbedForward
from fgm_trainer.perturbation.geometry import length
from fgm_trainer.perturbation.targets import find_target
from fgm_trainer.robustness import evaluate_robustness

TARGETS = {
    "word_embeddings": ("vocabulary", "example", "token"),
    "bert.encoder.layer.0": ("example", "token"),
    "bert.encoder.layer.*": ("example", "token"),
    "inputs_embeds": ("example", "token"),
}
LOOKUP_ONLY = {"token_aware", "atta"}
EVERY = [
    (name, target, scope)
    for name, (target, scopes) in itertools.product(INPUT_ATTACKS, TARGETS.items())
    for scope in scopes
    if target == "word_embeddings" or name not in LOOKUP_ONLY
]


# Beyond the lookup a few methods stand for all in the default suite.
FAST = {"fgm", "partial_fgm", "pgd"}


def marked(cases):
    slow = [c for c in cases if c[1] != "word_embeddings" and c[0] not in FAST]
    return [pytest.param(*c, marks=pytest.mark.slow) if c in slow else c for c in cases]


def bert():
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def data(target, count=8):
    """The same texts, as embeddings where these are the target."""
    found = examples(count)
    if target != "inputs_embeds":
        return found
    lookup = bert().get_input_embeddings().weight.detach()
    return [
        {"inputs_embeds": lookup[e["input_ids"]], "attention_mask": e["attention_mask"], "labels": e["labels"]}
        for e in found
    ]


@pytest.fixture
def met(monkeypatch):
    """Every perturbed pass: what it added, its units, its attention mask."""
    kept, end = [], PerturbedForward.end

    def keep(self):
        end(self)
        if self._delta is not None:
            kept.append((self.tensor.delta().clone(), self.tensor.units()))

    monkeypatch.setattr(PerturbedForward, "end", keep)
    return kept


class InOrder(AdversarialTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(path, name, target, scope, model=None, settings=None, **parts):
    args = flags(path, **{"max_steps": 2, "adv_epsilon": None, "max_grad_norm": 0.0} | (settings or {}))
    parts |= {"attack": attack_of(name, scope=scope, **VISIBLE.get(name, {})), "target": target}
    return InOrder(model=model or bert(), args=args, train_dataset=data(target), **parts)


def test_something_was_collected():
    assert len(EVERY) == (len(INPUT_ATTACKS) - 2) * 9 + 2 * 3 == 96


@pytest.mark.parametrize(("name", "target", "scope"), marked(EVERY))
def test_training(tmp_path, met, name, target, scope):
    trainer = trainer_of(tmp_path, name, target, scope)
    reach = trainer.attack.reach(trainer.attack.epsilon)
    trainer.train()
    assert met
    masked = 0
    for delta, units in met:
        assert torch.isfinite(delta).all()
        assert delta[~units.padding].any()
        assert not delta[units.padding].any()
        masked += int(units.padding.sum())
        assert (length(delta, trainer.attack.norm, units) <= reach * (1 + 1e-5)).all()
    assert masked, "without padding nothing was shown of it"
    assert sum(hooks(trainer.model)) == 0
    # The same seed, the same run; and it is not the stock one.
    again = trainer_of(tmp_path, name, target, scope)
    again.train()
    same(weights(trainer.model), weights(again.model))
    stock = trainer_of(tmp_path, name, target, scope)
    stock._adv_given = (FGM(epsilon=0.0), None, None)
    stock.train()
    plain = weights(stock.model)
    assert any(not torch.equal(weight, plain[n]) for n, weight in weights(trainer.model).items())


@pytest.mark.parametrize(("name", "target", "scope"), marked(EVERY))
def test_evaluation_leaves_nothing_behind(name, target, scope):
    model = bert().train()
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    before, modes = weights(model), [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    attack = attack_of(name, scope=scope, **VISIBLE.get(name, {}))
    parts = {"target": target, "batch_size": 4, "collate_fn": default_data_collator, "progress": False}
    report = evaluate_robustness(model, data(target), [attack], [0.5, 50.0], **parts)
    assert report == evaluate_robustness(model, data(target), [attack], [0.5, 50.0], **parts)
    same(before, weights(model))
    assert all(torch.equal(w.grad, torch.ones_like(w)) for w in model.parameters())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sum(hooks(model)) == 0


class Grads(TrainerCallback):
    """The gradients that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Divergences are compared with their joint graphs in test_methods.py.
@pytest.mark.parametrize(("name", "target", "scope"), marked([case for case in EVERY if not ATTACKS[case[0]].compares]))
def test_gradients_are_the_sum_of_the_training_passes(tmp_path, met, name, target, scope):
    """What else a method asks for (`GradientPass`, `ForwardPass`) leaves no trace in `.grad`."""
    watch = Grads()
    settings = {"max_steps": 1, "per_device_train_batch_size": 8}
    trainer_of(tmp_path, name, target, scope, callbacks=[watch], settings=settings).train()
    # By hand: the clean loss, and the loss at the perturbations that were trained on.
    model = bert().train()
    trains = {"freelb": 3, "token_aware": 2}.get(name, 1)
    batch = default_data_collator(data(target))
    place = find_target(target, model)
    place.attach(model)
    if trains == 1 and name not in ("partial_fgm", "atta"):
        model(**batch).loss.backward()
    for delta, _ in met[-trains:]:
        calls = place.shared_calls("example")
        for given in (None, delta):
            # The first pass of a step says what the calls are.
            once = place.new_pass(calls, given)
            with place.perturbed(once), once.loss_of(batch):
                loss = model(**batch).loss
            once.end()
        (loss / trains).backward()
    place.detach()
    for weight_name, weight in model.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(watch.grads[weight_name], weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "target", "scope"), marked(EVERY))
def test_a_failing_pass_leaves_weights_and_no_hook(tmp_path, name, target, scope):
    model = bert()
    before, random = weights(model), []

    def fail(module, args, output):
        random.append(1)
        if len(random) == 2:
            raise RuntimeError("injected")

    handle = model.classifier.register_forward_hook(fail)
    trainer = trainer_of(tmp_path, name, target, scope, model)
    with pytest.raises(RuntimeError, match="injected"):
        trainer.train()
    handle.remove()
    same(before, weights(model))
    assert sum(hooks(model)) == 0
    assert "compute_loss" not in vars(trainer)
    assert "backward" not in vars(trainer.accelerator)
