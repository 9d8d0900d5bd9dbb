"""Nothing is read back from the device inside a step: no operation whose result the host must wait for."""

from collections import Counter

import pytest
import torch
from test_faults import examples, flags, tiny_bert
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments

from fgm_trainer import AdversarialTrainer

# `.item()`, `bool(tensor)`, `nonzero`, boolean indexing and `unique` all go through one of these.
WAITS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "equal.default")


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in WAITS):
            self.seen[str(function)] += 1
        return function(*args, **kwargs or {})


def waits_in_steps(kind, path, arguments, **settings):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = flags(path, arguments, logging_strategy="no", max_steps=3, **settings)
    trainer = kind(model=model, args=args, train_dataset=examples())
    step, waits = trainer.training_step, Waits()

    def watched(*args, **kwargs):
        with waits:
            return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    return waits.seen


@pytest.mark.parametrize("scope", ["vocabulary", "example", "token"])
@pytest.mark.parametrize(("method", "passes"), [("fgm", 2), ("noise", 2), ("partial_fgm", 2), ("pgd", 4)])
def test_a_step_waits_no_more_often_than_its_stock_passes_do(tmp_path, scope, method, passes):
    stock = waits_in_steps(Trainer, tmp_path, TrainingArguments)
    ours = waits_in_steps(
        AdversarialTrainer, tmp_path, type(flags(tmp_path)), adv_method=method, adv_scope=scope, adv_same_dropout=True
    )
    assert {name: count for name, count in ours.items() if count > passes * stock[name]} == {}


@pytest.mark.parametrize("method", ["fgm", "pgd", "freelb", "vat"])
def test_epsilon_auto_waits_for_nothing(tmp_path, method):
    fixed, found = (
        waits_in_steps(AdversarialTrainer, tmp_path, type(flags(tmp_path)), adv_method=method, adv_epsilon=epsilon)
        for epsilon in (0.1, "auto")
    )
    assert found == fixed


def test_the_count_can_see_a_wait():
    with Waits() as waits:
        torch.ones(2).sum().item()
        torch.ones(2).nonzero()
    assert sum(waits.seen.values()) == 2


class Scatters(TorchDispatchMode):
    """How often the lookup's weight gets a gradient, (V, D), and how often such tensors are made otherwise."""

    def __init__(self, size):
        super().__init__()
        self.size, self.scatters, self.others = size, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if "embedding_dense_backward" in str(function):
            self.scatters += isinstance(result, torch.Tensor) and result.shape == self.size
        elif isinstance(result, torch.Tensor) and result.shape == self.size:
            self.others.append(str(function))
        return result


@pytest.mark.parametrize("method", ["fgm", "freelb", "partial_fgm", "pgd", "r3f"])
@pytest.mark.parametrize("scope", ["vocabulary", "example"])
def test_the_lookups_gradient_is_written_once_a_step(tmp_path, method, scope):
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = flags(tmp_path, max_steps=2, adv_method=method, adv_scope=scope)
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=examples())
    step, counts = trainer.training_step, Scatters(model.get_input_embeddings().weight.shape)

    def watched(*args, **kwargs):
        with counts:
            return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    assert counts.scatters == 2
    # Nothing else of that size, but for autograd's own handing over of the gradient.
    assert [name for name in counts.others if "detach" not in name and "new_empty_strided" not in name] == []
