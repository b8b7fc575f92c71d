"""Markdown files: their links, the paths and settings that they name; and `make help`."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from worker.cli import main
from worker.settings import Settings

ROOT = Path(__file__).parent.parent
CALLERS = (".ci/run", ".pre-commit-config.yaml", ".github/workflows/ci.yml")


def pages() -> list[Path]:
    """The repository's Markdown files: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = [ROOT / name for name in sorted(set(listed.stdout.split("\0"))) if name]
    assert found
    return [page for page in found if page.exists()]


@cache
def tokens(page: Path) -> list[Token]:
    """A page's tokens: its blocks, each followed by its inline tokens."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or ()))]


def links(page: Path) -> Iterator[str]:
    """Targets of a page's links and images."""
    for token in tokens(page):
        for name in ("href", "src"):
            if name in token.attrs:
                yield str(token.attrs[name])


@cache
def anchors(page: Path) -> set[str]:
    """Fragments that GitHub generates for a page's headings."""
    found: set[str] = set()
    seen: Counter[str] = Counter()
    blocks = [token for token in tokens(page) if token.block]
    for opening, heading in pairwise(blocks):
        if opening.type == "heading_open":
            text = "".join(token.content for token in heading.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    """Relative links of a page whose file below the root, or whose heading, does not exist."""
    broken = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        is_missing = not target.exists() or not target.is_relative_to(root)
        if is_missing or (parts.fragment and parts.fragment not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    """A link's file exists in the repository, and its anchor is a heading of that page."""
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    """A missing file, a missing heading and a missing image are reported; code is ignored."""
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`, three\n\n[a](missing.md) [b](#four) ![c](missing.svg) [d](#one-two-three)\n"
        "`[e](missing.md)` [f](https://example.org/missing)\n",
        encoding="utf-8",
    )
    assert broken_links(page, tmp_path) == ["missing.md", "#four", "missing.svg"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_named_test_exists(page: Path) -> None:
    """A file or folder of tests that a page names, also in a command, exists under that path."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/])(?:tests/[\w/]*\w(?:\.py)?|(?:test|slow)_\w+\.py)", text)
    assert [name for name in sorted(set(named)) if not (ROOT / name).exists()] == []


def test_the_index_links_every_page() -> None:
    """docs/README.md links every other page of docs/."""
    folder = ROOT / "docs"
    index = folder / "README.md"
    linked = {(folder / link).resolve() for link in links(index)}
    assert {page for page in folder.rglob("*.md") if page != index} <= linked


def test_the_readme_is_short() -> None:
    """The README has fewer than 200 lines; the rest is in docs/."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_the_configuration_is_that_of_the_settings() -> None:
    """docs/configuration.md lists every variable with its default and its limits."""
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| (\S+)[^|]* \| ([^|]+) \|.*\|$", text, re.MULTILINE)
    fields = Settings.model_fields
    assert sorted(name for name, _, _ in rows) == sorted(name.upper() for name in fields)
    for name, default, allowed in rows:
        field = fields[name.lower()]
        if field.is_required():
            assert default == "required"
        elif isinstance(field.default, int | float):
            assert float(default) == field.default
            limits = {
                type(one).__name__: getattr(one, type(one).__name__.lower())
                for one in field.metadata
            }
            assert allowed == f"{limits['Ge']:,} to {limits['Le']:,}"


def test_every_page_with_examples_is_read_by_a_test() -> None:
    """A page with blocks that can be executed is named by a test, which executes them."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")]
    others = [text for text in tests if text != Path(__file__).read_text(encoding="utf-8")]
    read = "\n".join(others).replace('" / "', "/")
    examples = {
        str(page.relative_to(ROOT))
        for page in pages()
        for token in tokens(page)
        if token.type == "fence" and token.info in {"python", "js", "sql", "redis"}
    }
    assert len(examples) > 3
    assert [page for page in sorted(examples) if f'"{page}"' not in read] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_console_blocks_exist(page: Path) -> None:
    """Subcommands and options of ours, make targets, and files that a command names exist."""
    blocks = [token.content for token in tokens(page) if token.type == "fence"]
    shown = {block.splitlines()[0].removeprefix("# ") for block in blocks}
    commands = re.findall(r"^\$ (.*?)(?: +#.*)?$", "\n".join(blocks), re.MULTILINE)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands:
        filled_in = re.sub(r" ID(\.\.\.)?$", " 1764000000000-0", re.sub(r"[\[\]]", "", command))
        program, *words = shlex.split(filled_in)
        if Path(program).name == "interview-access":
            subcommand: click.Command | None = main
            while isinstance(subcommand, click.Group):
                name = words.pop(0)
                subcommand = subcommand.get_command(click.Context(subcommand), name)
            assert subcommand, command
            given = ["-" if word.endswith(".txt") else word for word in words]
            subcommand.make_context(name, given)  # raises UsageError for an unknown option
        elif program == "make":
            assert set(words) <= set(targets), command
        for word in words:
            is_file = re.fullmatch(r"(\./|\.)?[\w/-]+\.(py|lock|example)", word)
            assert not is_file or word in shown or (ROOT / word).exists(), command


def test_make_help_describes_every_target() -> None:
    """Each phony target has a line with what it does and how long it takes."""
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    lines = dict(re.findall(r"^make ([a-z-]+) +(.*)$", make_help(), re.MULTILINE))
    assert sorted(lines) == sorted(phony[1].split())
    without = [name for name, line in lines.items() if not re.search(r"\(.+\)$", line)]
    assert without == ["help"]


@pytest.mark.parametrize("caller", CALLERS)
def test_ci_and_the_hooks_call_the_same_make_targets(caller: str) -> None:
    """Each runs `make check` and `make test`, and no command of its own."""
    text = (ROOT / caller).read_text(encoding="utf-8")
    calls = re.findall(r"^ *(?:- run: |entry: )?make (.+)$", text, re.MULTILINE)
    assert [target for call in calls for target in call.split()] == ["check", "test"]


def make_help() -> str:
    """The output of `make help`."""
    done = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S607 - the user's make
    return done.stdout
