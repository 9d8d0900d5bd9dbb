"""Which lookup is attacked, and whether its weight is what the model reads: behind wrappers, adapters, conversions."""

import re

import pytest
import reference
import torch
from models import AdversarialInOrder, batches, distance, padded_data, tiny, train, weights
from test_raw import Snippet, sgd
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fgm_trainer import FGM, loops
from fgm_trainer.perturbation.lookups import find_module, find_modules, input_embedding, mean_embedding_norm

TOLERANCE = 1e-12
WORDS = "bert.embeddings.word_embeddings"
INSTEAD = "Use fgm_trainer.loops.Adversary or AdversarialTrainer, which perturb what the lookup returns."

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks


def backward(model):
    batch = batches(padded_data(model, size=4), 4)[0]
    model(**batch).loss.backward()
    return batch


def moved(fgm, weight, **attack):
    """What one attack adds to a weight, which is back afterwards, bit for bit."""
    before = weight.detach().clone()
    with fgm.attack(**attack):
        delta = weight.detach() - before
    assert torch.equal(weight, before)
    return delta


def refused(model, kind=ValueError):
    """The message of the attack, or of making it; no weight has moved."""
    before = {name: p.detach().clone() for name, p in model.state_dict().items()}

    def attack():
        fgm = loops.FGM(model)
        backward(model)
        fgm.attack()

    with pytest.raises(kind) as error:
        attack()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return str(error.value)


def with_lookup(make):
    """A tiny BERT with another lookup in place of its own."""
    model = tiny("bert").train()
    model.set_input_embeddings(make(model.get_input_embeddings()))
    return model


# The weight changes after FGM(model) --------------------------------------------------------------------------------


def assigned(model):
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()}, assign=True)


def resized(model):
    model.resize_token_embeddings(40, mean_resizing=False)


def rebound(model):
    model.get_input_embeddings().weight = nn.Parameter(2 * model.get_input_embeddings().weight.detach())


def filled(model):
    """The same parameter with another tensor inside."""
    model.get_input_embeddings().weight.data = 0.5 * model.get_input_embeddings().weight.detach()


@pytest.mark.parametrize("change", [assigned, resized, rebound, filled])
def test_the_weight_is_asked_for_at_every_attack(change):
    model = tiny("bert").train()
    fgm = loops.FGM(model)
    backward(model)
    assert moved(fgm, model.get_input_embeddings().weight).any()
    model.zero_grad()
    change(model)
    batch = backward(model)
    expected = reference.fgm(reference.InPlace(model), batch, 1.0, "l2")
    delta = moved(fgm, model.get_input_embeddings().weight)
    assert expected.any()
    assert (delta - expected).abs().max() < TOLERANCE


def test_a_model_that_is_made_without_memory_and_loaded_later():
    loaded = tiny("bert")
    with torch.device("meta"):
        model = type(loaded)(loaded.config)
    fgm = loops.FGM(model)
    model.load_state_dict(loaded.state_dict(), assign=True)
    for name, buffer in loaded.named_buffers():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer)
    model.train()
    batch = backward(model)
    expected = reference.fgm(reference.InPlace(model), batch, 1.0, "l2")
    assert (moved(fgm, model.get_input_embeddings().weight) - expected).abs().max() < TOLERANCE


def test_offloaded_until_it_is_read():
    """accelerate's offloading: outside of a forward pass there is no weight to move."""

    class Offloaded(nn.Embedding):
        def __init__(self, lookup):
            super().__init__(*lookup.weight.shape, device="meta")
            self.kept = [lookup]

        def forward(self, ids):
            return self.kept[0](ids)

    model = with_lookup(Offloaded)
    fgm = loops.FGM(model)
    backward(model)
    with pytest.raises(ValueError, match="is on the meta device, offloaded until it is read, so its rows can't be"):
        fgm.attack()


def test_a_lookup_that_was_replaced():
    model = tiny("bert").train()
    fgm = loops.FGM(model)
    backward(model)
    old = model.get_input_embeddings()
    model.set_input_embeddings(nn.Embedding.from_pretrained(old.weight.detach().clone(), freeze=False))
    message = re.escape(
        "If that was done, the model does not call the lookup that FGM found, Embedding: make FGM(model) anew after a "
        "lookup was replaced or adapted, or name the one that is called, FGM(model, target='path')."
    )
    # The gradient of the old one is there still.
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            fgm.attack()
        backward(model)
    fgm.close()
    again = loops.FGM(model)
    backward(model)
    assert moved(again, model.get_input_embeddings().weight).any()


class Tied(nn.Module):
    """Two lookups with one weight, and a head that may have it too."""

    def __init__(self, head=False):
        super().__init__()
        self.first, self.second, self.head = nn.Embedding(20, 6), nn.Embedding(20, 6), nn.Linear(6, 20, bias=False)
        self.second.weight = self.first.weight
        if head:
            self.head.weight = self.first.weight
        self.double()

    def get_input_embeddings(self):
        return self.first

    def forward(self, ids):
        return self.head(torch.tanh(self.first(ids) * self.second(ids + 1))).square().mean()


def test_a_weight_that_is_tied_later_or_was_loaded_tied_is_refused():
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    fgm = loops.FGM(model)
    model(ids).backward()
    model.head.weight = model.first.weight
    before = model.first.weight.detach().clone()
    with pytest.raises(ValueError, match="weight is tied to head: moving it in place would move that too"):
        fgm.attack()
    assert torch.equal(model.first.weight, before)
    # Loaded like this, a tied weight is several objects in the same memory.
    tied = Tied(head=True)
    tied.load_state_dict(tied.state_dict(), assign=True)
    assert tied.head.weight is not tied.first.weight
    with pytest.raises(ValueError, match="weight is tied to head"):
        loops.FGM(tied)


def test_shared_lookups_that_were_loaded():
    """In one memory they are one weight still; with tensors of their own they are not."""
    model, ids = Tied(), torch.tensor([[1, 2, 3]])
    model(ids).backward()
    expected = model.first.weight.grad / model.first.weight.grad.norm()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.first.weight is not model.second.weight
    fgm = loops.FGM(model)
    model(ids).backward()
    assert (moved(fgm, model.first.weight) - expected).abs().max() < TOLERANCE
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    model(ids).backward()
    with pytest.raises(RuntimeError, match="The lookups first, second shared one weight when FGM was made, and have"):
        fgm.attack()


# A weight that is not what the model reads --------------------------------------------------------------------------


class Quantised(nn.Embedding):
    """Reads its weight, of whatever kind, by a copy that is made once."""

    def __init__(self, lookup, weight):
        super().__init__(*lookup.weight.shape)
        self.weight = weight
        self.register_buffer("read", lookup.weight.detach().clone(), persistent=False)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.read)


class Int8Params(nn.Parameter):
    """As bitsandbytes': floating-point until it is moved to the device."""


class Wrapped(torch.Tensor):
    """A tensor subclass, as torchao's."""


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda w: frozen(w.mul(50).to(torch.int8)), "quantised to int8"),
        (lambda w: frozen(torch.zeros(w.numel() // 2, 1, dtype=torch.uint8)), "quantised to uint8"),
        (lambda w: frozen(w.to(torch.float8_e4m3fn)), "quantised to float8_e4m3fn"),
        (lambda w: Int8Params(w.clone()), "a Int8Params and no plain parameter"),
        (lambda w: nn.Parameter(w.clone().as_subclass(Wrapped)), "a Wrapped and no plain parameter"),
        (lambda w: frozen(w.flatten().clone()), "no matrix with a row for each id but of shape (480,)"),
    ],
    ids=["int8", "packed", "float8", "subclass of a parameter", "subclass of a tensor", "flat"],
)
def test_a_weight_that_is_no_plain_parameter_is_refused(make, found):
    model = with_lookup(lambda lookup: Quantised(lookup, make(lookup.weight.detach())))
    message = f"The input embedding's weight ({WORDS}) is {found}, so its rows can't be moved in place. {INSTEAD}"
    with pytest.raises(ValueError, match=re.escape(message)):
        loops.FGM(model)
    # What is advised works.
    batch = batches(padded_data(model, size=4), 4)[0]
    assert loops.Adversary(model, FGM(epsilon=1.0)).backward(batch).isfinite()


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized(lookup):
    parametrize.register_parametrization(lookup, "weight", Halved())
    return lookup


def pruned(lookup):
    return prune.l1_unstructured(lookup, "weight", amount=0.3)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make", [parametrized, parametrizations.weight_norm, nn.utils.weight_norm, nn.utils.spectral_norm, pruned]
)
def test_a_weight_that_is_computed_is_refused(make):
    message = refused(with_lookup(make))
    found = "no parameter but computed from others (a parametrization, weight norm, pruning)"
    assert (
        message == f"The input embedding's weight ({WORDS}) is {found}, so its rows can't be moved in place. " + INSTEAD
    )


def test_a_parametrization_that_is_registered_later():
    model = tiny("bert").train()
    fgm = loops.FGM(model)
    parametrized(model.get_input_embeddings())
    backward(model)
    with pytest.raises(ValueError, match="is no parameter but computed from others"):
        fgm.attack()


class CachedOnce(nn.Embedding):
    """Reads a copy, and says nothing: the weight is a plain parameter."""

    def __init__(self, lookup):
        super().__init__(*lookup.weight.shape)
        self.weight = lookup.weight
        self.cache = [lookup.weight.detach().clone()]

    def forward(self, ids):
        return nn.functional.embedding(ids, self.cache[0])


class SomeRowsElsewhere(nn.Embedding):
    """Reads rows 7 and 9 elsewhere, as adapters of single tokens do."""

    def __init__(self, lookup):
        super().__init__(*lookup.weight.shape)
        self.weight = lookup.weight
        self.own = nn.Parameter(lookup.weight.detach()[[7, 9]].clone())

    def forward(self, ids):
        return nn.functional.embedding(ids, self.weight.index_copy(0, torch.tensor([7, 9]), self.own))


@pytest.mark.parametrize(
    ("make", "rows"), [(CachedOnce, r"\d+, \d+, \d+, \d+, \d+, \.\.\."), (SomeRowsElsewhere, "7, 9")]
)
def test_a_lookup_that_reads_another_weight_is_an_error(make, rows):
    message = refused(with_lookup(make), RuntimeError)
    assert re.fullmatch(
        rf"The model does not read {WORDS}\.weight where it would be moved: what the lookup returns for {rows} does "
        r"not depend on it \(an adapter such as peft's trainable_token_indices, a quantised or cached lookup, "
        r"a mask\)\. " + re.escape(INSTEAD),
        message,
    )


def test_it_is_found_whenever_such_a_token_comes():
    """At whatever attack: the first batch may not have it."""
    model = with_lookup(SomeRowsElsewhere)
    fgm, weight = loops.FGM(model), model.get_input_embeddings().weight
    batch = batches(padded_data(model, size=4), 4)[0]
    for token in (8, 9):
        ids = torch.full_like(batch["input_ids"], token)
        model(**{**batch, "input_ids": ids}).loss.backward()
        if token == 8:
            assert moved(fgm, weight).any()
    before = weight.detach().clone()
    with pytest.raises(RuntimeError, match="returns for 9 does not depend on it"):
        fgm.attack()
    assert torch.equal(weight, before)
    with pytest.raises(RuntimeError, match=r"restore\(\) without attack\(\)"):
        fgm.restore()


class Dropping(nn.Embedding):
    """With dropout of whole rows and a count of its calls in training."""

    def __init__(self, lookup):
        super().__init__(*lookup.weight.shape)
        self.weight = lookup.weight
        self.inner, self.still = nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.trained = 0

    def forward(self, ids):
        self.trained += self.training
        rows = super().forward(ids)
        return rows * self.inner(torch.ones_like(rows[..., :1])) * self.still(torch.ones(()))


def test_the_check_leaves_no_trace():
    model = with_lookup(Dropping)
    lookup = model.get_input_embeddings()
    model.train()
    lookup.still.eval()
    fgm = loops.FGM(model)
    backward(model)
    modes, state, calls = [m.training for m in model.modules()], torch.get_rng_state(), lookup.trained
    before = weights(model)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    fgm.attack()
    assert [m.training for m in model.modules()] == modes
    assert not all(modes)
    assert torch.equal(torch.get_rng_state(), state)
    assert lookup.trained == calls
    fgm.restore()
    assert distance(before, model) == 0
    assert all(torch.equal(p.grad, grads[name]) for name, p in model.named_parameters() if name in grads)
    # Our own hook took none of the check's calls for the model's.
    with pytest.raises(RuntimeError, match="needs a backward pass"):
        fgm.attack()


class Rounding(nn.Embedding):
    """Returns half precision: a small step is lost in it, which is no sign that the weight is not read."""

    def forward(self, ids):
        return super().forward(ids).bfloat16().double()


class Normalising(nn.Embedding):
    """Returns directions: a step along the row is lost."""

    def forward(self, ids):
        return nn.functional.normalize(super().forward(ids), dim=-1)


@pytest.mark.parametrize("kind", [Rounding, Normalising])
def test_a_step_that_is_lost_is_not_taken_for_another_weight(kind):
    model = with_lookup(lambda lookup: kind(*lookup.weight.shape).double())
    weight = model.get_input_embeddings().weight
    fgm = loops.FGM(model)
    backward(model)
    assert moved(fgm, weight, epsilon=1e-9).any()


def test_a_lookup_that_shortens_its_rows_in_place():
    """`max_norm` writes the weight whenever it is read; the check must not."""
    trained = []
    for kind in (loops.FGM, Snippet):
        model = with_lookup(lambda lookup: nn.Embedding.from_pretrained(lookup.weight.detach(), False, 0, max_norm=0.7))
        attack, optimizer = kind(model), sgd(model)
        for batch in batches(padded_data(model), 4):
            model(**batch).loss.backward()
            attack.attack(epsilon=0.5)
            model(**batch).loss.backward()
            attack.restore()
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model)
    assert distance(*trained) < TOLERANCE


def test_a_buffer_can_be_moved():
    class Static(nn.Embedding):
        def __init__(self, lookup):
            super().__init__(*lookup.weight.shape)
            del self.weight
            self.register_buffer("weight", lookup.weight.detach().clone())

    model = with_lookup(Static)
    fgm = loops.FGM(model)
    backward(model)
    assert moved(fgm, model.get_input_embeddings().weight).any()


# Adapters -----------------------------------------------------------------------------------------------------------


def adapted(model, **settings):
    peft = pytest.importorskip("peft", reason="an extra of the tests")
    unknown = settings.keys() - peft.LoraConfig.__dataclass_fields__.keys()
    if unknown:
        pytest.skip(f"this release of peft has no {', '.join(unknown)}")
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["query"], "lora_dropout": 0.0} | settings
    return peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **settings)).double()


def test_tokens_that_an_adapter_trains():
    model = adapted(tiny("bert"), trainable_token_indices=[7, 9]).train()
    name = f"base_model.model.{WORDS}.token_adapter.base_layer.weight"
    message = refused(model, RuntimeError)
    assert f"The model does not read {name} where it would be moved: what the lookup returns for 7, 9 does" in message
    # The others are read.
    fgm = loops.FGM(model)
    batch = batches(padded_data(model, size=4), 4)[0]
    batch["input_ids"][(batch["input_ids"] == 7) | (batch["input_ids"] == 9)] = 8
    model(**batch).loss.backward()
    assert moved(fgm, model.get_parameter(name)).any()
    # Once they are merged, all of them.
    fgm.close()
    model = model.merge_and_unload()
    fgm = loops.FGM(model)
    backward(model)
    assert moved(fgm, model.get_input_embeddings().weight)[[7, 9]].any()


@pytest.mark.parametrize("trains", [True, False], ids=["trained", "frozen"])
def test_a_copy_that_an_adapter_saves(trains):
    model = adapted(tiny("bert"), modules_to_save=["word_embeddings"]).train()
    if not trains:
        # As a loaded adapter is.
        model.get_input_embeddings().requires_grad_(False)
    copied = model.get_parameter(f"base_model.model.{WORDS}.modules_to_save.default.weight")
    original = model.get_parameter(f"base_model.model.{WORDS}.original_module.weight")
    with torch.no_grad():
        copied.mul_(1.5)
    fgm = loops.FGM(model)
    backward(model)
    still = original.detach().clone()
    with fgm.attack():
        assert torch.equal(original, still)
        assert not torch.equal(copied, 1.5 * still)
    assert torch.equal(copied, 1.5 * still)
    # Without the adapter the original is what the model reads.
    with model.disable_adapter():
        backward(model)
        assert moved(fgm, original).any()


@pytest.mark.parametrize("merged", [False, True])
def test_lora_on_the_lookup(merged):
    model = adapted(tiny("bert"), target_modules=["word_embeddings"]).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_()
    free = tiny("bert").train()
    lookup = model.get_input_embeddings()
    with torch.no_grad():
        free.get_input_embeddings().weight += lookup.get_delta_weight("default").to(free.dtype)
    if merged:
        model.merge_adapter()
    fgm = loops.FGM(model)
    batch = backward(model)
    expected = reference.fgm(reference.InPlace(free), batch, 1.0, "l2")
    assert (moved(fgm, lookup.base_layer.weight) - expected).abs().max() < 1e-9


def test_an_adapter_that_comes_later():
    model = tiny("bert")
    fgm = loops.FGM(model)
    adapted(model, target_modules=["word_embeddings"]).train()
    backward(model)
    assert moved(fgm, model.get_input_embeddings().base_layer.weight).any()


def test_a_token_adapter_that_comes_later():
    model = tiny("bert")
    fgm = loops.FGM(model)
    adapted(model, trainable_token_indices=[7, 9]).train()
    backward(model)
    with pytest.raises(RuntimeError, match=r"make FGM\(model\) anew after a lookup was replaced or adapted"):
        fgm.attack()


# Which module looks the tokens up -----------------------------------------------------------------------------------


class Around(nn.Module):
    """The circulating snippet's own use: a module around an encoder, no `get_input_embeddings` of its own."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(16, 3, dtype=torch.float64)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.head(torch.tanh(hidden[:, 0]))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Transformer(nn.Module):
    """The first part of a sentence-transformers model: it takes and returns a dictionary."""

    def __init__(self, encoder):
        super().__init__()
        self.auto_model = encoder

    def forward(self, features):
        hidden = self.auto_model(**{k: features[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
        return {**features, "token_embeddings": hidden}


class Pooling(nn.Module):
    def forward(self, features):
        mask = features["attention_mask"].unsqueeze(-1)
        return {**features, "sentence_embedding": (features["token_embeddings"] * mask).sum(1) / mask.sum(1)}


class Sentences(nn.Sequential):
    """A sentence-transformers model with a head."""

    def __init__(self, encoder):
        super().__init__(Transformer(encoder), Pooling())
        self.head = [nn.Linear(16, 3, dtype=torch.float64)]

    def forward(self, input_ids, attention_mask, labels):
        features = super().forward({"input_ids": input_ids, "attention_mask": attention_mask})
        logits = self.head[0](features["sentence_embedding"])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ByHand(nn.Module):
    """A hand-written encoder with one lookup, or with a second one for positions."""

    def __init__(self, places=False):
        super().__init__()
        self.words = nn.Embedding(30, 16)
        self.head = nn.Linear(16, 3)
        if places:
            self.places = nn.Embedding(10, 16)
        self.double()

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.words(input_ids) + (self.places.weight if hasattr(self, "places") else 0)
        logits = self.head((torch.tanh(hidden) * attention_mask.unsqueeze(-1)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def in_a(kind):
    torch.manual_seed(0)
    if kind is ByHand:
        model = ByHand()
        return model, model.words
    encoder = tiny("bert").bert
    return kind(encoder), encoder.embeddings.word_embeddings


@pytest.mark.parametrize("kind", [Around, Sentences, ByHand])
def test_the_lookup_inside_a_module_of_your_own(kind):
    (ours, lookup), (theirs, _), (stock, _) = (in_a(kind) for _ in range(3))
    theirs.get_input_embeddings = lambda: next(m for m in theirs.modules() if isinstance(m, nn.Embedding))
    data = padded_data(tiny("bert"))
    assert input_embedding(ours) is lookup
    assert mean_embedding_norm(ours) == pytest.approx(lookup.weight.norm(dim=1).mean().item(), rel=1e-12)
    # By hand, by the driver and by the trainer, against the snippet's formula on the weight.
    name = next(n for n, p in ours.named_parameters() if p is lookup.weight)
    fgm, snippet = loops.FGM(ours.train()), Snippet(theirs.train())
    first, second = sgd(ours), sgd(theirs)
    adversary = loops.Adversary(stock.train(), FGM(epsilon=1.0))
    third = sgd(stock)
    for batch in batches(data, 4):
        for model, attack, arguments in ((ours, fgm, {}), (theirs, snippet, {"emb_name": name})):
            model(**batch)["loss"].backward()
            attack.attack(**arguments)
            model(**batch)["loss"].backward()
            attack.restore(*arguments.values())
        adversary.backward(batch)
        for optimizer in (first, second, third):
            optimizer.step()
            optimizer.zero_grad()
    assert distance(ours, theirs) < TOLERANCE
    assert distance(stock, theirs) < TOLERANCE
    trained, _ = in_a(kind)
    train(trained, data, trainer=AdversarialInOrder, adv_epsilon=1.0)
    assert distance(trained, theirs) < TOLERANCE


def test_two_encoders_that_share_one_are_no_question():
    encoder = tiny("bert").bert
    model = nn.ModuleDict({"question": Around(encoder), "answer": Around(encoder)})
    assert input_embedding(model) is encoder.embeddings.word_embeddings


def test_several_that_may_be_meant_are_listed_with_their_sizes():
    two = nn.ModuleDict({"question": Around(tiny("bert").bert), "answer": Around(tiny("albert").albert)})
    message = (
        " has no token lookup at get_input_embeddings(), and what looks tokens up inside it can't be told: "
        "{found}. Name it by its path: adv_target='path', or for loops.FGM, FGM(model, target='path')."
    )
    for model, found in (
        (two, "question.encoder (30 x 16), answer.encoder (30 x 8)"),
        (ByHand(places=True), "words (30 x 16), places (10 x 16)"),
        (
            nn.ModuleList(nn.Embedding(9, n) for n in range(1, 11)),
            ", ".join(f"{n - 1} (9 x {n})" for n in range(1, 9)) + " and 2 more",
        ),
    ):
        for make in (input_embedding, loops.FGM, mean_embedding_norm):
            with pytest.raises(ValueError, match=re.escape(type(model).__name__ + message.format(found=found))):
                make(model)


@pytest.mark.parametrize("name", ["position_embeddings", "pos_emb", "token_type_embeddings", "segments"])
def test_a_lookup_of_positions_alone_is_not_taken_for_the_tokens(name):
    model = nn.Module()
    model.add_module(name, nn.Embedding(9, 4))
    with pytest.raises(ValueError, match=rf"what looks tokens up inside it can't be told: {name} \(9 x 4\)"):
        loops.FGM(model)
    assert loops.FGM(model, target=name)


def test_a_vision_model_has_no_tokens():
    """It names its patches, and its only lookup is that of positions."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionModel(CLIPVisionConfig(**settings, image_size=8, patch_size=4))
    for model in (vision, Around(vision)):
        with pytest.raises(ValueError, match=r"no token lookup at get_input_embeddings\(\), so adv_target='word_emb"):
            loops.FGM(model)
    encoder = tiny("bert").bert
    both = nn.ModuleDict({"image": vision, "text": encoder})
    assert input_embedding(both) is encoder.embeddings.word_embeddings


@pytest.mark.parametrize("by", ["path", "module", "module around it"])
def test_a_lookup_that_is_named(by):
    model = nn.ModuleDict({"question": Around(tiny("bert").bert), "answer": Around(tiny("albert").albert)})
    lookup = model["answer"].encoder.embeddings.word_embeddings
    target = {
        "path": "answer.encoder.embeddings.word_embeddings",
        "module": lookup,
        "module around it": "answer",
    }[by]
    fgm = loops.FGM(model, target=target)
    batch = batches(padded_data(tiny("bert"), size=4), 4)[0]
    sum(part(**batch)["loss"] for part in model.values()).backward()
    still = model["question"].encoder.embeddings.word_embeddings.weight.detach().clone()
    before = lookup.weight.detach().clone()
    with fgm.attack():
        expected = lookup.weight.grad / lookup.weight.grad.norm()
        assert (lookup.weight - before - expected).abs().max() < TOLERANCE
        assert torch.equal(model["question"].encoder.embeddings.word_embeddings.weight, still)


def test_a_lookup_written_by_hand():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(30, 16, dtype=torch.float64))

        def forward(self, mask, ids):
            return self.weight[ids] * mask.unsqueeze(-1)

    class Model(ByHand):
        def __init__(self):
            super().__init__()
            self.words = Words()

        def forward(self, input_ids, attention_mask, labels):
            return {"loss": self.head(torch.tanh(self.words(attention_mask.bool(), input_ids))).square().mean()}

    model = Model()
    fgm = loops.FGM(model, target="words")
    batch = batches(padded_data(tiny("bert"), size=4), 4)[0]
    batch["attention_mask"][:] = 1
    model(**batch)["loss"].backward()
    expected = model.words.weight.grad / model.words.weight.grad.norm()
    assert (moved(fgm, model.words.weight) - expected).abs().max() < TOLERANCE


def test_targets_that_are_no_lookups():
    model = tiny("bert")
    with pytest.raises(ValueError, match=r"BertLayer has no token lookup .*loops\.FGM moves rows of a lookup"):
        loops.FGM(model, target="bert.encoder.layer.0")
    with pytest.raises(ValueError, match="target is a Embedding that is no module of BertForSequenceClassification"):
        loops.FGM(model, target=nn.Embedding(3, 3))
    with pytest.raises(ValueError, match=r"embeddings\.words'.* has no such module\. Near names: "):
        loops.FGM(model, target="bert.embeddings.words")
    # Ids as one-hot vectors, and bags of ids.
    linear = nn.ModuleDict({"words": nn.Linear(30, 16)})
    with pytest.raises(ValueError, match="Linear has no token lookup"):
        loops.FGM(linear, target="words")
    bag = nn.EmbeddingBag(30, 16)
    with pytest.raises(ValueError, match="EmbeddingBag has no token lookup"):
        loops.FGM(bag)


def test_a_lookup_that_returns_no_row_for_each_id():
    class PooledEmbedding(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).mean(1)

    class OneHotEmbedding(nn.Embedding):
        def forward(self, vectors):
            return vectors @ self.weight

    pooled, ids = PooledEmbedding(9, 4), torch.ones(2, 3, dtype=torch.long)
    fgm = loops.FGM(pooled)
    with pytest.raises(RuntimeError, match=r"called with ids of shape \(2, 3\) and returned Tensor\(2, 4\)\. Use"):
        pooled(ids)
    fgm.close()
    one_hot = OneHotEmbedding(9, 4)
    fgm = loops.FGM(one_hot)
    with pytest.raises(RuntimeError, match="moves rows that are looked up by ids, and OneHotEmbedding was called with"):
        one_hot(torch.zeros(2, 9))


# The unit of epsilon ------------------------------------------------------------------------------------------------

SCALE = 8.0


class ScaledEmbedding(nn.Embedding):
    """As Gemma's."""

    def __init__(self, lookup):
        super().__init__(*lookup.weight.shape)
        self.weight = lookup.weight
        self.register_buffer("embed_scale", torch.tensor(SCALE, dtype=torch.float64), persistent=False)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def scaled_llama():
    model = tiny("llama")
    model.set_input_embeddings(ScaledEmbedding(model.get_input_embeddings()))
    return model


def mean_row(rows):
    """The mean length of the rows that are not zero, one by one."""
    lengths = [row.double().square().sum().sqrt().item() for row in rows.detach() if row.any()]
    return sum(lengths) / len(lengths)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=["bare", "lora", "copy", "tokens"],
)
def test_the_unit_is_measured_at_the_output_of_the_lookup(settings):
    plain = mean_row(tiny("llama").get_input_embeddings().weight)
    model = scaled_llama()
    if settings:
        model = adapted(model, **({"target_modules": ["q_proj"]} | settings))
    # An adapter starts as the identity.
    assert mean_embedding_norm(model) == pytest.approx(SCALE * plain, rel=1e-9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("embedding_A", "modules_to_save.default", "trainable_tokens_delta")):
                parameter.normal_()
    met = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: met.append(output[0]))
    with torch.no_grad():
        model(input_ids=torch.arange(30)[None])
    handle.remove()
    assert mean_embedding_norm(model) == pytest.approx(mean_row(met[0]), rel=1e-9)
    if settings and "embed_tokens" not in settings.get("target_modules", []):
        assert mean_row(met[0]) != pytest.approx(SCALE * plain, rel=1e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "distilbert"])
def test_the_unit_of_a_plain_lookup_is_that_of_its_rows(name):
    model = tiny(name, dtype=torch.float32)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[model.config.pad_token_id] = 0
    lengths = torch.linalg.vector_norm(weight.detach(), dim=-1)
    assert mean_embedding_norm(model) == float(lengths[lengths > 0].mean())
    assert mean_embedding_norm(model) == pytest.approx(mean_row(weight), rel=1e-6)


def test_the_unit_of_a_lookup_that_the_encoder_scales():
    """What is measured is the lookup that is attacked, not the one that the model names."""
    model = tiny("bart")
    for part in (model.model.encoder, model.model.decoder):
        part.embed_tokens = ScaledEmbedding(part.embed_tokens)
    assert mean_embedding_norm(model) == pytest.approx(SCALE * mean_row(model.get_input_embeddings().weight), rel=1e-9)


def test_measuring_leaves_no_trace():
    dropping = with_lookup(Dropping)
    lookup, state = dropping.get_input_embeddings(), torch.get_rng_state()
    modes, before = [m.training for m in dropping.modules()], weights(dropping)
    assert mean_embedding_norm(dropping) == pytest.approx(mean_row(lookup.weight), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in dropping.modules()] == modes
    assert lookup.trained == 0
    assert distance(before, dropping) == 0
    shortens = with_lookup(lambda own: nn.Embedding.from_pretrained(own.weight.detach(), False, max_norm=0.7))
    before = weights(shortens)
    assert 0 < mean_embedding_norm(shortens) <= 0.7
    assert distance(before, shortens) == 0


def test_the_unit_of_many_rows_is_taken_in_parts(monkeypatch):
    model, sizes = tiny("bert"), []
    whole = mean_embedding_norm(model)
    monkeypatch.setattr("fgm_trainer.perturbation.lookups._NUMBERS_AT_ONCE", 16 * 7)
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: sizes.append(args[0].shape[1]))
    assert mean_embedding_norm(model) == whole
    assert sizes == [7, 7, 7, 7, 2]


def test_lookups_that_give_no_unit():
    model = tiny("bert")
    nn.init.zeros_(model.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=f"All entries of the token lookup {WORDS} are zero, so their mean norm is no"):
        mean_embedding_norm(model)

    class NeedsMore(nn.Embedding):
        def forward(self, ids, mask):
            return super().forward(ids)

    with pytest.raises(ValueError, match="NeedsMore can't be called with ids alone"):
        mean_embedding_norm(NeedsMore(9, 4))


def test_the_unit_of_a_sharded_lookup(tmp_path):
    """One process is enough to have a weight that must be gathered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = mean_row(tiny("llama").get_input_embeddings().weight)
    model = adapted(scaled_llama(), target_modules=["embed_tokens"])
    base = model.get_input_embeddings().base_layer
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), mesh, [Shard(0)]))
        assert mean_embedding_norm(model) == pytest.approx(SCALE * plain, rel=1e-9)
        with pytest.raises(ValueError, match="weight is sharded over processes, so its rows can't be moved in place"):
            loops.FGM(model)
    finally:
        torch.distributed.destroy_process_group()


# Paths --------------------------------------------------------------------------------------------------------------


def same(found, expected):
    return len(found) == len(expected) and all(a is b for a, b in zip(found, expected, strict=True))


def test_a_path_of_the_bare_model_is_right_behind_an_adapter():
    bare = tiny("bert")
    paths = [name for name, _ in bare.named_modules() if name]
    lookup = bare.get_input_embeddings()
    model = adapted(bare, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"])
    for path in paths:
        assert find_module(model, path) is model.get_submodule(f"base_model.model.{path}"), path
    assert find_module(model, WORDS).base_layer is lookup
    assert find_module(model, "word_embeddings") is find_module(model, WORDS)
    layers = [model.get_submodule(f"base_model.model.bert.encoder.layer.{n}") for n in (0, 1)]
    for pattern in ("bert.encoder.layer.*", "*.encoder.layer.*", "layer.*", "base_model.model.bert.encoder.layer.*"):
        assert same(find_modules(model, pattern), layers), pattern
    assert same(find_modules(model, "*.bert.encoder.layer.1"), layers[1:])


def test_a_pattern_of_a_model_in_a_model():
    bare = tiny("llama")
    model = adapted(bare, target_modules=["q_proj"])
    layer = bare.model.layers[1]
    for pattern in ("model.layers.1", "*.model.layers.1", "*.layers.1", "layers.1"):
        assert same(find_modules(model, pattern), [layer]), pattern


def test_a_path_inside_a_copy():
    model = adapted(tiny("bert"), modules_to_save=["pooler"])
    copied = model.get_submodule("base_model.model.bert.pooler.modules_to_save.default.dense")
    if not hasattr(model.base_model.model.bert.pooler, "dense"):
        pytest.skip("this release of peft does not hand on what it copies")
    assert find_module(model, "bert.pooler.dense") is copied


def test_a_path_inside_a_compiled_part():
    model = tiny("bert")
    attention = model.bert.encoder.layer[0].attention
    model.bert.encoder.layer[0] = torch.compile(model.bert.encoder.layer[0], backend="eager")
    assert find_module(model, "bert.encoder.layer.0.attention") is attention


def test_whole_paths_win_and_ends_that_fit_several_are_refused():
    inner = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "a": inner, "b": nn.ModuleDict({"c": inner})})
    assert find_module(model, "layers.0") is model["layers"][0]
    assert same(find_modules(model, "layers.*"), [model["layers"][0]])
    # The same behind a wrapper.
    wrapped = nn.ModuleDict({"module": model})
    assert find_module(wrapped, "layers.0") is model["layers"][0]
    assert same(find_modules(wrapped, "layers.*"), [model["layers"][0]])
    # A shared module is one, by any of its names.
    assert find_module(model, "b.c.layers.0") is find_module(model, "a.layers.0")
    bert = tiny("bert")
    message = (
        "adv_target='query' fits several modules of BertForSequenceClassification: "
        "bert.encoder.layer.0.attention.self.query, bert.encoder.layer.1.attention.self.query. "
        "Write the whole path of one of them; '*.query' would mean all."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        find_module(bert, "query")
    both = [bert.get_submodule(f"bert.encoder.layer.{n}.attention.self.query") for n in (0, 1)]
    assert same(find_modules(bert, "*.query"), both)
    for wrong in ("uery", "self.que", "bert.encoder.layer.2", "bert..encoder"):
        with pytest.raises(ValueError, match=r"BertForSequenceClassification has no such module\. Near names: "):
            find_module(bert, wrong)


def test_training_behind_an_adapter_with_the_paths_of_the_bare_model():
    deltas = []
    for target in (WORDS, f"base_model.model.{WORDS}"):
        model = adapted(tiny("bert"), modules_to_save=["word_embeddings"])
        adversary = loops.Adversary(model.train(), FGM(epsilon=1.0, scope="vocabulary"), target=target)
        adversary.backward(batches(padded_data(tiny("bert"), size=4), 4)[0])
        deltas.append(model.get_parameter(f"base_model.model.{WORDS}.modules_to_save.default.weight").grad)
    assert torch.equal(*deltas)
