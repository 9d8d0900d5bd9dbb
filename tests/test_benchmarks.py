"""The benchmarks: what ours is compared with is what people use, and the scripts run."""

import copy
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import batches, distance, padded_data, tiny, weights
from transformers import set_seed

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import defaults  # noqa: E402
import gpu  # noqa: E402
import step  # noqa: E402
from baselines import EmbedsFreeLB, InPlaceFGM, InPlacePGD  # noqa: E402
from by_hand import by_hand  # noqa: E402
from candidates import ByScore, JustMoved, LeastCertain, LeastCertainBefore  # noqa: E402

from fgm_trainer import FGM, PGD, AdversarialTrainer  # noqa: E402
from fgm_trainer.attacks import ForwardPass, Step  # noqa: E402


def trained(path, kind, model, steps=3, **parts):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    batch = batches(padded_data(model), 4)[0]
    one = by_hand(kind, model, batch, str(path), optimizers=(optimizer, schedule), **parts)
    for _ in range(steps):
        one.passes()
        one.update()
    return model


@pytest.mark.parametrize(
    ("theirs", "attack"),
    [(InPlaceFGM, FGM(epsilon=1.0)), (InPlacePGD, PGD(epsilon=1.0, step_size=0.5, steps=3))],
)
def test_the_circulating_methods_compute_what_ours_do(tmp_path, theirs, attack):
    model = tiny("bert")
    start = weights(model)
    one = trained(tmp_path, theirs, copy.deepcopy(model))
    other = trained(tmp_path, AdversarialTrainer, copy.deepcopy(model), attack=attack)
    assert distance(start, one) > 1e-3
    assert distance(one, other) < 1e-9
    plain = trained(tmp_path, AdversarialTrainer, copy.deepcopy(model), attack=FGM(epsilon=0.0))
    assert distance(one, plain) > 1e-6


def test_freelb_on_embeds_trains_on_perturbed_embeddings(tmp_path):
    model = tiny("bert").float()
    start = weights(model)
    assert distance(start, trained(tmp_path, EmbedsFreeLB, model)) > 1e-3


def test_trainers_of_one_model_have_its_weights_and_hooks_of_their_own(tmp_path):
    found = step.trainers(step.shape_of("tiny"), ("stock", "fgm"), str(tmp_path))
    models = [one.trainer.model for one in found.values()]
    assert all(a is b for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    hooked = []
    for model in models:
        model.bert.encoder.register_forward_pre_hook(
            lambda module, args, model=model: hooked.append([sum(len(m._forward_hooks) for m in model.modules())])
        )
    found["fgm"].passes()
    assert [min(count) > 0 for count in hooked] == [True, True]
    found["stock"].passes()
    assert set(map(tuple, hooked[2:])) == {(0,)}
    assert not sum(len(m._forward_hooks) for model in models for m in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.cpu.amp.autocast:FutureWarning")  # transformers 4.46 calls it so
@pytest.mark.parametrize(("precision", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_shape_in_bf16_is_computed_in_bf16(tmp_path, precision, expected):
    shape = replace(step.shape_of("tiny"), precision=precision)
    found = step.trainers(shape, ("stock", "fgm", "fgm, adversarial only"), str(tmp_path))
    for name, one in found.items():
        types = []
        dense = one.trainer.model.bert.encoder.layer[0].intermediate.dense
        with dense.register_forward_hook(lambda module, args, output, types=types: types.append(output.dtype)):
            one.passes()
        assert set(types) == {expected}, name


@pytest.mark.parametrize(("name", "shared"), [("fgm", True), ("fgm, example", False)])
def test_bare_operations_compute_what_ours_do(tmp_path, name, shared):
    found = step.with_bare(step.trainers(step.shape_of("tiny"), ("stock", name), str(tmp_path)), str(tmp_path))
    gradients = {}
    for one in (name, f"{name}, bare", "stock, two"):
        trainer = found[one].trainer
        set_seed(0)
        found[one].passes()
        gradients[one] = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        trainer.model.zero_grad()
    far = torch.linalg.vector_norm(gradients[name] - gradients["stock, two"])
    assert torch.linalg.vector_norm(gradients[name] - gradients[f"{name}, bare"]) < 1e-5 * far


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["step.py", "--shapes", "tiny", "--rounds", "4", "--output", str(tmp_path)])
    step.main()
    figures = json.loads((tmp_path / "step.json").read_text())
    assert {"fgm", "fgm in place"} <= figures["shapes"]["tiny"]["time"]["passes"].keys()
    assert figures["shapes"]["tiny"]["memory"]["fgm"] >= 0
    python = figures["python"]["fgm"]
    assert 0 < python["outside of the passes"]["median"] < figures["python"]["stock, two"]["in all"]["median"]
    assert 0 < python["operations over those"] < figures["python"]["stock, two"]["operations"]
    assert (tmp_path / "step.png").stat().st_size > 10_000
    assert "| tiny | 4 x 8 | fgm |" in (tmp_path / "step.md").read_text()


@pytest.mark.slow
def test_the_benchmark_of_a_gpu_runs_on_a_processor(tmp_path, monkeypatch, capsys):
    command = ["gpu.py", "--rounds", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--settings", "tiny", "nothing", "tiny, bf16", "--cpu", "true"])
    gpu.main()
    figures = json.loads((tmp_path / "gpu.json").read_text())["settings"]
    assert figures["nothing"]["error"] == "KeyError: 'nothing'"
    for name in ("tiny", "tiny, bf16"):
        found = figures[name]
        assert found["passes"]["stock"]["median"] == 1
        assert found["operations"]["stock"] < found["operations"]["partial_fgm"] < found["operations"]["pgd-3"]
        assert f"| {name} | 4 x 8 | fgm |" in capsys.readouterr().out + (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(sys, "argv", [*command, "--settings", "tiny", "--cpu", "true", "--seconds", "0"])
    gpu.main()
    assert "| tiny | | no time was left |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_its_benchmark_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.main()


def test_the_least_certain_examples_are_chosen():
    passes = LeastCertain(share=0.5).passes(Step(0.3, 0, None, 4))
    assert isinstance(next(passes), ForwardPass)
    logits = torch.tensor([[3.0, 0.0], [0.1, 0.0], [0.0, 2.0], [0.0, 0.5]])
    request = passes.send(SimpleNamespace(outputs=(logits,)))
    assert request.rows.tolist() == [1, 3]


@pytest.mark.parametrize(("kind", "epochs"), [(LeastCertainBefore, 2), (JustMoved, 3)])
def test_examples_are_chosen_by_what_earlier_epochs_said(tmp_path, monkeypatch, kind, epochs):
    model = tiny("bert").float()
    batch = batches(padded_data(model), 4)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    one = by_hand(kind, model, batch, str(tmp_path), optimizers=(optimizer, schedule), attack=ByScore(share=0.5))
    chosen, passes = [], ByScore.passes

    def noted(self, step):
        chosen.append(next(passes(self, step)).rows.tolist())
        return passes(self, step)

    monkeypatch.setattr(ByScore, "passes", noted)
    for _ in range(epochs):
        one.passes()
        one.update()
    met = one.trainer._rows
    assert all(len(row) == epochs for row in met)
    scores = [-row[-2] if kind is LeastCertainBefore else abs(row[-2] - row[-3]) for row in met]
    assert len(set(scores)) == 4
    assert chosen[-1] == sorted(range(4), key=lambda row: -scores[row])[:2]


# What methods do at their defaults ------------------------------------------------------------------------------------


def test_figures_are_those_of_their_definitions():
    found, labels = np.array([1, 1, 0, 0, 1, 0]), np.array([1, 0, 0, 0, 1, 1])
    # True and false positives and negatives: 2, 1, 2, 1.
    assert defaults.matthews(found, labels) == pytest.approx((2 * 2 - 1 * 1) / (3 * 3 * 3 * 3) ** 0.5)
    assert defaults.matthews(np.zeros(6), labels) == 0
    found, labels = np.array([0, 3, 2, 0, 1]), np.array([0, 3, 1, 1, 0])
    # One entity token is right, of three found and three there.
    assert defaults.entity_f1(found, labels) == pytest.approx(1 / 3)
    assert defaults.entity_f1(np.zeros(5), labels) == 0


def test_settings_are_chosen_on_rows_that_are_neither_trained_on_nor_the_test_set(tmp_path):
    (tmp_path / "task").mkdir()
    for part, first in (("train", 0), ("validation", 100)):
        rows = [json.dumps({"sentence": str(first + i), "label": i % 2}) for i in range(10)]
        (tmp_path / "task" / f"{part}.jsonl").write_text("\n".join(rows))
    args = defaults.DefaultsArguments(data=str(tmp_path), clean_samples=4)

    def numbers(name):
        task = defaults.load_task(args, name, 5, lambda texts, **_: {"input_ids": [[int(text)] for text in texts]})
        return [{row["input_ids"][0] for row in part} for part in (task.train, task.test)]

    (train, chosen_on), (same, tested_on) = numbers("task:train"), numbers("task")
    assert train == same
    assert len(train) == 5
    assert len(chosen_on) == len(tested_on) == 4
    assert not train & chosen_on
    assert max(chosen_on) < 100 <= min(tested_on)


@pytest.mark.parametrize(
    ("kind", "found", "collapsed"),
    [
        ("classes", [0] * 98 + [1] * 2, True),
        ("classes", [0] * 97 + [1] * 3, False),
        ("numbers", [2.5, 2.6] * 50, True),
        ("numbers", [1.0, 4.0] * 50, False),
        ("tags", [0] * 100, True),
        ("tags", [0] * 99 + [3], False),
    ],
)
def test_a_model_that_says_the_same_of_everything_has_collapsed(kind, found, collapsed):
    task = defaults.Task(kind, 2, [], [], defaults.matthews)
    assert defaults.collapsed(task, np.array(found), np.array([0.0, 5.0] * 50)) is collapsed


def test_a_table_has_a_line_for_each_setting_and_counts_the_warnings(capsys):
    run = asdict(defaults.Run("minilm", "movies", 1000, 16, 1e-4, 0, "stock", ""))
    run |= {"clean": 0.8, "robust": 0.2, "collapsed": False, "warned": False, "seconds": 10.0}
    attacked = [
        run | {"method": "fgm", "epsilon": "auto", "seed": seed, "clean": clean, "seconds": 19.0, "warned": seed == 1}
        for seed, clean in ((0, 0.79), (1, 0.81))
    ]
    defaults.tables([run, *attacked])
    printed = capsys.readouterr().out
    assert "| stock |  |  | 1 | 80.0 | 20.0 | 0 | 0 | 1.00 |" in printed
    assert "| fgm | auto |  | 2 | 80.0 (79.0-81.0) | 20.0 (20.0-20.0) | 0 | 1 | 1.90 |" in printed
    assert "0 hits, 0 misses, 1 false alarms, 1 rightly silent" in printed
