"""`loops.FGM` against the snippet that circulates, and `loops.Adversary` against the trainer."""

import re

import pytest
import reference
import torch
from models import AdversarialInOrder, batches, distance, padded_data, tiny, train, weights
from torch import nn

from fgm_trainer import FGM, PGD, loops

TOLERANCE = 1e-12


class Snippet:
    """The snippet as it circulates."""

    def __init__(self, model):
        self.model = model
        self.backup = {}

    def attack(self, epsilon=1.0, emb_name="word_embeddings"):
        for name, param in self.model.named_parameters():
            if param.requires_grad and emb_name in name:
                self.backup[name] = param.data.clone()
                norm = torch.norm(param.grad)
                if norm != 0 and not torch.isnan(norm):
                    r_at = epsilon * param.grad / norm
                    param.data.add_(r_at)

    def restore(self, emb_name="word_embeddings"):
        for name, param in self.model.named_parameters():
            if param.requires_grad and emb_name in name:
                assert name in self.backup
                param.data = self.backup[name]
        self.backup = {}


def step(model, optimizer, parts, fgm, **attack):
    """One optimizer step over `parts`, attacked after each; the deltas of the lookup's weight."""
    deltas = []
    weight = model.get_input_embeddings().weight
    for batch in parts:
        model(**batch).loss.backward()
        before = weight.detach().clone()
        fgm.attack(**attack)
        deltas.append(weight.detach() - before)
        model(**batch).loss.backward()
        fgm.restore()
        assert torch.equal(weight.detach(), before)
    optimizer.step()
    optimizer.zero_grad()
    return deltas


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("attack", [{}, {"epsilon": 0.3}, {"epsilon": 2.0, "emb_name": "word_embeddings"}])
@pytest.mark.parametrize("name", ["bert", "roberta", "albert", "electra", "deberta", "mpnet", "distilbert"])
def test_equals_the_snippet(name, attack):
    ours, theirs = tiny(name).train(), tiny(name).train()
    data = batches(padded_data(ours), 4)
    fgm, snippet = loops.FGM(ours), Snippet(theirs)
    first, second = sgd(ours), sgd(theirs)
    for batch in data:
        mine = step(ours, first, [batch], fgm, **attack)
        snippets = step(theirs, second, [batch], snippet, **attack)
        assert (mine[0] - snippets[0]).abs().max() < TOLERANCE
        assert mine[0].any()
    assert distance(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_the_reference_where_the_snippet_does_nothing(name):
    ours, theirs = tiny(name).train(), tiny(name)
    data = batches(padded_data(ours), 4)
    assert not any("word_embeddings" in parameter for parameter, _ in ours.named_parameters())
    fgm, optimizer = loops.FGM(ours), sgd(ours)
    for batch in data:
        step(ours, optimizer, [batch], fgm)
    reference.train(theirs, data, "vocabulary", epsilon=1.0)
    assert distance(ours, theirs) < TOLERANCE


def test_accumulation():
    """The snippet takes its direction from what has accumulated; ours is each micro-batch's own."""
    ours, theirs = tiny("bert").train(), tiny("bert").train()
    parts = batches(padded_data(ours, size=16), 4)
    alone = []
    for batch in parts:
        model = tiny("bert").train()
        alone += step(model, sgd(model), [batch], loops.FGM(model))
    mine = step(ours, sgd(ours), parts, loops.FGM(ours))
    snippets = step(theirs, sgd(theirs), parts, Snippet(theirs))
    for own, single in zip(mine, alone, strict=True):
        assert (own - single).abs().max() < TOLERANCE
    assert (snippets[0] - alone[0]).abs().max() < TOLERANCE
    cosines = [torch.cosine_similarity(s.flatten(), a.flatten(), dim=0) for s, a in zip(snippets, alone, strict=True)]
    assert min(cosines[1:]) < 0.9, "the snippet is right here, so the test shows nothing"
    model = tiny("bert")
    reference.train(model, parts, "vocabulary", epsilon=1.0, accumulate=4, share=1.0)
    assert distance(ours, model) < TOLERANCE


def test_gradients_that_were_there_before_count_for_nothing():
    model = tiny("bert").train()
    first, second = batches(padded_data(model, size=8), 4)
    fgm = loops.FGM(model)
    weight = model.get_input_embeddings().weight
    model(**first).loss.backward()
    model(**second).loss.backward()
    with torch.no_grad():
        model(**first)
    before = weight.detach().clone()
    fgm.attack()
    found = weight.detach() - before
    fgm.restore()
    expected = reference.fgm(reference.InPlace(model), second, 1.0, "l2")
    assert (found - expected).abs().max() < TOLERANCE


def test_one_backward_over_two_forwards():
    """The loss is the sum of two forward passes (R-Drop, contrastive pairs): both count."""
    model = tiny("bert").train()
    first, second = batches(padded_data(model, size=8), 4)
    fgm = loops.FGM(model)
    weight = model.get_input_embeddings().weight
    (model(**first).loss + model(**second).loss).backward()
    expected = weight.grad / weight.grad.norm()
    before = weight.detach().clone()
    fgm.attack()
    assert (weight.detach() - before - expected).abs().max() < TOLERANCE
    fgm.restore()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_restore_is_bit_exact(dtype):
    """Adding and subtracting would not be: rounding moves most entries, as the last line shows."""
    model = tiny("bert", dtype=dtype)
    weight = model.get_input_embeddings().weight
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    data = batches(padded_data(model, size=8), 4)
    fgm = loops.FGM(model)
    address = weight.data_ptr()
    drifting = weight.detach().clone()
    for number in range(100):
        model(**data[number % 2]).loss.backward()
        fgm.attack(epsilon=0.5)
        delta = weight.detach() - before["bert.embeddings.word_embeddings.weight"]
        assert delta.any()
        fgm.restore()
        model.zero_grad()
        drifting = (drifting + delta) - delta
    assert weight.data_ptr() == address, "the optimizer would hold another tensor"
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    assert not torch.equal(drifting, before["bert.embeddings.word_embeddings.weight"])


def test_only_rows_that_were_looked_up_move():
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=2), 2)[0]
    weight = model.get_input_embeddings().weight
    fgm = loops.FGM(model)
    model(**batch).loss.backward()
    before = weight.detach().clone()
    fgm.attack()
    moved = (weight.detach() - before).abs().sum(1) > 0
    held = torch.zeros(len(weight), dtype=torch.bool)
    held[batch["input_ids"][batch["attention_mask"].bool()]] = True
    assert torch.equal(moved, held)
    assert not held.all()
    assert not moved[model.config.pad_token_id]
    assert (weight.detach() - before).norm() == pytest.approx(1.0)
    fgm.restore()


def test_padding_row_stays_even_where_padding_reaches_the_loss():
    """`nn.Embedding(padding_idx=0)`: the weight's own gradient is zero there, so the snippet leaves it alone."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.word_embeddings = nn.Embedding(9, 4, padding_idx=0)
            self.head = nn.Linear(4, 1)

        def get_input_embeddings(self):
            return self.word_embeddings

        def forward(self, ids):
            return self.head(torch.tanh(self.word_embeddings(ids)).mean(1)).square().sum()

    model = Bag().double()
    ids = torch.tensor([[1, 2, 0], [3, 0, 0]])
    fgm, weight = loops.FGM(model), model.word_embeddings.weight
    model(ids).backward()
    before = weight.detach().clone()
    expected = weight.grad / weight.grad.norm()
    fgm.attack()
    assert (weight.detach() - before - expected).abs().max() < TOLERANCE
    assert torch.equal(weight[0], before[0])
    fgm.restore()


def test_frozen_embedding():
    """The snippet silently does nothing there."""
    frozen, free = tiny("bert").train(), tiny("bert").train()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    data = batches(padded_data(free), 4)
    deltas = []
    for model in (frozen, free):
        fgm, optimizer = loops.FGM(model), sgd(model)
        start = model.get_input_embeddings().weight.detach().clone()
        deltas.append(step(model, optimizer, data[:1], fgm)[0])
        fgm.close()
    assert deltas[0].any()
    assert (deltas[0] - deltas[1]).abs().max() < TOLERANCE
    assert frozen.get_input_embeddings().weight.grad is None
    assert torch.equal(frozen.get_input_embeddings().weight, start)
    moved, still = weights(free), weights(frozen)
    own = "bert.embeddings.word_embeddings.weight"
    assert max((moved[n] - still[n]).abs().max() for n in moved if n != own) < TOLERANCE


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_context_manager_restores_whatever_happens(error):
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    weight = model.get_input_embeddings().weight
    fgm = loops.FGM(model)
    before = weight.detach().clone()
    model(**batch).loss.backward()

    def fail():
        with fgm.attack() as entered:
            assert entered is fgm
            assert not torch.equal(weight, before)
            raise error("injected")

    with pytest.raises(error, match="injected"):
        fail()
    assert torch.equal(weight, before)
    # It goes on as if nothing had been.
    model(**batch).loss.backward()
    with fgm.attack():
        model(**batch).loss.backward()
        fgm.restore()
    assert torch.equal(weight, before)
    with pytest.raises(RuntimeError, match=r"restore\(\) without attack\(\)"):
        fgm.restore()


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    weight = model.get_input_embeddings().weight
    fgm = loops.FGM(model)
    before = weight.detach().clone()
    for bad in (float("inf"), float("nan")):
        (bad * model(**batch).loss).backward()
        fgm.attack()
        assert torch.equal(weight, before)
        fgm.restore()


def test_misuse():
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    fgm = loops.FGM(model)
    without_backward = re.escape(
        "attack() needs a backward pass through the token lookup first: make FGM(model) before the forward pass, and "
        "call loss.backward() before attack()."
    )
    with pytest.raises(RuntimeError, match=re.escape("restore() without attack(): there is nothing to put back.")):
        fgm.restore()
    with pytest.raises(RuntimeError, match=without_backward):
        fgm.attack()
    model(**batch).loss.backward()
    fgm.attack()
    twice = re.escape("attack() was called twice: call restore() before the next attack.")
    with pytest.raises(RuntimeError, match=twice):
        fgm.attack()
    fgm.restore()
    with pytest.raises(RuntimeError, match=without_backward):
        fgm.attack()


@pytest.mark.parametrize(
    ("emb_name", "found"),
    [
        ("nothing_like_it", "it matches nothing."),
        (
            "embeddings",
            "it matches bert.embeddings.word_embeddings.weight, bert.embeddings.position_embeddings.weight, "
            "bert.embeddings.token_type_embeddings.weight, bert.embeddings.LayerNorm.weight, "
            "bert.embeddings.LayerNorm.bias.",
        ),
        ("position_embeddings", "it matches bert.embeddings.position_embeddings.weight."),
    ],
)
def test_wrong_names(emb_name, found):
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    fgm = loops.FGM(model)
    model(**batch).loss.backward()
    before = weights(model)
    message = (
        f"emb_name={emb_name!r} must match the input embedding's weight alone, "
        f"bert.embeddings.word_embeddings.weight; {found} Leave emb_name out, or choose among: "
        "bert.embeddings.word_embeddings.weight, bert.embeddings.position_embeddings.weight, "
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        fgm.attack(emb_name=emb_name)
    assert distance(before, model) == 0
    # The error is no attack: a right name works at once.
    fgm.attack(emb_name="word_embeddings")
    fgm.restore()


def test_tied_head_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=1, n_positions=8, bos_token_id=1, eos_token_id=2)
    message = (
        "The input embedding's weight is tied to lm_head: moving it in place would move that too. "
        "Use fgm_trainer.loops.Adversary or AdversarialTrainer, which perturb the lookup alone."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        loops.FGM(GPT2LMHeadModel(config))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_with_tied_heads_are_refused(name):
    with pytest.raises(ValueError, match=r"weight is tied to .*lm_head"):
        loops.FGM(tiny(name))


def test_a_model_without_a_lookup():
    with pytest.raises(ValueError, match=r"Linear has no token lookup at get_input_embeddings\(\)"):
        loops.FGM(nn.Linear(2, 2))


def hooks(model):
    return {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}


def test_close():
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    before, bare = weights(model), hooks(model)
    fgm = loops.FGM(model)
    assert hooks(model) != bare
    model(**batch).loss.backward()
    fgm.attack()
    fgm.close()
    assert hooks(model) == bare
    assert distance(before, model) == 0


class Counting:
    """What Adversary asks of an accelerator, without one: the loss is scaled, as under fp16."""

    process_index, num_processes = 0, 1
    sync_gradients = True
    distributed_type = None

    def __init__(self):
        self.synced = []

    def unwrap_model(self, model):
        return model

    def backward(self, loss):
        self.synced.append(self.sync_gradients)
        (1024 * loss).backward()


ATTACKS = {
    "fgm": (FGM(epsilon=1.0), {}),
    "pgd": (PGD(epsilon=1.0, steps=2), {"adv_method": "pgd", "adv_steps": 2}),
    "weights": (FGM(epsilon=1.0, weight=0.5, clean_weight=0.25), {"adv_weight": 0.5, "adv_clean_weight": 0.25}),
    "adversarial only": (FGM(epsilon=1.0, clean_weight=0.0), {"adv_clean_weight": 0.0}),
    # The raw gradient: whatever the loss was multiplied by must be taken out again.
    "none": (
        FGM(epsilon=9.0, norm="none", clean_weight=0.5),
        {"adv_epsilon": 9.0, "adv_norm": "none", "adv_clean_weight": 0.5},
    ),
    "example": (FGM(epsilon=1.0, scope="example"), {"adv_scope": "example"}),
    "token": (
        FGM(epsilon=0.3, scope="token", norm="linf"),
        {"adv_epsilon": 0.3, "adv_scope": "token", "adv_norm": "linf"},
    ),
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("case", list(ATTACKS))
def test_adversary_equals_the_trainer(case, name):
    attack, flags = ATTACKS[case]
    loop, trained, scaled = tiny(name).train(), tiny(name), tiny(name).train()
    data = padded_data(loop)
    trainer = train(trained, data, trainer=AdversarialInOrder, **flags)
    optimizer, adversary = sgd(loop), loops.Adversary(loop, attack)
    losses = []
    for batch in batches(data, 4):
        losses.append(adversary.backward(batch).item())
        optimizer.step()
        optimizer.zero_grad()
    adversary.close()
    assert distance(loop, trained) < TOLERANCE
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses == pytest.approx(logged, abs=1e-3)
    accelerator = Counting()
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1 / 1024)
    adversary = loops.Adversary(scaled, attack, accelerator=accelerator)
    for batch in batches(data, 4):
        adversary.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
    assert distance(scaled, trained) < TOLERANCE
    trains = 1 if case == "adversarial only" else 2
    assert accelerator.synced == [*[False] * (trains - 1), True] * 4
    assert accelerator.sync_gradients is True


def test_adversary_with_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    # The trainers of other tests left their own: every Accelerator of a process shares one.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    loop, theirs = tiny("bert").train(), tiny("bert")
    data = batches(padded_data(loop), 4)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(loop, sgd(loop))
    adversary = loops.Adversary(model, FGM(epsilon=1.0), accelerator=accelerator)
    for batch in data:
        with accelerator.accumulate(model):
            adversary.backward(batch)
            optimizer.step()
            optimizer.zero_grad()
    reference.train(theirs, data, "vocabulary", epsilon=1.0, accumulate=2)
    assert distance(loop, theirs) < TOLERANCE


def test_adversary_with_a_loss_of_your_own_and_another_epsilon():
    loop, theirs = tiny("bert").train(), tiny("bert")
    data = batches(padded_data(loop), 4)
    optimizer, adversary = sgd(loop), loops.Adversary(loop, FGM(epsilon=5.0, scope="example"))

    def summed(outputs, labels):
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")

    def loss_of(model, batch):
        return summed(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"])

    epsilons = [0.0, 0.5, 1.0, 0.0]
    for batch, epsilon in zip(data, epsilons, strict=True):
        adversary.backward(batch, loss_of, epsilon=epsilon)
        optimizer.step()
        optimizer.zero_grad()
    reference.train(
        theirs,
        data,
        "example",
        epsilon=1.0,
        epsilon_at=lambda number: epsilons[number],
        loss_of=lambda model, batch, **inputs: summed(model(**inputs), batch["labels"]),
    )
    assert distance(loop, theirs) < TOLERANCE


def test_adversary_after_an_exception():
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    before, bare = weights(model), hooks(model)
    accelerator = Counting()
    adversary = loops.Adversary(model, FGM(epsilon=1.0), accelerator=accelerator)
    calls = []

    def loss_of(model, batch):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt("injected")
        return model(**batch).loss

    with pytest.raises(KeyboardInterrupt, match="injected"):
        adversary.backward(batch, loss_of)
    assert accelerator.sync_gradients is True
    assert all(parameter.grad is None for parameter in model.parameters())
    adversary.close()
    assert distance(before, model) == 0
    assert hooks(model) == bare


def test_adversary_refuses():
    model = tiny("bert")
    with pytest.raises(
        ValueError, match=r"adv_target='bert.encoder.layers.0': .* has no such module. Near names: bert"
    ):
        loops.Adversary(model, FGM(epsilon=1.0), target="bert.encoder.layers.0")
    message = r"adv_scope 'vocabulary' does not exist at adv_target .*; choose one of: example, token\."
    with pytest.raises(ValueError, match=message):
        loops.Adversary(model, FGM(epsilon=1.0, scope="vocabulary"), target="bert.encoder.layer.0")
    batch = batches(padded_data(model, size=4), 4)[0]
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with pytest.raises(RuntimeError, match="The batch holds `inputs_embeds` and no `input_ids`"):
        loops.Adversary(model, FGM(epsilon=1.0)).backward({**batch, "inputs_embeds": embeds})
