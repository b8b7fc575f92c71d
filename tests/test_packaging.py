"""Packaging: declared dependencies, metadata of both packages, and the files that Git tracks."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import metadata, packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SOURCES = {
    ".": ("worker", "tasks", "storage", "devstack", "celeryconfig.py"),
    "client": ("client/interview_access",),
}
"""What each pyproject.toml installs."""

PROJECTS: dict[str, dict[str, Any]] = {
    folder: tomllib.loads((ROOT / folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder in SOURCES
}
MAX_TRACKED_BYTES = 1_000_000
BINARY_SUFFIXES = {
    *(".7z", ".a", ".bin", ".bz2", ".db", ".dll", ".dylib", ".egg", ".exe", ".gif", ".gz", ".ico"),
    *(".jar", ".jpeg", ".jpg", ".mo", ".o", ".pdf", ".pickle", ".pkl", ".png", ".pyc", ".pyd"),
    *(".rdb", ".so", ".sqlite", ".tar", ".tgz", ".webp", ".whl", ".woff", ".woff2", ".xz", ".zip"),
    ".zst",
}


def normalized(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(project: dict[str, Any]) -> set[str]:
    """Names of the distributions that a project requires, those of its extras included."""
    requirements = [*project["dependencies"]]
    for extra in project.get("optional-dependencies", {}).values():
        requirements += extra
    return {normalized(re.split(r"[\[<>=!~; ]", one, maxsplit=1)[0]) for one in requirements}


def imported_modules(source: Path) -> Iterator[str]:
    """Top-level names of the third-party modules that a file or the files of a folder import."""
    for path in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            yield from (name.partition(".")[0] for name in names)


@pytest.mark.parametrize("folder", SOURCES)
def test_every_imported_package_is_declared(folder: str) -> None:
    """An import of a transitive dependency breaks when the package between them drops it."""
    own = {Path(source).stem for source in SOURCES[folder]}
    if folder == "client":
        own |= {"storage", "tasks"}  # the inline clients say that the worker must be installed
    modules = {name for source in SOURCES[folder] for name in imported_modules(ROOT / source)}
    third_party = modules - sys.stdlib_module_names - own
    assert third_party

    installed = packages_distributions()
    names = declared(PROJECTS[folder])
    undeclared = {
        module
        for module in third_party
        if names.isdisjoint(normalized(name) for name in installed.get(module, []))
    }
    assert not undeclared


def test_both_packages_have_one_version_and_license() -> None:
    """The installed metadata are those of the two pyproject.toml files, which agree."""
    for project in PROJECTS.values():
        assert version(project["name"]) == project["version"] == PROJECTS["."]["version"]
        fields = metadata(project["name"])
        assert fields["License-Expression"] == "Apache-2.0"
        assert fields.get_all("License-File") == ["LICENSE"]
        assert fields["Description-Content-Type"] == "text/markdown"
    client = ROOT / "client"
    assert (client / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert (client / "interview_access/py.typed").exists()


def test_ci_runs_every_python_version_that_is_declared() -> None:
    """The classifiers of both packages and the matrix of the workflow name the same versions."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    prefix = "Programming Language :: Python :: 3."
    for project in PROJECTS.values():
        versions = [
            classifier.rpartition(" ")[2]
            for classifier in project["classifiers"]
            if classifier.startswith(prefix)
        ]
        assert versions == job["strategy"]["matrix"]["python"]
        assert project["requires-python"] == f">={versions[0]}"


def tracked_files() -> list[Path]:
    """Paths of the files that Git tracks, from the repository's root."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)  # noqa: S607 - the user's git
    found = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    assert found
    return found


def test_binary_files_are_tracked_in_docs_only() -> None:
    """Wheels, archives, databases and images do not belong in the repository."""
    binary = [path for path in tracked_files() if path.suffix.lower() in BINARY_SUFFIXES]
    assert [path for path in binary if path.parts[0] != "docs"] == []


def test_no_tracked_file_is_larger_than_1_mb() -> None:
    """A large file stays in every clone for ever, even if it is removed later."""
    paths = [path for path in tracked_files() if (ROOT / path).exists()]
    assert [path for path in paths if (ROOT / path).stat().st_size > MAX_TRACKED_BYTES] == []
