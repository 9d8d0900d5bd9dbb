"""Situations that people describe in public threads, each the smallest of its kind: what a step has to come to there.

At a vanishing epsilon an attacked step is twice the stock step (the sum of two equal losses), whatever the loop does.
"""

import copy
import io

import pytest
import torch
from models import attack_of, batches, padded_data, tiny
from test_faults import flags
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from fgm_trainer import FGM, PGD, AdversarialTrainer, FreeLB, PartialFGM
from fgm_trainer.attacks import ATTACKS
from fgm_trainer.loops import FGM as InPlace  # noqa: N811
from fgm_trainer.loops import Adversary

TINY = 1e-9
INPUT_METHODS = [name for name, attack in ATTACKS.items() if attack.default_target != "weights"]


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(ours, theirs):
    """The largest difference, relative to the largest entry of its tensor."""
    assert ours.keys() == theirs.keys()
    return max((ours[n] - theirs[n]).abs().max().item() / theirs[n].abs().max().clamp(min=1e-3).item() for n in ours)


def one_step(kind, model, path, data, attack, **settings):
    """The gradients of one step on all of the data, by a trainer of that kind; stock where `attack` is None."""
    settings = {"max_steps": 1, "per_device_train_batch_size": len(data), "max_grad_norm": 0.0} | settings
    kept = {}

    class Kept(kind):
        def training_step(self, model, *args, **kwargs):
            result = super().training_step(model, *args, **kwargs)
            kept.update(gradients(self.model))
            return result

        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = flags(path, adv_epsilon=None, **settings)
    Kept(model=model, args=args, train_dataset=data, attack=attack or FGM(epsilon=0.0)).train()
    return kept


def twice_the_stock_step(kind, make_model, path, data, attack, **settings):
    ours = one_step(kind, make_model(), path, data, attack, **settings)
    stock = one_step(kind, make_model(), path, data, None, **settings)
    return apart(ours, {name: 2 * g for name, g in stock.items()})


# 1. A lookup that is not a plain table ------------------------------------------------------------------------------


class DroppedWords(nn.Embedding):
    """AWD-LSTM's embedding dropout: whole rows of the table are dropped, others each time."""

    def forward(self, ids):
        keep = torch.bernoulli(torch.full((self.num_embeddings, 1), 0.5, dtype=self.weight.dtype))
        return functional.embedding(ids, self.weight * keep * 2, self.padding_idx)


class OfUnitLength(nn.Module):
    def forward(self, weight):
        return functional.normalize(weight, dim=-1)


def with_lookup(change):
    def make():
        model = tiny("bert")
        change(model)
        return model.train()

    return make


def dropped_words(model):
    own = model.bert.embeddings.word_embeddings
    other = DroppedWords(*own.weight.shape, padding_idx=own.padding_idx).double()
    other.weight = own.weight
    model.set_input_embeddings(other)


def dropping_hook(model):
    def drop(module, args, output):
        return functional.dropout(output, 0.5)

    model.bert.embeddings.word_embeddings.register_forward_hook(drop)


def dropping_forward(model):
    lookup = model.bert.embeddings.word_embeddings
    own = lookup.forward
    lookup.forward = lambda ids: functional.dropout(own(ids), 0.5)


def parametrised(model):
    parametrize.register_parametrization(model.bert.embeddings.word_embeddings, "weight", OfUnitLength())


def clamping_hook_on_the_weight(model):
    # Not linear in what it is given: a sum of two is not the same as two.
    model.bert.embeddings.word_embeddings.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


LOOKUPS = [dropped_words, dropping_hook, dropping_forward, parametrised, clamping_hook_on_the_weight]


@pytest.mark.parametrize("method", ["fgm", "freelb", "pgd"])
@pytest.mark.parametrize("change", LOOKUPS, ids=lambda f: f.__name__)
def test_a_lookup_that_is_not_a_plain_table(tmp_path, change, method):
    make = with_lookup(change)
    data = padded_data(make(), size=8)
    attack = ATTACKS[method](epsilon=TINY)
    if method == "freelb" and change is clamping_hook_on_the_weight:
        pytest.skip("three clamped thirds are not one clamped whole")
    assert twice_or_once(method, AdversarialTrainer, make, tmp_path, data, attack, adv_same_dropout=True) < 1e-6


def twice_or_once(method, kind, make, path, data, attack, **settings):
    """FreeLB's losses are a mean over its passes: once the stock step."""
    if method == "freelb":
        ours = one_step(kind, make(), path, data, attack, **settings)
        return apart(ours, one_step(kind, make(), path, data, None, **settings))
    return twice_the_stock_step(kind, make, path, data, attack, **settings)


class OtherIds(AdversarialTrainer):
    """Words are replaced by chance before every forward pass; the padding stays."""

    seen = ()

    def compute_loss(self, model, inputs, *args, **kwargs):
        ids = inputs["input_ids"]
        drawn = torch.randint_like(ids, 5, 30)
        ids = torch.where((torch.rand(ids.shape) < 0.5) & (ids != 0), drawn, ids)
        self.seen = [*self.seen, ids]
        return super().compute_loss(model, {**inputs, "input_ids": ids}, *args, **kwargs)


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
def test_two_passes_that_look_other_words_up(tmp_path, scope):
    """By hand: the weight's rows are moved in scope `vocabulary`, the positions in scope `example`."""
    data = padded_data(tiny("bert"), size=8)
    model = tiny("bert").train()
    seen = []

    class Kept(OtherIds):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            seen.extend(self.seen)
            return result

    ours = one_step(Kept, model, tmp_path, data, FGM(epsilon=0.5, scope=scope))
    assert len(seen) == 2
    assert not torch.equal(*seen)
    reference = tiny("bert").train()
    weight = reference.get_input_embeddings().weight
    batch = batches(data, 8)[0]
    mask = batch["attention_mask"].unsqueeze(-1)

    def loss_at(ids, embedded):
        rest = {k: v for k, v in batch.items() if k != "input_ids"}
        return reference(inputs_embeds=embedded, **rest).loss

    leaf = torch.zeros(8, 10, 16, dtype=torch.float64, requires_grad=True)
    loss_at(seen[0], weight[seen[0]] + leaf).backward()
    gradient = leaf.grad * mask
    if scope == "vocabulary":
        rows = torch.zeros_like(weight)
        for example in range(8):
            for position in range(10):
                rows[seen[0][example, position]] += gradient[example, position]
        delta = 0.5 * (rows / rows.norm())[seen[1]]
    else:
        delta = 0.5 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    loss_at(seen[1], weight[seen[1]] + delta.detach() * mask).backward()
    theirs = gradients(reference)
    # A table's own padding row gets no gradient; by hand it does.
    lookup = "bert.embeddings.word_embeddings.weight"
    theirs[lookup][0] = 0
    assert apart(ours, theirs) < 1e-9


# 2. compute_loss several times in one step --------------------------------------------------------------------------


def halves_of(batch):
    size = len(batch["labels"]) // 2
    return [{k: v[part] for k, v in batch.items()} for part in (slice(0, size), slice(size, None))]


class OneBackward(AdversarialTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        loss = sum(self.compute_loss(model, half) for half in halves_of(self._prepare_inputs(inputs)))
        self.accelerator.backward(loss)
        return loss.detach()


class TwoBackwards(AdversarialTrainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        total = 0.0
        for half in halves_of(self._prepare_inputs(inputs)):
            loss = self.compute_loss(model, half)
            self.accelerator.backward(loss)
            total = total + loss.detach()
        return total


def halved(kind):
    """The mixin's order: the user's trainer first, ours on top of it."""
    from transformers import Trainer

    from fgm_trainer import AdversarialTrainerMixin

    own = type(kind.__name__, (Trainer,), {"training_step": kind.__dict__["training_step"]})
    return type("Adversarial" + kind.__name__, (AdversarialTrainerMixin, own), {})


@pytest.mark.parametrize("method", [m for m in INPUT_METHODS if m not in ("partial_fgm", "atta")])
@pytest.mark.parametrize("kind", [OneBackward, TwoBackwards], ids=lambda k: k.__name__)
def test_a_batch_in_two_parts(tmp_path, kind, method):
    """Each part is what a step on that part alone would be, gradients added up."""
    data = padded_data(tiny("bert"), size=8)
    attack = attack_of(method, scope="example")
    ours = one_step(halved(kind), tiny("bert"), tmp_path, data, attack)
    theirs = {}
    if method in ("noise", "freelb", "token_aware", "vat", "smart", "alum", "r3f"):
        # What is drawn depends on the shapes, so at a vanishing size.
        sizes = {name: TINY for name in attack.lengths if getattr(attack, name) is not None or name == "epsilon"}
        ours = one_step(halved(kind), tiny("bert"), tmp_path, data, attack_of(method, scope="example", **sizes))
        stock = one_step(halved(kind), tiny("bert"), tmp_path, data, None)
        factor = 2 if method == "noise" else 1
        assert apart(ours, {n: factor * g for n, g in stock.items()}) < 1e-5
        return
    for half in (data[:4], data[4:]):
        for name, g in one_step(AdversarialTrainer, tiny("bert"), tmp_path, half, attack).items():
            theirs[name] = theirs.get(name, 0) + g
    assert apart(ours, theirs) < 1e-9


def test_a_part_of_a_batch_in_two_parts_is_refused_or_right(tmp_path):
    data = padded_data(tiny("bert"), size=8)
    with pytest.raises(RuntimeError, match="part of the batch"):
        one_step(halved(TwoBackwards), tiny("bert"), tmp_path, data, PartialFGM(epsilon=0.3))


class _Chunks(torch.autograd.Function):
    """Sentence-transformers' cached losses: embeddings without autograd, and again in the backward pass."""

    @staticmethod
    def forward(ctx, model, batch, marker):
        ctx.model, ctx.batch = model, batch
        return torch.cat([embedded(model, part) for part in halves_of(batch)])

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            for part, own in zip(halves_of(ctx.batch), gradient.chunk(2), strict=True):
                embedded(ctx.model, part).backward(own)
        return None, None, torch.zeros(())


def embedded(model, batch):
    return model.bert(batch["input_ids"], batch["attention_mask"])[0][:, 0]


def contrast(outputs, labels):
    return functional.cross_entropy(outputs @ outputs.T, labels)


class Cached(AdversarialTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = _Chunks.apply(model, inputs, torch.zeros((), requires_grad=True))
        return contrast(outputs, inputs["labels"])


class Whole(AdversarialTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = torch.cat([embedded(model, part) for part in halves_of(inputs)])
        return contrast(outputs, inputs["labels"])


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
def test_gradient_caching_is_what_one_pass_without_it_is(tmp_path, scope):
    data = padded_data(tiny("bert"), size=8)
    attack = FGM(epsilon=0.5, scope=scope)
    cached = one_step(Cached, tiny("bert"), tmp_path, data, attack)
    assert apart(cached, one_step(Whole, tiny("bert"), tmp_path, data, attack)) < 1e-9


@pytest.mark.parametrize("attack", [PGD(epsilon=1.0), FreeLB(epsilon=0.2)], ids=lambda a: a.name)
def test_gradient_caching_refuses_by_name_what_it_can_not_give(tmp_path, attack):
    data = padded_data(tiny("bert"), size=8)
    with pytest.raises(RuntimeError, match="gradient caching"):
        one_step(Cached, tiny("bert"), tmp_path, data, attack)


def test_gradient_caching_by_hand_is_refused_by_name(tmp_path):
    class ByHand(AdversarialTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with torch.no_grad():
                outputs = torch.cat([embedded(model, part) for part in halves_of(inputs)])
            outputs.requires_grad_()
            loss = contrast(outputs, inputs["labels"])
            (kept,) = torch.autograd.grad(loss, outputs)
            for part, own in zip(halves_of(inputs), kept.chunk(2), strict=True):
                embedded(model, part).backward(own)
            return loss.detach().requires_grad_()

    data = padded_data(tiny("bert"), size=8)
    with pytest.raises(RuntimeError, match="gradient caching by hand"):
        one_step(ByHand, tiny("bert"), tmp_path, data, FGM(epsilon=0.5))


# 3. A forward pass that is none of the attack's ---------------------------------------------------------------------


@pytest.mark.parametrize("target", ["word_embeddings", "bert.encoder.layer.0"])
@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb"])
def test_a_probe_in_training_step_sees_the_model_as_it_is(tmp_path, method, target):
    from transformers import Trainer

    from fgm_trainer import AdversarialTrainerMixin

    model = tiny("bert")
    probe = batches(padded_data(model, size=3, length=7, seed=5), 3)[0]
    found, expected = [], []

    class Probed(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            for autograd in (True, False):
                with torch.set_grad_enabled(autograd):
                    found.append(model(**probe).logits.detach())
            loss = super().training_step(model, inputs, *args, **kwargs)
            for autograd in (True, False):
                with torch.set_grad_enabled(autograd):
                    found.append(model(**probe).logits.detach())
            return loss

    expected = model(**probe).logits.detach()
    kind = type("Ours", (AdversarialTrainerMixin, Probed), {})
    attack = ATTACKS[method](epsilon=2.0)
    args = flags(tmp_path, max_steps=1, adv_epsilon=None)
    kind(model=model, args=args, train_dataset=padded_data(model, size=4), attack=attack, target=target).train()
    assert len(found) >= 8
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("target", ["word_embeddings", "bert.encoder.layer.0", "weights"])
@pytest.mark.parametrize("method", ["fgm", "noise", "freelb", "smart"])
def test_a_teacher_inside_of_the_loss_is_not_perturbed(tmp_path, method, target):
    """The same model on the same batch without autograd, as the reference of DPO or of self-distillation."""
    if target == "weights" and method != "fgm":
        pytest.skip("weights are awp's")
    model = tiny("bert")
    found = []

    class Taught(AdversarialTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            with torch.no_grad():
                found.append(model(**inputs).logits)
            result = super().compute_loss(model, inputs, True, **kwargs)
            with torch.no_grad():
                found.append(model(**inputs).logits)
            return result if return_outputs else result[0]

    data = padded_data(model, size=4)
    expected = model(**batches(data, 4)[0]).logits.detach()
    attack = ATTACKS["awp" if target == "weights" else method](epsilon=0.5)
    args = flags(tmp_path, max_steps=1, adv_epsilon=None, per_device_train_batch_size=4)
    trainer = Taught(model=model, args=args, train_dataset=data, attack=attack, target=target)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    assert len(found) >= 4
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scope", ["vocabulary", "example"])
def test_a_probe_with_autograd_inside_of_the_loss_is_not_perturbed_once_it_is_known(tmp_path, scope):
    """The first pass shows that the loss does not depend on it."""
    model = tiny("bert")
    data = padded_data(model, size=4)
    probe = batches(padded_data(model, size=3, seed=5), 3)[0]
    found = []

    class Probing(AdversarialTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            found.append(model(**probe).logits.detach())
            return super().compute_loss(model, inputs, *args, **kwargs)

    expected = model(**probe).logits.detach()
    attack = PGD(epsilon=1.0, scope=scope)
    probed = one_step(Probing, model, tmp_path, data, attack)
    assert len(found) == 4
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert apart(probed, one_step(AdversarialTrainer, tiny("bert"), tmp_path, data, attack)) < 1e-9


def test_a_bag_of_words_has_no_tokens(tmp_path):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.head = nn.EmbeddingBag(30, 8), nn.Linear(8, 3)

        def forward(self, input_ids, labels, attention_mask=None):
            return {"loss": functional.cross_entropy(self.head(self.words(input_ids)), labels)}

    data = padded_data(tiny("bert"), size=4)
    batch = batches(data, 4)[0]
    adversary = Adversary(Bag(), FGM(epsilon=0.5, scope="example"), target="words")
    adversary.backward(batch)
    adversary.close()
    with pytest.raises(ValueError, match="adv_scope 'vocabulary' does not exist"):
        Adversary(Bag(), FGM(epsilon=1.0, scope="vocabulary"), target="words")


# 4. Copies of a model -----------------------------------------------------------------------------------------------


def test_a_copy_made_in_the_middle_of_a_pass_is_no_part_of_it(tmp_path):
    model = tiny("bert")
    data = padded_data(model, size=4)
    batch = batches(data, 4)[0]
    expected = model(**batch).logits.detach()
    copies, found = [], []

    class Averaged(AdversarialTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            copies.append(copy.deepcopy(model))
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            copies.append(torch.load(buffer, weights_only=False))
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            found.extend(one(**batch).logits.detach() for one in copies)
            return loss

    args = flags(tmp_path, max_steps=1, adv_epsilon=None, per_device_train_batch_size=4)
    Averaged(model=model, args=args, train_dataset=data, attack=FGM(epsilon=5.0)).train()
    assert len(copies) == 4
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    for one in [model, *copies]:
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())


@pytest.mark.parametrize("kind", ["Adversary", "FGM"])
def test_a_copy_made_inside_of_a_loop(kind):
    model = tiny("bert").train()
    batch = batches(padded_data(model, size=4), 4)[0]
    expected = model(**batch).logits.detach()
    driver = Adversary(model, FGM(epsilon=5.0)) if kind == "Adversary" else InPlace(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    for one in copies:
        for _ in range(2):
            torch.testing.assert_close(one(**batch).logits.detach(), expected, rtol=0, atol=0)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.modules())
    driver.close()
