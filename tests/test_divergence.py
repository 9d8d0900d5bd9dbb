"""Divergences: what the logits are, and which positions count, in every head that has its own way with labels."""

import copy
import math
from types import SimpleNamespace

import pytest
import reference_methods as slow
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SEQ2SEQ, VOCABULARY, batches, distance, padded_data, tiny, train, weights
from test_methods import DIVERGENCES, check_divergence, headed
from test_synchronisation import Waits
from torch import nn
from torch.distributions import Bernoulli, Categorical, kl_divergence

from fgm_trainer import SMART, VAT
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.divergence import KINDS, Against, counted_positions, divergence

TOLERANCE = 1e-12
# T5 takes its softmax in float32, and some machines sum more columns in another order.
NARROW = 1e-5
many = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def model_of(name="Model", **config):
    """A model that nobody calls: its class has this name."""
    model = type(name, (nn.Module,), {})()
    model.config = SimpleNamespace(**config)
    return model


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(now, then, kind="kl", model=None, **batch):
    return divergence((now,), [Against((then,), kind)], model or model_of(), batch)


def by_torch(family, now, then, kind="kl"):
    """torch's own divergence of each distribution."""
    p, q = family(logits=then), family(logits=now)
    return kl_divergence(p, q) + (kl_divergence(q, p) if kind == "symmetric" else 0.0)


# What the logits are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3), (4, 5, 1), (4, 5, 3)])
def test_the_configuration_names_a_yes_or_no(shape, kind):
    now, then = drawn(*shape), drawn(*shape, seed=1)
    found = measured(now, then, kind, model_of(problem_type="multi_label_classification"))
    each = by_torch(Bernoulli, now, then, kind)
    expected = each.mean() if len(shape) == 1 else each.sum(-1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_one_yes_or_no_is_not_a_difference():
    """Logits that are 1 apart, written out: p log(p/q) + (1 - p) log((1 - p)/(1 - q))."""
    then, now = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    found = measured(now, then, model=model_of(problem_type="multi_label_classification"))
    p, q = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert found.item() == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)), abs=1e-6)
    assert measured(now, then, model=model_of(problem_type="regression")).item() == 1


@pytest.mark.parametrize("shape", [(4, 1), (4,), (4, 3), (4, 5, 1)])
def test_the_configuration_names_a_regression(shape):
    now, then = drawn(*shape), drawn(*shape, seed=1)
    each = (now - then) ** 2
    expected = each.mean() if len(shape) == 1 else each.sum(-1).mean()
    found = measured(now, then, model=model_of(problem_type="regression"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("columns", "labels", "family"),
    [
        (1, torch.zeros(4), "number"),
        (1, torch.zeros(4, 1), "number"),
        (1, torch.zeros(4, dtype=torch.long), "number"),
        (1, None, "number"),
        (3, torch.zeros(4, 3), "yes or no"),
        (3, torch.zeros(4, 3, dtype=torch.long), "yes or no"),
        (3, torch.zeros(4, dtype=torch.long), "classes"),
        (3, None, "classes"),
    ],
)
@pytest.mark.parametrize("config", [{"problem_type": None}, {}])
def test_where_the_configuration_does_not_say(config, columns, labels, family):
    now, then = drawn(4, columns), drawn(4, columns, seed=1)
    expected = slow.apart(then, now, "kl", family, None)
    found = measured(now, then, model=model_of(**config), labels=labels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_it_is_inferred_as_transformers_does():
    """The configuration that a head has written into it agrees with what was found without it."""
    for classes, labels in [(1, [0.5] * 4), (3, [[1.0, 0.0, 1.0]] * 4), (3, [0, 1, 2, 0])]:
        model = tiny("bert", classes=classes)
        batch = {"input_ids": torch.full((4, 5), 7), "labels": torch.tensor(labels)}
        now, then = drawn(4, classes), drawn(4, classes, seed=1)
        before = measured(now, then, model=model, **batch)
        assert model.config.problem_type is None
        if batch["labels"].is_floating_point():
            batch["labels"] = batch["labels"].double()
        model(**batch)
        assert model.config.problem_type is not None
        assert before == measured(now, then, model=model, **batch)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_training_on_one_yes_or_no(name):
    model = tiny("bert", classes=1, problem_type="multi_label_classification")
    data = padded_data(model)
    for number, example in enumerate(data):
        example["labels"] = [float(number % 2)]
    check_divergence(name, model, data, settings={"family": "yes or no"})


def test_question_answering_is_over_positions():
    """Two distributions over positions an example; no position of them is left out."""
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]), "start_positions": torch.tensor([0, 1])}
    start, end = drawn(2, 4), drawn(2, 4, seed=1)
    fixed = drawn(2, 4, seed=2), drawn(2, 4, seed=3)
    model = model_of("BertForQuestionAnswering", problem_type=None)
    found = divergence((start, end), [Against(fixed, "symmetric")], model, batch)
    each = [by_torch(Categorical, a, b, "symmetric").mean() for a, b in zip((start, end), fixed, strict=True)]
    torch.testing.assert_close(found, sum(each), rtol=1e-12, atol=0.0)


def test_multiple_choice_is_over_choices():
    """With as many choices as positions or examples no mask is taken for one of choices."""
    mask = torch.ones(3, 3, 3)
    mask[:, :, 1:] = 0
    now, then = drawn(3, 3), drawn(3, 3, seed=1)
    model = model_of("BertForMultipleChoice", problem_type=None)
    found = measured(now, then, model=model, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found, by_torch(Categorical, now, then).mean(), rtol=1e-12, atol=0.0)


def test_an_example_without_a_label_counts():
    """As in semi-supervised VAT."""
    now, then = drawn(4, 3), drawn(4, 3, seed=1)
    found = measured(now, then, labels=torch.tensor([0, -100, -100, 2]))
    torch.testing.assert_close(found, by_torch(Categorical, now, then).mean(), rtol=1e-12, atol=0.0)


# Which positions count: those at whose logits the loss has a gradient ------------------------------------------------


class Wrapped(nn.Module):
    """A model of one's own around another; it has no configuration."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def renamed(model):
    """A subclass whose name says nothing."""
    model.__class__ = type("Own", (type(model),), {})
    return model


def adapted(model, **settings):
    peft = pytest.importorskip("peft", reason="an extra of the tests")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **settings))


def prompted(model, task):
    """Five virtual tokens in front."""
    peft = pytest.importorskip("peft", reason="an extra of the tests")
    return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=5, task_type=task))


def encoder_decoder():
    parts = tiny("bert").config.to_dict()
    encoder, decoder = (transformers.BertConfig(**parts) for _ in range(2))
    decoder.is_decoder = decoder.add_cross_attention = True
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return transformers.EncoderDecoderModel(config)


def seeing():
    """A decoder behind an image tower, which has the name of an encoder-decoder."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes),
        text_config=transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes),
        image_token_index=VOCABULARY - 1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def xlnet():
    config = transformers.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=24)
    return transformers.XLNetLMHeadModel(config)


def decoding_bert():
    config = tiny("bert").config
    config.is_decoder = True
    return transformers.BertLMHeadModel(config)


HEADS = {
    "tokens": lambda: headed("BertForTokenClassification"),
    "tokens, wrapped": lambda: Wrapped(headed("BertForTokenClassification")),
    "tokens, after a decoder": lambda: headed("LlamaForTokenClassification", "llama"),
    "tokens, after an encoder-decoder's encoder": lambda: headed("T5ForTokenClassification", "t5"),
    "masked": lambda: headed("BertForMaskedLM"),
    "masked, wrapped": lambda: Wrapped(headed("BertForMaskedLM")),
    "causal, Llama": lambda: headed("LlamaForCausalLM", "llama"),
    "causal, GPT-2": lambda: headed("GPT2LMHeadModel", "gpt2"),
    "causal, BERT": decoding_bert,
    "causal, subclass": lambda: renamed(headed("LlamaForCausalLM", "llama")),
    "causal, wrapped": lambda: Wrapped(headed("LlamaForCausalLM", "llama")),
    "causal, adapted": lambda: adapted(headed("LlamaForCausalLM", "llama"), task_type="CAUSAL_LM"),
    "causal, adapted for nothing": lambda: adapted(headed("LlamaForCausalLM", "llama")),
    "causal, prompted": lambda: prompted(headed("LlamaForCausalLM", "llama"), "CAUSAL_LM"),
    "causal, behind images": seeing,
    "causal, not shifted": lambda: headed("BartForCausalLM", "bart"),
    "causal, not shifted, adapted": lambda: adapted(headed("BartForCausalLM", "bart"), task_type="CAUSAL_LM"),
    "permuted": xlnet,
    "T5": lambda: tiny("t5"),
    "T5, wrapped": lambda: Wrapped(tiny("t5")),
    "T5, adapted": lambda: adapted(tiny("bart"), task_type="SEQ_2_SEQ_LM"),
    "T5, prompted": lambda: prompted(tiny("t5"), "SEQ_2_SEQ_LM"),
    "BART": lambda: tiny("bart"),
    "two BERTs": encoder_decoder,
}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for the old name
@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")  # both of EncoderDecoderModel, in every step
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("head", HEADS)
def test_the_positions_that_the_loss_counts(head):
    # The masks of transformers 4.46 can't be made in float64 everywhere.
    model = HEADS[head]().float().train()
    classes = 2 if "tokens" in head else VOCABULARY
    generator = torch.Generator().manual_seed(3)
    for seed in range(3):
        ids = torch.randint(5, VOCABULARY - 1, (3, 6), generator=generator)
        labels = torch.randint(0, classes, (3, 6), generator=generator)
        labels[torch.rand(3, 6, generator=generator) < 0.5] = -100
        # The start is a prompt; the encoder's mask has the shape of the labels and is none of theirs.
        labels[:, 0], labels[0, 1 + seed] = -100, 1
        mask = torch.ones(3, 6, dtype=torch.long)
        if "images" not in head:
            # In transformers 4.46 that one takes no label of padding.
            mask[1, 4:] = mask[2, 2:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        outputs = model(**batch)
        logits = outputs["logits"]
        expected = slow.which_count(outputs["loss"], logits)
        assert expected.any()
        assert not expected.all()
        assert torch.equal(counted_positions(logits, model, batch), expected)


def test_every_choice_of_a_double_head():
    model = headed("GPT2DoubleHeadsModel", "gpt2")
    ids = torch.randint(5, VOCABULARY, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :, :2] = labels[0, 1] = -100
    batch = {"input_ids": ids, "labels": labels}
    outputs = model(**batch)
    expected = slow.which_count(outputs.loss, outputs.logits)
    assert torch.equal(counted_positions(outputs.logits, model, batch), expected)
    assert counted_positions(outputs.mc_logits, model, batch) is None


def test_labels_that_are_not_of_positions():
    """CTC's, by chance as many as frames."""
    labels = torch.tensor([[3, 4, -100, -100]])
    logits, model = drawn(1, 4, 9), model_of("Wav2Vec2ForCTC", is_encoder_decoder=False)
    assert counted_positions(logits, model, {"labels": labels}) is None


@pytest.mark.parametrize("labels", [{}, {"labels": torch.zeros(2, dtype=torch.long)}, {"labels": torch.zeros(2, 4)}])
@pytest.mark.parametrize(
    ("name", "decoder", "own", "expected"),
    [
        ("BertModel", False, [[1, 1, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
        ("LlamaForCausalLM", False, [[1, 1, 1, 0], [0, 0, 1, 1]], [[1, 1, 1, 0], [0, 0, 1, 1]]),
        ("LlamaForCausalLM", False, [[1, 1, 0], [0, 1, 1]], [[0, 1, 1, 0], [0, 0, 1, 1]]),
        ("BertModel", False, [[1, 1, 0], [0, 1, 1]], None),
        ("T5ForConditionalGeneration", True, [[1, 1, 0, 0], [0, 1, 1, 1]], None),
    ],
)
def test_without_a_label_for_each_position_it_is_the_mask(labels, name, decoder, own, expected):
    model, logits = model_of(name, is_encoder_decoder=decoder), drawn(2, 4, 3)
    found = counted_positions(logits, model, {"attention_mask": torch.tensor(own), **labels})
    assert found is None if expected is None else found.int().tolist() == expected


def test_without_labels_a_decoder_has_its_own_mask():
    model, logits = model_of("T5ForConditionalGeneration", is_encoder_decoder=True), drawn(2, 4, 3)
    own = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    batch = {"attention_mask": 1 - own, "decoder_attention_mask": own}
    assert torch.equal(counted_positions(logits, model, batch), own.bool())


def test_virtual_tokens_do_not_count():
    labels = torch.tensor([[4, 5, -100, 7]])
    found = counted_positions(drawn(1, 7, 3), model_of("LlamaForCausalLM"), {"labels": labels})
    assert found.int().tolist() == [[0, 0, 0, 1, 0, 1, 0]]
    # Logits of the end alone.
    found = counted_positions(drawn(1, 2, 3), model_of("LlamaForCausalLM"), {"labels": labels})
    assert found.int().tolist() == [[1, 0]]


# Training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 10])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_encoder_decoders(kind, name, length):
    """At length 6 the encoder's mask has the shape of the labels."""
    model = tiny(kind)
    check_divergence(name, model, padded_data(model, length=length))


def prompts(model):
    """The first tokens, and those after the last, are not trained on."""
    data = padded_data(model)
    for number, example in enumerate(data):
        pairs = zip(example["input_ids"], example["attention_mask"], strict=True)
        start = 1 + number % 3
        labels = [token if there else -100 for token, there in pairs]
        example["labels"] = [-100] * start + labels[start:]
    return data


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(("head", "kind"), [("LlamaForCausalLM", "llama"), ("GPT2LMHeadModel", "gpt2")])
def test_causal_language_models_after_a_prompt(head, kind, name):
    model = headed(head, kind)
    check_divergence(name, model, prompts(model))


def longer(model, data, columns):
    """More ignored columns, and what goes into the decoder, as DataCollatorForSeq2Seq makes it."""
    data = [{**example, "labels": example["labels"] + [-100] * columns} for example in data]
    for example in data:
        ids = model.prepare_decoder_input_ids_from_labels(labels=torch.tensor([example["labels"]]))
        example["decoder_input_ids"] = ids[0].tolist()
    return data


def cross_entropy(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    "loss",
    [{}, {"label_smoothing_factor": 0.1}, {"extra": {"compute_loss_func": cross_entropy}}],
    ids=["model's", "smoothed", "function"],
)
@pytest.mark.parametrize("name", ["smart", "vat"])
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_more_ignored_columns_change_nothing(kind, name, loss):
    """Whatever pops the labels out of the batch that the model is given."""
    model = tiny(kind)
    data = padded_data(model, length=8)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    flags = {"adv_method": name, "adv_epsilon": 1.0, **loss}
    if name == "smart":
        flags["adv_kwargs"] = {"step_size": 0.2, "sigma": 0.05}
    train(one, longer(model, data, 0), **flags)
    train(other, longer(model, data, 2), **flags)
    assert distance(one, weights(model)) > 1e-3
    assert distance(one, other) < (NARROW if kind == "t5" else TOLERANCE)


@pytest.mark.parametrize("attack", [SMART(epsilon=1.0, step_size=0.2, sigma=0.05), VAT(epsilon=1.0)], ids=str)
def test_more_ignored_columns_change_nothing_in_a_loop_of_ones_own(attack):
    model = tiny("t5")
    found = []
    for columns in (0, 2):
        own = copy.deepcopy(model)
        adversary = Adversary(own, attack)
        adversary.backward(batches(longer(model, padded_data(model, length=8), columns), 4)[0])
        adversary.close()
        found.append({name: weight.grad for name, weight in own.named_parameters()})
    assert distance(*found) < NARROW


# Numbers ------------------------------------------------------------------------------------------------------------


def test_nothing_counts():
    """Zero and no gradient; what is ignored may be anything."""
    now = drawn(2, 4, 3).requires_grad_()
    labels = torch.full((2, 4), -100)
    found = measured(now, drawn(2, 4, 3, seed=1), labels=labels)
    found.backward()
    assert found.item() == 0
    assert not now.grad.any()
    with torch.no_grad():
        now[0, 1], labels[1, 2] = float("nan"), 1
    assert measured(now, drawn(2, 4, 3, seed=1), labels=labels).isfinite()


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_nothing_is_read_back_from_the_device(problem):
    now, model = drawn(2, 6, 3).requires_grad_(), model_of("LlamaForCausalLM", problem_type=problem)
    batch = {"labels": torch.tensor([[1, 2, -100, 2], [-100] * 4])}
    with Waits() as waits:
        measured(now, drawn(2, 6, 3, seed=1), model=model, **batch).backward()
    assert not waits.seen


PROBLEMS = ["regression", "multi_label_classification", "single_label_classification", None]
cases = {
    "seed": st.integers(0, 10**6),
    "problem": st.sampled_from(PROBLEMS),
    "kind": st.sampled_from(KINDS),
    "shape": st.lists(st.integers(1, 5), min_size=1, max_size=3),
    "scale": st.sampled_from([0.1, 1.0, 30.0]),
}


def labels_for(shape, seed):
    """Of each position, some of them ignored."""
    labels = torch.randint(0, 3, shape[:-1], generator=torch.Generator().manual_seed(seed))
    return labels.masked_fill(labels == 0, -100)


@many
@given(**cases)
def test_it_is_a_divergence(seed, problem, kind, shape, scale):
    now, then = scale * drawn(*shape, seed=seed), scale * drawn(*shape, seed=seed + 1)
    model, labels = model_of(problem_type=problem), labels_for(shape, seed)
    found = measured(now, then, kind, model, labels=labels)
    assert found.isfinite()
    assert found >= -1e-12
    assert measured(now, now, kind, model, labels=labels) == 0


@many
@given(**{**cases, "problem": st.just("single_label_classification")}, shift=st.floats(-100, 100))
def test_a_constant_added_to_the_logits_changes_nothing(seed, problem, kind, shape, scale, shift):
    now, then = scale * drawn(*shape, seed=seed), scale * drawn(*shape, seed=seed + 1)
    model, labels = model_of(problem_type=problem), labels_for(shape, seed)
    moved = now + shift * drawn(*shape[:-1], 1, seed=seed + 2)
    found = measured(now, then, kind, model, labels=labels)
    torch.testing.assert_close(measured(moved, then, kind, model, labels=labels), found, rtol=1e-9, atol=1e-10)


@many
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    more=st.integers(1, 4),
    name=st.sampled_from(["T5ForConditionalGeneration", "LlamaForCausalLM", "BertForTokenClassification"]),
)
def test_positions_that_do_not_count_change_nothing(seed, kind, more, name):
    model = model_of(name, problem_type=None, is_encoder_decoder=name.startswith("T5"))
    now, then, labels = drawn(2, 5, 3, seed=seed), drawn(2, 5, 3, seed=seed + 1), labels_for((2, 5, 3), seed)
    found = measured(now, then, kind, model, labels=labels)
    extra = [torch.cat([logits, drawn(2, more, 3, seed=seed + 2 + i)], 1) for i, logits in enumerate((now, then))]
    longer_labels = nn.functional.pad(labels, (0, more), value=-100)
    torch.testing.assert_close(measured(*extra, kind, model, labels=longer_labels), found, rtol=1e-12, atol=1e-15)
