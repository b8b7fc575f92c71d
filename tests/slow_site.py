"""The documentation site as `make docs` builds it: pages, links and loaded files.

A warning of Sphinx, such as a link or a name in a docstring that leads nowhere, fails the build.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parent.parent
SITE = ROOT / "build" / "docs"
LOADING = {"script", "link", "img", "iframe", "source", "object", "embed"}
"""Elements for which a browser loads a file without a click."""


class Page(HTMLParser):
    """A page's links, the files that it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """See the base class."""
        for name, value in attributes:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in {"href", "src", "data"} and value:
                (self.loaded if tag in LOADING else self.links).append(value)


@pytest.fixture(scope="module", autouse=True)
def _site() -> None:
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S607 - the user's make
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def parsed(path: Path) -> Page:
    """A page of the site."""
    return Page(path)


def pages() -> list[Path]:
    """All pages of the site."""
    found = sorted(SITE.rglob("*.html"))
    assert found
    return found


def test_every_page_is_on_the_site() -> None:
    """Each Markdown page of docs/, the README and the other pages for readers are on the site."""
    sources = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.rst")]
    names = ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY", "client/README", "contract/README")
    built = {path.relative_to(ROOT).with_suffix("") for path in sources} | set(map(Path, names))
    assert built <= {path.relative_to(SITE).with_suffix("") for path in pages()}


def test_nothing_is_loaded_from_the_network() -> None:
    """The pages and their style sheets load no file from another host."""
    loaded = [file for path in pages() for file in parsed(path).loaded]
    assert any(file.endswith(".svg") for file in loaded)
    assert not [file for file in loaded if urlsplit(file).netloc]
    for path in SITE.rglob("*.css"):
        assert not re.search(r"(@import|url\()[^;)]*//", path.read_text(encoding="utf-8")), path


def test_every_local_link_leads_somewhere() -> None:
    """A link to a page, an anchor, an image or a download has a target."""
    broken = []
    for path in pages():
        for link in (*parsed(path).links, *parsed(path).loaded):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchors = parsed(target).anchors if target.suffix == ".html" else set()
            if not target.exists() or (parts.fragment and parts.fragment not in anchors):
                broken.append((path.name, link))
    assert not broken


def test_every_page_of_the_reference_documents_something() -> None:
    """A page of the API reference has at least one name with its docstring."""
    found = [path for path in (SITE / "docs" / "reference").glob("*.html") if path.stem != "index"]
    assert len(found) >= 5
    for path in found:
        names = [name for name in parsed(path).anchors if name.startswith("interview_access.")]
        assert len(names) > 1, path
