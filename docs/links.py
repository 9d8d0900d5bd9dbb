"""The site's hook: links out of `docs/` work in the site as they do in the repository.

`mkdocs.yml` names it. A link such as `../examples/launch/ddp.yaml` stays as it is in the page. Here the file behind it
joins the site, and the link follows. A link to a file that does not exist stays, so that a strict build fails.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
# Pages of the site that stand at the root of the repository, where a code forge looks for them.
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "README.md": "overview.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the pages of the root, their links as if they stood in `docs/`."""
    for name, page in PAGES.items():
        text = LINK.sub(lambda link: _from_docs(link[1]), (ROOT / name).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Points links out of `docs/` into the site."""
    folder = posixpath.dirname(page.file.src_uri)

    def follow(link: re.Match[str]) -> str:
        place = posixpath.normpath(posixpath.join("docs", folder, link[1]))
        if place.startswith("docs/") or not (ROOT / place).is_file():
            return link[1]
        return posixpath.relpath(_in_site(place, config, files), folder or ".")

    return LINK.sub(follow, markdown)


def _from_docs(link: str) -> str:
    # In a block of code `](` is no link.
    return posixpath.relpath(link, "docs") if (ROOT / link).exists() else link


def _in_site(place: str, config: Any, files: Files) -> str:
    """Where the site has this file of the repository."""
    if place in PAGES:
        return PAGES[place]
    copy = f"source/{place}"
    if files.get_file_from_path(copy) is None:
        files.append(File.generated(config, copy, abs_src_path=str(ROOT / place)))
    return copy
