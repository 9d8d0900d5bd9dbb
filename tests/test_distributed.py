"""Real processes over gloo give the weights of one process, on every engine."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import DIFFERENCES
from engines import NEEDS, PROCESSES, SETTINGS, STEPS, load, train
from processes import free_port, require
from test_faults import tiny_bert

from fgm_trainer.attacks import ATTACKS

HERE = Path(__file__).parent
SMALL = {"per_device_train_batch_size": 2}
# What makes the perturbation of a method visible in weights that move by 1e-2.
VISIBLE = {
    "alum": {"adv_epsilon": 0.5, "adv_step_size": 100.0, "adv_kwargs": {"sigma": 0.1}},
    "awp": {"adv_epsilon": 0.05},
    "fgsm": {"adv_epsilon": 0.1},
    "r3f": {"adv_epsilon": 0.5},
    "smart": {"adv_epsilon": 0.5, "adv_step_size": 0.5, "adv_kwargs": {"sigma": 0.1}},
}
WHOLE = {"awp"}  # its weights have to be whole
GRID = [
    SMALL | {"adv_method": m, "adv_epsilon": 1.0, "gradient_accumulation_steps": n} | scope | VISIBLE.get(m, {})
    for m in sorted(ATTACKS)
    for scope in ([{}] if m in WHOLE else [{"adv_scope": "vocabulary"}, {"adv_scope": "example"}])
    for n in (1, 2)
]
# Of FGM and PGD half of the grid, both scopes, with and without accumulation; of the others a quarter, in turn.
PLAIN = ("fgm", "pgd")
TURN = {m: n % 4 for n, m in enumerate(sorted(ATTACKS))}
OWN = {m: [case for case in GRID if case["adv_method"] == m] for m in sorted(ATTACKS)}
COVER = [
    case | {"measure": m in PLAIN}
    for m, own in OWN.items()
    for i, case in enumerate(own)
    if (i in (0, 3) if m in PLAIN else i == TURN[m] % len(own))
]
REST = [case for case in GRID if case not in [{k: v for k, v in c.items() if k != "measure"} for c in COVER]]
STOCK = SMALL | {"stock": True, "measure": True}
CLIPPED = SMALL | {"max_grad_norm": 0.05, "lr_scheduler_type": "linear", "warmup_steps": 2}
HALF = SMALL | {"bf16": True}
FOUND = SMALL | {"adv_epsilon": "auto", "adv_scope": "example", "logging_steps": 1}
# Losses as the head makes them, whatever that is in training: nothing is learned.
AS_IT_COMES = FOUND | {"as_it_comes": True, "learning_rate": 0.0}
# Three epochs, so that what is remembered of a row is asked for where the row has gone to.
AGAIN = SMALL | {"adv_method": "atta", "adv_epsilon": 1.0, "adv_scope": "example", "max_steps": 9}
# What they draw is drawn by micro-batch.
DRAWS = {"alum", "atta", "freelb", "noise", "partial_fgm", "r3f", "smart", "token_aware", "vat"}
# The training passes of a micro-batch, where they are not two.
TRAINS = {"freelb": 3, "partial_fgm": 1, "atta": 1}
# In these a pass that is not the step's last leaves its gradients on the process.
REDUCE_ONCE = {"ddp", "ddp-loop", "zero1"}

LOOPS = [engine for engine in SETTINGS if engine.endswith("loop")]
TRAINERS = [engine for engine in SETTINGS if engine not in LOOPS]
DEEPSPEED = [engine for engine in TRAINERS if engine.startswith("zero")]
# The default suite has one group of processes for each kind of engine.
# DeepSpeed's and FSDP2's are those of test_launch.
MORE = {"fsdp2", "ddp-loop", "fully_shard-loop", "hsdp", "fsdp2-accelerate", "zero1", "zero2", "zero3", "zero3-loop"}


def marked(engines):
    return [pytest.param(e, marks=pytest.mark.slow if e in MORE else ()) for e in engines]


PARTS = [pytest.param(e, "cover", id=e, marks=pytest.mark.slow if e in MORE else ()) for e in SETTINGS]
PARTS += [pytest.param(e, "rest", id=f"{e}-rest", marks=pytest.mark.slow) for e in SETTINGS]


@functools.cache
def model_path():
    path = tempfile.mkdtemp(prefix="tiny-bert-")
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with torch.no_grad():
        # Above 1 the neighbours of a float32 lie 1.2e-7 apart, too far for the bound of 1e-7.
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.div_(2)
    model.save_pretrained(path)
    return path


@functools.cache
def on_one_process(kind, case):
    """What one process gives; `case` as JSON."""
    return train(kind, json.loads(case), Path(model_path()) / "run", model_path())


def accumulating(engine, case):
    """The result of one process that accumulates over what the engine's processes take."""
    accumulation = PROCESSES.get(engine, 2) * case.get("gradient_accumulation_steps", 1)
    kind = "loop" if engine in LOOPS else "trainer"
    return on_one_process(kind, json.dumps(case | {"gradient_accumulation_steps": accumulation}))


def launch(engine, cases, out):
    """Runs every case on the engine's processes; gives, by case, the results of all ranks."""
    processes = PROCESSES.get(engine, 2)
    group = [f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command = [sys.executable, "-m", "torch.distributed.run", *group]
    command += [str(HERE / "distributed_worker.py"), engine, json.dumps(cases), str(out), model_path()]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        # DeepSpeed compiles an operator with the ninja of this environment.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [[torch.load(out / f"case{n}-rank{r}.pt") for r in range(processes)] for n in range(len(cases))]


@functools.cache
def group(engine, part):
    """What one group of processes on the engine gave: pairs of a case and the results of all ranks."""
    require(engine, NEEDS.get(engine, {}), "deepspeed" if engine.startswith("zero") else "torch")
    cases = (
        REST
        if part == "rest"
        else COVER
        if engine in LOOPS
        else [*COVER, STOCK, CLIPPED, HALF, FOUND, AS_IT_COMES, again(engine)]
    )
    with tempfile.TemporaryDirectory() as out:
        cases = [case for case in cases if engine.startswith("ddp") or case.get("adv_method") not in WHOLE]
        return list(zip(cases, launch(engine, cases, Path(out)), strict=True))


def accumulated(case):
    return case["gradient_accumulation_steps"]


def training_passes(case):
    return TRAINS.get(case["adv_method"], 2) * accumulated(case)


def attacked(engine, part="cover"):
    return [(case, ranks) for case, ranks in group(engine, part) if case in COVER + REST]


def again(engine):
    """As many rows as make three whole steps."""
    return AGAIN | {"rows": 6 * PROCESSES.get(engine, 2)}


def ranks_of(engine, case):
    return next(ranks for other, ranks in group(engine, "cover") if other == case)


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[k].double() - other[k].double()).abs().max().item() for k in one)


def agree(one, other):
    return largest_difference(one["weights"], other["weights"]) < 1e-7


def moved(result):
    """How far training took the weights, at most."""
    return largest_difference(result["weights"], dict(load("trainer", model_path()).named_parameters()))


@pytest.mark.parametrize(("engine", "part"), PARTS)
def test_weights_equal_those_of_one_process_that_accumulates(engine, part, request):
    differences = request.config.stash.setdefault(DIFFERENCES, {})
    for case, ranks in attacked(engine, part):
        one = accumulating(engine, case)
        found = largest_difference(ranks[0]["weights"], one["weights"])
        place = engine, case.get("adv_scope", "tensor"), case["adv_method"]
        differences[place] = max(found, differences.get(place, 0.0))
        assert agree(ranks[0], one), case
        assert moved(one) > 1e-3, "the run is too short to tell"
        if engine not in LOOPS:
            plain = accumulating(engine, SMALL | {"stock": True, "gradient_accumulation_steps": accumulated(case)})
            far = largest_difference(one["weights"], plain["weights"])
            assert far > 1e-5, f"an attack that does nothing would pass: {case}"


@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_what_is_remembered_of_a_row_is_known_on_every_process(engine):
    one = accumulating(engine, again(engine))
    partial = accumulating(engine, again(engine) | {"adv_method": "partial_fgm"})
    assert largest_difference(one["weights"], partial["weights"]) > 1e-3
    for result in ranks_of(engine, again(engine)):
        assert agree(result, one)


@pytest.mark.parametrize("case", [FOUND, AS_IT_COMES], ids=["divided", "as it comes"])
@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_epsilon_auto_is_that_of_one_process_with_the_whole_batch(engine, case):
    whole = case | {"per_device_train_batch_size": 2 * PROCESSES.get(engine, 2)} if case == AS_IT_COMES else case
    one = on_one_process("trainer", json.dumps(whole)) if case == AS_IT_COMES else accumulating(engine, case)
    logged = [
        [line["adv_epsilon"] for line in result["log"] if "adv_epsilon" in line]
        for result in (one, *ranks_of(engine, case))
    ]
    assert len(set(logged[0])) == STEPS
    for other in logged[1:]:
        assert other == pytest.approx(logged[0], rel=1e-4)


@pytest.mark.parametrize(("engine", "part"), PARTS)
def test_ranks_agree_bit_for_bit(engine, part):
    for case, ranks in attacked(engine, part):
        for other in ranks[1:]:
            assert largest_difference(ranks[0]["weights"], other["weights"]) == 0, case


@pytest.mark.parametrize(("engine", "part"), PARTS)
def test_scope_example_depends_on_no_split_at_all(engine, part):
    for case, ranks in attacked(engine, part):
        if case.get("adv_scope") == "example" and case["adv_method"] not in DRAWS:
            rows = 2 * PROCESSES.get(engine, 2) * case["gradient_accumulation_steps"]
            undivided = {**case, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
            whole = on_one_process("loop" if engine in LOOPS else "trainer", json.dumps(undivided))
            assert agree(ranks[0], whole), case


@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_the_log_is_that_of_one_process(engine):
    for case, ranks in attacked(engine):
        assert all(other["log"] == ranks[0]["log"] for other in ranks[1:]), case
        for ours, whole in zip(ranks[0]["log"], accumulating(engine, case)["log"], strict=True):
            # A divergence is the small difference of numbers near 1, in float32.
            assert ours == pytest.approx(whole, rel=1e-4, abs=1e-7), case


@pytest.mark.parametrize("engine", marked(SETTINGS))
def test_robustness_is_measured_on_the_model_as_the_engine_holds_it(engine):
    for case, ranks in attacked(engine):
        for rank in ranks:
            assert rank.get("robustness") == accumulating(engine, case).get("robustness"), case


@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_traffic(engine):
    """Under DDP an attacked step moves what a stock step moves; where gradients live in shards, every pass moves it."""
    stock = ranks_of(engine, STOCK)[0]["moved"]
    for case, ranks in attacked(engine):
        if case["measure"]:
            passes = 1 if engine in REDUCE_ONCE else training_passes(case)
            # gloo counts the sum that is scattered as well, over twice the weights of a replica's: it is summed once.
            saved = (passes - 1) * stock["all_reduce"] / 3 if engine == "hsdp" else 0
            # The figures of a log line are a few numbers.
            assert ranks[0]["moved"]["all_reduce"] <= passes * stock["all_reduce"] - saved + 300, case
            if passes == 1:
                assert ranks[0]["moved"]["all_gather"] == stock["all_gather"], case


@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_clipping_and_schedule_are_stock(engine):
    ranks = ranks_of(engine, CLIPPED)
    one = accumulating(engine, CLIPPED)
    assert agree(ranks[0], one)
    unclipped = accumulating(engine, {**CLIPPED, "max_grad_norm": 0.0})
    assert largest_difference(one["weights"], unclipped["weights"]) > 1e-4
    for ours, whole in zip(ranks[0]["log"], one["log"], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("engine", marked(TRAINERS))
def test_bf16(engine):
    ranks = ranks_of(engine, HALF)
    exact = accumulating(engine, SMALL)
    # DeepSpeed gives the weights in bf16, where the neighbours of 0.5 lie 2e-3 apart.
    assert 0 < largest_difference(ranks[0]["weights"], exact["weights"]) < 0.1 * moved(exact)


@pytest.mark.parametrize("engine", marked(DEEPSPEED))
def test_deepspeed_steps_once_and_clears_gradients_after_steps_alone(engine):
    for case, ranks in attacked(engine):
        passes = training_passes(case)
        for rank in ranks:
            assert re.fullmatch(rf"(b{{{passes}}}sz+){{{STEPS}}}", rank["events"]), (case, rank["events"])
