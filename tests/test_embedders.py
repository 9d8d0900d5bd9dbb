"""Embedders under attack, against a loop that attacks one row at a time; real sentence-transformers models."""

import pytest
import torch
from test_trainers import PAIRS, SCORED, TEXTS, TRAINERS, made_world
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from fgm_trainer import FGM
from fgm_trainer.robustness import evaluate_embedder
from fgm_trainer.robustness.tasks import ranks

pytestmark = [
    pytest.mark.slow,
    # Of datasets, multiprocess and sentence-transformers, on what they will rename.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GRID = (0.1, 0.3)
ASKED = [{"anchor": f"say {text}", "positive": f"is it {text}"} for text in TEXTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return made_world(tmp_path_factory.mktemp("embedders"))


@pytest.fixture(scope="module")
def embedder(world):
    import sentence_transformers

    torch.manual_seed(0)
    model = sentence_transformers.SentenceTransformer(str(world / "encoder"), device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def looked_up(model, text):
    ids = model.preprocess([text])["input_ids"]
    return model[0].auto_model.embeddings.word_embeddings(ids).detach()


def embedding(model, values):
    """The mean of a text's tokens."""
    return model[0].auto_model(inputs_embeds=values).last_hidden_state.mean(1)


def fgm(texts, loss_of, epsilon):
    """Each text of an example moved along its own gradient."""
    leaves = [text.clone().requires_grad_() for text in texts]
    gradients = torch.autograd.grad(loss_of(leaves), leaves)
    return [text + epsilon * gradient / gradient.norm() for text, gradient in zip(texts, gradients, strict=True)]


def test_pairs_are_those_of_a_plain_loop(embedder):
    embedder.eval()

    def cosine(texts):
        return cosine_similarity(*(embedding(embedder, text) for text in texts))[0]

    rows = []
    for row in SCORED:
        texts = [looked_up(embedder, row[name]) for name in ("sentence1", "sentence2")]
        found = [cosine(texts).item()]
        for epsilon in GRID:
            # Bound now, called now.
            moved = fgm(texts, lambda leaves, score=row["score"]: (cosine(leaves) - score) ** 2, epsilon)
            now = cosine(moved).item()
            found.append(now if abs(now - row["score"]) > abs(found[-1] - row["score"]) else found[-1])
        rows.append(found)
    found, scores = torch.tensor(rows, dtype=torch.float64), torch.tensor([row["score"] for row in SCORED])
    report = evaluate_embedder(embedder.train(), SCORED, [FGM()], GRID, batch_size=3, progress=False)
    errors = (found - scores[:, None]).square().mean(0).tolist()
    assert [report.clean, *report.scores["fgm"]] == pytest.approx(errors, rel=1e-4)
    assert errors[0] < errors[1] < errors[2]
    correlations = [torch.corrcoef(torch.stack([column, scores.double()]))[0, 1].item() for column in found.T]
    assert [report.clean_pearson, *report.pearson["fgm"]] == pytest.approx(correlations, rel=1e-4)
    places = [torch.corrcoef(torch.stack([ranks(column), ranks(scores)]))[0, 1].item() for column in found.T]
    of_ranks = [report.clean_further["spearman"], *report.further["spearman"]["fgm"]]
    assert of_ranks == pytest.approx(places, rel=1e-4)
    assert embedder.training


def test_queries_are_those_of_a_plain_loop(embedder):
    embedder.eval()
    texts = list(dict.fromkeys(row["positive"] for row in ASKED))
    with torch.no_grad():
        known = torch.cat([normalize(embedding(embedder, looked_up(embedder, text)), dim=-1) for text in texts])

    def logits(values):
        return 20 * normalize(embedding(embedder, values[0]), dim=-1) @ known.T

    rows = []
    for row in ASKED:
        label, query = torch.tensor([texts.index(row["positive"])]), [looked_up(embedder, row["anchor"])]
        found = []
        for epsilon in (0.0, *GRID):
            moved = fgm(query, lambda leaves, label=label: cross_entropy(logits(leaves), label), epsilon)
            answer = logits(moved)[0]
            found.append(max([1 + (answer > answer[label]).sum().item(), *found]))
        rows.append(found)
    report = evaluate_embedder(embedder, ASKED, [FGM()], GRID, batch_size=3, progress=False)
    firsts = [sum(row[i] == 1 for row in rows) / len(rows) for i in range(3)]
    assert [report.clean, *report.scores["fgm"]] == firsts
    assert firsts[0] > firsts[2]
    means = [sum(1 / row[i] for row in rows) / len(rows) for i in range(3)]
    assert [report.clean_further["mrr"], *report.further["mrr"]["fgm"]] == pytest.approx(means)
    assert report.labels == tuple(texts.index(row["positive"]) for row in ASKED)


def test_a_trainer_evaluates_its_embedder(world):
    trainer = TRAINERS["`SentenceTransformerTrainer`, in-batch negatives"](world, FGM(epsilon=0.1))
    report = trainer.evaluate_robustness(PAIRS, attacks="strong", epsilons=[0.5])
    assert report.metric == "accuracy"
    assert report.scores["strong"][0] <= report.scores["pgd-10"][0] <= report.clean
    both = trainer.evaluate_robustness({"pairs": SCORED, "queries": PAIRS}, epsilons=[0.1])
    assert (both["pairs"].metric, both["queries"].metric) == ("squared_error", "accuracy")


def test_ties_share_the_mean_of_their_places():
    assert ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_errors(embedder):
    with pytest.raises(ValueError, match="two columns of texts; found a"):
        evaluate_embedder(embedder, [{"a": "yes", "score": 0.1}])
    with pytest.raises(ValueError, match=r"'score' is compared with a cosine, .* found 4"):
        evaluate_embedder(embedder, [{"a": "yes", "b": "no", "score": 4}])
    with pytest.raises(ValueError, match="'score' is compared with a cosine, so it must be a number; found a text"):
        evaluate_embedder(embedder, [{"a": "yes", "b": "no", "score": "0.4"}])
    with pytest.raises(ValueError, match="the data set is empty"):
        evaluate_embedder(embedder, [])


def test_an_embedder_that_says_the_same_of_all_finds_nothing(world):
    import sentence_transformers

    model = sentence_transformers.SentenceTransformer(str(world / "encoder"), device="cpu")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(0.0 if "LayerNorm.weight" in name else 1.0)
    report = evaluate_embedder(model, ASKED, [FGM()], [0.1], progress=False)
    assert report.clean == report.scores["fgm"][0] == 0
    assert report.clean_further["mrr"] == pytest.approx(1 / len(ASKED))
