"""A compiled model is attacked in full, is compiled once, and gives the weights of the eager run."""

import pytest
import torch
from test_faults import examples, hooks, tiny_bert, weights
from test_trainer import CHECKPOINTING, far, run
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback

from fgm_trainer import AWP, FGM, PGD, AdversarialTrainer, loops

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own

STEPS = 6
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Embeddings that the optimizer does not train, as under LoRA: whether the lookup's output has a gradient then changes.
FROZEN = "bert.embeddings"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    # Past its limit the compiler would give up without a word, and the count would stand still.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def frames():
    """How often the compiler was asked for code so far: at a first call, or because no code that is there fits."""
    return counters["frames"]["total"]


class Frames(TrainerCallback):
    """The same, for each optimizer step."""

    def __init__(self):
        self.by_step = []

    def on_step_begin(self, *args, **kwargs):
        self.before = frames()

    def on_step_end(self, *args, **kwargs):
        self.by_step.append(frames() - self.before)


class InOrder(AdversarialTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def bert(frozen=None):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1)
    if frozen:
        model.get_submodule(frozen).requires_grad_(False)
    return model


def train(path, model, settings, kind=InOrder, **arguments):
    count = Frames()
    trainer, _ = run(kind, path, model, settings={"max_steps": STEPS} | settings, callbacks=[count], **arguments)
    return trainer, count.by_step


def compiled_once(by_step):
    return by_step[0] > 0 and not any(by_step[2:])


CASES = {
    "fgm, vocabulary": {"adv_scope": "vocabulary"},
    "fgm, example": {"adv_scope": "example"},
    "pgd": {"adv_method": "pgd"},
    "noise": {"adv_method": "noise"},
    "adversarial examples alone": {"adv_clean_weight": 0.0},
    "accumulation": {"gradient_accumulation_steps": 2},
    "a late start and a rise": {"adv_start": 3, "adv_warmup": 2},
    "every second step": {"adv_every": 2},
    "a hidden layer": {"adv_target": "bert.encoder.layer.0"},
    "checkpointing": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
    "frozen embeddings, a late start": {"frozen": FROZEN, "adv_start": 4, "adv_method": "pgd"},
}


SLOW = (
    "adversarial examples alone",
    "a late start and a rise",
    "accumulation",
    "checkpointing",
    "bf16",
    "noise",
    "pgd",
)
SLOW += ("every second step", "fgm, vocabulary")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_nothing_is_compiled_after_the_second_step_and_the_weights_are_the_eager_runs(tmp_path, name):
    settings = dict(CASES[name])
    frozen = settings.pop("frozen", None)
    eager, model = bert(frozen), bert(frozen)
    train(tmp_path, eager, settings)
    trainer, by_step = train(tmp_path, model, settings | COMPILED)
    assert compiled_once(by_step), by_step
    assert far(weights(eager), weights(model)) < 1e-6
    assert [h for h in trainer.state.log_history if h.get("adv_delta_norm", 0) > 0]


@pytest.mark.parametrize(
    "lengths",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in [(8, 6, 8, 6, 8, 6), (6, 8, 8, 6, 6, 8)]), (8, 6, 5, 7, 10, 6)],
)
def test_batches_of_several_lengths_are_compiled_for_once(tmp_path, lengths):
    data = [row for length in lengths for row in examples(4, length)]
    eager, model = bert(), bert()
    train(tmp_path, eager, {}, data=data)
    if len(set(lengths)) == 2:
        settings = COMPILED
    else:
        # accelerate 1.1 forbids code for any length, so that a third one is compiled for in a stock run as well.
        settings = {}
        compiled(model, "method")
    _, by_step = train(tmp_path, model, settings, data=data)
    assert compiled_once(by_step), by_step
    assert far(weights(eager), weights(model)) < 1e-6


def test_the_count_sees_a_guard_that_fails_in_every_step(tmp_path):
    model = bert()
    model.word = ""

    def reads(module, args):
        return (args[0] + 0 * len(model.word),)

    class Changes(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            model.word += "x"

    model.bert.pooler.register_forward_pre_hook(reads)
    count = Frames()
    run(AdversarialTrainer, tmp_path, model, settings={"max_steps": 4} | COMPILED, callbacks=[Changes(), count])
    assert all(count.by_step), count.by_step


def batches():
    rows = examples(4 * STEPS)
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    return [{name: torch.stack([torch.as_tensor(r[name]) for r in group]) for name in group[0]} for group in groups]


def compiled(model, how, backend="eager"):
    if how == "function":
        return torch.compile(model, backend=backend)
    if how == "method":
        model.compile(backend=backend)
    return model


def loop(model, backward):
    """A plain loop around `backward`, which makes a batch's gradients. Gives the count for each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    by_step = []
    for batch in batches():
        before = frames()
        backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        by_step.append(frames() - before)
    return by_step


@pytest.mark.parametrize(
    ("how", "attack"),
    # awp has hooks on every module: code that they share would have to fit them all.
    [
        ("function", FGM(epsilon=1.0)),
        pytest.param("function", PGD(epsilon=1.0), marks=pytest.mark.slow),
        ("method", PGD(epsilon=1.0)),
        ("function", AWP(epsilon=5e-3)),
    ],
    ids=["function, fgm", "function, pgd", "method, pgd", "function, awp"],
)
def test_adversary_in_a_loop_on_a_model_that_the_user_compiled(how, attack):
    eager, model = bert(), bert()
    loop(eager, loops.Adversary(eager, attack).backward)
    adversary = loops.Adversary(compiled(model, how), attack)
    assert compiled_once(loop(model, adversary.backward))
    assert far(weights(eager), weights(model)) < 1e-6
    adversary.close()
    assert sum(hooks(model)) == 0


def test_a_model_may_be_compiled_after_the_adversary_is_made():
    eager, model = bert(), bert()
    loop(eager, loops.Adversary(eager, FGM(epsilon=1.0)).backward)
    adversary = loops.Adversary(model, FGM(epsilon=1.0))
    model.compile(backend="eager")
    assert compiled_once(loop(model, adversary.backward))
    assert far(weights(eager), weights(model)) < 1e-6


def test_the_snippets_interface_on_a_model_that_the_user_compiled():
    def snippet(model, called):
        fgm = loops.FGM(model)

        def backward(batch):
            called(**batch).loss.backward()
            with fgm.attack():
                called(**batch).loss.backward()

        return backward

    eager, model = bert(), bert()
    loop(eager, snippet(eager, eager))
    assert compiled_once(loop(model, snippet(model, compiled(model, "function"))))
    assert far(weights(eager), weights(model)) < 1e-6


@pytest.mark.parametrize(("how", "method"), [("function", "fgm"), ("method", "pgd")])
def test_the_trainer_takes_a_model_that_the_user_compiled(tmp_path, how, method):
    # Trainer reads the columns to keep from the model's signature, which the compiled wrapper hides.
    settings = {"remove_unused_columns": False, "adv_method": method}
    eager, model = bert(), bert()
    train(tmp_path, eager, settings)
    _, by_step = train(tmp_path, compiled(model, how), settings)
    assert compiled_once(by_step), by_step
    assert far(weights(eager), weights(model)) < 1e-6
    assert sum(hooks(model)) == 0


def test_code_that_a_stock_run_compiled_does_not_pass_for_code_with_hooks(tmp_path):
    eager, model = bert(), bert()
    train(tmp_path, eager, {})
    settings = {"max_steps": 3, **COMPILED}
    run(Trainer, tmp_path, bert(), settings=settings)
    _, by_step = train(tmp_path, model, COMPILED)
    assert compiled_once(by_step), by_step
    assert far(weights(eager), weights(model)) < 1e-6


@pytest.mark.parametrize("how", [pytest.param("function", marks=pytest.mark.slow), "method"])
def test_an_adversary_made_after_the_first_plain_steps_is_seen(how):
    results = []
    for way in ("eager", how):
        model = bert()
        called = compiled(model, way)
        loop(model, lambda batch, called=called: called(**batch).loss.backward())
        loop(model, loops.Adversary(called, FGM(epsilon=1.0)).backward)
        results.append(weights(model))
    assert far(*results) < 1e-6


def test_a_second_training_with_another_attack_is_seen(tmp_path):
    results = []
    for settings in ({}, COMPILED):
        model = bert()
        train(tmp_path, model, settings | {"adv_epsilon": 0.0})
        train(tmp_path, model, settings | {"adv_epsilon": 1.0})
        train(tmp_path, model, settings | {"adv_epsilon": 0.5, "adv_target": "bert.encoder.layer.0"})
        results.append(weights(model))
    assert far(*results) < 1e-6


def test_the_layers_stay_one_graph_and_only_our_hooks_break_it():
    def sizes_of_graphs(backward_of):
        sizes, model = [], tiny_bert()

        def note(graph, inputs):
            sizes.append(sum(node.op.startswith("call_") for node in graph.graph.nodes))
            return graph.forward

        counters["graph_break"].clear()
        loop(model, backward_of(compiled(model, "function", note)))
        return sizes, list(counters["graph_break"])

    stock, breaks = sizes_of_graphs(lambda model: lambda batch: model(**batch).loss.backward())
    assert not breaks
    torch.compiler.reset()
    ours, breaks = sizes_of_graphs(lambda model: loops.Adversary(model, FGM(epsilon=1.0)).backward)
    assert max(ours) > 0.75 * max(stock), (stock, ours)
    assert breaks
    assert all("torch.compiler.disable" in reason for reason in breaks)
