"""The house: who may import what."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"worker", "tasks", "storage", "devstack", "celeryconfig"}
ARROWS = {
    "devstack": {"devstack", "storage", "interview_access"},
    "worker": {"worker", "tasks", "storage", "devstack", "interview_access"},
    "tasks": {"tasks", "storage", "interview_access"},
    "storage": {"storage"},
    "client/interview_access": {"interview_access"},
    "contract": {"interview_access"},
}
DRIVERS = {"sqlalchemy", "psycopg", "alembic"}
CELERY = {"celery", "kombu", "billiard"}
ASKS_IN_SQL = "client/interview_access/outbox.py"
"""Holds the INSERT that a service runs in its own transaction, and names its connection's type."""
MAY_KNOW_CELERY = {"tasks/celery_tasks.py"}
MAY_KNOW_REDIS = {f"client/interview_access/{name}.py" for name in ("aio", "producer", "protocol")}


def sources(folder: str) -> list[Path]:
    """All of a folder's Python files."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python files in {folder}"
    return found


def imported(path: Path) -> set[str]:
    """The top-level names of all that a file imports, wherever in it."""
    return imported_by(ast.parse(path.read_text(encoding="utf-8")))


def imported_by(code: ast.AST) -> set[str]:
    """The top-level names of all that a piece of code imports."""
    names: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: a relative import hides where it points"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_run_one_way(folder: str) -> None:
    """A folder imports only what stands below it: worker, tasks, storage; and the contract."""
    known = OURS | {"interview_access", "tests", "benchmarks"}
    for path in sources(folder):
        assert imported(path) & known <= ARROWS[folder], path


def test_only_two_subcommands_import_the_local_servers() -> None:
    """In worker/ only the functions `demo` and `up` import devstack."""
    importers = {
        getattr(statement, "name", "module level")
        for path in sources("worker")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if "devstack" in imported_by(statement)
    }
    assert importers == {"demo", "up"}


@pytest.mark.parametrize("folder", ["worker", "tasks", "client/interview_access"])
def test_the_database_is_known_to_storage_only(folder: str) -> None:
    """No file outside storage/ imports SQLAlchemy, a driver or Alembic, or holds an INSERT."""
    for path in sources(folder):
        if str(path.relative_to(ROOT)) != ASKS_IN_SQL:
            assert not imported(path) & DRIVERS, path
            assert "INSERT INTO" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("folder", ["tasks", "storage", "client/interview_access"])
def test_celery_is_known_where_messages_are_made_and_read(folder: str) -> None:
    """Business, data and contract know nothing of Celery, kombu or Redis."""
    for path in sources(folder):
        name = str(path.relative_to(ROOT))
        assert name in MAY_KNOW_CELERY or not imported(path) & CELERY, path
        assert name in MAY_KNOW_REDIS or "redis" not in imported(path), path


def test_the_lock_files_name_packages_and_hashes_only() -> None:
    """A lock holds no address, and every package in it has a hash."""
    for lock in sorted(ROOT.glob("requirements*.lock")):
        text = lock.read_text(encoding="utf-8")
        assert "://" not in text, lock
        pins = [line for line in text.splitlines() if "==" in line and not line.startswith(" ")]
        assert len(pins) > 20, lock
        assert all(line.endswith("\\") for line in pins), lock


def test_the_lock_of_node_names_packages_and_hashes_only() -> None:
    """Likewise; where a package comes from is the machine's to know."""
    lock = json.loads((ROOT / "tests/node/package-lock.json").read_text(encoding="utf-8"))
    packages = [package for path, package in lock["packages"].items() if path]
    assert len(packages) > 20
    assert all("integrity" in package and "resolved" not in package for package in packages)
