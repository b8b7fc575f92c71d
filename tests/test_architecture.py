"""The directions of imports, and the sizes of packages."""

from __future__ import annotations

import ast
import json
from graphlib import TopologicalSorter
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
CLIENT_WITH_SQL = {
    "client/interview_access/outbox.py",
    "client/interview_access/testing/outbox.py",
}
"""Statements that a service or its tests execute on a connection of their own."""
CLIENT_WITH_WORKER = "client/interview_access/testing/execution.py"
"""Executes a test's jobs with the worker's own code; only the inline clients import it."""
DJANGO_APP = "client/interview_access/django"
MAY_KNOW_CELERY = {"tasks/celery_tasks.py"}
REDIS_CONNECTIONS = ("aio", "connections", "producer")
TEST_KIT = "client/interview_access/testing/queue.py"  # raises Redis' errors to the clients
REDIS_ERRORS = ("commands", "control_requests", "enqueueing", "limits", "polling", "retrying")
MAY_KNOW_REDIS = {
    TEST_KIT,
    *(f"client/interview_access/{name}.py" for name in REDIS_CONNECTIONS),
    *(f"client/interview_access/protocol/{name}.py" for name in REDIS_ERRORS),
}


def sources(folder: str) -> list[Path]:
    """All of a folder's Python files."""
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"no Python files in {folder}"
    return found


def imported(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports."""
    return imported_by(ast.parse(path.read_text(encoding="utf-8")))


def imported_by(code: ast.AST) -> set[str]:
    """The top-level names of all modules that a piece of code imports."""
    names: set[str] = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: expected an absolute import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_run_one_way(folder: str) -> None:
    """A folder imports only those below it: worker, tasks, storage, and the client."""
    known = OURS | {"interview_access", "tests", "benchmarks"}
    for path in sources(folder):
        allowed = ARROWS[folder]
        if str(path.relative_to(ROOT)) == CLIENT_WITH_WORKER:
            allowed = allowed | {"tasks", "storage"}
        assert imported(path) & known <= allowed, path


def test_the_worker_is_imported_by_the_inline_clients_only() -> None:
    """The module of the client that imports the worker is imported within one function only."""
    module = "interview_access.testing.execution"
    importers = {
        path.name for path in sources("client/interview_access") if module in imported_modules(path)
    }
    assert importers == {"inline.py"}
    inline = ast.parse((ROOT / "client/interview_access/testing/inline.py").read_text("utf-8"))
    at_import = ast.Module(
        [one for one in inline.body if isinstance(one, ast.Import | ast.ImportFrom)], []
    )
    assert module not in ast.unparse(at_import)


WORKER_ARROWS = {
    "broker": set(),
    "execution": {"broker"},
    "tracing": {"execution"},
    "operations": {"broker", "execution"},
    "monitoring": {"broker", "execution", "operations", "services"},
    "services": {"broker", "operations"},
    "startup": {"broker"},
    "cli": {"broker", "operations", "services"},
}
"""The sub-packages of worker/, each with those that it may import."""
MOST_FILES = 8


@pytest.mark.parametrize("name", WORKER_ARROWS)
def test_sub_packages_of_the_worker_import_one_way(name: str) -> None:
    """A sub-package imports only those below it."""
    for path in sources(f"worker/{name}"):
        found = {
            module.split(".")[1]
            for module in imported_modules(path)
            if module.startswith("worker.") and module.split(".")[1] in WORKER_ARROWS
        }
        assert found <= WORKER_ARROWS[name] | {name}, path


@pytest.mark.parametrize("name", WORKER_ARROWS)
def test_sub_packages_of_the_worker_are_small(name: str) -> None:
    """A sub-package has at most eight modules beside its own docstring."""
    modules = [path for path in (ROOT / "worker" / name).glob("*.py") if path.stem[0] != "_"]
    assert len(modules) <= MOST_FILES, sorted(path.name for path in modules)


def test_there_is_no_circular_import() -> None:
    """No module imports itself through others, also where only types are imported."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for root, folders in (
            (ROOT, [*OURS - {"celeryconfig"}]),
            (ROOT / "client", ["interview_access"]),
        )
        for folder in folders
        for path in sorted((root / folder).rglob("*.py"))
    }
    graph = {
        name: {module for module in imported_modules(path) if module in modules} - {name}
        for name, path in modules.items()
    }
    TopologicalSorter(graph).prepare()


def imported_modules(path: Path) -> set[str]:
    """The dotted names of all modules, and of all names, that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_only_two_subcommands_import_the_local_servers() -> None:
    """In worker/ only the functions `demo` and `up` import devstack."""
    importers = {
        (path.name, getattr(statement, "name", "module level"))
        for path in sources("worker")
        for statement in ast.parse(path.read_text(encoding="utf-8")).body
        if "devstack" in imported_by(statement)
    }
    assert importers == {("local.py", "demo"), ("local.py", "up")}


@pytest.mark.parametrize("folder", ["worker", "tasks", "client/interview_access"])
def test_the_database_is_known_to_storage_only(folder: str) -> None:
    """No file outside storage/ imports SQLAlchemy, a driver or Alembic, or holds an INSERT."""
    for path in sources(folder):
        if str(path.relative_to(ROOT)) not in CLIENT_WITH_SQL:
            assert not imported(path) & DRIVERS, path
            assert "INSERT INTO" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("folder", [*sorted(OURS - {"celeryconfig"}), "client/interview_access"])
def test_django_is_known_to_its_app_only(folder: str) -> None:
    """No other file imports Django or the app, but those that use a connection of Django."""
    for path in sources(folder):
        name = str(path.relative_to(ROOT))
        if not name.startswith(f"{DJANGO_APP}/"):
            assert name in CLIENT_WITH_SQL or "django" not in imported(path), path
            assert not any("interview_access.django" in one for one in imported_modules(path)), path


@pytest.mark.parametrize("folder", ["worker", "tasks"])
def test_sqlstates_are_known_to_storage_only(folder: str) -> None:
    """No file above storage/ decides by a SQLSTATE: it asks a storage error what it means."""
    for path in sources(folder):
        assert "sqlstate" not in path.read_text(encoding="utf-8").lower(), path


@pytest.mark.parametrize("folder", ["tasks", "storage", "client/interview_access"])
def test_celery_is_known_where_messages_are_made_and_read(folder: str) -> None:
    """Business rules, storage and client do not import Celery, kombu or Redis, with exceptions."""
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
    """The lock of npm packages holds no address, and every package has a hash."""
    lock = json.loads((ROOT / "tests/node/package-lock.json").read_text(encoding="utf-8"))
    packages = [package for path, package in lock["packages"].items() if path]
    assert len(packages) > 20
    assert all("integrity" in package and "resolved" not in package for package in packages)
