"""What `atta` remembers: by an example's tokens, on every process, in a checkpoint, within its limit."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import attack_of, batches, distance, padded_data, tiny
from test_controller import observed
from test_faults import examples, flags, same, tiny_bert
from torch import nn

from fgm_trainer import ATTA, AdversarialTrainer
from fgm_trainer.attacks import PassResult
from fgm_trainer.attacks.atta import Gradients, packed, unpacked
from fgm_trainer.checkpoint import STATE_FILE
from fgm_trainer.engine.accelerate import AllProcesses
from fgm_trainer.engine.controller import losses_of
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.calls import TargetCall
from fgm_trainer.perturbation.geometry import Units
from fgm_trainer.robustness import evaluate_robustness

ALONE = AllProcesses(None)
DIMENSION = 11


def padded(texts, length, left=False):
    """(ids, padding) of texts, filled up to `length`."""
    ids, padding = torch.zeros(len(texts), length, dtype=torch.int64), torch.ones(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        places = slice(length - len(text), length) if left else slice(0, len(text))
        ids[row, places], padding[row, places] = torch.tensor(text), False
    return ids, padding


def noted(memory, texts, gradients, length, left=False):
    """One step in which these gradients, (tokens, D) each, were found."""
    ids, padding = padded(texts, length, left)
    whole = torch.zeros(*ids.shape, DIMENSION)
    whole[~padding] = torch.cat(gradients)
    memory.note(PassResult(whole, Units("example", padding), torch.zeros(()), ids=ids))
    memory.settle(nn.Identity(), ALONE)


def recalled(memory, texts, length, left=False):
    ids, padding = padded(texts, length, left)
    value = torch.zeros(*ids.shape, DIMENSION)
    found = memory.gradient(TargetCall(value, Units("example", padding), ids, 50, 0))
    assert not found[padding].any()
    return [row[~own] for row, own in zip(found, padding, strict=True)]


def signed(gradient):
    """A sign an entry, a length a token."""
    return torch.where(gradient > 0, 1.0, -1.0) * gradient.norm(dim=1, keepdim=True) / DIMENSION**0.5


texts_of = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=5, unique_by=tuple)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 9))
def test_signs_come_back(size, seed):
    values = torch.randn(3, 4, size, generator=torch.Generator().manual_seed(seed))
    bits = packed(values)
    assert bits.dtype == torch.uint8
    assert bits.shape == (3, 4, (size + 7) // 8)
    assert torch.equal(unpacked(bits, size), values.sign().to(torch.int8))


@settings(max_examples=40, deadline=None)
@given(texts_of, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 9))
def test_an_example_is_known_by_its_tokens_however_it_is_padded(texts, left, later_left, more, seed):
    draw = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(len(text), DIMENSION, generator=draw) for text in texts]
    memory = Gradients(2**20)
    assert not any(row.any() for row in recalled(memory, texts, 6))
    noted(memory, texts, gradients, 6, left)
    found = recalled(memory, [*texts, [49, 48]], 6 + more, later_left)
    for gradient, row in zip(gradients, found, strict=False):
        torch.testing.assert_close(row, signed(gradient))
    assert not found[-1].any()


def test_whether_most_examples_are_new():
    memory, ones = Gradients(2**20), torch.ones(1, DIMENSION)
    assert memory.meets_new
    for texts, new in (([[1], [2], [3]], True), ([[1], [2], [4]], False), ([[5], [6], [4]], True), ([[4], [7]], False)):
        noted(memory, texts, [ones] * len(texts), 1)
        assert memory.meets_new == new
    memory.settle(nn.Identity(), ALONE)
    assert not memory.meets_new, "a step without attack says nothing"


def test_what_was_met_longest_ago_goes_first():
    # A token takes 4 bytes for its length and 2 for its signs.
    memory, ones = Gradients(3 * 6), torch.ones(1, DIMENSION)
    for text in ([1], [2], [3], [1], [4]):
        noted(memory, [text], [ones], 1)
    assert [row.any().item() for row in recalled(memory, [[1], [2], [3], [4]], 1)] == [True, False, True, True]
    noted(memory, [[5, 6]], [torch.ones(2, DIMENSION)], 2)
    assert [row.any().item() for row in recalled(memory, [[1], [3], [4], [5, 6]], 2)] == [False, False, True, True]


def test_a_state_is_the_memory():
    draw = torch.Generator().manual_seed(0)
    one, other = Gradients(2**20), Gradients(2**20)
    other.load_state_dict(one.state_dict())
    assert other.meets_new
    texts = [[1, 2, 3], [4], [5, 6]]
    noted(one, texts, [torch.randn(len(text), DIMENSION, generator=draw) for text in texts], 3)
    noted(one, texts[:1], [torch.randn(3, DIMENSION, generator=draw)], 3)
    other.load_state_dict(one.state_dict())
    assert other.meets_new == one.meets_new is False
    for mine, theirs in zip(recalled(one, texts, 3), recalled(other, texts, 3), strict=True):
        assert mine.any()
        assert torch.equal(mine, theirs)


@pytest.mark.usefixtures("resumable")
@pytest.mark.parametrize("epsilon", [1.0, "auto"])
def test_a_resumed_run_is_bit_equal(tmp_path, epsilon):
    def trainer():
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = flags(
            tmp_path, adv_method="atta", adv_epsilon=epsilon, max_steps=12, save_strategy="steps", save_steps=7
        )
        return AdversarialTrainer(model=model, args=args, train_dataset=examples())

    whole, cut = trainer(), trainer()
    whole.train()
    # In the middle of the second epoch.
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    same(dict(cut.model.state_dict()), dict(whole.model.state_dict()))
    (tmp_path / "checkpoint-7" / STATE_FILE).unlink()
    cut.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert distance(cut.model, whole.model) > 1e-7


def test_texts_that_never_come_back_are_attacked_as_by_partial_fgm(tmp_path, caplog):
    def trained(method):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = flags(tmp_path, adv_method=method, adv_epsilon=1.0, max_steps=4)
        trainer = AdversarialTrainer(model=model, args=args, train_dataset=examples(64))
        trainer.train()
        return dict(trainer.model.state_dict())

    same(trained("atta"), trained("partial_fgm"))
    assert [line for line in caplog.messages if "met no example twice, so it was 'partial_fgm'" in line]


def test_the_first_pass_says_what_the_perturbation_added(monkeypatch):
    """From the second epoch on there is no clean pass; what it would have found is what the gradient says."""
    seen, clean = observed(monkeypatch, ATTA(), 3)
    assert [len(passes) for passes in seen] == [2, 2, 1]
    found, added = losses_of(seen[-1])
    assert found.item() == pytest.approx(clean, rel=1e-6)
    assert added.item() == pytest.approx(2 * (seen[-1][0].unweighted.item() - clean), rel=1e-2)
    assert added.item() > 1e-5


def test_in_an_evaluation_it_is_fgm():
    model = tiny("bert")
    data = [{name: row[name] for name in row} for row in padded_data(model)]
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in data]
    names = {"fgm": attack_of("fgm", scope="example"), "atta": attack_of("atta", epsilon=1.0)}
    report = evaluate_robustness(model, rows, list(names.values()), [0.3, 1.0], progress=False)
    assert report.scores["fgm"] == report.scores["atta"]
    assert report.scores["fgm"][-1] < report.clean


def test_settings_that_make_no_sense():
    with pytest.raises(ValueError, match=r"megabytes must be a whole number, 1 or more; found 0\.5\. targeted must be"):
        ATTA(megabytes=0.5, targeted=1)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_hidden_states_have_no_tokens(share):
    model = tiny("bert")
    adversary = Adversary(model, ATTA(share=share), target="bert.encoder.layer.0")
    with pytest.raises(ValueError, match="atta knows an example by its tokens: adv_target must be a token lookup"):
        adversary.backward(batches(padded_data(model), 4)[0])


def test_shuffled_epochs_are_recognised(tmp_path, caplog):
    """With the Trainer's own shuffling and padding of each batch by itself."""
    draw = random.Random(0)
    rows = [{"input_ids": [draw.randint(1, 49) for _ in range(draw.randint(3, 9))], "labels": i % 2} for i in range(20)]

    def collate(part):
        ids, padding = padded([row["input_ids"] for row in part], max(len(row["input_ids"]) for row in part))
        labels = torch.tensor([row["labels"] for row in part])
        return {"input_ids": ids, "attention_mask": (~padding).long(), "labels": labels}

    args = flags(tmp_path, adv_method="atta", max_steps=15)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=rows, data_collator=collate)
    looked, step = [], ATTA.passes

    def passes(self, given):
        looked.append(given.memory.meets_new)
        return step(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ATTA, "passes", passes)
        trainer.train()
    assert not [line for line in caplog.messages if "met no example twice" in line]
    assert looked == [True] * 6 + [False] * 9
    assert len(trainer._adv_run.state.kept.memory._known) == 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_model_remembers_the_same(tmp_path):
    def trained(**settings):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        args = flags(tmp_path, adv_method="atta", adv_epsilon=1.0, max_steps=12, **settings)
        trainer = AdversarialTrainer(model=model, args=args, train_dataset=examples())
        trainer.train()
        return dict(trainer.model.state_dict())

    eager = trained()
    compiled = trained(torch_compile=True, torch_compile_backend="aot_eager")
    for name, value in compiled.items():
        torch.testing.assert_close(value, eager[name.removeprefix("_orig_mod.")])
