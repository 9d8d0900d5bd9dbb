"""The collapse warning looks at what the model answers, and is silent about a run that has learned."""

import copy
import itertools
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import free_port
from test_faults import examples, flags, hooks, tiny_bert
from test_synchronisation import Waits
from torch import nn
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer import collapse as watch
from fgm_trainer.collapse import CollapseWatch, FirstOutput, Predictions
from fgm_trainer.engine.schedule import Schedule

PLAIN = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Alone:
    device = torch.device("cpu")

    def reduce(self, value, reduction):
        return value


def ratio(*steps):
    """What `Predictions` makes of (logits, labels) pairs."""
    predictions = Predictions()
    for logits, labels in steps:
        predictions.observe({"logits": logits}, labels)
    return predictions.close(Alone())


def by_hand(steps, classes=True):
    """The same in plain Python, float64; a step is answers and labels, both rows of numbers."""
    squares, others = ([], []), ([], [])
    for which in (0, 1):
        last = []
        for step in steps:
            rows = [last[-1], *step[which]] if last and 1 in (len(last), len(step[which])) else step[which]
            for a, b in itertools.pairwise(rows):
                squares[which].append(math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True)))
                others[which].append(a.index(max(a)) != b.index(max(b)))
            last = step[which]
    moved, apart, other, different = (math.fsum(s) / len(s) for s in (*squares, *others))
    return max(math.sqrt(moved / apart), other / different if classes else 0.0)


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / math.fsum(powers) for x in powers]


def of_classes(logits, labels):
    one_hot = [[float(label == c) for c in range(logits.shape[1])] for label in labels.tolist()]
    return [softmax(row) for row in logits.tolist()], one_hot


def easy(count=64, share=2, **columns):
    """The second token says the label; every `share`-th example is of class 1."""
    data = examples(count)
    for number, example in enumerate(data):
        example["labels"] = int(number % share == 0)
        example["input_ids"][1:4] = 10 + example["labels"]
        example |= columns
    random.Random(0).shuffle(data)
    return data


def tiny(**settings):
    return tiny_bert(**PLAIN | settings)


def learned(path, data, **settings):
    """A model that knows the answers."""
    model = tiny(**settings)
    args = flags(path, max_steps=100, logging_strategy="no", adv_epsilon=0.0, learning_rate=1e-2)
    AdversarialTrainer(model=model, args=args, train_dataset=data).train()
    return model


def constant(model, bias=3.0):
    """The same model, but it says the same of all."""
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([bias, 0.0])[: len(model.classifier.bias)])
    return model


def warned(path, caplog, model, data, kind=AdversarialTrainer, parts=None, **settings):
    caplog.clear()
    common = {"max_steps": 60, "logging_steps": 6, "learning_rate": 0.0, "adv_epsilon": 1e-3}
    args = flags(path, **common | settings)
    trainer = kind(model=model, args=args, train_dataset=data, **parts or {})
    before = hooks(model)
    trainer.train()
    assert hooks(model) == before
    return caplog.text.count("Collapse?")


# The figure -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("sizes", [(20, 8, 5), (1,) * 40, (40,), (9, 1, 9, 9, 9), (1, 30, 1, 1, 6)])
def test_the_figure_of_classes_is_the_one_reckoned_by_hand(classes, sizes):
    steps = [(torch.randn(n, classes, dtype=torch.float64), torch.randint(classes, (n,))) for n in sizes]
    assert ratio(*steps) == pytest.approx(by_hand([of_classes(*step) for step in steps]), rel=1e-5)


@pytest.mark.parametrize("shape", ["column", "flat", "labels in a column", "whole labels"])
def test_the_figure_of_numbers_is_the_one_reckoned_by_hand(shape):
    logits, labels = torch.randn(30, 1, dtype=torch.float64), 3 * torch.randn(30, dtype=torch.float64)
    if shape == "whole labels":
        labels = labels.round().long()
    expected = by_hand([(logits.tolist(), labels.double()[:, None].tolist())], classes=False)
    given = labels[:, None] if shape == "labels in a column" else labels
    assert ratio((logits[:, 0] if shape == "flat" else logits, given)) == pytest.approx(expected, rel=1e-5)


def test_a_part_of_the_batch_is_compared_with_the_whole_batchs_labels():
    logits, labels = torch.randn(30, 3), torch.randint(3, (40,))
    answers = of_classes(logits, labels[:30])[0]
    expected = by_hand([(answers, of_classes(torch.zeros(40, 3), labels)[1])])
    assert ratio((logits, labels)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype):
    logits, labels = torch.randn(40, 3).to(dtype), torch.randint(3, (40,))
    assert ratio((logits, labels)) == ratio((logits.float(), labels))


def test_a_long_window_is_added_up_in_parts(monkeypatch):
    steps = [(torch.randn(8, 2), torch.randint(2, (8,))) for _ in range(60)]
    whole = ratio(*steps)
    monkeypatch.setattr(watch, "_KEPT", 7)
    assert ratio(*steps) == pytest.approx(whole, rel=1e-5)


def test_an_answer_that_drifts_is_still_one_answer():
    """The bias of a collapsed model follows the labels of late: half of the window is one class, half the other."""
    labels = torch.randint(2, (256,))
    drifting = torch.linspace(-1, 1, 256)[:, None] * torch.tensor([1.0, -1.0])
    assert drifting.argmax(-1).double().mean() == 0.5
    assert ratio(*zip(drifting.split(16), labels.split(16), strict=True)) < 0.02


def test_a_scale_of_the_logits_does_not_make_a_collapse():
    """As of a head that leaves the temperature to the loss."""
    logits, labels = torch.randn(64, 3), torch.randint(3, (64,))
    assert ratio((1e-4 * logits, labels)) > 0.5


def test_few_labels_are_waited_for():
    labels = torch.arange(6) % 2
    predictions = Predictions()
    predictions.observe((torch.zeros(6, 2),), labels)
    assert math.isnan(predictions.close(Alone()))
    for _ in range(2):
        predictions.observe((torch.zeros(6, 2),), labels)
    assert predictions.close(Alone()) == 0.0
    assert predictions.close(Alone()) is None


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.randn(50, 2), (torch.arange(50) == 7).long()),  # one in fifty
        (torch.randn(200, 2), (torch.arange(200) % 25 == 7).long()),  # and enough of them
        (torch.randn(50, 2), torch.zeros(50, dtype=torch.long)),
        (torch.randn(50, 1), torch.ones(50)),
        (torch.randn(1, 2), torch.tensor([1])),
    ],
)
def test_labels_that_hardly_differ_say_nothing(logits, labels):
    found = ratio((logits, labels))
    assert found is None or math.isnan(found)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.randn(50, 4), torch.rand(50, 4)),  # several numbers, or several labels, an example
        (torch.randn(50, 4), torch.rand(50)),
        (torch.randn(50, 6, 4), torch.randint(4, (50, 6))),  # tags
        (torch.randn(1, 300_000), torch.zeros(1, dtype=torch.long)),
        (torch.randn(0, 2), torch.zeros(0, dtype=torch.long)),
        (torch.zeros(50, 2, dtype=torch.long), torch.randint(2, (50,))),
        (None, torch.randint(2, (50,))),
        ("text", torch.randint(2, (50,))),
        (torch.randn(50, 2), None),
        (torch.randn(50, 2), [0, 1]),
        (torch.tensor(1.0), torch.tensor(1)),
    ],
)
def test_of_anything_else_nothing_is_said(logits, labels):
    assert ratio((logits, labels)) is None


@pytest.mark.parametrize("wrap", [lambda t: (torch.tensor(1.0), t), lambda t: SimpleNamespace(logits=t), lambda t: t])
def test_the_logits_are_found_in_any_output(wrap):
    logits, labels = torch.randn(20, 2), torch.randint(2, (20,))
    predictions = Predictions()
    predictions.observe(wrap(logits), labels)
    assert predictions.close(Alone()) == ratio((logits, labels))


@pytest.mark.parametrize("output", [(), None, 3, {}, object(), [None], {"logits": [1]}])
def test_no_output_makes_it_raise(output):
    predictions = Predictions()
    predictions.observe(output, torch.randint(2, (20,)))
    assert predictions.close(Alone()) is None


class Hostile(dict):
    def get(self, *args):
        raise KeyError("no such thing")


def test_nor_does_one_that_raises_itself():
    predictions = Predictions()
    predictions.observe(Hostile(), torch.randint(2, (20,)))
    assert predictions.close(Alone()) is None


def test_two_heads_in_turn():
    """They are added up each by itself: here both say the same of all."""
    two, five, number = torch.randint(2, (20,)), torch.randint(5, (20,)), torch.randn(20)
    assert ratio((torch.zeros(20, 2), two), (torch.zeros(20, 5), five), (torch.zeros(20, 1), number)) == 0.0
    assert ratio((50.0 * torch.eye(2)[two], two), (50.0 * torch.eye(5)[five], five)) == pytest.approx(1.0)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fgm", "partial_fgm", "pgd", "freelb", "vat", "smart"])
def test_a_run_that_says_the_same_of_all_is_warned_of_once(tmp_path, caplog, method):
    model = constant(tiny())
    assert warned(tmp_path, caplog, model, easy(), adv_method=method, adv_epsilon=0.01) == 1
    assert "says nearly the same" in caplog.text
    assert "adv_epsilon='auto'" in caplog.text


@pytest.mark.parametrize("method", ["fgm", "partial_fgm", "pgd", "freelb", "vat", "smart"])
def test_a_run_whose_loss_does_not_fall_but_that_tells_examples_apart_is_not(tmp_path, caplog, method):
    """It knew from the start; the loss alone says that it has not learned."""
    data = easy()
    assert warned(tmp_path, caplog, learned(tmp_path, data), data, adv_method=method, adv_epsilon=0.01) == 0


@pytest.mark.parametrize("share", [2, 8])
def test_attacked_examples_in_the_loss_are_no_collapse(tmp_path, caplog, share):
    """`partial_fgm` reports the loss of a batch half of which is attacked: here above that of guessing all the time."""
    data = easy(share=share)
    model = learned(tmp_path, data)
    settings = {"adv_method": "partial_fgm", "adv_epsilon": 5.0, "adv_kwargs": {"share": 0.6}}
    assert warned(tmp_path, caplog, model, data, **settings) == 0


SITUATIONS = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "one example a batch": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "every second step": {"adv_every": 2},
    "a late start": {"adv_start": 0.4, "adv_warmup": 0.2},
    "bf16": {"bf16": True},
    "adversarial examples alone": {"adv_clean_weight": 0.0},
    "a line a step": {"logging_steps": 1},
    "three lines": {"logging_steps": 20},
    "weights": {"adv_method": "awp"},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}


@pytest.mark.filterwarnings("ignore")  # the compiler's own, and those of autocast in transformers 4.46
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("accumulation", "bf16") else pytest.mark.slow) for name in SITUATIONS],
)
def test_both_are_told_apart_in_every_situation(tmp_path, caplog, name):
    data = easy()
    model = learned(tmp_path, data)
    assert warned(tmp_path, caplog, copy.deepcopy(model), data, **SITUATIONS[name]) == 0
    assert warned(tmp_path, caplog, constant(model), data, **SITUATIONS[name]) == 1
    assert "says nearly the same" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_nothing_is_compiled_when_the_watch_begins(tmp_path):
    from torch._dynamo.utils import counters

    seen = []

    class Frames(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(counters["frames"]["total"])

    torch.compiler.reset()
    args = flags(tmp_path, max_steps=10, torch_compile=True, torch_compile_backend="eager")
    trainer = AdversarialTrainer(model=tiny(), args=args, train_dataset=examples(8, 9), callbacks=[Frames()])
    trainer.train()
    torch.compiler.reset()
    assert seen[0] > 0
    assert seen[2:] == [seen[2]] * 8


def test_numbers(tmp_path, caplog):
    data = easy()
    for example in data:
        example["labels"] = 10.0 * example["labels"] - 5
    model = learned(tmp_path, data, num_labels=1)
    assert warned(tmp_path, caplog, copy.deepcopy(model), data) == 0
    assert warned(tmp_path, caplog, constant(model), data) == 1
    assert "says nearly the same" in caplog.text


def test_rare_classes_say_nothing(tmp_path, caplog):
    data = easy(count=80, share=40)
    assert warned(tmp_path, caplog, constant(tiny()), data) == 0


@pytest.mark.parametrize("rate", [0.0, 1e-2])
def test_a_language_model_is_judged_by_its_loss(tmp_path, caplog, rate):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=32, **shape | PLAIN))
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 50, (16, 8))]
    assert warned(tmp_path, caplog, model, data, learning_rate=rate) == (rate == 0)


def test_a_resumed_run_is_compared_with_its_own_start(tmp_path, caplog, resumable):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    data = [{"input_ids": row, "labels": row} for row in torch.randint(1, 50, (16, 8))]

    def new():
        return BertForMaskedLM(BertConfig(vocab_size=50, max_position_embeddings=32, **shape | PLAIN))

    common = {"learning_rate": 1e-2, "max_steps": 60, "logging_steps": 2, "adv_epsilon": 1e-3}
    saved = {"save_strategy": "steps", "save_steps": 50, "lr_scheduler_type": "constant"}
    args = flags(tmp_path, **common | saved)
    AdversarialTrainer(model=new(), args=args, train_dataset=data).train()
    caplog.clear()
    for group in (state := tmp_path / "checkpoint-50").glob("optimizer.pt"):
        held = torch.load(group, weights_only=True)
        held["param_groups"] = [g | {"lr": 0.0} for g in held["param_groups"]]
        torch.save(held, group)
    again = AdversarialTrainer(model=new(), args=args, train_dataset=data)
    again.train(resume_from_checkpoint=str(state))
    assert "Collapse?" not in caplog.text


class Twice(AdversarialTrainer):
    """R-Drop: the batch goes through the model twice, and the labels are its own business."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        doubled = {name: torch.cat([value, value]) for name, value in inputs.items()}
        output = model(**doubled)
        loss = nn.functional.cross_entropy(output.logits, torch.cat([labels, labels]))
        return (loss, output) if return_outputs else loss


class CopiesItsModel(AdversarialTrainer):
    """A teacher that is made while a step runs."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.teacher = copy.deepcopy(model)
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("kind", [pytest.param(Twice, marks=pytest.mark.slow), CopiesItsModel])
def test_losses_of_ones_own(tmp_path, caplog, kind):
    data = easy()
    model = learned(tmp_path, data)
    assert warned(tmp_path, caplog, copy.deepcopy(model), data, kind) == 0
    assert warned(tmp_path, caplog, constant(model), data, kind) == 1


def test_the_copy_of_a_model_that_is_watched_tells_nobody():
    predictions, model = Predictions(), nn.Linear(3, 2)
    with FirstOutput(predictions, model, torch.tensor([0, 1])):
        twin = copy.deepcopy(model)
        twin(torch.randn(2, 3))
        assert predictions._answers == []
        model(torch.randn(2, 3))
        model(torch.randn(2, 3))
    assert not model._forward_hooks
    assert len(predictions._answers) == 1


def test_a_fault_leaves_no_hook():
    predictions, model = Predictions(), nn.Linear(3, 2)
    with pytest.raises(KeyboardInterrupt), FirstOutput(predictions, model, torch.tensor([0, 1])):
        raise KeyboardInterrupt
    assert not model._forward_hooks


def test_nothing_is_read_from_the_device_inside_a_step(tmp_path):
    def waits(kind, **settings):
        model = tiny()
        args = flags(tmp_path, kind=settings.pop("arguments"), max_steps=8, logging_steps=4, **settings)
        trainer, seen = kind(model=model, args=args, train_dataset=examples()), Waits()
        step = trainer.training_step

        def watched(*args, **kwargs):
            with seen:
                return step(*args, **kwargs)

        trainer.training_step = watched
        trainer.train()
        return seen.seen

    stock = waits(Trainer, arguments=TrainingArguments)
    ours = waits(AdversarialTrainer, arguments=AdversarialTrainingArguments)
    assert {name: n for name, n in ours.items() if n > 2 * stock[name]} == {}


def test_the_first_half_and_runs_without_a_log_are_not_watched(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Predictions, "observe", lambda self, output, labels: seen.append(0))
    monkeypatch.setattr(CollapseWatch, "see", lambda *args: None)
    for settings in ({"max_steps": 20, "logging_steps": 2}, {"max_steps": 20, "logging_strategy": "no"}):
        AdversarialTrainer(model=tiny(), args=flags(tmp_path, **settings), train_dataset=examples()).train()
    assert len(seen) == 11


def test_a_warm_up_is_waited_for():
    watch_, schedule = CollapseWatch(), Schedule(warmup=0.8)
    assert watch_.watched(nn.Linear(2, 2), torch.ones(2).long(), 70, schedule, 100).__class__.__name__ == "nullcontext"
    assert watch_.watched(nn.Linear(2, 2), torch.ones(2).long(), 80, schedule, 100).__class__.__name__ == "FirstOutput"


WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[2])
from accelerate import Accelerator
from fgm_trainer.collapse import Predictions
accelerator = Accelerator(cpu=True)
draw = torch.Generator().manual_seed(accelerator.process_index)
seen = Predictions()
if accelerator.process_index < 2 - int(sys.argv[1]):
    seen.observe((torch.randn(30, 2, generator=draw),), torch.randint(2, (30,), generator=draw))
# In one piece, and gone at once: gloo's threads may abort a process that ends by itself.
sys.stdout.write(f"ratio {seen.close(accelerator)}\\n")
sys.stdout.flush()
torch.distributed.destroy_process_group()
os._exit(0)
"""


@pytest.mark.parametrize("silent", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_processes_are_added_up_even_where_one_has_seen_nothing(tmp_path, silent):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(free_port()), tmp_path / "worker.py", str(silent), Path(__file__).parent.parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = [float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("ratio")]
    draws = [torch.Generator().manual_seed(rank) for rank in range(2 - silent)]
    steps = [(torch.randn(30, 2, generator=d), torch.randint(2, (30,), generator=d)) for d in draws]
    expected = by_hand([of_classes(logits.double(), labels) for logits, labels in steps])
    assert figures == pytest.approx([expected] * 2, rel=1e-5)
