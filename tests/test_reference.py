"""The trainer against the reference: the same weights after several steps."""

import copy

import pytest
import reference
import torch
from models import (
    CLASSIFIERS,
    SEQ2SEQ,
    StockInOrder,
    batches,
    distance,
    padded_data,
    tiny,
    train,
    weights,
)
from torch import nn
from transformers import TrainerCallback

from fgm_trainer.perturbation.geometry import NORMS, SCOPES

TOLERANCE = 1e-9
EPSILON = {"vocabulary": 1.0, "example": 1.0, "token": 0.3}
# The raw gradient is small, a sign or a largest entry of 1 is long.
FACTOR = {"l2": 1.0, "linf": 0.1, "max": 0.3, "none": 20.0}


def both(model, data, scope, *, epsilon, norm="l2", flags=None, **reference_settings):
    """(start, by the trainer, by the reference, the trainer, what the reference saw)."""
    start, ours, theirs = weights(model), copy.deepcopy(model), copy.deepcopy(model)
    trainer = train(ours, data, adv_scope=scope, adv_norm=norm, adv_epsilon=epsilon, **(flags or {}))
    seen = reference.train(theirs, batches(data, 4), scope, epsilon=epsilon, norm=norm, **reference_settings)
    return start, weights(ours), weights(theirs), trainer, seen


def lines(trainer):
    """The log lines of training steps, in order."""
    return [line for line in trainer.state.log_history if "loss" in line]


def check(model, data, scope, **settings):
    start, ours, theirs, trainer, seen = both(model, data, scope, **settings)
    assert distance(ours, theirs) < TOLERANCE
    assert distance(start, ours) > 1e-3, "nothing was trained, so nothing was compared"
    return trainer, seen


def plain(model, data, **settings):
    """The weights after a stock run."""
    model = copy.deepcopy(model)
    train(model, data, trainer=StockInOrder, **settings)
    return weights(model)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", CLASSIFIERS + SEQ2SEQ)
def test_weights_equal_the_reference(name, scope):
    model = tiny(name)
    data = padded_data(model)
    assert any(0 in example["attention_mask"] for example in data)
    trainer, seen = check(model, data, scope, epsilon=EPSILON[scope])
    # The attack matters: without it the weights are others by far more than the tolerance.
    assert distance(plain(model, data), trainer.model) > 1e-5
    for line, (clean, adversarial, length) in zip(lines(trainer), seen, strict=True):
        # Trainer rounds the losses it logs.
        assert line["loss"] == pytest.approx(clean, abs=1e-3)
        assert line["adv_loss"] == pytest.approx(adversarial, abs=1e-3)
        assert line["adv_delta_norm"] == pytest.approx(length, rel=1e-5)
        assert line["adv_skipped"] == 0


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "l2"])
def test_other_norms_equal_the_reference(norm, scope):
    model = tiny("bert")
    check(model, padded_data(model), scope, epsilon=FACTOR[norm] * EPSILON[scope], norm=norm)


@pytest.mark.parametrize("norm", ["l2", "linf", "max"])
@pytest.mark.parametrize("scope", SCOPES)
def test_pgd_equals_a_plain_loop(scope, norm):
    model = tiny("bert")
    data = padded_data(model)
    epsilon = FACTOR[norm] * EPSILON[scope]
    flags = {"adv_method": "pgd", "adv_steps": 3}
    check(model, data, scope, epsilon=epsilon, norm=norm, flags=flags, attack=reference.pgd)
    flags = {"adv_method": "pgd", "adv_steps": 2, "adv_step_size": 0.6 * epsilon}

    def two(place, batch, now, norm):
        return reference.pgd(place, batch, now, norm, steps=2, step_size=0.6 * epsilon)

    check(model, data, scope, epsilon=epsilon, norm=norm, flags=flags, attack=two)


def test_pgd_projects():
    """The loop above really leaves the ball before it is projected, or the projection would be untested."""
    model = tiny("bert")
    batch = batches(padded_data(model), 4)[0]
    place = reference.place_for(model, "example")
    free = reference.pgd(place, batch, float("inf"), "l2", steps=3, step_size=2.5 / 3)
    assert (place.lengths(batch, free) > 1.2).all()
    assert (place.lengths(batch, reference.pgd(place, batch, 1.0, "l2")) < 1 + 1e-9).all()


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_decoder_lookup_is_not_perturbed(name):
    """Moving the shared weight in place moves the decoder's input too: another result, which must not be ours."""
    model = tiny(name)
    data = padded_data(model)
    ours, moved = copy.deepcopy(model), copy.deepcopy(model)
    train(ours, data, adv_scope="vocabulary", adv_epsilon=1.0)
    moved.config.is_encoder_decoder = False
    reference.train(moved, batches(data, 4), "vocabulary", epsilon=1.0)
    assert distance(ours, moved) > 1e-5


@pytest.mark.parametrize("method", ["fgm", "pgd"])
@pytest.mark.parametrize(("weight", "clean_weight"), [(0.5, 1.0), (1.0, 0.5), (1.0, 0.0), (0.3, 0.7)])
def test_weights_of_the_two_losses(weight, clean_weight, method):
    model = tiny("bert")
    trainer, seen = check(
        model,
        padded_data(model),
        "example",
        epsilon=1.0,
        flags={"adv_method": method, "adv_weight": weight, "adv_clean_weight": clean_weight},
        attack={"fgm": reference.fgm, "pgd": reference.pgd}[method],
        weight=weight,
        clean_weight=clean_weight,
    )
    for line, (clean, adversarial, _) in zip(lines(trainer), seen, strict=True):
        # Logged losses are unweighted; without a clean pass `loss` is the first training pass.
        assert line["adv_loss"] == pytest.approx(adversarial, abs=1e-3)
        assert line["loss"] == pytest.approx(clean if clean_weight else adversarial, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "epsilons"),
    [
        ({"adv_start": 2}, [0, 0, 1, 1, 1, 1]),
        ({"adv_start": 0.5}, [0, 0, 0, 1, 1, 1]),
        ({"adv_every": 2}, [1, 0, 1, 0, 1, 0]),
        ({"adv_start": 1, "adv_every": 3}, [0, 1, 0, 0, 1, 0]),
        ({"adv_warmup": 3}, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ({"adv_start": 1, "adv_warmup": 0.5}, [0, 1 / 3, 2 / 3, 1, 1, 1]),
    ],
)
def test_schedule(flags, epsilons):
    model = tiny("bert")
    data = padded_data(model, size=24)
    trainer, _ = check(model, data, "example", epsilon=1.0, flags=flags, epsilon_at=lambda step: epsilons[step])
    for line, epsilon in zip(lines(trainer), epsilons, strict=True):
        assert ("adv_loss" in line) == (epsilon > 0)
        assert line.get("adv_delta_norm", 0) == pytest.approx(epsilon)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_raw_gradient_is_that_of_the_unweighted_loss(scope):
    model = tiny("bert")
    flags = {"adv_weight": 0.5, "adv_clean_weight": 0.25}
    check(model, padded_data(model), scope, epsilon=9.0, norm="none", flags=flags, weight=0.5, clean_weight=0.25)


@pytest.mark.parametrize("scope", SCOPES)
def test_without_a_mask_the_padding_id_says_where_no_token_is(scope):
    """Padding then reaches the loss, and still gets no perturbation."""
    model = tiny("bert")
    data = padded_data(model)
    bare = [{key: example[key] for key in ("input_ids", "labels")} for example in data]
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    train(ours, bare, adv_scope=scope, adv_epsilon=EPSILON[scope])

    def loss_of(model, batch, attention_mask, **inputs):
        return model(**inputs, labels=batch["labels"]).loss

    reference.train(theirs, batches(data, 4), scope, epsilon=EPSILON[scope], loss_of=loss_of)
    assert distance(ours, theirs) < TOLERANCE


class _RandomStates(TrainerCallback):
    """The random state after each step."""

    def __init__(self):
        self.states = []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append(torch.get_rng_state())


def with_dropout(**flags):
    """(weights, random states, log lines) of a run with dropout."""
    model = tiny("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1)
    seen = _RandomStates()
    trainer = train(model, padded_data(model), extra={"callbacks": [seen]}, **flags)
    return weights(model), torch.stack(seen.states), lines(trainer)


def test_epsilon_zero_is_the_stock_trainer_bit_for_bit():
    ours, random_states, logged = with_dropout(adv_epsilon=0.0)
    theirs, stock_random_states, stock_logged = with_dropout(trainer=StockInOrder)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(random_states, stock_random_states)
    assert [line.keys() for line in logged] == [line.keys() for line in stock_logged]
    assert not torch.equal(random_states[0], random_states[1]), "no dropout was drawn"


@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_same_dropout(method):
    flags = {"adv_method": method, "adv_epsilon": 1e-9, "adv_scope": "example"}
    _, stock, _ = with_dropout(trainer=StockInOrder)
    _, shared, shared_lines = with_dropout(adv_same_dropout=True, **flags)
    _, own, own_lines = with_dropout(**flags)
    assert torch.equal(shared, stock)
    assert not torch.equal(own, stock)
    # Trainer rounds `loss` to four places.
    assert all(line["loss"] == pytest.approx(line["adv_loss"], abs=1e-4) for line in shared_lines)
    assert all(abs(line["loss"] - line["adv_loss"]) > 1e-3 for line in own_lines)


class Towers(nn.Module):
    """Two lookups in one forward, of different length; a position without a token still reaches the loss."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.norm = nn.BatchNorm1d(12)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(12, 3)
        self.double()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, other_ids, attention_mask=None, labels=None, left=None, right=None):
        one, other = self.embedding(input_ids), self.embedding(other_ids)
        one = one if left is None else one + left
        other = other if right is None else other + right
        both = torch.cat([torch.tanh(self.mix(one)).mean(1), torch.tanh(self.mix(other)).mean(1)], 1)
        logits = self.head(self.norm(both))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def towers_data(size=16):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, 20, (7,), generator=generator).tolist(),
            "attention_mask": [1] * (4 + n % 4) + [0] * (3 - n % 4),
            "other_ids": torch.randint(0, 20, (5,), generator=generator).tolist(),
            "labels": n % 3,
        }
        for n in range(size)
    ]


def towers_step(model, batch, scope, lr=0.1):
    """One step of FGM at epsilon 1 by hand, for two lookups; the left one has a mask."""
    mask = batch["attention_mask"][:, :, None]
    left = torch.zeros(4, 7, 6, dtype=torch.float64, requires_grad=True)
    right = torch.zeros(4, 5, 6, dtype=torch.float64, requires_grad=True)
    model.zero_grad()
    model(**batch, left=left, right=right)["loss"].backward()
    moves = []
    pairs = [(left.grad * mask, batch["input_ids"]), (right.grad, batch["other_ids"])]
    if scope == "vocabulary":
        table = torch.zeros(20, 6, dtype=torch.float64)
        for gradient, ids in pairs:
            for b in range(ids.shape[0]):
                for position in range(ids.shape[1]):
                    table[ids[b, position]] += gradient[b, position]
        table = table / table.norm()
        moves = [table[ids] for _, ids in pairs]
    elif scope == "example":
        moves = [torch.stack([g / g.norm() for g in gradient]) for gradient, _ in pairs]
    else:
        moves = [torch.stack([torch.stack([p / (p.norm() or 1) for p in g]) for g in gr]) for gr, _ in pairs]
    model(**batch, left=moves[0] * mask, right=moves[1])["loss"].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad


@pytest.mark.parametrize("scope", SCOPES)
def test_two_lookups_in_one_forward(scope):
    ours = Towers()
    theirs = copy.deepcopy(ours)
    data = towers_data()
    train(ours, data, adv_scope=scope, adv_epsilon=1.0, remove_unused_columns=False)
    theirs.train()
    for batch in batches(data, 4):
        towers_step(theirs, batch, scope)
    assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        ({"adv_method": "fgm"}, 2),
        ({"adv_method": "pgd", "adv_steps": 4}, 2),
        ({"adv_method": "pgd", "adv_steps": 4, "adv_clean_weight": 0.0}, 1),
    ],
)
def test_looks_leave_batch_norm_statistics(flags, passes):
    """Only training passes update running statistics: their number, and their value from a replay of those passes."""
    ours = Towers()
    data = towers_data()
    seen = []
    # What a training pass normalised; a look pass has the flag off.
    ours.norm.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach().clone()) if module.track_running_stats else None
    )
    train(ours, data, adv_scope="example", adv_epsilon=1.0, remove_unused_columns=False, **flags)
    assert ours.norm.num_batches_tracked == 4 * passes
    assert len(seen) == 4 * passes
    replay = nn.BatchNorm1d(12).double().train()
    for values in seen:
        replay(values)
    assert torch.equal(replay.running_mean, ours.norm.running_mean)
    assert torch.equal(replay.running_var, ours.norm.running_var)
    assert ours.norm.track_running_stats


def test_padding_id_that_is_also_a_token():
    """GPT-2 style: pad is eos. Masked positions get nothing, the same id under the mask is a token like any other."""
    model = tiny("bert", pad_token_id=None)
    data = padded_data(tiny("bert"))
    for example in data:
        last = sum(example["attention_mask"]) - 1
        example["input_ids"][last] = 7
        example["input_ids"][last + 1 :] = [7] * (len(example["input_ids"]) - last - 1)
    for scope in SCOPES:
        check(model, data, scope, epsilon=EPSILON[scope])


def test_masked_positions_get_nothing_even_where_they_reach_the_loss():
    """A model that averages over padding too: the gradient there is not zero, the perturbation is."""
    torch.manual_seed(0)
    model = Towers()
    batch = batches(towers_data(), 4)[0]
    left = torch.zeros(4, 7, 6, dtype=torch.float64, requires_grad=True)
    model(**batch, left=left)["loss"].backward()
    assert (left.grad[batch["attention_mask"] == 0].abs().sum(-1) > 0).all()
    for scope in SCOPES:
        outputs = []
        fresh = copy.deepcopy(model)
        fresh.mix.register_forward_pre_hook(lambda module, args, outputs=outputs: outputs.append(args[0].detach()))
        train(fresh, towers_data(4), adv_scope=scope, adv_epsilon=1.0, remove_unused_columns=False)
        moved = (outputs[2] - outputs[0]).abs().sum(-1) > 0
        assert torch.equal(moved, batch["attention_mask"].bool())
