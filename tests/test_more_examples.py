"""The example scripts of single tasks, run as a user runs them: tiny random models, the first rows of real data."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from glue_world import EXAMPLES, run, saved_results, write_jsonl
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

DATA = Path(__file__).parents[1].parent / "shared" / "data"
pytestmark = pytest.mark.slow

ROWS = {"wnut17": (48, 8), "xquad_en": (16, 6), "stsb": (48, 60)}
FAST = shlex.split(
    "--report_to none --per_device_train_batch_size 8 --max_steps 4 --learning_rate 1e-3 --logging_steps 1 "
    "--save_strategy no --disable_tqdm True --use_cpu True --do_train --do_eval --eval_robustness"
)
CLEAN_AND_ATTACKED = {"robust_clean", "robust_noise_0.2", "robust_fgm_0.2", "robust_pgd-10_0.2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the first rows of each data set and a random model of each kind that knows their words."""
    if not DATA.is_dir():
        pytest.skip(f"there is no folder {DATA} with real data")
    folder = tmp_path_factory.mktemp("world")
    words: Counter[str] = Counter()
    for name, counts in ROWS.items():
        for split, count in zip(("train", "validation"), counts, strict=True):
            lines = (DATA / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
            write_jsonl(folder / f"{name}_{split}.jsonl", [json.loads(line) for line in lines])
            words.update(re.findall(r"[a-z]+", " ".join(lines).lower()))
    common = [word for word, _ in words.most_common(600) if len(word) > 1]
    signs = [chr(i) for i in range(33, 127) if not chr(i).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [f"##{sign}" for sign in signs if sign.isalnum()]
    (folder / "vocab.txt").write_text("\n".join([*special, *signs, *letters, *common]) + "\n")
    save_models(folder, BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=512, eos_token="[SEP]"))
    return folder


def save_models(folder, tokenizer):
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    bart = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 3}
    models = {
        "encoder": BertModel(BertConfig(**ids, **size, max_position_embeddings=512)),
        "decoder": LlamaForCausalLM(LlamaConfig(**ids, **size, num_key_value_heads=2)),
        "both": BartForConditionalGeneration(BartConfig(**ids, **bart, max_position_embeddings=512)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_on(script, world, model, data, *flags):
    """Runs the script adversarially on a data set; returns its folder."""
    files = [f"--{split}_file={world / data}_{split}.jsonl" for split in ("train", "validation")]
    out = world / Path(script).stem
    run(script, world, "--model_name_or_path", world / model, *files, *FAST, "--output_dir", out, *flags)
    assert_attacked(out)
    return out


def assert_attacked(folder):
    """The log says by how much."""
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    steps = [line for line in log if "adv_loss" in line]
    assert steps
    assert max(line["adv_delta_norm"] for line in steps) > 0
    # Only a size that is found while training is logged.
    assert all(line.get("adv_epsilon", 1.0) > 0 for line in steps[1:])


def test_tags(world):
    out = run_on("run_ner.py", world, "encoder", "wnut17", "--adv_epsilon", "auto")
    found = saved_results(out)
    assert found.keys() >= CLEAN_AND_ATTACKED | {"train_loss", "eval_entity_f1", "robust_entity_f1_pgd-10_0.2"}
    # The script's own figure, and the package's.
    assert found["eval_token_accuracy"] == pytest.approx(found["robust_token_accuracy_clean"])
    assert found["eval_entity_f1"] == pytest.approx(found["robust_entity_f1_clean"])
    model = AutoModelForTokenClassification.from_pretrained(out)
    assert {"O", "B-person", "I-person"} <= set(model.config.label2id)


def test_answer_spans(world):
    windows = "--max_seq_length 96 --doc_stride 32 --adv_epsilon 0.2 --adv_method pgd --adv_warmup 0"
    out = run_on("run_qa.py", world, "encoder", "xquad_en", *shlex.split(windows))
    found = saved_results(out)
    assert found.keys() >= CLEAN_AND_ATTACKED | {"eval_exact_match", "robust_f1_pgd-10_0.2"}
    assert found["eval_exact_match"] == pytest.approx(found["robust_clean"])
    assert found["eval_f1"] == pytest.approx(found["robust_f1_clean"])
    AutoModelForQuestionAnswering.from_pretrained(out)


def test_the_spans_of_windows_are_the_answers(world, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "run_qa", raising=False)
    from run_qa import ScriptArguments, windows

    rows = [json.loads(line) for line in (world / "xquad_en_train.jsonl").read_text().splitlines()]
    tokenizer = BertTokenizerFast.from_pretrained(world / "encoder")
    script = ScriptArguments("", "", model_name_or_path="", max_seq_length=128, doc_stride=32)
    found = windows({name: [row[name] for row in rows] for name in rows[0]}, tokenizer, script)
    answers = [answer.lower().split() for row in rows for answer in row["answers"]["text"][:1]]
    spans = zip(found["input_ids"], found["start_positions"], found["end_positions"], strict=True)
    texts = {tokenizer.decode(ids[start : end + 1]).replace(" ", "") for ids, start, end in spans if start}
    plain = {"".join(answer) for answer in answers if "".join(answer).isascii()}
    assert plain
    assert plain <= texts
    assert len(found["start_positions"]) > len(rows)


def test_summaries(world):
    # Questions are the summaries: what is asked about a text.
    flags = "--text_column context --summary_column question --predict_with_generate --generation_num_beams 2"
    lengths = "--max_source_length 96 --max_target_length 12 --adv_epsilon auto"
    out = run_on("run_summarization.py", world, "both", "xquad_en", *shlex.split(f"{flags} {lengths}"))
    found = saved_results(out)
    assert found.keys() >= CLEAN_AND_ATTACKED | {"eval_word_f1", "eval_gen_len", "robust_perplexity_pgd-10_0.2"}
    assert found["robust_pgd-10_0.2"] >= found["robust_clean"]
    AutoModelForSeq2SeqLM.from_pretrained(out)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's, loading an adapter
def test_a_language_model_with_lora(world):
    from peft import PeftModel

    flags = "--dataset_text_field context --max_length 64 --adv_epsilon auto --bf16 False"
    out = run_on("sft_lora.py", world, "decoder", "xquad_en", *shlex.split(flags))
    found = saved_results(out)
    assert found.keys() >= CLEAN_AND_ATTACKED | {"eval_loss", "robust_perplexity_pgd-10_0.2"}
    assert found["robust_clean"] == pytest.approx(found["eval_loss"], rel=0.02)
    assert found["robust_pgd-10_0.2"] > found["robust_clean"]
    # Adapters alone are saved.
    assert not (out / "model.safetensors").exists()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world / "decoder"), out)


def test_sentence_embeddings(world):
    from sentence_transformers import SentenceTransformer

    out = run_on("train_embedder.py", world, "encoder", "stsb", "--adv_epsilon", "auto")
    found = saved_results(out)
    assert found.keys() >= CLEAN_AND_ATTACKED | {"eval_spearman_cosine", "robust_mrr_pgd-10_0.2"}
    assert found["robust_clean"] > found["robust_typing_errors"]
    assert SentenceTransformer(str(out), device="cpu").encode(["a plane"]).shape == (1, 32)


def test_a_detector_of_injections(world, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import injection_detector
    import reviews

    try:
        train, test = injection_detector.load()
    except reviews.FetchError as error:
        pytest.skip(f"the texts can't be fetched: {error}")
    assert {row["label"] for row in test} == {row["label"] for row in train} == {0, 1}
    assert not {row["category"] for row in test} & {row["category"] for row in train}
    words = [[set(reviews.normalised(row["text"]).split()) for row in rows] for rows in (train, test)]
    # No held-out text is one of training with a word or two changed.
    assert max(len(a & b) / len(a | b) for a in words[0] for b in words[1]) <= 0.5
    out = world / "injections"
    flags = "--num_train_epochs 1 --robustness_attacks quick --text_budget 5 --report_to none --use_cpu True"
    run("injection_detector.py", world, "--model_name_or_path", world / "encoder", "--output_dir", out, *flags.split())
    found = saved_results(out)
    assert found.keys() == {"plain", "adversarial"}
    assert found["plain"].keys() >= {"clean", "pgd-10, epsilon 0.4", "changed characters"}
    assert_attacked(out / "adversarial")
    assert (out / "plain" / "texts.jsonl").exists()
    AutoModelForSequenceClassification.from_pretrained(out / "adversarial")
