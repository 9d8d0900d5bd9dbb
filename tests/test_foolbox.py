"""foolbox's attacks on what a target perturbs, and ours beside theirs."""

import pytest
import torch
import transformers
from models import batches, padded_data, tiny
from test_images import tiny_vit
from test_robustness import measure, model_and_data

from fgm_trainer import FGM, FGSM, PGD
from fgm_trainer.attacks import Step
from fgm_trainer.perturbation.clipping import valid_range
from fgm_trainer.perturbation.targets import find_target
from fgm_trainer.robustness import Foolbox, Member, evaluate_robustness
from fgm_trainer.robustness.foolbox import _FromValue
from fgm_trainer.robustness.passes import evaluating, passes_of

foolbox = pytest.importorskip("foolbox", reason="`make test-slow` installs it")
pytestmark = [
    pytest.mark.slow,
    # Of eagerpy, on what numpy and torch will rename.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
STEPS = 7
BOTH = {
    "fgm": (FGM(), lambda: foolbox.attacks.L2FastGradientAttack()),
    "fgsm": (FGSM(), lambda: foolbox.attacks.LinfFastGradientAttack()),
    "pgd": (
        PGD(steps=STEPS),
        lambda: foolbox.attacks.L2ProjectedGradientDescentAttack(
            rel_stepsize=2.5 / STEPS, steps=STEPS, random_start=False
        ),
    ),
    "pgd linf": (
        PGD(steps=STEPS, norm="linf"),
        lambda: foolbox.attacks.LinfProjectedGradientDescentAttack(
            rel_stepsize=2.5 / STEPS, steps=STEPS, random_start=False
        ),
    ),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("epsilon", [0.05, 0.5])
def test_ours_are_theirs(name, epsilon):
    model = tiny("bert", dtype=torch.float64).eval()
    (batch,) = batches(padded_data(model, size=6), 6)
    ours, theirs = BOTH[name]
    place = find_target("word_embeddings", model)
    with evaluating(model, place):
        last = passes_of(model, place, batch, ours, Step(epsilon, 0, examples=6), "example")[-1]
        function = _FromValue(model, place, batch)
        clean = function.clean
        found = Foolbox(theirs())._found(function, clean, batch["labels"], epsilon)
        padding = batch["attention_mask"] == 0
        assert padding.any()
        difference = (found - clean - last.forward_pass.tensor.delta()).masked_fill(padding[..., None], 0.0)
    assert difference.abs().max() < 1e-5 * epsilon


def test_a_report_beside_ours_and_nothing_is_touched():
    model, data = model_and_data(30)
    model.train()
    weight = next(model.parameters())
    weight.grad = torch.ones_like(weight)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    attacks = [FGM(), Foolbox(BOTH["fgm"][1]()), Foolbox(foolbox.attacks.L2DeepFoolAttack(), "deepfool")]
    report = measure(model, data, attacks, (0.05, 0.2))
    assert report.scores["fgm"] == report.scores["L2FastGradientAttack"]
    assert report.fell["fgm"] == report.fell["L2FastGradientAttack"]
    assert report.scores["deepfool"][1] < report.clean
    assert torch.equal(torch.get_rng_state(), state)
    assert weight.grad.eq(1).all()
    assert all(
        parameter.requires_grad and (parameter.grad is None or parameter is weight) for parameter in model.parameters()
    )
    assert model.training
    assert measure(model, data, attacks, (0.05, 0.2)) == report


def test_noise_is_seeded():
    model, data = model_and_data(30)
    attacks = [Foolbox(foolbox.attacks.L2RepeatedAdditiveGaussianNoiseAttack(repeats=20))]
    assert measure(model, data, attacks, (0.5,), seed=1) == measure(model, data, attacks, (0.5,), seed=1)


def test_pixels_stay_in_their_range():
    torch.manual_seed(0)
    model = tiny_vit(1).eval()
    data = [{"pixel_values": torch.rand(1, 4, 4), "labels": i % 3} for i in range(12)]
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    attack = Foolbox(BOTH["pgd linf"][1]())
    report = evaluate_robustness(
        model,
        data,
        [PGD(steps=STEPS, norm="linf"), attack],
        [0.3],
        target="pixel_values",
        clip=valid_range((0.0, 1.0)),
        progress=False,
    )
    low, high = min(x.min().item() for x in seen), max(x.max().item() for x in seen)
    assert (low, high) == (0.0, 1.0)
    assert report.scores["pgd-7"] == report.scores["LinfProjectedGradientDescentAttack"]


def test_errors():
    model, data = model_and_data(4)
    attack = Foolbox(BOTH["fgm"][1]())
    with pytest.raises(ValueError, match="names of their own; found L2FastGradientAttack, L2FastGradientAttack"):
        measure(model, data, [attack, attack], (0.1,))
    numbers = tiny("bert", classes=1)
    data = padded_data(numbers, size=4, regression=True)
    with pytest.raises(ValueError, match="foolbox attacks classifiers"):
        measure(numbers, data, [attack], (0.1,))
    tags = [{**row, "labels": [0] * len(row["input_ids"])} for row in padded_data(tiny("bert"), size=4)]
    with pytest.raises(ValueError, match=r"one label an example; here labels are \(\d, 10\)"):
        measure(tagger(), tags, [attack], (0.1,))
    with pytest.raises(ValueError, match="A member's attack is one of fgm_trainer's; found Foolbox"):
        Member(attack)


def tagger():
    return transformers.BertForTokenClassification(tiny("bert").config).double().eval()
