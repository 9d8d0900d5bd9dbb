"""Attacks stronger than those of training, the smallest epsilon of each example, intervals and paired differences."""

import json
import math
import random

import pytest
import reference
import torch
from models import batches
from test_robustness import GRID, logits_at, measure, model_and_data
from torch import nn
from transformers import default_data_collator

from fgm_trainer import FGM, PGD, Noise
from fgm_trainer.robustness import (
    Ensemble,
    Member,
    RadiusReport,
    RobustnessReport,
    compare,
    smallest_epsilons,
    strong,
)
from fgm_trainer.robustness.ensemble import margin, targeted_margin
from fgm_trainer.robustness.report import mcnemar, wilson

# Strong ---------------------------------------------------------------------------------------------------------------


def by_margin(model, batch, epsilon, steps, start=None, wrong=None):
    """PGD on the margin of one example by hand; the iterates."""
    place = reference.AtInput(model, "example")
    delta = place.zero(batch) if start is None else start
    label, iterates = batch["labels"].item(), []
    for _ in range(steps):
        leaf = delta.clone().requires_grad_()
        embeds = model.get_input_embeddings()(batch["input_ids"]) + leaf * batch["attention_mask"][:, :, None]
        logits = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits[0]
        top = logits.sort(descending=True).values
        others = torch.cat([logits[:label], logits[label + 1 :]])
        ahead = others.max() if wrong is None else logits[wrong]
        loss = (ahead - logits[label]) / (top[0] - top[2] if wrong is None else 1.0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        delta = delta + 2.5 * epsilon / steps * gradient / gradient.norm()
        delta = delta * min(1.0, epsilon / delta.norm().item())
        iterates.append(delta)
    return iterates


@pytest.mark.parametrize("loss", ["margin", "targeted"])
def test_the_margins_of_an_ensemble_are_those_of_a_plain_loop(loss):
    model, data = model_and_data()
    ensemble = Ensemble("it", [Member(PGD(steps=2), loss)])
    grid = (0.05, 0.2)
    report = measure(model, data, [ensemble], grid, batch_size=40)
    standing = [0, 0]
    for batch in batches(data, 1):
        label = batch["labels"].item()
        if logits_at(model, batch, torch.zeros(())).argmax().item() != label:
            continue
        for i, epsilon in enumerate(grid):
            towards = [None] if loss == "margin" else [(label + 1) % 3, (label + 2) % 3]
            paths = [by_margin(model, batch, epsilon, 2, wrong=wrong) for wrong in towards]
            if any(logits_at(model, batch, delta).argmax().item() != label for path in paths for delta in path):
                break
            standing[i] += 1
    assert report.scores["it"] == pytest.approx([count / len(data) for count in standing])
    assert 0 < standing[1] < standing[0] < 32, "the curve is flat, so the test shows little"


def test_four_classes_have_a_scale_of_their_own():
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.0]])
    label, wrong = torch.tensor([0]), torch.tensor([2])
    assert targeted_margin(logits, label, wrong).item() == pytest.approx(-2.5 / 2.75)
    assert margin(logits, label).item() == pytest.approx(-2 / 2.5)
    assert margin(7 * logits, label).item() == pytest.approx(-2 / 2.5)
    assert margin(logits[:, :2], label).item() == -2


def test_strong_is_the_worst_of_all():
    model, data = model_and_data()
    report = measure(model, data, strong(steps=12, restarts=1), (0.05, 0.2), batch_size=40)
    assert list(report.scores) == ["pgd-10", "pgd-12", "random-20", "strong"]
    for i in range(2):
        standing = [
            all(fell is None or fell > report.epsilons[i] for fell in each)
            for each in zip(*(report.fell[name] for name in report.scores), strict=True)
        ]
        assert report.scores["strong"][i] == pytest.approx(sum(standing) / len(data))
    assert sum(report.scores["strong"]) < sum(report.scores["pgd-10"]) < sum(report.scores["random-20"])


def test_of_an_ensemble_any_iterate_counts():
    """PGD whose steps are too long comes and goes; with fewer steps it is the same up to there."""
    model, data = model_and_data(size=40)
    size, epsilon = 10.0, 1.0
    short = [PGD(steps=steps, step_size=size) for steps in range(1, 5)]
    each = [measure(model, data, [attack], (epsilon,)) for attack in short]
    fell = [next(iter(report.fell.values())) for report in each]
    expected = tuple(min((f for f in of if f is not None), default=None) for of in zip(*fell, strict=True))
    report = measure(model, data, [Ensemble("it", [Member(short[-1])])], (epsilon,))
    assert report.fell["it"] == expected
    assert report.fell["it"] != fell[-1], "some stand at the last iterate"


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()


class Strict(Wrapped):
    """A classifier that takes no more than its inputs."""

    def forward(self, input_ids, attention_mask, labels=None):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_no_column_of_a_targeted_attack_reaches_the_model():
    model, data = model_and_data(size=6)
    data = [{**row, "wrong": (row["labels"] + 1) % 3} for row in data]
    attacks = [Noise(), FGM(targeted="wrong"), Ensemble("it", [Member(PGD(steps=2, targeted="wrong"))])]
    assert list(measure(Strict(model), data, attacks, (0.1,)).scores) == ["noise", "fgm", "it"]
    with pytest.raises(ValueError, match="need names of their own; found it, it"):
        measure(model, data, [attacks[2], attacks[2]], (0.1,))
    assert measure(*model_and_data(size=6), "strong", (0.0,)).masking == ()


class Masked(Wrapped):
    """A classifier whose softmax is saturated, so that cross-entropy has no gradient in float32."""

    def forward(self, labels=None, **inputs):
        logits = 1e5 * self.model(**inputs).logits
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_masked_gradients_are_seen_through_and_reported():
    model, data = model_and_data(size=20, dtype=torch.float32)
    plain = measure(model, data, "strong", (1.0,), batch_size=20)
    masked = measure(Masked(model), data, "strong", (1.0,), batch_size=20)
    assert plain.masking == ()
    # The gradient of the model's own loss is zero; that of the margin is not.
    assert masked.scores["pgd-10"][0] == masked.clean > plain.scores["pgd-10"][0]
    assert masked.scores["strong"][0] < 0.2
    assert len(masked.masking) >= 2
    assert "the gradient says less than chance" in masked.masking[0]


def test_an_unknown_preset_and_an_unknown_loss():
    model, data = model_and_data(size=4)
    with pytest.raises(ValueError, match="attacks is a list of attacks, or one of quick, strong; found 'weak'"):
        measure(model, data, "weak")
    with pytest.raises(ValueError, match="loss must be one of own, margin, targeted; found 'dlr'"):
        Member(PGD(), "dlr")


def test_regression_has_no_margin():
    model, data = model_and_data(classes=1, size=8)
    report = measure(model, data, "strong", (0.5,))
    assert report.fell is None
    assert report.masking == ()
    assert report.scores["strong"][0] >= report.scores["pgd-10"][0] > report.clean
    with pytest.raises(ValueError, match="such as accuracy; these scores are squared_error"):
        report.intervals()
    with pytest.raises(ValueError, match="Only reports that say where each example fell"):
        compare(report, report)


# The smallest epsilon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attack",
    [PGD(steps=4), FGM(norm="linf"), pytest.param(PGD(steps=3, scope="token"), marks=pytest.mark.slow)],
    ids=str,
)
def test_the_radius_of_each_example_is_that_of_the_example_alone(attack):
    """Bisection of each example by itself, at plain numbers, finds the same."""
    model, data = model_and_data(size=20)
    report = smallest_epsilons(
        model, data, attack, largest=1.0, halvings=6, batch_size=7, progress=False, collate_fn=default_data_collator
    )
    expected = []
    for example in data:
        falls = lambda e, one=example: measure(model, [one], [attack], (e,)).fell  # noqa: E731
        radius = next(iter(falls(1.0).values()))[0]
        low, high = 0.0, 1.0 if radius else math.inf if radius is None else 0.0
        for _ in range(6 if high == 1 else 0):
            middle = (low + high) / 2
            fell = next(iter(falls(middle).values()))[0] is not None
            low, high = (low, middle) if fell else (middle, high)
        expected.append(high)
    assert report.radii == pytest.approx(expected)
    assert len(set(report.radii)) > 4
    assert 0.0 in report.radii
    for epsilon in (0.25, 0.5):
        assert report.accuracy(epsilon) == sum(radius > epsilon for radius in expected) / 20


def test_the_median_radius_and_its_interval():
    report = RadiusReport(tuple(float(i) for i in range(100)), 200.0, 0.1)
    assert report.median == 49.5
    # The 40th and the 61st of 100 (Conover 1999, table A3).
    assert report.interval() == (39.0, 60.0)
    assert RadiusReport((0.0, math.inf, math.inf), 1.0, 0.1).median == math.inf
    assert json.dumps(report.to_dict())
    with pytest.raises(ValueError, match="where squared_error is measured there is none"):
        smallest_epsilons(*model_and_data(classes=1, size=4), progress=False)
    with pytest.raises(ValueError, match="largest must be above 0 and halvings 1 or more"):
        smallest_epsilons(*model_and_data(size=4), largest=0.0)
    with pytest.raises(ValueError, match="and the scope is 'vocabulary'"):
        smallest_epsilons(*model_and_data(size=4), FGM(scope="vocabulary"), progress=False)
    with pytest.raises(ValueError, match="the data set is empty"):
        smallest_epsilons(model_and_data(size=4)[0], [], progress=False)


# Intervals and differences --------------------------------------------------------------------------------------------


def report_of(fell, labels=None):
    scores = {
        name: tuple(sum(f is None or f > e for f in each) / len(each) for e in (0.1, 0.2))
        for name, each in fell.items()
    }
    some = next(iter(fell.values()))
    clean = sum(f != 0 for f in some) / len(some)
    labels = tuple(float(i % 2) for i in range(len(some))) if labels is None else labels
    return RobustnessReport(len(some), (0.1, 0.2), clean, scores, labels=labels, predictions=labels, fell=fell)


def test_rows_say_where_each_example_fell():
    model, data = model_and_data()
    report = measure(model, data, [FGM(), PGD(steps=3)], GRID)
    rows = report.rows()
    assert len(rows) == len(data)
    assert json.loads(json.dumps(report.to_dict()))["fell"]["fgm"] == list(report.fell["fgm"])
    for name, curve in report.scores.items():
        for epsilon, score in zip(GRID, curve, strict=True):
            standing = [row[f"fell_{name}"] is None or row[f"fell_{name}"] > epsilon for row in rows]
            assert sum(standing) / len(rows) == pytest.approx(score)
    assert sum(row["prediction"] == row["label"] for row in rows) / len(rows) == report.clean


def test_wilson_covers_as_often_as_it_says():
    """Over all outcomes of a binomial, the interval holds the true share in about 95 % of them."""
    for share in (0.05, 0.3, 0.5, 0.9):
        for count in (40, 200):
            covered = 0.0
            for hits in range(count + 1):
                low, high = wilson(hits / count, count)
                chance = math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
                covered += chance * (low <= share <= high)
            assert 0.92 < covered < 0.985, (share, count)
    low, high = wilson(0.0, 100)
    assert low == 0
    assert 0.03 < high < 0.04


def test_mcnemar_is_a_coin():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 9) == pytest.approx(2 * 11 / 1024)


def test_two_models_are_compared_example_by_example():
    first = report_of({"pgd": (0.0, 0.1, 0.1, 0.2, None, None, 0.1, 0.1)})
    second = report_of({"pgd": (0.0, 0.2, None, None, None, None, 0.1, 0.0)})
    clean, small, large = compare(first, second)
    assert (clean.attack, clean.epsilon, clean.only_first, clean.only_second) == ("clean", 0.0, 1, 0)
    assert (small.only_first, small.only_second, small.difference) == (0, 2, 0.25)
    assert (large.only_first, large.only_second) == (0, 2)
    assert large.p_value == 0.5
    assert large.interval[0] < 0 < large.difference < large.interval[1]
    back = compare(second, first)[1]
    assert back.difference == -small.difference
    assert back.interval == pytest.approx([-bound for bound in reversed(small.interval)])
    with pytest.raises(ValueError, match="not of the same examples"):
        compare(first, report_of(first.fell, labels=(0.0,) * 8))
    with pytest.raises(ValueError, match="No attack, or no epsilon, is in both"):
        compare(first, report_of({"fgm": first.fell["pgd"]}))


def test_the_interval_of_a_difference_covers_as_often_as_it_says():
    draw, covered = random.Random(0), 0
    for _ in range(400):
        pairs = [draw.choices([(1, 1), (0, 0), (0, 1), (1, 0)], [0.5, 0.2, 0.2, 0.1])[0] for _ in range(100)]
        reports = [report_of({"pgd": tuple(None if pair[i] else 0.1 for pair in pairs)}) for i in (0, 1)]
        low, high = compare(*reports)[1].interval
        covered += low <= 0.1 <= high
    assert 0.92 <= covered / 400 <= 0.98
