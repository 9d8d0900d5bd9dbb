"""Attacks on words, against a search that asks the model about one text at a time."""

import json
import math
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from fgm_trainer.robustness import NearestTokens, WordNet, attack_texts, characters, print_texts
from fgm_trainer.robustness.text import TextReport, TextResult

SPELLED = "a the film is was good great bad poor dull fine very not and of hearts"
WORDS = [*SPELLED.split(), "3D", "it's", "2024"]
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    letters = [*ALPHABET, *(f"##{letter}" for letter in ALPHABET)]
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "'", ".", *letters, *WORDS[1:-3]]))
    return BertTokenizerFast(str(path))


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=3, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.4)
    return model.train()


def some_texts(number, seed=0):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) + "." for _ in range(number)]


def probabilities(model, tokenizer, text, first=None):
    model.eval()
    inputs = tokenizer(*(t for t in (first, text) if t is not None), return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs).logits[0].softmax(-1)
    model.train()
    return found


def labels_of(model, tokenizer, texts, first=None):
    """Right but for every fourth."""
    found = [probabilities(model, tokenizer, text, first).argmax().item() for text in texts]
    return [(label + (i % 4 == 0)) % 3 for i, label in enumerate(found)]


def swaps(word, draw):
    """Three fixed words: no random numbers, so that a reference needs none."""
    return [other for other in ("bad", "fine", "dull") if other != word]


def greedy(model, tokenizer, text, label, candidates, share):
    """(attacked text, its class, changed words, queries), one question at a time."""
    words = list(re.finditer(r"\w+(?:'\w+)*", text))
    asked = []

    def of(chosen):
        made = text
        for number in sorted(chosen, reverse=True):
            made = made[: words[number].start()] + chosen[number] + made[words[number].end() :]
        asked.append(made)
        return made, probabilities(model, tokenizer, made)

    _, start = of({})
    if start.argmax() != label:
        return text, start.argmax().item(), 0, 1
    open_ones = [i for i, word in enumerate(words) if not re.search(r"\d", word.group())]
    left = {i: of({i: ""})[1][label].item() for i in open_ones}
    chosen, best, allowed = {}, (text, start), max(1, int(share * len(words)))
    for i in sorted(open_ones, key=left.get):
        if len(chosen) == allowed:
            break
        tried = [(chosen | {i: other}, *of(chosen | {i: other})) for other in candidates(words[i].group(), None)]
        wrong = [each for each in tried if each[2].argmax() != label]
        lowest = min(wrong or tried, key=lambda each: each[2][label].item(), default=None)
        if wrong or (lowest is not None and lowest[2][label] < best[1][label]):
            chosen, best = lowest[0], lowest[1:]
        if wrong:
            break
    return best[0], best[1].argmax().item(), len(chosen), len(asked)


@pytest.mark.parametrize("share", [0.2, 0.6])
def test_the_search_is_the_greedy_one(model, tokenizer, share):
    texts = some_texts(24)
    labels = labels_of(model, tokenizer, texts)
    report = attack_texts(model, tokenizer, texts, labels, swaps, most_changed=share, batch_size=5, progress=False)
    outcomes = set()
    for text, label, found in zip(texts, labels, report.results, strict=True):
        attacked, prediction, changed, queries = greedy(model, tokenizer, text, label, swaps, share)
        assert (found.attacked, found.attacked_prediction) == (attacked, prediction)
        assert (found.changed, found.queries) == (changed, queries)
        outcomes.add((found.skipped, found.fooled))
    assert outcomes == {(True, False), (False, True), (False, False)}
    assert model.training


def test_a_beam_finds_no_less_and_no_budget_is_exceeded(model, tokenizer):
    texts = some_texts(16, seed=1)
    labels = labels_of(model, tokenizer, texts)
    under = {}
    for beam in (1, 3):
        report = attack_texts(model, tokenizer, texts, labels, swaps, most_changed=0.5, beam=beam, progress=False)
        under[beam] = report.accuracy_under_attack
    assert under[3] <= under[1]
    asked = []
    forward = model.forward

    def counted(**inputs):
        asked.append(len(inputs["input_ids"]))
        return forward(**inputs)

    model.forward = counted
    try:
        for budget in (1, 2, 9, 30):
            asked.clear()
            report = attack_texts(model, tokenizer, texts, labels, budget=budget, most_changed=1.0, progress=False)
            assert max(each.queries for each in report.results) <= budget
            assert sum(asked) == sum(each.queries for each in report.results)
    finally:
        del model.forward


def test_a_text_that_fools_is_kept_though_another_leaves_the_true_class_less(model, tokenizer):
    """Of three classes the true one may be low where it is the largest still."""
    told = {"": (0.5, 0.3, 0.2), "one": (0.34, 0.33, 0.33), "two": (0.4, 0.45, 0.15)}

    class Told(nn.Module):
        config = None

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **rest):
            texts = [tokenizer.decode(row, skip_special_tokens=True).replace(" ", "") for row in input_ids]
            rows = [told[next((word for word in ("one", "two") if word in text), "")] for text in texts]
            return {"logits": torch.tensor(rows).log()}

    report = attack_texts(Told(), tokenizer, ["film"], [0], lambda word, draw: ["one", "two"], progress=False)
    assert (report.results[0].attacked, report.results[0].attacked_prediction) == ("two", 1)


def test_what_stays(model, tokenizer):
    texts = ["good film 3D, very good 2024!", "The good, the bad and it's poor"] * 4
    labels = labels_of(model, tokenizer, texts)
    report = attack_texts(model, tokenizer, texts, labels, keep={"good"}, most_changed=1.0, seed=3, progress=False)
    assert report == attack_texts(
        model, tokenizer, texts, labels, keep={"good"}, most_changed=1.0, seed=3, progress=False
    )
    assert any(each.changed for each in report.results)
    for each in report.results:
        for word in ("good", "3D", "2024", "!", ","):
            assert each.attacked.count(word) >= each.text.count(word)


def test_the_first_text_of_a_pair_stays(model, tokenizer):
    texts, first = some_texts(8, seed=2), "the film was good"
    labels = labels_of(model, tokenizer, texts, first)
    report = attack_texts(model, tokenizer, texts, labels, before=[first] * 8, most_changed=1.0, progress=False)
    assert any(each.fooled for each in report.results)
    for each in report.results:
        for text, prediction in ((each.text, each.prediction), (each.attacked, each.attacked_prediction)):
            assert probabilities(model, tokenizer, text, first).argmax() == prediction


@settings(max_examples=200, deadline=None)
@given(word=st.text("abcdefgXYZé", min_size=0, max_size=9), seed=st.integers(0, 99))
def test_characters_are_single_edits_inside_of_the_word(word, seed):
    found = characters(word, random.Random(seed))
    assert found == characters(word, random.Random(seed))
    assert word not in found
    assert len(set(found)) == len(found)
    for other in found:
        assert abs(len(other) - len(word)) <= 1
        same = sum(a == b for a, b in zip(word, other, strict=False))
        suffix = sum(a == b for a, b in zip(word[::-1], other[::-1], strict=False))
        assert same + suffix >= len(word) - 2
        if len(word) > 3:
            assert (other[0], other[-1]) == (word[0], word[-1])
    assert (not found) == (len(word) < 2 or (len(set(word)) == 1 and not found))


def test_the_kinds_of_edits():
    found = {other for seed in range(200) for other in characters("great", random.Random(seed))}
    assert {"gerat", "graet", "geat", "grat", "grest", "gr\u0435at"} <= found
    assert any(len(other) == 6 for other in found)


def test_nearest_tokens(model, tokenizer):
    weight = model.get_input_embeddings().weight.detach()
    cosines = nn.functional.cosine_similarity(weight, weight[tokenizer.vocab["good"]][None], dim=1)
    whole = [w for w in tokenizer.vocab if w.isalpha() and len(w) > 1 and w != "good"]
    expected = sorted(whole, key=lambda w: -cosines[tokenizer.vocab[w]])[:4]
    near = NearestTokens(model, tokenizer, count=4, least=-1.0)
    assert near("good", random.Random(0)) == expected
    assert near("Good", random.Random(0)) == [w.capitalize() for w in expected]
    assert near("unheard", random.Random(0)) == []
    assert NearestTokens(model, tokenizer, least=0.999)("good", random.Random(0)) == []


@pytest.fixture
def dictionary(tmp_path, monkeypatch):
    """WordNet's files with three senses, where NLTK looks for them."""
    nltk = pytest.importorskip("nltk")
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("noun", "verb", "adj", "adv"):
        for name in (f"{part}.exc", f"index.{part}", f"data.{part}"):
            (folder / name).write_text("")
    (folder / "noun.exc").write_text("geese goose\n")
    for name in ("index.sense", "cntlist.rev"):
        (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.all\t1\n")
    data, places = "", []
    for words in (
        ["film", "movie", "moving_picture"],
        ["film", "Cinema", "movie"],
        ["goose", "bird"],
        ["a", "vitamin"],
    ):
        named = " ".join(f"{word} 0" for word in words)
        places.append(f"{len(data):08d}")
        data += f"{places[-1]} 00 n {len(words):02x} {named} 000 | a gloss\n"
    senses = {
        "film": places[:2],
        "movie": places[:2],
        "cinema": places[1:2],
        "goose": places[2:3],
        "bird": places[2:3],
        "a": places[3:],
    }
    index = [f"{word} n {len(of)} 0 {len(of)} 0 {' '.join(of)}" for word, of in sorted(senses.items())]
    (folder / "data.noun").write_text(data)
    (folder / "index.noun").write_text("\n".join(index) + "\n")
    from nltk.corpus.reader import WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))
    yield folder
    # NLTK leaves files open.
    for file in vars(nltk.corpus.wordnet).get("_data_file_map", {}).values():
        file.close()


@pytest.mark.filterwarnings("ignore:The multilingual functions:UserWarning")
def test_synonyms_are_wordnet_s(dictionary):
    wordnet, draw = WordNet(), random.Random(0)
    assert wordnet("film", draw) == ["movie", "moving picture", "cinema"]
    assert wordnet("Movies", draw) == ["Film", "Movie", "Moving picture", "Cinema"]
    assert wordnet("GEESE", draw) == ["GOOSE", "BIRD"]
    assert wordnet("the", draw) == wordnet("it's", draw) == wordnet("a", draw) == []
    assert WordNet(count=1)("film", draw) == ["movie"]


@pytest.mark.filterwarnings("ignore:The multilingual functions:UserWarning")
def test_synonyms_change_a_text(model, tokenizer, dictionary):
    text = "the film is good"
    label = probabilities(model, tokenizer, text).argmax().item()
    (found,) = attack_texts(model, tokenizer, [text], [label], WordNet(), most_changed=1.0, progress=False).results
    tried = [f"the {word} is good" for word in ("film", "movie", "moving picture", "cinema")]
    lowest = min(tried, key=lambda other: probabilities(model, tokenizer, other)[label])
    assert found.attacked == lowest or found.fooled


def test_without_a_wordnet_its_synonyms_say_so(dictionary, monkeypatch):
    import nltk

    (dictionary / "lexnames").unlink()
    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(ValueError, match=r"NLTK finds no WordNet. Run `python -m nltk.downloader wordnet`"):
        WordNet()


def result(prediction, attacked, changed=0, queries=1):
    return TextResult("a b c d", "a b c d", 1, prediction, attacked, changed, 4, queries)


def test_figures_are_those_of_textattack(tmp_path, capsys):
    report = TextReport((result(0, 0), result(1, 1, 2, 9), result(1, 0, 1, 5), result(1, 0, 2, 7)))
    assert report.metrics() == {
        "text_accuracy": 0.75,
        "text_accuracy_under_attack": 0.25,
        "text_success_rate": pytest.approx(2 / 3),
        "text_words_changed": pytest.approx(3 / 8),
        "text_queries": 7,
    }
    assert math.isnan(TextReport((result(0, 0),)).success_rate)
    report.save(tmp_path / "texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [TextResult(**line) for line in lines] == list(report.results)
    print_texts(report)
    assert "text success rate 0.667" in capsys.readouterr().out


def test_errors(model, tokenizer):
    with pytest.raises(ValueError, match=r"there are 1 texts, 2 labels: they must be as many. most_changed must be "):
        attack_texts(model, tokenizer, ["a"], [0, 1], most_changed=0.0)
    with pytest.raises(ValueError, match=r"there is no text\. beam must be a whole number, 1 or more; found 0"):
        attack_texts(model, tokenizer, [], [], beam=0)
    with pytest.raises(ZeroDivisionError):
        attack_texts(
            model, tokenizer, ["the film"], labels_of(model, tokenizer, ["x", "the film"])[1:], lambda w, d: 1 / 0
        )
    assert model.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "several labels a text"),
        ({"num_labels": 1}, "one number a text"),
    ],
)
def test_models_that_give_no_class(model, tokenizer, settings, message):
    config = BertConfig.from_dict(model.config.to_dict())
    for name, value in settings.items():
        setattr(config, name, value)
    other = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=f"the model gives {message}, and one class a text is attacked"):
        attack_texts(other, tokenizer, ["a film"], [0], progress=False)


def test_a_tokenizer_may_have_more_tokens_than_the_lookup(model, tokenizer):
    config = BertConfig.from_dict(model.config.to_dict() | {"vocab_size": len(tokenizer) - 3})
    near = NearestTokens(BertForSequenceClassification(config), tokenizer, count=3, least=-1.0)
    assert len(near("good", random.Random(0))) == 3
