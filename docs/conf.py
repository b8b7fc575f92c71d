"""Sphinx settings of the documentation site: ``make docs``.

The sources are the repository's Markdown pages as they are, so that their links work on GitHub and
on the site. ``docs/README.md`` is the table of contents of both.
"""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "Interview Access Worker"
version = release = installed_version("interview-access-worker")
html_title = f"{project} {version}"

root_doc = "README"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
    *("client/README.md", "contract/README.md", "docs/**.md", "docs/**.rst"),
]
exclude_patterns = [".*", "build", "tests", "worker", "tasks", "storage"]  # not even searched

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # anchors as GitHub generates them

autodoc_default_options = {"members": True, "exclude-members": "model_config"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"  # single backticks in docstrings

nitpicky = True
nitpick_ignore_regex = [
    # Without their inventories, which are on the network, names of other projects have no target.
    ("py:.*", r"(collections|contextlib|datetime|types|typing|unittest|uuid)\..*"),
    ("py:.*", r"(celery|django|kombu|opentelemetry|psycopg|pydantic|pytest|redis|sqlalchemy)\..*"),
    # Imports for type checkers only, which autodoc does not execute.
    ("py:class", "Connection|EllipsisType|Span|UUID|datetime"),
    # Defined in a submodule, and documented in the package that exports them.
    ("py:.*", r"interview_access\.contracts\.\w+\..*"),
    # Internal classes in the signatures of the test kit and of tracing.
    ("py:class", r"interview_access\.(redis_address|testing\.(clients|queue))\..*"),
    # Internal modules, which docstrings name for readers of the source.
    ("py:mod", r"interview_access\.(protocol|stored_errors).*"),
]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "index.html"}  # leads to the README, where a web server starts
templates_path = ["_templates"]
html_show_sphinx = False
html_copy_source = False

_INDEX = Path(__file__).parent / "README.md"


def _name_pages_by_title(_app: Sphinx, _name: str, source: list[str]) -> None:
    """Let a link that shows a page's path, as GitHub's readers want it, show the page's title."""
    source[0] = re.sub(r"\[(?:[\w-]+/|\.\./)*[\w-]+\.md\]\(", "[](", source[0])


def _append_contents(_app: Sphinx, name: str, source: list[str]) -> None:
    """Append the pages that docs/README.md links to the README, which GitHub shows without them."""
    if name != root_doc:
        return
    source[0] += _contents("Overview", ["Introduction <self>", "By task <docs/README>"])
    index = _INDEX.read_text(encoding="utf-8")
    _, *sections = re.split(r"^\| \*\*For (.*)\*\* \|", index, flags=re.MULTILINE)
    listed: set[str] = set()
    for audience, rows in zip(sections[::2], sections[1::2], strict=True):
        links = re.findall(r"\]\(([\w./-]+)\.(?:md|rst)\)", rows)
        pages = [(_INDEX.parent / link).resolve().relative_to(_INDEX.parents[1]) for link in links]
        names = dict.fromkeys(map(str, pages))  # without repetitions
        source[0] += _contents(audience.capitalize(), [one for one in names if one not in listed])
        listed.update(names)


def _contents(caption: str, pages: list[str]) -> str:
    lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
    return "\n".join(lines)


def setup(app: Sphinx) -> None:
    """Connect to Sphinx's events."""
    app.add_lexer("redis", TextLexer)
    app.connect("source-read", _name_pages_by_title)
    app.connect("source-read", _append_contents)
