"""Tasks other than one label an example, against a loop that attacks one example at a time."""

import json
import math
import random

import pytest
import reference
import torch
import transformers
from models import batches, padded_data, tiny
from test_robustness import measure, ten_steps
from torch.nn.functional import cross_entropy

from fgm_trainer import FGM, PGD
from fgm_trainer.robustness import compare, smallest_epsilons
from fgm_trainer.robustness.tasks import entities

GRID = (0.1, 0.4)
TAGS = ["O", "B-place", "I-place", "B-person", "I-person"]
KINDS = ["several", "tags", "spans", "masked", "causal", "seq2seq", "numbers"]


def model_of(kind):
    heads = {"tags": "TokenClassification", "spans": "QuestionAnswering", "masked": "MaskedLM"}
    if kind == "causal":
        return headed("llama", "LlamaForCausalLM")
    if kind == "seq2seq":
        return tiny("bart")
    if kind == "several":
        return tiny("bert", problem_type="multi_label_classification")
    if kind == "numbers":
        return tiny("bert", classes=2, problem_type="regression")
    model = headed("bert", f"BertFor{heads[kind]}", classes=2 if kind == "spans" else 5)
    if kind == "tags":
        model.config.id2label = dict(enumerate(TAGS))
    return model


def headed(name, head, **settings):
    base = tiny(name, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, head)(base.config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def clean_logits(model, batch):
    with torch.no_grad():
        outputs = model(**batch)
    names = ("start_logits", "end_logits") if "start_logits" in outputs else ("logits",)
    return [outputs[name][0] for name in names]


def data_of(kind, model, size=12):
    """Labels that the model gets right, for the most part, so that there is something to lose."""
    data = padded_data(model, size=size)
    drawn = random.Random(0)
    if kind == "seq2seq":
        return data
    for number, example in enumerate(data):
        there = sum(example["attention_mask"])
        example.pop("labels")
        (batch,) = batches([example], 1)
        logits = clean_logits(model, batch)
        if kind == "several":
            example["labels"] = [float(x > 0) for x in logits[0].tolist()]
            if number % 4 == 0:
                example["labels"][0] = 1 - example["labels"][0]
        elif kind == "numbers":
            example["labels"] = [x + drawn.gauss(0, 0.1) for x in logits[0].tolist()]
        elif kind == "tags":
            example["labels"] = [-100, *logits[0].argmax(-1)[1:there].tolist(), *[-100] * (10 - there)]
            if number % 4 == 0:
                example["labels"][1] = (example["labels"][1] + 1) % 5
        elif kind == "spans":
            start = logits[0][:there].argmax().item()
            example["start_positions"] = start
            end = start + logits[1][start:there].argmax().item()
            example["end_positions"] = min(end + (number % 4 == 0), there - 1)
        else:
            ids = example["input_ids"]
            example["labels"] = [i if here else -100 for i, here in zip(ids, example["attention_mask"], strict=True)]
    return data


# The same figures, by hand --------------------------------------------------------------------------------------------


def loss_of(model, batch, **inputs):
    labels = {k: batch[k] for k in ("labels", "start_positions", "end_positions") if k in batch}
    return model(**{**inputs, **labels}).loss


def judged(kind, logits, batch):
    """(right, error, what to count)."""
    if "labels" in batch:
        labels = batch["labels"][0]
    if kind == "several":
        wrong = [(x > 0) != (y == 1) for x, y in zip(logits[0].tolist(), labels.tolist(), strict=True)]
        pairs = [(x > 0, y == 1) for x, y in zip(logits[0].tolist(), labels.tolist(), strict=True)]
        return not any(wrong), sum(wrong) / len(wrong), pairs
    if kind == "numbers":
        return True, ((logits[0] - labels) ** 2).mean().item(), None
    if kind == "tags":
        pairs = [(x.argmax().item(), y) for x, y in zip(logits[0], labels.tolist(), strict=True) if y != -100]
        wrong = sum(a != b for a, b in pairs)
        return wrong == 0, wrong / len(pairs), pairs
    if kind == "spans":
        size = len(logits[0])
        spans = [(i, j) for i in range(size) for j in range(i, size)]
        best = max(spans, key=lambda span: logits[0][span[0]].item() + logits[1][span[1]].item())
        true = batch["start_positions"].item(), batch["end_positions"].item()
        one, other = (set(range(a, b + 1)) for a, b in (best, true))
        return best == true, 1 - 2 * len(one & other) / (len(one) + len(other)), None
    if kind == "causal":
        logits, labels = [logits[0][:-1]], labels[1:]
    keep = labels != -100
    exact = logits[0][keep].argmax(1).tolist() == labels[keep].tolist()
    return exact, cross_entropy(logits[0][keep], labels[keep]).item(), int(keep.sum())


def f1(pairs):
    hits = sum(a and b for a, b in pairs)
    return 2 * hits / (sum(a for a, _ in pairs) + sum(b for _, b in pairs))


def tags_f1(sentences):
    named = [tuple(entities([TAGS[pair[side]] for pair in pairs]) for side in (0, 1)) for pairs in sentences]
    return 2 * sum(len(a & b) for a, b in named) / sum(len(a) + len(b) for a, b in named)


def by_hand(kind, outcomes):
    """Every figure of the outcomes of a data set."""
    right, error, counted = (list(values) for values in zip(*outcomes, strict=True))
    size = len(outcomes)
    if kind == "several":
        return {"accuracy": sum(right) / size, "f1": f1([pair for pairs in counted for pair in pairs])}
    if kind == "numbers":
        return {"squared_error": sum(error) / size}
    if kind == "tags":
        tokens = [pair for pairs in counted for pair in pairs]
        of_tokens = sum(a == b for a, b in tokens) / len(tokens)
        return {"accuracy": sum(right) / size, "token_accuracy": of_tokens, "entity_f1": tags_f1(counted)}
    if kind == "spans":
        return {"exact_match": sum(right) / size, "f1": 1 - sum(error) / size}
    loss = sum(e * n for e, n in zip(error, counted, strict=True)) / sum(counted)
    return {"loss": loss, "perplexity": math.exp(loss), "exact_match": sum(right) / size}


def attacked(kind, model, batch, delta):
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
    if kind == "seq2seq":
        inputs["labels"] = batch["labels"]
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")) + delta * batch["attention_mask"][:, :, None]
    return clean_logits(model, inputs | {"inputs_embeds": embeds})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("attack", "plain"), [(FGM(), reference.fgm), (PGD(steps=10), ten_steps)], ids=["fgm", "pgd"])
def test_every_figure_is_the_one_of_a_plain_loop(kind, attack, plain):
    model = model_of(kind)
    data = data_of(kind, model)
    report = measure(model, data, [attack], GRID, batch_size=5)
    rows = [[] for _ in range(1 + len(GRID))]
    for batch in batches(data, 1):
        place = reference.AtInput(model, "example", loss_of)
        place.moved = lambda batch, delta: delta * batch["attention_mask"][:, :, None]
        zero = torch.zeros(*batch["input_ids"].shape, model.get_input_embeddings().weight.shape[1]).double()
        now = judged(kind, attacked(kind, model, batch, zero), batch)
        rows[0].append(now)
        for number, epsilon in enumerate(GRID):
            then = judged(kind, attacked(kind, model, batch, plain(place, batch, epsilon, "l2")), batch)
            worse = then if then[1] > now[1] else now
            now = (now[0] and then[0], *worse[1:])
            rows[1 + number].append(now)
    clean, *under_attack = [by_hand(kind, row) for row in rows]
    (name,) = report.scores
    assert {report.metric: report.clean, **report.clean_further} == pytest.approx(clean, rel=1e-4)
    assert report.metric == next(iter(clean))
    for i, figures in enumerate(under_attack):
        found = {report.metric: report.scores[name][i], **{k: v[name][i] for k, v in report.further.items()}}
        assert found == pytest.approx(figures, rel=1e-4)
    assert report.clean != report.scores[name][-1]
    assert report.metrics()[f"robust_{name}_0.4"] == report.scores[name][-1]


def test_exact_match_is_that_of_greedily_generated_text():
    """Some texts match and some don't, clean and under attack."""
    model = model_of("seq2seq")
    data = data_of("seq2seq", model)
    (batch,) = batches(data, len(data))
    mask = batch["attention_mask"]

    def generated(**inputs):
        outputs = model.get_encoder()(**inputs, attention_mask=mask)
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 1, "forced_eos_token_id": None}
        return model.generate(encoder_outputs=outputs, attention_mask=mask, **settings)[:, 1:]

    labels = generated(input_ids=batch["input_ids"])
    # Every third text is another one in its first token.
    labels[::3, 0] = (labels[::3, 0] + 1) % model.config.vocab_size
    labels = labels.masked_fill(labels == model.config.pad_token_id, -100)
    data = [{**row, "labels": label.tolist()} for row, label in zip(data, labels, strict=True)]
    (batch,) = batches(data, len(data))
    report = measure(model, data, [FGM()], (1.0,), batch_size=len(data))
    assert report.clean_further["exact_match"] == pytest.approx(8 / 12)
    place = reference.AtInput(model, "example", loss_of)
    place.moved = lambda batch, delta: delta * mask[:, :, None]
    moved = model.get_input_embeddings()(batch["input_ids"]) + place.moved(
        batch, reference.fgm(place, batch, 1.0, "l2")
    )
    texts = generated(inputs_embeds=moved)
    wrong = (texts != labels) & (labels != -100)
    right = (~wrong.any(1)).float().mean().item()
    assert 0 < right < 8 / 12
    assert report.further["exact_match"]["fgm"] == (pytest.approx(right),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strong_evaluation_is_at_least_as_hard(kind):
    """And the two models of a comparison differ by nothing from themselves."""
    model = model_of(kind)
    data = data_of(kind, model, size=6)
    report = measure(model, data, "strong", (0.2,))
    rises = report.metric in ("loss", "squared_error")
    worst, others = report.scores["strong"][0], [row[0] for row in report.scores.values()]
    assert worst == (max if rises else min)(others)
    assert len(report.rows()) == 6
    if report.fell is None:
        with pytest.raises(ValueError, match="Only reports that say where each example fell"):
            compare(report, report)
        with pytest.raises(ValueError, match="Intervals are of shares"):
            report.intervals()
    else:
        assert all(difference.difference == 0 for difference in compare(report, report))
        assert report.intervals("strong")[0][0] <= worst <= report.intervals("strong")[0][1]


def test_the_margin_of_tags_is_the_sum_over_the_labelled_tokens():
    from fgm_trainer.robustness.ensemble import margin, margin_loss

    model = model_of("tags")
    (batch,) = batches(data_of("tags", model, size=4), 4)
    loss, outputs = margin_loss()(model, batch)
    keep = batch["labels"] != -100
    assert 0 < keep.sum() < keep.numel()
    assert loss.item() == pytest.approx(margin(outputs.logits[keep], batch["labels"][keep]).sum().item())


@pytest.mark.parametrize("kind", ["several", "tags", "spans"])
def test_the_radius_is_where_the_answer_turns_wrong(kind):
    model = model_of(kind)
    data = data_of(kind, model)
    radii = smallest_epsilons(model, data, FGM(), largest=1.0, progress=False)
    report = measure(model, data, [FGM()], (0.25, 0.5, 1.0))
    assert radii.accuracy(0) == report.clean
    assert sum(0 < radius < 1 for radius in radii.radii) > 0
    assert radii.accuracy(0.999) == report.scores["fgm"][-1]


def test_a_radius_of_a_language_model_is_refused():
    model = model_of("causal")
    with pytest.raises(ValueError, match="where loss is measured there is none"):
        smallest_epsilons(model, data_of("causal", model, size=2), progress=False)


def test_labels_without_names_of_entities_have_no_f1_of_entities():
    model = model_of("tags")
    model.config.id2label = {i: f"LABEL_{i}" for i in range(5)}
    report = measure(model, data_of("tags", model, size=4), [FGM()], (0.1,))
    assert set(report.further) == {"token_accuracy"}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-a I-a O B-b", {("a", 0, 2), ("b", 3, 4)}),
        ("I-a I-a I-b", {("a", 0, 2), ("b", 2, 3)}),
        ("B-a B-a", {("a", 0, 1), ("a", 1, 2)}),
        ("S-a B-a I-a E-a I-a", {("a", 0, 1), ("a", 1, 4), ("a", 4, 5)}),
        ("O O", set()),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags, expected):
    assert entities(tags.split()) == expected


def test_examples_without_a_label_are_left_out():
    model = model_of("tags")
    data = data_of("tags", model, size=8)
    for row in data[1::3]:
        row["labels"] = [-100] * len(row["labels"])
    labelled = [row for row in data if set(row["labels"]) != {-100}]
    assert 0 < len(labelled) < len(data)
    found = measure(model, data, [FGM()], GRID, batch_size=2)
    assert found.examples == len(labelled)
    assert found == measure(model, labelled, [FGM()], GRID, batch_size=2)


def test_a_collator_that_draws_gives_the_same_report_twice():
    model = model_of("masked")
    data = data_of("masked", model, size=8)

    def masked(rows):
        (batch,) = batches(rows, len(rows))
        chosen = (torch.rand(batch["labels"].shape) < 0.3) | (torch.arange(10) == random.randrange(4))
        return batch | {"labels": batch["labels"].where(chosen, -100)}

    reports = [measure(model, data, [FGM()], GRID, collate_fn=masked) for _ in range(2)]
    assert reports[0] == reports[1]
    assert reports[0] != measure(model, data, [FGM()], GRID, collate_fn=masked, seed=1)


@pytest.mark.parametrize(("name", "head"), [("llama", "LlamaForCausalLM"), ("bart", "BartForCausalLM")])
@pytest.mark.parametrize("wrapped", [False, True])
# Of peft, on what transformers renamed.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_language_model_is_measured_as_its_own_loss_is(name, head, wrapped):
    """Of BART's decoder labels are not shifted; peft says nothing of the kind of model."""
    import peft

    # In float32: BART's mask overflows in float64 in transformers 4.46.
    model = headed(name, head).float()
    if wrapped:
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    data = data_of("causal", model, size=4)
    report = measure(model, data, [FGM()], (0.1,), batch_size=1)
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches(data, 1)]
    shift = 1 if name == "llama" else 0
    tokens = [int((batch["labels"][:, shift:] != -100).sum()) for batch in batches(data, 1)]
    mean = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    assert report.clean == pytest.approx(mean, rel=1e-4)


def test_a_task_of_ones_own():
    from fgm_trainer.robustness import Outcome, Task

    class TopTwo(Task):
        metric = "top_two"

        def judge(self, outputs, batch):
            two = outputs["logits"].topk(2).indices
            right = (two == batch["labels"][:, None]).any(1)
            return Outcome(right, (~right).float(), two[:, 0])

    model = tiny("bert")
    data = padded_data(model, size=20)
    report = measure(model, data, [FGM()], (0.5, 2.0), task=TopTwo())
    plain = measure(model, data, [FGM()], (0.5, 2.0))
    assert report.metric == "top_two"
    assert report.clean > plain.clean
    assert report.scores["fgm"][-1] < report.clean


class Broken(torch.nn.Module):
    """Answers NaN for some examples, where they are perturbed."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, **batch):
        lookup = self.inner.get_input_embeddings()
        kept = []
        with lookup.register_forward_hook(lambda module, args, output: kept.append(output)):
            outputs = self.inner(**batch)
        # What came out of the lookup after our hook: 0 where it is as it was, NaN where it is not.
        moved = (kept[0] - lookup.weight[batch["input_ids"]]).detach().abs().flatten(1).amax(1)
        broken = torch.where(moved > 0, torch.nan, 0.0)
        for name in ("logits", "start_logits", "end_logits"):
            if name in outputs:
                outputs[name] = outputs[name] + broken.view(-1, *[1] * (outputs[name].dim() - 1))
        return outputs


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "seq2seq"])
def test_an_answer_that_is_no_number_is_wrong(kind):
    model = model_of(kind)
    data = data_of(kind, model, size=6)
    report = measure(Broken(model).eval(), data, [FGM()], (0.3,))
    attacked = report.scores["fgm"][0]
    if kind in ("numbers", "masked", "causal"):
        assert math.isfinite(report.clean)
        assert attacked == math.inf
        assert report.to_dict()["scores"]["fgm"] == (None,)
    else:
        assert (attacked, report.clean > 0) == (0, True)
    json.dumps(report.to_dict(), allow_nan=False)


def test_labels_that_are_not_known_count_nowhere():
    model = model_of("several")
    data = data_of("several", model)
    whole = measure(model, data, [FGM()], (0.1,))
    for number, example in enumerate(data):
        # The wrong ones among them.
        example["labels"][number % 3 if number % 4 else 0] = -100.0
    report = measure(model, data, [FGM()], (0.1,))
    assert whole.clean == 0.75
    assert (report.clean, report.clean_further["f1"]) == (1, 1)


def test_the_first_batch_may_have_nothing_to_predict():
    model = headed("gpt2", "GPT2LMHeadModel")
    data = padded_data(model, size=6)
    for example in data:
        ids = example["input_ids"]
        example["labels"] = [i if m else -100 for i, m in zip(ids, example["attention_mask"], strict=True)]
    with torch.no_grad():
        own = [model(**batch).loss.item() for batch in batches(data[1:], 1)]
    # Its own loss is that of no token.
    data[0]["labels"][1:] = [-100] * 9
    found = measure(model, data, [FGM()], (0.1,), batch_size=1)
    counts = [sum(label != -100 for label in example["labels"][1:]) for example in data[1:]]
    expected = sum(c * loss for c, loss in zip(counts, own, strict=True)) / sum(counts)
    assert found.clean == pytest.approx(expected)


def test_one_attack_needs_no_list():
    model = tiny("bert")
    data = padded_data(model, size=6)
    assert measure(model, data, FGM(), (0.3,)) == measure(model, data, [FGM()], (0.3,))
