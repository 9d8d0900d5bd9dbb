"""Tiny random models in float64 without dropout, padded data for them, and a helper that trains them."""

import tempfile
import warnings

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer

from fgm_trainer import AdversarialTrainer, AdversarialTrainingArguments
from fgm_trainer.attacks import ATTACKS

VOCABULARY = 30
CLASSES = 3

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BART = {
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
}
# name: (prefix of the configuration's class, class of the model, what the configuration says)
ZOO = {
    "bert": ("Bert", "BertForSequenceClassification", _BERT | {"pad_token_id": 0}),
    "roberta": ("Roberta", "RobertaForSequenceClassification", _BERT | {"pad_token_id": 1}),
    "distilbert": (
        "DistilBert",
        "DistilBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
            "pad_token_id": 0,
        },
    ),
    "albert": (
        "Albert",
        "AlbertForSequenceClassification",
        _BERT | {"embedding_size": 8, "classifier_dropout_prob": 0.0, "pad_token_id": 0},
    ),
    "electra": ("Electra", "ElectraForSequenceClassification", _BERT | {"embedding_size": 8, "pad_token_id": 0}),
    "deberta": (
        "DebertaV2",
        "DebertaV2ForSequenceClassification",
        _BERT
        | {
            "pad_token_id": 0,
            "pooler_hidden_size": 16,
            "pooler_dropout": 0.0,
            "cls_dropout": 0.0,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
        },
    ),
    "modernbert": (
        "ModernBert",
        "ModernBertForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "reference_compile": False,
        },
    ),
    "mpnet": ("MPNet", "MPNetForSequenceClassification", _BERT | {"pad_token_id": 1}),
    "gpt2": (
        "GPT2",
        "GPT2ForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            # The mask of transformers 4.46 for the other implementation can't be made in float64.
            "attn_implementation": "eager",
        },
    ),
    "llama": (
        "Llama",
        "LlamaForSequenceClassification",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    "t5": (
        "T5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "dropout_rate": 0.0,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "bart": (
        "Bart",
        "BartForConditionalGeneration",
        _BART
        | {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "max_position_embeddings": 32,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "pad_token_id": 1,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "decoder_start_token_id": 3,
            "forced_eos_token_id": None,
        },
    ),
}
CLASSIFIERS = [name for name in ZOO if name not in ("t5", "bart")]
SEQ2SEQ = ["t5", "bart"]
LEAST = {"modernbert": "4.48"}


def tiny(name, *, seed=0, dtype=torch.float64, classes=CLASSES, **settings):
    """A random tiny model; skips the test below the least transformers version that has the model."""
    least = LEAST.get(name, "4.46")
    if Version(transformers.__version__) < Version(least):
        pytest.skip(f"{name} is in transformers >= {least}; this is {transformers.__version__}")
    prefix, model_class, own = ZOO[name]
    with warnings.catch_warnings():
        # Of transformers 4.46's DeBERTa, when it is imported.
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        model_class = getattr(transformers, model_class)
    config = getattr(transformers, prefix + "Config")(**(own | settings))
    if name not in SEQ2SEQ:
        config.num_labels = classes
    torch.manual_seed(seed)
    model = model_class(config).to(dtype)
    # The usual initialisation is so small that a tiny model is nearly linear.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.eval()
    return model


def padded_data(model, size=16, length=10, seed=1, regression=False):
    """Examples of several lengths, padded at the end to `length`, a list of dicts of lists."""
    generator = torch.Generator().manual_seed(seed)
    padding_id = model.config.pad_token_id
    examples = []
    for number in range(size):
        own = length if number % 4 == 0 else int(torch.randint(4, length + 1, (), generator=generator))
        ids = torch.randint(5, VOCABULARY, (own,), generator=generator).tolist()
        example = {
            "input_ids": ids + [padding_id] * (length - own),
            "attention_mask": [1] * own + [0] * (length - own),
        }
        if model.config.is_encoder_decoder:
            target = torch.randint(5, VOCABULARY, (6,), generator=generator).tolist()
            keep = int(torch.randint(3, 7, (), generator=generator))
            example["labels"] = target[:keep] + [-100] * (6 - keep)
        elif regression:
            example["labels"] = float(torch.randn((), generator=generator))
        else:
            example["labels"] = int(torch.randint(0, CLASSES, (), generator=generator))
        examples.append(example)
    return examples


def batches(data, size):
    """The data set in order, as batches of tensors."""
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    return [{key: torch.tensor([example[key] for example in part]) for key in part[0]} for part in parts]


class _InOrder:
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


class StockInOrder(_InOrder, Trainer):
    pass


class AdversarialInOrder(_InOrder, AdversarialTrainer):
    pass


# Epsilons of a size that shows in a few steps.
EPSILONS = {"fgm": 1.0, "pgd": 1.0, "noise": 1.0, "awp": 5e-3, "fgsm": 5e-3, "partial_fgm": 0.3, "atta": 0.3}
EPSILONS |= {"freelb": 0.2, "token_aware": 0.2, "vat": 0.2, "alum": 1e-5, "r3f": 1e-5, "smart": 1e-5}


def fixed(**flags):
    """The flags, with a fixed epsilon of full size from the first step on where they say nothing of it."""
    method = flags.get("adv_method", "fgm")
    return {"adv_epsilon": EPSILONS.get(method), "adv_warmup": 0.0} | flags


def attack_of(name, **settings):
    """The method, with a fixed epsilon unless the settings have one."""
    return ATTACKS[name](**{"epsilon": EPSILONS[name]} | settings)


def train(model, data, *, trainer=AdversarialInOrder, batch=4, accumulate=1, lr=0.1, extra=None, **flags):
    """Trains `model` by plain SGD over `data` in order, one epoch unless flags say more; returns the trainer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    settings = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    flags = {"adv_warmup": 0.0} | flags if extra and "attack" in extra else fixed(**flags)
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            model=model,
            args=AdversarialTrainingArguments(output_dir=folder, **(settings | flags)),
            train_dataset=data,
            optimizers=(optimizer, constant),
            **(extra or {}),
        )
        # Stock Trainer scales the loss wrongly for heads that take **kwargs and ignore num_items_in_batch.
        made.model_accepts_loss_kwargs = False
        made.train()
    return made


def weights(model):
    """A copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def distance(one, other):
    """The largest absolute difference of any weight of two models (or copies of their weights)."""
    one, other = (weights(m) if isinstance(m, nn.Module) else m for m in (one, other))
    assert one.keys() == other.keys()
    assert one
    return max((one[name] - other[name]).abs().max().item() for name in one)
