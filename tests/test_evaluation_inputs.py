"""`evaluate_robustness` takes what `Trainer.evaluate` takes."""

import datasets
import pytest
import torch
from models import padded_data, tiny
from test_faults import flags
from torch.utils.data import Dataset, IterableDataset, Subset

from fgm_trainer import FGM, PGD, AdversarialTrainer, Noise
from fgm_trainer.robustness import RobustnessReport, evaluate_robustness

ATTACKS = (Noise(), FGM(), PGD(steps=3))


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Indexed(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


KINDS = {
    "list": list,
    "indexed": Indexed,
    "subset": lambda rows: Subset(Indexed(rows), range(len(rows))),
    "stream": Stream,
    "arrow": datasets.Dataset.from_list,
    "arrow stream": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "generator": lambda rows: (row for row in rows),
}


def trainer_of(path, **parts):
    return AdversarialTrainer(model=tiny("bert"), args=flags(path, per_device_eval_batch_size=4), **parts)


@pytest.fixture(scope="module")
def rows():
    # A column that the model does not take, as real data have.
    return [row | {"sentence": f"number {i}", "idx": i} for i, row in enumerate(padded_data(tiny("bert"), size=10))]


@pytest.fixture(scope="module")
def expected(rows):
    plain = [{k: v for k, v in row.items() if k not in ("sentence", "idx")} for row in rows]
    report = evaluate_robustness(tiny("bert"), plain, ATTACKS, batch_size=4, seed=42, progress=False)
    assert report.examples == 10
    assert report.scores["fgm"][-1] < report.clean
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["here", "to the Trainer"])
def test_every_kind_of_data_set(tmp_path, rows, expected, kind, given):
    data = KINDS[kind](rows)
    trainer = trainer_of(tmp_path, eval_dataset=data if given == "to the Trainer" else None)
    report = trainer.evaluate_robustness(None if given == "to the Trainer" else data, attacks=ATTACKS)
    assert report == expected


@pytest.mark.parametrize("kind", ["list", "stream", "arrow"])
@pytest.mark.parametrize("container", [dict, datasets.DatasetDict])
def test_a_dictionary_of_data_sets(tmp_path, rows, expected, kind, container):
    if container is not dict and kind != "arrow":
        pytest.skip("a DatasetDict holds arrow data sets")
    data = container({"all": KINDS[kind](rows), "some": KINDS[kind](rows[:4])})
    trainer = trainer_of(tmp_path, eval_dataset=data)
    reports = trainer.evaluate_robustness(attacks=ATTACKS)
    assert reports.keys() == {"all", "some"}
    assert reports["all"] == expected
    assert reports["some"].examples == 4
    assert trainer.evaluate_robustness(data, attacks=ATTACKS) == reports
    assert trainer.evaluate_robustness("some", attacks=ATTACKS) == reports["some"]
    with pytest.raises(ValueError, match="has no data set 'others'; it has: all, some"):
        trainer.evaluate_robustness("others")


def test_a_name_without_a_dictionary(tmp_path, rows):
    with pytest.raises(ValueError, match="it has: none, since eval_dataset is no dictionary"):
        trainer_of(tmp_path, eval_dataset=rows).evaluate_robustness("validation")


@pytest.mark.parametrize("kind", ["stream", "arrow stream", "generator"])
def test_a_stream_under_a_progress_bar(tmp_path, rows, expected, kind, capsys):
    report = evaluate_robustness(
        tiny("bert"),
        KINDS[kind]([{k: v for k, v in row.items() if k not in ("sentence", "idx")} for row in rows]),
        ATTACKS,
        batch_size=4,
        seed=42,
    )
    assert report == expected
    assert "robustness: 3it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_data_set(tmp_path, rows, kind):
    if kind.startswith("arrow"):
        pytest.skip("has no columns then")
    with pytest.raises(ValueError, match="the data set is empty"):
        trainer_of(tmp_path).evaluate_robustness(KINDS[kind]([]))


def test_a_collator_of_ones_own_gets_the_columns_that_the_model_takes(tmp_path, rows, expected):
    seen = []

    def collate(examples):
        seen.extend(set(example) for example in examples)
        return {k: torch.tensor([e[k] for e in examples]) for k in examples[0]}

    report = trainer_of(tmp_path).evaluate_robustness(rows, attacks=ATTACKS, collate_fn=collate)
    assert isinstance(report, RobustnessReport)
    assert report == expected
    assert all(names == {"input_ids", "attention_mask", "labels"} for names in seen)
