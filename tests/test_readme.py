"""The README's Python blocks run, in order, in one namespace."""

import re
from pathlib import Path

import pytest
import torch
from test_faults import examples, flags, tiny_bert
from transformers import TrainingArguments

from fgm_trainer import AdversarialTrainer
from fgm_trainer.attacks import ATTACKS, registry

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # no GPU here
def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("model")
    data = examples(32)
    names = {
        "MODEL": str(tmp_path / "model"),
        "TRAIN": data,
        "TEST": data[:8],
        "LOADER": torch.utils.data.DataLoader(data, batch_size=8),
    }
    assert len(BLOCKS) == 4
    for block in BLOCKS:
        exec(block, names)
    assert names["report"].examples == 8


def test_the_attack_of_contributing_trains(tmp_path, monkeypatch):
    guide = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    monkeypatch.setattr(registry, "ATTACKS", ATTACKS | {})
    exec(block, {"__name__": "example"})
    attack = registry.ATTACKS["two_gradients"](epsilon=0.5, scope="example")
    args = flags(tmp_path, TrainingArguments, max_steps=1)
    trainer = AdversarialTrainer(model=tiny_bert(), args=args, train_dataset=examples(), attack=attack)
    trainer.train()
    assert trainer.state.log_history[0]["adv_delta_norm"] == pytest.approx(0.5, rel=1e-5)


def test_the_diff_is_the_whole_migration():
    diff = re.search(r"```diff\n(.*?)```", README, flags=re.DOTALL).group(1)
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert len(added) == 1
    names = {}
    exec(added[0], names)
    assert names["Trainer"].__name__ == "AdversarialTrainer"


def test_every_flag_is_in_the_readme():
    from dataclasses import fields

    from fgm_trainer.arguments import AdversarialArguments

    missing = [f.name for f in fields(AdversarialArguments) if f"`--{f.name}`" not in README]
    assert missing == []
