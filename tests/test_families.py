"""Families of models against a float64 reference that moves the lookup's rows in place.

`python tests/test_families.py` prints the table of docs/models.md.
"""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from models import ZOO

from fgm_trainer import FGM
from fgm_trainer.loops import Adversary
from fgm_trainer.perturbation.lookups import path_of

EPSILON, VOCABULARY, PAD = 0.5, 30, 1
PAGE = Path(__file__).parent.parent / "docs" / "models.md"

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_BART = ZOO["bart"][2] | {"d_model": 16, "max_position_embeddings": 64}
_KV = {"num_key_value_heads": 2}
# family: (class of the model, what its configuration says beside the common part)
FAMILIES = {
    "BERT": ("BertForSequenceClassification", _SMALL),
    "RoBERTa": ("RobertaForSequenceClassification", _SMALL),
    "XLM-RoBERTa": ("XLMRobertaForSequenceClassification", _SMALL),
    "DistilBERT": ("DistilBertForSequenceClassification", ZOO["distilbert"][2]),
    "ALBERT": ("AlbertForSequenceClassification", _SMALL | {"embedding_size": 8}),
    "ELECTRA": ("ElectraForSequenceClassification", _SMALL | {"embedding_size": 8}),
    "DeBERTa": ("DebertaForSequenceClassification", _SMALL | {"relative_attention": True, "pos_att_type": ["p2c"]}),
    "DeBERTa-v2, v3": ("DebertaV2ForSequenceClassification", ZOO["deberta"][2]),
    "ModernBERT": ("ModernBertForSequenceClassification", ZOO["modernbert"][2]),
    "MPNet": ("MPNetForSequenceClassification", _SMALL),
    "XLNet": (
        "XLNetForSequenceClassification",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24},
    ),
    "Longformer": ("LongformerForSequenceClassification", _SMALL | {"attention_window": [4, 4]}),
    "SqueezeBERT": ("SqueezeBertForSequenceClassification", _SMALL | {"embedding_size": 16}),
    "MobileBERT": ("MobileBertForSequenceClassification", _SMALL | {"embedding_size": 16}),
    "RoFormer": ("RoFormerForSequenceClassification", _SMALL | {"embedding_size": 16}),
    "FNet": ("FNetForSequenceClassification", _SMALL),
    "GPT-2": ("GPT2ForSequenceClassification", _GPT),
    "GPT-Neo": (
        "GPTNeoForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global"], 2]],
            "max_position_embeddings": 64,
        },
    ),
    "GPT-NeoX": ("GPTNeoXForSequenceClassification", _SMALL),
    "GPT-J": ("GPTJForSequenceClassification", _GPT | {"rotary_dim": 4}),
    "CTRL": ("CTRLForSequenceClassification", _GPT | {"dff": 24}),
    "OPT": ("OPTForSequenceClassification", _SMALL | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BLOOM": (
        "BloomForSequenceClassification",
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    ),
    "Falcon": ("FalconForSequenceClassification", _SMALL),
    "Phi": ("PhiForSequenceClassification", _SMALL),
    "Llama": ("LlamaForSequenceClassification", _SMALL | _KV),
    "Mistral": ("MistralForSequenceClassification", _SMALL | _KV),
    "Qwen2": ("Qwen2ForSequenceClassification", _SMALL | _KV),
    "Gemma": ("GemmaForSequenceClassification", _SMALL | _KV | {"head_dim": 8}),
    "Gemma 2": ("Gemma2ForSequenceClassification", _SMALL | _KV | {"head_dim": 8}),
    "Reformer": (
        "ReformerForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "attention_head_size": 8,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "attn_layers": ["local"],
            "axial_pos_shape": [2, 4],
            "axial_pos_embds_dim": [8, 8],
            "feed_forward_size": 24,
            "local_attn_chunk_length": 4,
            "max_position_embeddings": 8,
            "is_decoder": False,
        },
    ),
    "T5": ("T5ForConditionalGeneration", ZOO["t5"][2]),
    "BART": ("BartForConditionalGeneration", _BART),
    "mBART": ("MBartForConditionalGeneration", _BART | {"scale_embedding": True}),
    "Pegasus": ("PegasusForConditionalGeneration", _BART),
    "Marian": ("MarianMTModel", _BART),
}
# Their own loss, or its gradients, are NaN in float64 where a row begins with padding.
RIGHT_ONLY = {"Longformer", "BLOOM", "Gemma 2"}
CASES = [(name, side) for name in FAMILIES for side in ("right", "left") if side == "right" or name not in RIGHT_ONLY]
# What is refused, or says at the first batch why it can't be served.
REFUSED = {
    "CANINE": ("CanineForSequenceClassification", "hashes characters, looks no tokens up"),
    "Perceiver": ("PerceiverForSequenceClassification", "names no input embedding"),
}


def make(name):
    """A random tiny model in float64 without dropout, in training mode."""
    class_name, own = FAMILIES[name]
    if not hasattr(transformers, class_name):
        pytest.skip(f"{name} is not in transformers {transformers.__version__}")
    kind = getattr(transformers, class_name)
    ids = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = kind.config_class(**(own | ids))
    config.num_labels = 3
    for key, value in vars(config).items():
        if re.search("drop", key) and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = kind(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.05 if name == "MobileBERT" else 0.3)
    return model.train()


def batch_for(model, side):
    """Four examples of several lengths, padded on that side; the padding id stands nowhere else."""
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.full((4, 8), PAD), torch.zeros(4, 8, dtype=torch.long)
    for row, length in enumerate((8, 6, 5, 7)):
        where = slice(0, length) if side == "right" else slice(8 - length, 8)
        ids[row, where] = torch.randint(5, VOCABULARY, (length,), generator=draw)
        mask[row, where] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}
    if model.config.is_encoder_decoder:
        batch["labels"] = torch.randint(5, VOCABULARY, (4, 5), generator=draw)
    if isinstance(model, transformers.FNetForSequenceClassification):
        del batch["attention_mask"]
    return batch


def lookup_of(model):
    return model.get_encoder().embed_tokens if model.config.is_encoder_decoder else model.get_input_embeddings()


def in_place(model, batch):
    """FGM on the rows of the weight: clean backward, rows moved by epsilon * G / ||G||, backward, rows put back."""
    lookup = lookup_of(model)
    weight = lookup.weight
    with torch.no_grad():
        scale = float((lookup(torch.tensor([7])) / weight[7]).mean())
    model(**batch).loss.backward()
    rows = weight.grad.clone()
    rows[PAD] = 0
    kept = weight.detach().clone()
    with torch.no_grad():
        # A step at the output of a lookup that scales its rows is shorter in the rows.
        weight += EPSILON / scale * rows / rows.norm()
    model(**batch).loss.backward()
    with torch.no_grad():
        weight.copy_(kept)


def by_embeds(model, batch):
    """The same for encoder-decoders, whose weight the decoder and the head read as well: fed as `inputs_embeds`."""
    lookup, ids = lookup_of(model), batch["input_ids"]
    rest = {k: v for k, v in batch.items() if k != "input_ids"}
    leaf = torch.zeros(4, 8, 16, dtype=torch.float64, requires_grad=True)
    model(inputs_embeds=lookup(ids) + leaf, **rest).loss.backward()
    rows = torch.zeros(VOCABULARY, 16, dtype=torch.float64)
    for example in range(4):
        for position in range(8):
            if batch["attention_mask"][example, position]:
                rows[ids[example, position]] += leaf.grad[example, position]
    rows = EPSILON * rows / rows.norm()
    model(inputs_embeds=lookup(ids) + rows[ids] * batch["attention_mask"].unsqueeze(-1), **rest).loss.backward()


def worst_difference(name, side):
    """The largest difference of any weight's gradient, relative to the largest entry of all; and what was attacked."""
    found = []
    for kind in ("package", "reference"):
        model = make(name)
        batch = batch_for(model, side)
        if kind == "package":
            adversary = Adversary(model, FGM(epsilon=EPSILON, scope="vocabulary"))
            adversary.backward(batch)
            adversary.close()
        else:
            (by_embeds if model.config.is_encoder_decoder else in_place)(model, batch)
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    size = max(g.abs().max().item() for g in theirs.values())
    if not math.isfinite(size) and transformers.__version__ < "5":
        pytest.skip("the model's own loss is not finite in this version")
    assert size > 1e-3
    return max((ours[n] - theirs[n]).abs().max().item() for n in ours) / size, path_of(model, lookup_of(model))


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize(("name", "side"), CASES)
def test_a_family(name, side):
    try:
        difference, _ = worst_difference(name, side)
    except RuntimeError as error:
        if transformers.__version__ < "5" and "without overflow" in str(error):
            pytest.skip("4.46 can't make this model's mask in float64")
        raise
    assert difference < 1e-12


def refusal(name):
    """What is said of a model that can't be attacked."""
    kind = getattr(transformers, REFUSED[name][0])
    small = {
        "CANINE": _SMALL | {"num_hash_functions": 2, "num_hash_buckets": 16},
        "Perceiver": {"vocab_size": VOCABULARY, "d_model": 16, "d_latents": 16, "num_latents": 4},
    }[name]
    model = kind(kind.config_class(**small | {"pad_token_id": PAD, "num_labels": 3})).train()
    batch = {"input_ids": torch.randint(5, 30, (2, 8)), "labels": torch.tensor([0, 1])}
    with pytest.raises((ValueError, RuntimeError)) as error:
        Adversary(model, FGM(epsilon=1.0)).backward(batch)
    return str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CANINE", "CanineForSequenceClassification has no token lookup at get_input_embeddings"),
        ("Perceiver", "has no token lookup at get_input_embeddings"),
    ],
)
def test_a_refusal_is_clear(name, says):
    assert says in refusal(name)


def table():
    """The table of docs/models.md. A difference is rounded up to a power of ten, so that it is the same everywhere."""
    lines = ["| family | model | padding | attacked | worst difference from float64 |", "|---|---|---|---|---|"]
    for name, side in CASES:
        difference, path = worst_difference(name, side)
        bound = f"1e{math.ceil(math.log10(max(difference, 1e-16)))}"
        lines.append(f"| {name} | `{FAMILIES[name][0]}` | {side} | `{path}` | below {bound} |")
    lines += [f"| {name} | `{c}` | | refused: {why} | |" for name, (c, why) in REFUSED.items()]
    return "\n".join(lines)


def test_the_page_lists_what_is_tested():
    listed = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(), re.MULTILINE)
    assert set(listed) - {"family"} == {*FAMILIES, *REFUSED}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table())
