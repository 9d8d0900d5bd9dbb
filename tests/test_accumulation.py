"""What depends on how a batch is split into micro-batches, and what does not."""

import copy

import pytest
import reference
import torch
from models import batches, distance, padded_data, tiny, train, weights

from fgm_trainer import PGD, Noise

SPLITS = [(8, 1), (4, 2), (2, 4)]
EPSILON = {"vocabulary": 1.0, "example": 1.0, "token": 0.3}


def shared_loss(outputs, labels, num_items_in_batch=None):
    """The mean over an optimizer step of 8 examples: right in every release, whatever Trainer counts."""
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / 8


def reference_loss(model, batch, **inputs):
    return shared_loss(model(**inputs), batch["labels"])


def run(model, data, batch, accumulate, **flags):
    model = copy.deepcopy(model)
    extra = {"compute_loss_func": shared_loss, **flags.pop("extra", {})}
    trainer = train(model, data, batch=batch, accumulate=accumulate, extra=extra, **flags)
    assert trainer.state.global_step == len(data) / 8
    return weights(model), trainer


@pytest.mark.parametrize("method", ["fgm", "pgd"])
@pytest.mark.parametrize("scope", ["example", "token"])
def test_no_split_changes_the_result(scope, method):
    model = tiny("bert")
    data = padded_data(model, size=32)
    flags = {"adv_scope": scope, "adv_epsilon": EPSILON[scope], "adv_method": method}
    one, two, four = (run(model, data, *split, **flags) for split in SPLITS)
    assert distance(one[0], two[0]) < 1e-9
    assert distance(one[0], four[0]) < 1e-9
    assert distance(one[0], weights(model)) > 1e-3
    for lines in zip(*(trainer.state.log_history[:-1] for _, trainer in (one, two, four)), strict=True):
        for key in ("adv_delta_norm", "adv_delta_ratio"):
            assert lines[1][key] == pytest.approx(lines[0][key], rel=1e-5)
            assert lines[2][key] == pytest.approx(lines[0][key], rel=1e-5)


@pytest.mark.parametrize("method", ["fgm", "pgd"])
@pytest.mark.parametrize(("batch", "accumulate"), SPLITS)
def test_vocabulary_is_the_reference_for_each_micro_batch(batch, accumulate, method):
    model = tiny("bert")
    data = padded_data(model, size=32)
    ours, trainer = run(model, data, batch, accumulate, adv_scope="vocabulary", adv_epsilon=1.0, adv_method=method)
    theirs = copy.deepcopy(model)
    seen = reference.train(
        theirs,
        batches(data, batch),
        "vocabulary",
        epsilon=1.0,
        accumulate=accumulate,
        share=1.0,
        loss_of=reference_loss,
        attack={"fgm": reference.fgm, "pgd": reference.pgd}[method],
    )
    assert distance(ours, weights(theirs)) < 1e-9
    lengths = [length for _, _, length in seen]
    for step, line in enumerate(trainer.state.log_history[:-1]):
        own = lengths[step * accumulate : (step + 1) * accumulate]
        assert line["adv_delta_norm"] == pytest.approx(sum(own) / accumulate, rel=1e-5)


def test_vocabulary_does_depend_on_the_split():
    """So says the definition: the micro-batch is the unit. It also shows that the tests above can tell."""
    model = tiny("bert")
    data = padded_data(model, size=32)
    one, two = (run(model, data, *split, adv_scope="vocabulary", adv_epsilon=1.0)[0] for split in SPLITS[:2])
    assert distance(one, two) > 1e-5


@pytest.mark.parametrize("scope", ["vocabulary", "example", "token"])
def test_noise_is_seeded(scope):
    model = tiny("bert")
    data = padded_data(model, size=32)
    flags = {"adv_scope": scope, "adv_epsilon": EPSILON[scope], "adv_method": "noise"}
    first, again = (run(model, data, 4, 2, **flags)[0] for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other, _ = run(model, data, 4, 2, seed=7, **flags)
    assert distance(first, other) > 1e-9


def test_noise_differs_from_micro_batch_to_micro_batch():
    """Each draws its own: with equal data in both micro-batches, equal noise would go unnoticed."""
    seen = []

    class Spy(Noise):
        def passes(self, step):
            seen.append(step.seed)
            return super().passes(step)

    model = tiny("bert")
    trainer_flags = {"extra": {"attack": Spy(epsilon=1.0, scope="example")}}
    run(model, padded_data(model, size=32), 2, 4, **trainer_flags)
    assert len(seen) == len(set(seen)) == 16
    assert all(0 <= seed < 2**63 for seed in seen)


def test_uneven_micro_batches():
    """The last optimizer step has fewer examples: scope example still equals one batch of them."""
    model = tiny("bert")
    data = padded_data(model, size=8)
    attack = PGD(epsilon=1.0, scope="example", steps=2)
    three = run(model, data, 3, 3, extra={"attack": attack})[0]
    one = run(model, data, 8, 1, extra={"attack": attack})[0]
    assert distance(three, one) < 1e-9
