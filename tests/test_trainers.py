"""Trainers of other libraries, the real ones: trl and sentence-transformers.

`python tests/test_trainers.py` prints the table of docs/trainers.md.
"""

import gc
import importlib
import math
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BertConfig, BertModel, BertTokenizerFast, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaReward

from fgm_trainer import FGM, PGD, SMART, VAT, AdversarialTrainerMixin, PartialFGM
from fgm_trainer.compatibility import steps_twice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.trainers,
    # Of trl, on what it will rename, and of datasets and multiprocess.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
PAGE = Path(__file__).parents[1] / "docs" / "trainers.md"
WORDS = [
    "a",
    "short",
    "long",
    "sentence",
    "number",
    "about",
    "nothing",
    "yes",
    "no",
    "never",
    "say",
    "is",
    "it",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
]
TEXTS = [f"a {'short' if i % 2 else 'long'} sentence about number {WORDS[-1 - i % 8]}" for i in range(8)]
SAID = [{"prompt": f"say {WORDS[-1 - i]}", "chosen": f"yes {WORDS[-1 - i]}", "rejected": "no never"} for i in range(8)]
PAIRS = [{"anchor": text, "positive": f"is it {text}"} for text in TEXTS]
SCORED = [{"sentence1": text, "sentence2": "is it so", "score": (i % 5) / 5} for i, text in enumerate(TEXTS)]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def adversarial(kind):
    return type(f"Adversarial{kind.__name__}", (AdversarialTrainerMixin, kind), {})


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return made_world(tmp_path_factory.mktemp("trainers"))


def made_world(folder):
    """A folder with a tokenizer, a language model, a reward model and an encoder."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, "so", "#", ".", *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), eos_token="[SEP]")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    llama = LlamaConfig(**size, **SIZES, num_key_value_heads=2)
    bert = BertConfig(vocab_size=len(tokenizer), **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    models = {"llama": LlamaForCausalLM(llama), "encoder": BertModel(bert)}
    llama.num_labels = 1
    models["reward"] = LlamaReward(llama)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def of_trl(name, world, attack, *, data, model="llama", module=None, settings=None, **more):
    import trl

    source = trl if module is None else __import__(f"trl.experimental.{module}", fromlist=[name])
    kind, config = getattr(source, f"{name}Trainer"), getattr(source, f"{name}Config")
    loaded = (LlamaReward if model == "reward" else LlamaForCausalLM).from_pretrained(world / model)
    args = config(**common(world), bf16=False, **settings or {})
    tokenizer = BertTokenizerFast.from_pretrained(world / model)
    more |= {"model": loaded, "args": args, "train_dataset": Dataset.from_list(data), "processing_class": tokenizer}
    return made(kind, attack, more)


def of_sentences(loss, world, attack, *, data, cross=False):
    import sentence_transformers as st

    torch.manual_seed(0)
    if cross:
        from sentence_transformers import cross_encoder

        kind, config = cross_encoder.CrossEncoderTrainer, cross_encoder.CrossEncoderTrainingArguments
        model = st.CrossEncoder(str(world / "encoder"), num_labels=1, device="cpu")
    else:
        kind, config = st.SentenceTransformerTrainer, st.SentenceTransformerTrainingArguments
        model = st.SentenceTransformer(str(world / "encoder"), device="cpu")
    data = {k: Dataset.from_list(v) for k, v in data.items()} if isinstance(data, dict) else Dataset.from_list(data)
    more = {"model": model, "args": config(**common(world)), "train_dataset": data, "loss": loss(model)}
    return made(kind, attack, more)


def made(kind, attack, given):
    """The trainer, plain where there is no attack."""
    return kind(**given) if attack is None else adversarial(kind)(**given, attack=attack)


def common(world):
    plain = {
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    plain |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return plain | {"output_dir": str(world / "out"), "per_device_train_batch_size": 4, "dataloader_pin_memory": False}


def losses():
    from sentence_transformers import losses as known

    return known


TEXT = [{"text": text} for text in TEXTS]
COMPLETED = [{"prompt": row["prompt"], "completion": f" {row['chosen']}"} for row in SAID]
JUDGED = [row | {"label": i % 2 == 0} for i, row in enumerate(COMPLETED)]
LORA = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
TRAINERS = {
    "trl `SFTTrainer`": lambda w, a: of_trl("SFT", w, a, data=TEXT),
    "trl `SFTTrainer`, packed": lambda w, a: of_trl(
        "SFT", w, a, data=TEXT, settings={"packing": True, "max_length": 16}
    ),
    "trl `SFTTrainer`, packed, wrapped": lambda w, a: of_trl(
        "SFT", w, a, data=TEXT, settings={"packing": True, "max_length": 16, "packing_strategy": "wrapped"}
    ),
    "trl `SFTTrainer`, prompt and completion": lambda w, a: of_trl("SFT", w, a, data=COMPLETED),
    "trl `SFTTrainer`, gradient checkpointing": lambda w, a: of_trl("SFT", w, a, data=TEXT, settings=CHECKPOINTING),
    "trl `SFTTrainer`, LoRA": lambda w, a: of_trl("SFT", w, a, data=TEXT, **LORA),
    "trl `DPOTrainer`": lambda w, a: of_trl("DPO", w, a, data=SAID),
    "trl `DPOTrainer`, LoRA": lambda w, a: of_trl("DPO", w, a, data=SAID, **LORA),
    "trl `KTOTrainer`": lambda w, a: of_trl("KTO", w, a, data=JUDGED),
    "trl `ORPOTrainer`": lambda w, a: of_trl("ORPO", w, a, data=SAID, module="orpo"),
    "trl `CPOTrainer`": lambda w, a: of_trl("CPO", w, a, data=SAID, module="cpo"),
    "trl `RewardTrainer`": lambda w, a: of_trl("Reward", w, a, data=SAID, model="reward"),
    "`SentenceTransformerTrainer`, in-batch negatives": lambda w, a: of_sentences(
        lambda m: losses().MultipleNegativesRankingLoss(m), w, a, data=PAIRS
    ),
    "`SentenceTransformerTrainer`, cosine similarity": lambda w, a: of_sentences(
        lambda m: losses().CosineSimilarityLoss(m), w, a, data=SCORED
    ),
    "`SentenceTransformerTrainer`, Matryoshka": lambda w, a: of_sentences(
        lambda m: losses().MatryoshkaLoss(m, losses().MultipleNegativesRankingLoss(m), [16, 8]), w, a, data=PAIRS
    ),
    "`SentenceTransformerTrainer`, two data sets": lambda w, a: of_sentences(
        lambda m: {"a": losses().MultipleNegativesRankingLoss(m), "b": losses().CosineSimilarityLoss(m)},
        w,
        a,
        data={"a": PAIRS, "b": SCORED},
    ),
    "`SentenceTransformerTrainer`, gradient caching": lambda w, a: of_sentences(
        lambda m: losses().CachedMultipleNegativesRankingLoss(m, mini_batch_size=2), w, a, data=PAIRS
    ),
    "`CrossEncoderTrainer`": lambda w, a: of_sentences(cross_entropy, w, a, data=SCORED, cross=True),
}


def cross_entropy(model):
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    return BinaryCrossEntropyLoss(model)


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def step(make, world, attack):
    """What a step adds to the weights."""
    torch.manual_seed(1)
    trainer = make(world, attack)
    before = parameters(trainer)
    trainer.train()
    return {name: p - before[name] for name, p in parameters(trainer).items()}, trainer


def difference(name, world):
    """Between a step at epsilon 1e-8 and twice the stock step, relative to the longest change of a weight."""
    stock, _ = step(TRAINERS[name], world, None)
    found, _ = step(TRAINERS[name], world, FGM(epsilon=1e-8, scope="example"))
    assert stock.keys() == found.keys()
    largest = max(2 * change.abs().max().item() for change in stock.values())
    assert largest > 0
    return max((found[key] - 2 * stock[key]).abs().max().item() for key in stock) / largest


@pytest.mark.parametrize("name", TRAINERS)
def test_without_a_perturbation_a_step_is_twice_the_stock_step(name, world):
    assert difference(name, world) < 1e-4


@pytest.mark.parametrize("name", TRAINERS)
def test_an_attack_is_seen_and_logged(name, world):
    stock, _ = step(TRAINERS[name], world, None)
    # The losses of sentences are steep.
    epsilon = 0.01 if "Sentence" in name else 0.5
    found, trainer = step(TRAINERS[name], world, FGM(epsilon=epsilon, scope="example"))
    largest = max(2 * change.abs().max().item() for change in stock.values())
    assert max((found[key] - 2 * stock[key]).abs().max().item() for key in stock) > 1e-3 * largest
    (line,) = [line for line in trainer.state.log_history if "adv_loss" in line]
    assert line["adv_loss"] > line["loss"]
    assert line["adv_delta_norm"] == pytest.approx(epsilon, rel=1e-3)


@pytest.mark.parametrize("name", ["trl `DPOTrainer`", "trl `DPOTrainer`, LoRA", "trl `KTOTrainer`"])
def test_the_reference_model_of_a_preference_is_not_perturbed(name, world):
    """It says what the model was like before training, which an attack does not change."""
    trainer = TRAINERS[name](world, FGM(epsilon=5.0, scope="example"))
    # With LoRA the reference is the model itself, its adapter switched off.
    reference = getattr(trainer, "ref_model", None) or trainer.model
    last = [m for path, m in reference.named_modules() if path.endswith("model.layers.1")][-1]
    seen = {True: [], False: []}
    last.register_forward_hook(
        lambda module, args, output: seen[torch.is_grad_enabled()].append(
            (output[0] if isinstance(output, tuple) else output).detach().clone()
        )
    )
    trainer.train()
    half = len(seen[False]) // 2
    assert half
    # KTO has several of them in a pass.
    for clean, attacked in zip(seen[False][:half], seen[False][half:], strict=True):
        assert torch.equal(clean, attacked)
    if "LoRA" in name:
        clean, attacked = seen[True]
        assert (clean - attacked).abs().max() > 0.1


@pytest.mark.parametrize(
    "attack", [FGM(epsilon=5.0, scope="example"), PGD(epsilon=5.0, scope="example")], ids=["fgm", "pgd"]
)
@pytest.mark.parametrize("name", [name for name in TRAINERS if "trl" in name])
def test_figures_of_the_loss_are_those_of_the_clean_pass(name, attack, world):
    """Rewards, entropies, numbers of tokens: the first step's are the stock trainer's."""
    ours = ("loss", "grad_norm", "adv_")

    def figures(attack):
        _, trainer = step(TRAINERS[name], world, attack)
        line = trainer.state.log_history[0]
        return {key: value for key, value in line.items() if not key.startswith(ours)}

    stock = figures(None)
    assert len(stock) > 3
    assert figures(attack) == pytest.approx(stock, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("path", ["model.layers.1", "*.model.layers.1"])
def test_a_path_that_is_right_for_the_model_is_right_under_lora(path, world):
    lora = TRAINERS["trl `SFTTrainer`, LoRA"](world, None).model
    trainer = adversarial(type(TRAINERS["trl `SFTTrainer`, LoRA"](world, None)))(
        model=lora,
        args=TRAINERS["trl `SFTTrainer`"](world, None).args,
        train_dataset=Dataset.from_list(TEXT),
        processing_class=BertTokenizerFast.from_pretrained(world / "llama"),
        attack=FGM(epsilon=0.5, scope="example"),
        target=path,
    )
    trainer.train()
    assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(0.5, rel=1e-3)


REFUSED = {
    "trl `SFTTrainer`, method `vat`": (lambda w: TRAINERS["trl `SFTTrainer`"](w, VAT()), "outputs that have no graph"),
    "`SentenceTransformerTrainer`, gradient caching, method `pgd`": (
        lambda w: TRAINERS["`SentenceTransformerTrainer`, gradient caching"](w, PGD()),
        "runs the model again in its backward pass",
    ),
    "`SentenceTransformerTrainer`, gradient caching, method `partial_fgm`": (
        lambda w: TRAINERS["`SentenceTransformerTrainer`, gradient caching"](w, PartialFGM()),
        "Where the loss caches gradients, choose a method",
    ),
    "trl `GRPOTrainer`": (
        lambda w: of_trl("GRPO", w, FGM(), data=SAID, reward_funcs=len, settings={"num_generations": 2}),
        "GRPOTrainer counts its training steps",
    ),
}


# By module: what generates, or counts its own steps; and what trains on the data that it is given.
SAMPLE = {
    "trainer": ["GRPO", "RLOO", "Distillation"],
    "experimental.gkd": ["GKD"],
    "experimental.gold": ["GOLD"],
    "experimental.online_dpo": ["OnlineDPO"],
    "experimental.sdft": ["SDFT"],
    "experimental.sdpo": ["SDPO"],
    "experimental.a2po": ["A2PO"],
    "experimental.iw_opd": ["IWOPD"],
    "experimental.gmpo": ["GMPO"],
}
GIVEN = {
    "trainer": ["SFT", "DPO", "KTO", "Reward"],
    "experimental.cpo": ["CPO"],
    "experimental.orpo": ["ORPO"],
    "experimental.tpo": ["TPO"],
}


@pytest.mark.parametrize(("listed", "sampled"), [(SAMPLE, True), (GIVEN, False)], ids=["sample", "given"])
def test_what_samples_is_told_apart(listed, sampled):
    for module, names in listed.items():
        for name in names:
            kind = getattr(importlib.import_module(f"trl.{module}"), f"{name}Trainer")
            assert bool(steps_twice(kind)) == sampled, name


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_attacked_is_refused_by_name(name, world):
    make, says = REFUSED[name]
    trainer = make(world)
    with pytest.raises((ValueError, RuntimeError), match=says):
        trainer.train()


COMPARED = ["`SentenceTransformerTrainer`, in-batch negatives", "`CrossEncoderTrainer`"]


def compared(name, world, attack, steps):
    """What the model gave in each pass, column by column; the trainer."""
    torch.manual_seed(1)
    trainer = TRAINERS[name](world, attack)
    trainer.args.max_steps, trainer.args.learning_rate = steps, 0.1
    given = []

    def note(module, args, output):
        given.append(next(output[key] for key in ("sentence_embedding", "scores") if key in output).detach().clone())

    trainer.model.register_forward_hook(note)
    trainer.train()
    columns = 1 if "Cross" in name else 2
    return [given[i : i + columns] for i in range(0, len(given), columns)], trainer


def apart(name, one, other):
    """The divergence: of embeddings one minus the cosine, of scores the square."""
    if "Cross" in name:
        return sum((a - b).square().mean() for a, b in zip(one, other, strict=True)).item()
    return sum((1 - torch.cosine_similarity(a, b)).mean() for a, b in zip(one, other, strict=True)).item()


@pytest.mark.parametrize("name", COMPARED)
def test_a_divergence_is_of_embeddings_or_scores(name, world):
    (clean, noisy, moved), trainer = compared(name, world, VAT(epsilon=0.3, scope="example"), 1)
    (line,) = [line for line in trainer.state.log_history if "adv_loss" in line]
    assert line["adv_loss"] == pytest.approx(apart(name, clean, moved), rel=1e-3)
    assert apart(name, clean, moved) > 10 * apart(name, clean, noisy) > 0


@pytest.mark.parametrize("name", COMPARED)
def test_the_mean_of_earlier_weights_is_that_of_the_model_that_the_loss_holds(name, world):
    attack = SMART(epsilon=0.1, steps=1, bregman=1.0, decay=0.5)
    passes, _ = compared(name, world, attack, 3)
    # Of each step: clean, one for the gradient, the perturbed one, that of earlier weights, and the last.
    first, _, _, before, last = passes[10:]
    torch.testing.assert_close(first, last)
    assert apart(name, before, last) > 1e-6


@pytest.mark.parametrize("name", ["trl `DPOTrainer`", "`SentenceTransformerTrainer`, cosine similarity"])
def test_a_part_of_the_batch(name, world):
    _, trainer = step(TRAINERS[name], world, PartialFGM(epsilon=0.5))
    assert trainer.state.log_history[0]["adv_delta_norm"] > 0


def test_a_script_as_it_is(world):
    """Classes that were imported before, and plain arguments."""
    import fgm_trainer

    # The classes that other tests have made of these.
    gc.collect()
    with fgm_trainer.patch(adv_epsilon=0.5, adv_warmup=0.0, adv_scope="example") as patched:
        for name in ("trl `SFTTrainer`", "`CrossEncoderTrainer`"):
            trainer = TRAINERS[name](world, None)
            trainer.train()
            assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(0.5, rel=1e-3)
    assert patched.trainers == ["SFTTrainer", "CrossEncoderTrainer"]
    assert patched.steps == 2
    _, trainer = step(TRAINERS["trl `SFTTrainer`"], world, None)
    assert "adv_loss" not in trainer.state.log_history[0]


def fit_few_shots(world, **flags):
    """setfit's phases on eight texts, with flags adversarial: what its inner trainer logged first, and its model."""
    import setfit

    import fgm_trainer

    gc.collect()
    with fgm_trainer.patch(**flags) if flags else nullcontext():
        model = setfit.SetFitModel.from_pretrained(str(world / "encoder"), device="cpu")
        args = setfit.TrainingArguments(
            output_dir=str(world / "out"), batch_size=4, max_steps=1, logging_steps=1, report_to="none", seed=0
        )
        data = Dataset.from_list([{"text": text, "label": i % 2} for i, text in enumerate(TEXTS)])
        trainer = setfit.Trainer(model=model, args=args, train_dataset=data)
        trainer.train()
    return trainer.st_trainer.state.log_history[0], model


def test_the_embedding_phase_of_setfit(world):
    plain, _ = fit_few_shots(world)
    assert "adv_loss" not in plain
    twice, _ = fit_few_shots(world, adv_epsilon=1e-8, adv_warmup=0.0, adv_scope="example")
    assert twice["grad_norm"] == pytest.approx(2 * plain["grad_norm"], rel=1e-4)
    attacked, model = fit_few_shots(world, adv_epsilon=0.01, adv_warmup=0.0, adv_scope="example")
    assert attacked["adv_loss"] > attacked["embedding_loss"]
    assert attacked["adv_delta_norm"] == pytest.approx(0.01, rel=1e-3)
    assert len(model.predict(TEXTS)) == len(TEXTS)


# The page -------------------------------------------------------------------------------------------------------------


def table(world):
    lines = ["| trainer | a step at epsilon 1e-8 beside twice the stock step |", "|---|---|"]
    for name in TRAINERS:
        found = difference(name, world)
        lines.append(f"| {name} | below 1e{math.ceil(math.log10(max(found, 1e-6)))} |")
    return "\n".join([*lines, *(f"| {name} | refused |" for name in REFUSED)])


def test_the_page_lists_what_is_tested():
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert set(rows) - {"trainer"} == {*TRAINERS, *REFUSED}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(table(made_world(Path(tempfile.mkdtemp()))))
