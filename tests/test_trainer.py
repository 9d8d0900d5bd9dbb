"""The Trainer's features under attack: each run equals the in-place snippet, written plainly, to 1e-9 in float64."""

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from test_faults import examples, flags, hooks, tiny_bart, tiny_bert, weights
from torch import nn
from transformers import (
    BartForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import fgm_trainer
from fgm_trainer import (
    FGM,
    PGD,
    VAT,
    AdversarialTrainer,
    AdversarialTrainerMixin,
    AdversarialTrainingArguments,
    PartialFGM,
    metrics,
)

# Renamed in transformers 5; the old name warns there.
NEW_NAME = "activation_checkpointing" in {f.name for f in dataclasses.fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if NEW_NAME else "gradient_checkpointing"


class Snippet(Trainer):
    """Weight FGM as it circulates, done right: this micro-batch's gradient, and the weight put back by copy."""

    epsilon = 1.0

    def training_step(self, model, inputs, *args, **kwargs):
        weight = next(p for n, p in self.model.named_parameters() if "word_embeddings" in n)
        kept_grad, weight.grad = weight.grad, None
        loss = super().training_step(model, inputs, *args, **kwargs)
        gradient, kept = weight.grad.clone(), weight.data.clone()
        if kept_grad is not None:
            weight.grad += kept_grad
        weight.data.add_(self.epsilon * gradient / gradient.norm())
        super().training_step(model, inputs, *args, **kwargs)
        weight.data.copy_(kept)
        return loss


def run(kind, path, model, parts=(), settings=None, data=None, **arguments):
    """Trains with plain SGD and gives the trained weights."""
    of_ours = issubclass(kind, AdversarialTrainerMixin)
    given = {"adv_epsilon": None} if of_ours and "attack" in arguments else {}
    args = flags(path, AdversarialTrainingArguments if of_ours else TrainingArguments, **given | (settings or {}))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if "frozen" not in n], lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = kind(
        model=model, args=args, train_dataset=data or examples(), optimizers=(optimizer, schedule), **arguments
    )
    set_seed(3)
    trainer.train()
    return trainer, weights(model)


def agree(one, other, tolerance=1e-9):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max() <= tolerance, name


def far(one, other):
    return max((one[n] - other[n]).abs().max().item() for n in one if one[n].is_floating_point())


def class_weighted(base):
    class Weighted(base):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 3.0]).double())
            return (loss, outputs) if return_outputs else loss

    return Weighted


class WeightedAbove(class_weighted(AdversarialTrainer)):
    """compute_loss overridden in a subclass of ours."""


class WeightedBelow(AdversarialTrainerMixin, class_weighted(Trainer)):
    """The mixin in front of somebody's Trainer."""


class WeightedSnippet(Snippet, class_weighted(Trainer)):
    """The reference."""


def summed_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


CASES = {
    "plain": {},
    "dropout off": {"model": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}},
    "label smoothing": {"settings": {"label_smoothing_factor": 0.2}},
    "compute_loss_func": {"arguments": {"compute_loss_func": summed_loss}},
    "accumulation": {"arguments": {"compute_loss_func": summed_loss}, "settings": {"gradient_accumulation_steps": 2}},
    "checkpointing": {"settings": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}}},
    "reentrant checkpointing": {"settings": {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}}},
    "neftune": {"settings": {"neftune_noise_alpha": 5.0}},
    "clipping": {"settings": {"max_grad_norm": 0.1}},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_the_snippet(tmp_path, name):
    case = {"model": {}, "settings": {}, "arguments": {}} | CASES[name]
    done = [
        run(kind, tmp_path, tiny_bert(**case["model"]).double(), settings=case["settings"], **case["arguments"])[1]
        for kind in (Snippet, AdversarialTrainer)
    ]
    agree(*done)
    stock = run(Trainer, tmp_path, tiny_bert(**case["model"]).double(), settings=case["settings"], **case["arguments"])
    assert far(stock[1], done[1]) > 1e-4, "the attack changed nothing, so this test proves nothing"


@pytest.mark.parametrize("kind", [WeightedAbove, WeightedBelow])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_an_overridden_compute_loss_keeps_its_class_weights_and_ours(tmp_path, kind, weight):
    class Reference(WeightedSnippet):
        def training_step(self, model, inputs, *args, **kwargs):
            self.second = False
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            factor, self.second = (weight if self.second else 1.0), True
            return loss * factor

    settings = {} if weight == 1.0 else {"adv_weight": weight}
    _, ours = run(kind, tmp_path, tiny_bert().double(), settings=settings)
    _, reference = run(Reference, tmp_path, tiny_bert().double())
    agree(ours, reference)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks for the old name
def test_lora_with_a_frozen_embedding_is_attacked(tmp_path):
    peft = pytest.importorskip("peft", reason="an extra of the tests")

    def adapted():
        config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", lora_dropout=0.0)
        set_seed(1)
        return peft.get_peft_model(tiny_bert().double(), config)

    reference_model = adapted()
    for name, parameter in reference_model.named_parameters():
        if "word_embeddings" in name:
            parameter.requires_grad_(True)  # the snippet needs its gradient; the optimizer below has no part in it

    class FrozenSnippet(Snippet):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            next(p for n, p in self.model.named_parameters() if "word_embeddings" in n).grad = None
            return loss

    settings = {"max_grad_norm": 0.0}
    _, ours = run(AdversarialTrainer, tmp_path, adapted(), settings=settings)
    _, reference = run(FrozenSnippet, tmp_path, reference_model, settings=settings)
    agree(ours, reference)
    assert far(ours, run(Trainer, tmp_path, adapted(), settings=settings)[1]) > 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.cpu.amp.autocast.*:FutureWarning")  # accelerate 1.1's name for it
def test_bf16_autocast_is_attacked_and_learns_close_to_float32(tmp_path):
    trainer, ours = run(AdversarialTrainer, tmp_path, tiny_bert(), settings={"bf16": True})
    _, full = run(AdversarialTrainer, tmp_path, tiny_bert())
    _, snippet = run(Snippet, tmp_path, tiny_bert(), settings={"bf16": True})
    assert far(ours, snippet) < 1e-5
    assert far(ours, full) < 2e-2
    assert trainer.state.log_history[0]["adv_delta_norm"] > 0.1


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_gives_the_same_weights_even_after_an_evaluation_compiled_first(tmp_path):
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    _, eager = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"max_steps": 2})
    settings = {
        "max_steps": 2,
        "torch_compile": True,
        "torch_compile_backend": "eager",
        "eval_on_start": True,
        "eval_strategy": "steps",
    }
    torch.compiler.reset()
    _, compiled = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings=settings, eval_dataset=examples(8))
    torch.compiler.reset()
    assert far(eager, compiled) < 1e-6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_torch_compile_with_inductor(tmp_path):
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    _, eager = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"max_steps": 2})
    torch.compiler.reset()
    _, compiled = run(
        AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"max_steps": 2, "torch_compile": True}
    )
    torch.compiler.reset()
    assert far(eager, compiled) < 1e-5


def test_the_log_says_what_was_applied(tmp_path):
    trainer, _ = run(AdversarialTrainer, tmp_path, tiny_bert(), settings={"adv_scope": "example", "adv_epsilon": 0.5})
    lines = [h for h in trainer.state.log_history if "adv_loss" in h]
    assert len(lines) == 4
    for line in lines:
        assert line["adv_delta_norm"] == pytest.approx(0.5, rel=1e-5)
        assert 0 < line["adv_delta_ratio"] < 10
        assert line["adv_skipped"] == 0
        assert math.isfinite(line["adv_loss"])
    stock, _ = run(Trainer, tmp_path, tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    ours, _ = run(AdversarialTrainer, tmp_path, tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    first = [t.state.log_history[0]["loss"] for t in (stock, ours)]
    assert first[0] == pytest.approx(first[1], rel=1e-6), "`loss` is the clean one, comparable with a plain run"


def test_the_accelerator_says_which_pass_is_the_last_of_a_step(tmp_path):
    """On one process as on many: an optimizer step has one pass with `sync_gradients`."""
    seen = []

    class Watching(AdversarialTrainer):
        def compute_loss(self, *args, **kwargs):
            seen.append(self.accelerator.sync_gradients)
            return super().compute_loss(*args, **kwargs)

    run(Watching, tmp_path, tiny_bert(), settings={"max_steps": 2, "gradient_accumulation_steps": 2})
    assert seen == [False, False, False, True] * 2


def test_a_model_that_is_wrapped_later_is_asked_what_its_wrapper_does(tmp_path):
    """In a process of its own: a process group would stay."""
    command = [sys.executable, Path(__file__).with_name("wrapped_later.py"), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("distance")[1]) < 1e-12


def test_a_long_window_is_added_up_in_parts(tmp_path, monkeypatch):
    lines = []
    for kept in (1024, 3):
        monkeypatch.setattr(metrics, "_KEPT", kept)
        settings = {"max_steps": 8, "logging_steps": 8, "gradient_accumulation_steps": 2}
        trainer, _ = run(AdversarialTrainer, tmp_path, tiny_bert(), settings=settings)
        lines += [h for h in trainer.state.log_history if "adv_loss" in h]
    whole, parts = lines
    for name in ("adv_loss", "adv_delta_norm", "adv_delta_ratio", "adv_skipped"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5), name


def test_adv_loss_is_unweighted_and_absent_without_an_attacked_step(tmp_path):
    plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    halved, _ = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"adv_weight": 0.5, "max_steps": 1})
    whole, _ = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"max_steps": 1})
    one, other = (t.state.log_history[0]["adv_loss"] for t in (halved, whole))
    assert one == pytest.approx(other, rel=1e-6)
    late, _ = run(AdversarialTrainer, tmp_path, tiny_bert(**plain), settings={"adv_start": 2})
    assert ["adv_loss" in h for h in late.state.log_history[:4]] == [False, False, True, True]


def test_a_nan_in_the_adversarial_loss_alone_is_visible(tmp_path, caplog):
    model = tiny_bert()
    calls = []

    def poison(module, args, output):
        calls.append(0)
        return output * float("nan") if len(calls) == 2 else output

    model.classifier.register_forward_hook(poison)
    trainer, _ = run(AdversarialTrainer, tmp_path, model, settings={"max_steps": 1})
    assert math.isnan(trainer.state.log_history[0]["adv_loss"])
    assert "The adversarial loss is nan" in caplog.text


def test_a_run_that_learns_is_not_warned_of(tmp_path, caplog):
    data = examples(48)
    for example in data:  # easy: the first token says the label
        example["input_ids"][1:4] = 10 + example["labels"]
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    args = flags(tmp_path, max_steps=80, logging_steps=20, adv_epsilon=0.05, adv_scope="example", learning_rate=2e-2)
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] < 0.3
    assert "Collapse?" not in caplog.text


def test_plain_arguments_mean_fgm_with_epsilon_one_and_say_so(tmp_path, caplog):
    args = flags(tmp_path, TrainingArguments, max_steps=1)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples())
    trainer.train()
    assert trainer.attack == FGM(epsilon=1.0)
    assert "FGM(epsilon=1.0)" in caplog.text


def test_an_attack_object_works_with_plain_arguments_and_with_schedule_flags(tmp_path):
    plain = AdversarialTrainer(
        model=tiny_bert(),
        args=flags(tmp_path, TrainingArguments, max_steps=1),
        train_dataset=examples(),
        attack=PGD(epsilon=0.5, steps=2),
    )
    plain.train()
    assert plain.state.log_history[0]["adv_delta_norm"] > 0
    args = flags(tmp_path, adv_epsilon=None, adv_start=1, adv_target="bert.encoder.layer.0")
    scheduled = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), attack=FGM(epsilon=0.5))
    scheduled.train()
    first, second = scheduled.state.log_history[:2]
    assert "adv_loss" not in first
    assert second["adv_delta_norm"] == pytest.approx(0.5, rel=1e-5), "a hidden layer's default scope is `example`"


def test_inputs_embeds_can_be_the_target(tmp_path):
    data = [{"inputs_embeds": torch.randn(6, 16), "labels": i % 2} for i in range(8)]
    args = flags(tmp_path, adv_target="inputs_embeds", max_steps=2)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(1.0, rel=1e-5)
    assert sum(hooks(trainer.model)) == 0


@pytest.mark.parametrize(
    ("given", "scope"),
    [
        ({"adv_method": "awp"}, "tensor"),
        ({"adv_target": "bert.encoder.layer.0", "adv_epsilon": 0.5}, "example"),
        ({"adv_epsilon": 0.5}, "vocabulary"),
        ({"adv_epsilon": "auto"}, "example"),
        ({"adv_scope": "token"}, "token"),
    ],
    ids=str,
)
def test_the_model_card_names_the_scope_in_which_the_run_was_attacked(tmp_path, given, scope):
    trainer = AdversarialTrainer(
        model=tiny_bert(), args=flags(tmp_path, max_steps=1, **given), train_dataset=examples()
    )
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    assert f"| scope | {scope} |" in (tmp_path / "README.md").read_text()


def test_the_model_card_names_the_attack(tmp_path):
    args = flags(tmp_path, max_steps=1, adv_method="pgd", adv_epsilon=0.25, adv_steps=2)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples())
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    for row in ("| method | pgd |", "| epsilon | 0.25 |", "| steps | 2 |", "| scope | vocabulary |"):
        assert row in card
    assert set(huggingface_hub.ModelCard(card).data.tags) >= {"adversarial-training", "fgm_trainer"}


@pytest.mark.parametrize(
    "known", [{}, {"dataset_tags": "glue", "dataset": "GLUE SST2", "tasks": "text-classification"}]
)
def test_the_model_card_holds_the_figures_of_the_last_evaluation(tmp_path, known):
    args = flags(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1)
    data = examples()
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.evaluate_robustness(epsilons=[3.0])
    report = trainer.evaluate_robustness(epsilons=[0.1, 2.0])
    for _ in range(2):
        trainer.create_model_card(model_name="tiny", **known)
        card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
        found = {each.metric_name: each.metric_value for each in card.data.eval_results if "under" in each.metric_name}
        assert found == {
            f"accuracy under {attack} of length {epsilon:g}": round(score, 4)
            for attack, scores in report.scores.items()
            for epsilon, score in zip(report.epsilons, scores, strict=True)
        }
        assert "| attack | clean | epsilon 0.1 | epsilon 2 |" in card.text
        assert (tmp_path / "robustness.png").stat().st_size > 1000
    both = trainer.evaluate_robustness({"one": data[:4], "two": data}, epsilons=[0.1])
    trainer.create_model_card(model_name="tiny", **known)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    names = {each.dataset_name for each in card.data.eval_results if "under" in each.metric_name}
    assert names == set(both) == {"one", "two"}


def test_the_model_card_forgets_what_was_found_before_training(tmp_path):
    trainer = AdversarialTrainer(
        model=tiny_bert(), args=flags(tmp_path, max_steps=1), train_dataset=examples(), eval_dataset=examples()
    )
    trainer.evaluate_robustness(epsilons=[0.1])
    trainer.train()
    trainer.create_model_card(model_name="tiny")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert "Robustness" not in card.text
    assert not card.data.eval_results


def test_the_model_card_of_an_image_classifier_says_so(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    data = [{"pixel_values": torch.rand(3, 8, 8), "labels": i % 2} for i in range(8)]
    args = flags(tmp_path, max_steps=1, adv_target="pixel_values")
    trainer = AdversarialTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    report = trainer.evaluate_robustness(epsilons=[0.1])
    trainer.create_model_card(model_name="tiny")
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert {each.task_type for each in card.data.eval_results} == {"image-classification"}
    assert "fgm-train attack" not in card.text
    # The code of the card runs, and measures the same.
    code = card.text.partition("```python\n")[2].partition("```")[0].replace("\nevaluate", "\nfound = evaluate")
    names = {"model": trainer.model, "examples": data, "collate": trainer.data_collator}
    exec(code, names)
    assert names["found"] == report


def test_an_evaluation_reads_the_column_of_a_targeted_attack(tmp_path):
    data = [{**row, "towards": 1 - row["labels"]} for row in examples()]
    args = flags(tmp_path, max_steps=1)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), eval_dataset=data)
    found = trainer.evaluate_robustness(attacks=[PGD(steps=2, targeted="towards")], epsilons=[2.0])
    alone = fgm_trainer.robustness.evaluate_robustness(
        trainer.model, data, [PGD(steps=2, targeted="towards")], [2.0], progress=False
    )
    assert found.scores == alone.scores
    trainer.train()


def test_the_progress_bar_shows_the_attack(tmp_path, capsys):
    args = flags(tmp_path, max_steps=2, disable_tqdm=False, logging_steps=1, adv_epsilon="auto")
    AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples()).train()
    assert re.search(r"adv_loss=[\d.]+, adv_epsilon=[\d.e-]+", capsys.readouterr().err)


def test_tensorboard_has_a_group_of_the_attack(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="make .venv/distributed installs it")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = flags(tmp_path, max_steps=2, logging_steps=1, report_to=["tensorboard"], adv_epsilon="auto")
    AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples()).train()
    (events,) = (file.read_bytes() for file in (tmp_path / "board").rglob("events*"))
    for name in (b"adv/loss", b"adv/epsilon", b"adv/delta_norm", b"train/loss"):
        assert name in events


def test_wandb_has_a_group_of_the_attack(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="make .venv/distributed installs it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    args = flags(tmp_path, max_steps=3, logging_steps=1, report_to=["wandb"])
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples())
    trainer.train()
    try:
        logged = [line for line in trainer.state.log_history if "adv_loss" in line]
        assert wandb.run.summary["adv/loss"] == logged[-1]["adv_loss"]
        assert wandb.run.summary["train/loss"] == logged[-1]["loss"]
    finally:
        wandb.finish()


def test_the_seq2seq_twin_trains(tmp_path):
    args = flags(tmp_path, fgm_trainer.AdversarialSeq2SeqTrainingArguments, max_steps=2)
    data = [{**e, "labels": e["input_ids"]} for e in examples()]
    model = tiny_bart(BartForConditionalGeneration)
    fgm_trainer.AdversarialSeq2SeqTrainer(model=model, args=args, train_dataset=data).train()
    assert sum(hooks(model)) == 0


class GradientPenalty(AdversarialTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        (gradient,) = torch.autograd.grad(loss, self.model.classifier.weight, create_graph=True)
        loss = loss + gradient.norm()
        return (loss, outputs) if return_outputs else loss


class Recursive(AdversarialTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, inner=False, **kwargs):
        if not inner:
            return self.compute_loss(model, inputs, return_outputs=return_outputs, inner=True, **kwargs)
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def test_a_loss_that_takes_a_gradient_of_weights_in_passes_for_the_perturbation_alone(tmp_path):
    model = tiny_bert(attn_implementation="eager", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    start = weights(model)
    trainer, trained = run(GradientPenalty, tmp_path, model, attack=PGD(epsilon=0.5))
    assert far(start, trained)
    assert trainer.state.log_history


@pytest.mark.parametrize(
    "attack",
    [
        PartialFGM(epsilon=0.5),
        PGD(epsilon=1.0, norm="none", clean_weight=0.5, step_size=50.0),
        VAT(epsilon=1.0, weight=0.5),
    ],
    ids=lambda attack: attack.name,
)
def test_a_compute_loss_that_calls_itself_is_weighted_once(tmp_path, attack):
    trained = []
    for kind in (AdversarialTrainer, Recursive):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        trained.append(run(kind, tmp_path, model, attack=attack))
    (one, plain), (other, recursive) = trained
    agree(plain, recursive)
    logs = [[h for h in t.state.log_history if "adv_loss" in h] for t in (one, other)]
    for name in ("loss", "adv_loss", "adv_delta_norm"):
        assert [h[name] for h in logs[0]] == pytest.approx([h[name] for h in logs[1]], rel=1e-9), name


class TriesAgain(Trainer):
    """A loss that fails once in every step, and a step that is then taken again."""

    failed = False

    def training_step(self, *args, **kwargs):
        self.failed = False
        try:
            return super().training_step(*args, **kwargs)
        except MemoryError:
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        if not self.failed:
            self.failed = True
            raise MemoryError
        return super().compute_loss(*args, **kwargs)


def test_a_pass_whose_loss_failed_and_was_tried_again_is_measured_as_any(tmp_path):
    trained = []
    for kind in (Trainer, TriesAgain):
        model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
        ours = type("Ours", (AdversarialTrainerMixin, kind), {})
        trained.append(run(ours, tmp_path, model, attack=FGM(epsilon=1.0, weight=0.5))[1])
    agree(*trained)
