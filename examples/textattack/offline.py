"""What TextAttack would download when it is imported or used, made here from what is at hand.

| what | who needs it | here |
|---|---|---|
| stop words of NLTK | the import itself, all attacks | `stop_words.txt` |
| WordNet | PWWS | two packages of Debian, fetched by apt and unpacked without root |
| further data of NLTK | nobody here | never asked for: the file that says "done" is there |

`prepare` must run before TextAttack is imported.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / ".cache"
PACKAGES = ("wordnet-base", "wordnet-sense-index")
STOP_WORDS = Path(__file__).with_name("stop_words.txt")
"""Words that carry grammar rather than content, by kind. NLTK has much the same."""
LEXNAMES = re.compile(r"^(\d\d)\t((noun|verb|adj|adv)\.\w+)", re.MULTILINE)
SYNTACTIC_CATEGORY = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}


class MissingError(RuntimeError):
    """Something that can't be made here is not there."""


def prepare(cache: Path = CACHE) -> None:
    """Points TextAttack and NLTK at `cache`, with all in it that an import needs."""
    own, data = cache / "textattack", cache / "nltk_data"
    stop_words = data / "corpora" / "stopwords" / "english"
    for path in (own, stop_words.parent):
        path.mkdir(parents=True, exist_ok=True)
    stop_words.write_text("\n".join(STOP_WORDS.read_text(encoding="utf-8").split()) + "\n", encoding="utf-8")
    # TextAttack takes this file as the sign that NLTK's data has been downloaded.
    (own / "post_install_check_3").touch()
    os.environ |= {"TA_CACHE_DIR": str(own), "NLTK_DATA": str(data), "HF_HUB_OFFLINE": "1"}


def wordnet(cache: Path = CACHE) -> None:
    """Puts WordNet where NLTK looks for it.

    Raises:
        MissingError: it is not there, and can't be fetched; says why.
    """
    folder = cache / "nltk_data" / "corpora" / "wordnet"
    if folder.exists():
        return
    if missing := [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]:
        raise MissingError(f"WordNet comes from Debian's {' and '.join(PACKAGES)}, but there is no {missing[0]} here.")
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _run(["apt-get", "download", *PACKAGES], scratch)
        for package in Path(scratch).glob("*.deb"):
            _run(["dpkg", "-x", str(package), scratch], scratch)
        # NLTK reads one file that Debian leaves out. Its contents stand in the manual page about it.
        manual = gzip.decompress(Path(scratch, "usr/share/man/man5/lexnames.5WN.gz").read_bytes()).decode()
        lines = [f"{number}\t{name}\t{SYNTACTIC_CATEGORY[kind]}\n" for number, name, kind in LEXNAMES.findall(manual)]
        made = Path(scratch, "usr/share/wordnet")
        (made / "lexnames").write_text("".join(lines), encoding="utf-8")
        # The last step, so that what an interrupted run leaves behind is never taken for the whole.
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, folder)


def _run(command: list[str], folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise MissingError(f"WordNet: `{' '.join(command)}` failed ({said}). Does `apt-get update` help?")
