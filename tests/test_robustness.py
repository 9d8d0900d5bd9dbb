"""Accuracy under attack, against a loop that takes one example at a time."""

import copy
import json
import re
from itertools import pairwise

import pytest
import reference
import torch
from models import AdversarialInOrder, batches, padded_data, tiny, train
from torch import nn
from torch.utils.data import DataLoader

from fgm_trainer import FGM, PGD, Noise, PartialFGM
from fgm_trainer.robustness import (
    ATTACKS_TO_TRY,
    EPSILONS,
    evaluate_robustness,
)

GRID = (0.05, 0.1, 0.3, 1.0)


def model_and_data(size=40, **settings):
    """A model, and data of which it gets about four in five right."""
    model = tiny("bert", **settings)
    data = padded_data(model, size=size, regression=settings.get("classes") == 1)
    if settings.get("classes") == 1:
        return model, data
    for number, (example, batch) in enumerate(zip(data, batches(data, 1), strict=True)):
        example["labels"] = (model(**batch).logits.argmax().item() + (number % 5 == 0)) % 3
    return model, data


def measure(model, data, attacks, epsilons=GRID, **settings):
    return evaluate_robustness(model, data, attacks, epsilons, progress=False, **{"batch_size": 8, **settings})


def logits_at(model, batch, delta):
    embeds = model.get_input_embeddings()(batch["input_ids"]) + delta * batch["attention_mask"][:, :, None]
    with torch.no_grad():
        return model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[0]


def plain_loop(model, data, attack, epsilons, scope="example", norm="l2"):
    """(clean accuracy, accuracy at each epsilon), each example by itself, small epsilons first."""
    right = 0
    standing = [0] * len(epsilons)
    for batch in batches(data, 1):
        place = reference.AtInput(model, scope)
        label = batch["labels"].item()
        if logits_at(model, batch, place.zero(batch)).argmax().item() != label:
            continue
        right += 1
        for i, epsilon in enumerate(epsilons):
            delta = attack(place, batch, epsilon, norm)
            if logits_at(model, batch, delta).argmax().item() != label:
                break
            standing[i] += 1
    return right / len(data), [count / len(data) for count in standing]


def ten_steps(place, batch, epsilon, norm):
    return reference.pgd(place, batch, epsilon, norm, steps=10)


@pytest.mark.parametrize(("attack", "plain"), [(FGM(), reference.fgm), (PGD(steps=10), ten_steps)], ids=["fgm", "pgd"])
@pytest.mark.parametrize(
    ("scope", "norm", "factor"),
    [("example", "l2", 1), ("token", "l2", 0.3), pytest.param("example", "linf", 0.1, marks=pytest.mark.slow)],
)
def test_equals_a_plain_loop(attack, plain, scope, norm, factor):
    model, data = model_and_data()
    grid = [factor * epsilon for epsilon in GRID]
    given = type(attack)(**{**vars(attack), "scope": scope, "norm": norm})
    report = measure(model, data, [given], grid)
    clean, accuracies = plain_loop(model, data, plain, grid, scope, norm)
    (found,) = report.scores.values()
    assert report.clean == pytest.approx(clean)
    assert found == pytest.approx(accuracies)
    assert report.examples == len(data)
    assert report.epsilons == tuple(grid)
    assert report.metric == "accuracy"
    assert report.pearson is None
    assert clean == 0.8
    assert len(set(found)) > 2, "the curve is flat, so the test shows little"


def test_the_scope_is_example_where_none_is_named():
    model, data = model_and_data()
    assert measure(model, data, [FGM()]).scores == measure(model, data, [FGM(scope="example")]).scores
    assert measure(model, data, [FGM()]).scores != measure(model, data, [FGM(scope="token")]).scores


def test_the_curve_never_rises():
    model, data = model_and_data()
    grid = (0.0, 0.1, 0.3, 1.0, 9.0, 100.0)
    attacks = [Noise(), FGM(), PGD(steps=3), FGM(norm="linf"), FGM(scope="token"), FGM(norm="none")]
    report = measure(model, data, attacks, grid)
    assert len(report.scores) == len(attacks)
    for curve in report.scores.values():
        assert curve[0] == report.clean
        assert all(later <= earlier for earlier, later in pairwise(curve))
    # Without the rule it would rise: at some epsilon an example stands that fell at a smaller one.
    alone = [measure(model, data, attacks, (epsilon,)).scores for epsilon in grid]
    assert any(one[name][0] < other[name][0] for name in report.scores for one, other in pairwise(alone))
    for name, curve in report.scores.items():
        assert all(together <= single[name][0] for together, single in zip(curve, alone, strict=True))


def test_stronger_attacks_and_noise():
    model, data = model_and_data()
    report = measure(model, data, [Noise(), FGM(), PGD(steps=10)], (1.0,))
    assert list(report.scores) == ["noise", "fgm", "pgd-10"]
    noise, fgm, pgd = (report.scores[name][0] for name in report.scores)
    assert report.clean >= noise > fgm > pgd


def test_deterministic_and_the_order_of_epsilons_does_not_matter():
    model, data = model_and_data()
    attacks = [Noise(), FGM(), PGD(steps=3)]
    first = measure(model, data, attacks, seed=3)
    torch.rand(7)
    assert measure(model, data, attacks, seed=3) == first
    assert measure(model, data, attacks, tuple(reversed(GRID)) + GRID, seed=3) == first
    noises = {measure(model, data, [Noise()], (3.0, 6.0), seed=seed).scores["noise"] for seed in range(6)}
    assert len(noises) > 1, "the seed counts for nothing"


@pytest.mark.parametrize("attack", [FGM(), PGD(steps=4), FGM(scope="token", epsilon=1.0), FGM(norm="linf")])
def test_the_batch_size_does_not_matter(attack):
    model, data = model_and_data()
    reports = [measure(model, data, [attack], batch_size=size) for size in (1, 7, 40, 100)]
    assert all(report == reports[0] for report in reports)


def fingerprint(model):
    """Everything that the evaluation must leave as it was."""
    return (
        {n: p.detach().clone() for n, p in model.state_dict().items()},
        {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        torch.get_rng_state(),
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return one == other


def prepared():
    """A model in the middle of something: gradients, modules in both modes, dropout, a hook of its own."""
    model, data = model_and_data(hidden_dropout_prob=0.3)
    model.train()
    model.bert.encoder.layer[0].eval()
    model(**batches(data, 4)[0]).loss.backward()
    model.classifier.weight.grad = None
    model.classifier.bias.requires_grad_(False)
    model.bert.register_forward_hook(lambda module, args, output: None)
    return model, data


def test_nothing_is_touched():
    model, data = prepared()
    before = fingerprint(model)
    report = measure(model, data, [Noise(), FGM(), PGD(steps=3)])
    assert all(map(same, before, fingerprint(model)))
    model.eval()
    assert measure(model, data, [Noise(), FGM(), PGD(steps=3)]) == report


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_touched_by_an_exception_either(error):
    model, data = prepared()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 5:
            raise error("injected")

    handle = model.bert.encoder.layer[1].register_forward_pre_hook(fail)
    before = fingerprint(model)
    with pytest.raises(error, match="injected"):
        measure(model, data, [FGM(), PGD(steps=3)])
    assert all(map(same, before, fingerprint(model)))
    handle.remove()


def test_a_method_for_a_part_of_the_batch_attacks_every_example():
    model, data = model_and_data()
    expected = measure(model, data, [FGM()]).scores["fgm"]
    assert measure(model, data, [PartialFGM()]).scores["partial_fgm"] == expected
    assert expected[-1] < expected[0]


def test_epsilons_that_are_near_to_each_other_have_names_of_their_own():
    model, data = model_and_data(size=4)
    names = measure(model, data, [FGM()], (0.1, 0.10000001, 1.0)).metrics()
    assert {"robust_fgm_0.1", "robust_fgm_0.10000001", "robust_fgm_1"} <= set(names)


def test_inside_no_grad():
    model, data = model_and_data()
    with torch.no_grad():
        report = measure(model, data, [FGM(), PGD(steps=3)])
    assert report == measure(model, data, [FGM(), PGD(steps=3)])


def test_regression():
    """Nothing falls; the largest error so far counts, and Pearson's correlation is of the same predictions."""
    model, data = model_and_data(size=20, classes=1)
    attacks = {"fgm": reference.fgm, "pgd-10": ten_steps}
    report = measure(model, data, [FGM(), PGD(steps=10)])
    labels = torch.tensor([example["labels"] for example in data], dtype=torch.float64)
    clean = torch.tensor([logits_at(model, b, torch.zeros(1, 10, 16)).item() for b in batches(data, 1)]).double()

    def pearson(predictions):
        one, other = predictions - predictions.mean(), labels - labels.mean()
        return ((one * other).sum() / (one.norm() * other.norm())).item()

    assert report.metric == "squared_error"
    assert report.clean == pytest.approx((clean - labels).square().mean().item(), rel=1e-5)
    assert report.clean_pearson == pytest.approx(pearson(clean), abs=1e-5)
    for name, attack in attacks.items():
        worst = clean.clone()
        for i, epsilon in enumerate(GRID):
            for number, batch in enumerate(batches(data, 1)):
                batch["labels"] = batch["labels"].double()
                delta = attack(reference.AtInput(model, "example"), batch, epsilon, "l2")
                predicted = logits_at(model, batch, delta).double()[0]
                if (predicted - labels[number]) ** 2 > (worst[number] - labels[number]) ** 2:
                    worst[number] = predicted
            assert report.scores[name][i] == pytest.approx((worst - labels).square().mean().item(), rel=1e-5)
            assert report.pearson[name][i] == pytest.approx(pearson(worst), abs=1e-5)
        assert list(report.scores[name]) == sorted(report.scores[name])
        assert report.scores[name][0] > report.clean


def test_metrics_and_to_dict():
    model, data = model_and_data(size=10)
    report = measure(model, data, [Noise(), PGD(steps=2)], (0.5, 0.25))
    assert list(report.metrics()) == [
        "robust_clean",
        "robust_noise_0.25",
        "robust_noise_0.5",
        "robust_pgd-2_0.25",
        "robust_pgd-2_0.5",
    ]
    assert report.metrics()["robust_pgd-2_0.5"] == report.scores["pgd-2"][1]
    assert set(report.metrics("eval")) == {key.replace("robust", "eval") for key in report.metrics()}
    assert json.loads(json.dumps(report.to_dict()))["scores"]["noise"] == list(report.scores["noise"])


def test_attacks_that_share_a_name_are_told_apart():
    model, data = model_and_data(size=10)
    report = measure(model, data, [FGM(), FGM(norm="linf"), PGD(steps=2), PGD(steps=3)])
    assert list(report.scores) == ["fgm (l2, example, #0)", "fgm (linf, example, #1)", "pgd-2", "pgd-3"]


def test_defaults():
    assert [type(attack) for attack in ATTACKS_TO_TRY] == [Noise, FGM, PGD]
    model, data = model_and_data(size=10)
    report = evaluate_robustness(model, data, progress=False)
    assert list(report.scores) == ["noise", "fgm", "pgd-10"]
    assert report.epsilons == tuple(EPSILONS)


def test_a_progress_bar(capsys):
    model, data = model_and_data(size=10)
    evaluate_robustness(model, data, [FGM()], (0.1,), batch_size=5)
    assert "2/2" in capsys.readouterr().err
    evaluate_robustness(model, data, [FGM()], (0.1,), batch_size=5, progress=False)
    assert capsys.readouterr().err == ""


def test_other_targets():
    model, data = model_and_data()
    embedded = []
    for example, batch in zip(data, batches(data, 1), strict=True):
        embeds = model.get_input_embeddings()(batch["input_ids"])[0].detach()
        embedded.append(
            {"inputs_embeds": embeds, **{k: torch.tensor(example[k]) for k in ("attention_mask", "labels")}}
        )
    attacks = [FGM(), PGD(steps=3)]
    assert measure(model, embedded, attacks, target="inputs_embeds") == measure(model, data, attacks)
    assert measure(model, data, attacks, target="bert.embeddings.word_embeddings") == measure(model, data, attacks)
    inner = measure(model, data, attacks, target="bert.encoder.layer.0")
    assert inner.clean == measure(model, data, attacks).clean
    assert inner != measure(model, data, attacks)


def test_a_model_that_returns_tuples():
    model, data = model_and_data()
    tuples = copy.deepcopy(model)
    tuples.config.return_dict = False
    assert measure(tuples, data, [FGM()]) == measure(model, data, [FGM()])


@pytest.mark.parametrize("name", ["gpt2", "distilbert"])
def test_other_models(name):
    model = tiny(name)
    data = padded_data(model, size=24)
    for example, batch in zip(data, batches(data, 1), strict=True):
        example["labels"] = model(**batch).logits.argmax().item()
    report = measure(model, data, [FGM(), PGD(steps=5)])
    assert report.clean == 1.0
    assert all(curve[-1] < 1.0 for curve in report.scores.values())


def test_the_trainer_gives_the_same_report():
    model, data = model_and_data()
    trainer = train(model, data, trainer=AdversarialInOrder, adv_epsilon=0.5, extra={"eval_dataset": data[:20]})
    attacks, epsilons = [FGM(), PGD(steps=3)], GRID
    report = trainer.evaluate_robustness(attacks=attacks, epsilons=epsilons)
    assert report == measure(model, data[:20], attacks)
    assert trainer.evaluate_robustness(data, attacks=attacks, epsilons=epsilons) == measure(model, data, attacks)


class NoLabelLoss(nn.Module):
    """One logit a position: nothing that the evaluation is for."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 4)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask, labels):
        logits = self.embedding(input_ids)
        return {"loss": logits.sum(), "logits": logits}


def test_errors():
    model, data = model_and_data(size=8)
    begins = "Robustness can't be evaluated: "
    for settings, message in [
        ({"attacks": []}, begins + "there is no attack: pass at least one, such as FGM()."),
        ({"epsilons": []}, begins + "epsilons must be finite numbers, 0 or more, at least one; found []."),
        (
            {"epsilons": [0.1, -1.0]},
            begins + "epsilons must be finite numbers, 0 or more, at least one; found [0.1, -1.0].",
        ),
        ({"epsilons": [float("nan")]}, "at least one; found [nan]."),
        ({"epsilons": [float("inf")]}, "at least one; found [inf]."),
        ({"data": []}, begins + "the data set is empty."),
        ({"data": [], "attacks": []}, "such as FGM(). the data set is empty."),
        ({"data": {"test": data}}, begins + "it takes a data set; found dict: pass one of its data sets."),
        ({"data": DataLoader(data)}, "it takes a data set; found DataLoader: pass its dataset, and its collate_fn."),
        (
            {"target": "bert.encoder.layr"},
            "adv_target='bert.encoder.layr': BertForSequenceClassification has no such module",
        ),
    ]:
        given = {"data": data, "attacks": [FGM()], "epsilons": [0.1], **settings}
        with pytest.raises(ValueError, match=re.escape(message)):
            measure(model, **given)
    unlabelled = [{k: v for k, v in example.items() if k != "labels"} for example in data]
    with pytest.raises(
        ValueError, match=r"Robustness needs `labels` in every batch; found input_ids, attention_mask\."
    ):
        measure(model, unlabelled, [FGM()])
    message = (
        "answer spans and language models; NoLabelLoss gave logits (8, 10, 4) for labels (8,), which is none of them."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(NoLabelLoss(), data, [FGM()])


class MergesInEval(torch.nn.Linear):
    """As loralib's layers do: `train(False)` writes to the weight."""

    def train(self, mode=True):
        if not mode:
            with torch.no_grad():
                self.weight.add_(1.0)
        return super().train(mode)


def test_an_evaluation_calls_no_eval_that_writes_weights():
    model, data = model_and_data(size=4)
    old = model.classifier
    model.classifier = MergesInEval(old.in_features, old.out_features).to(old.weight)
    model.classifier.training = True
    before = model.classifier.weight.detach().clone()
    measure(model, data, [FGM()], (0.1,))
    assert torch.equal(model.classifier.weight, before)
    assert model.classifier.training
