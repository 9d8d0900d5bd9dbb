"""The site's pages: their code runs, and the reference leaves no public name out. `make docs` checks its links."""

import re
from pathlib import Path

import pytest
import torch
from test_faults import examples, tiny_bert

import fgm_trainer
from fgm_trainer import attacks, loops, robustness

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FORMER = {"Answer", "Glance", "Look", "Train"}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no GPU here
@pytest.mark.parametrize(("page", "count"), [("index.md", 1), ("loops.md", 3)])
def test_every_python_block_runs(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("model")
    data = examples(32)
    names = {"MODEL": "model", "TRAIN": data, "TEST": data[:8]}
    names |= {"model": tiny_bert(), "LOADER": torch.utils.data.DataLoader(data, batch_size=8)}
    assert len(blocks(page)) == count
    for block in blocks(page):
        exec(block, names)
    if page == "loops.md":
        assert names["perturbed"] > names["clean"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")  # of trl
def test_the_page_of_language_models(tmp_path, monkeypatch):
    from datasets import Dataset
    from test_trainers import TEXTS, made_world

    monkeypatch.chdir(tmp_path)
    made_world(tmp_path)
    data = Dataset.from_list([{"text": text} for text in TEXTS])
    names = {"MODEL": str(tmp_path / "llama"), "TRAIN": data, "TEST": data}
    first, second, third = blocks("llm.md")
    exec(first, names)
    assert names["trainer"].state.log_history[0]["adv_delta_norm"] > 0
    assert str(names["trainer"]._adv_run.plan.target) == "model.layers.1"
    exec(second, names)
    exec(third, names)
    assert names["trainer"].state.global_step == 2


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    shown = re.findall(r"^::: fgm_trainer\.(\S+)$", pages, flags=re.MULTILINE)
    assert len(shown) == len(set(shown))
    public = {*fgm_trainer.__all__}
    public |= {f"attacks.{name}" for name in set(attacks.__all__) - FORMER - public}
    public |= {f"{m.__name__.split('.')[1]}.{name}" for m in (loops, robustness) for name in m.__all__}
    # Shown once, as the package's own.
    public -= {"Attack", "register"}
    public |= {"attacks.Attack", "attacks.register"}
    assert sorted(public) == sorted(shown)


def test_the_citation_is_of_this_version():
    assert f"\nversion: {fgm_trainer.__version__}\n" in (ROOT / "CITATION.cff").read_text()
