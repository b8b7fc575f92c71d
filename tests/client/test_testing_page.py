"""Every block of docs/testing.md, unchanged, with the test runner that the page is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from celery.exceptions import AlwaysEagerIgnored

from devstack.servers import LocalStack
from storage.memory import MemoryStorage
from tasks.celery_tasks import GrantAccessTask, TaskDependencies
from tests.support.database import database
from tests.support.platform import Database
from tests.support.workers import GRANT_ACCESS, QUEUE, ROOT

PAGE = (ROOT / "docs/testing.md").read_text(encoding="utf-8")
SERVICE = ROOT / "tests/django_service"
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


def files(heading: str) -> dict[str, str]:
    """The Python blocks under a heading, by the file that their first line names."""
    under = re.split(rf"^## {heading}$", PAGE, flags=re.MULTILINE)[1]
    return files_in(re.split(r"^## ", under, maxsplit=1, flags=re.MULTILINE)[0])


def files_in(text: str) -> dict[str, str]:
    """The Python blocks in a text, by the file that their first line names."""
    blocks = re.findall(r"^```python\n# service/(\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) == text.count("```python"), "a block does not name its file"
    return dict(blocks)


ENROLMENT = files_in(PAGE.partition("\n## ")[0])
DJANGO = files("Django")


def run(folder: Path, blocks: dict[str, str], *command: str, **environment: str) -> str:
    """Write files, run a command beside them, and return what it prints."""
    for name, text in blocks.items():
        (folder / name).write_text(text, encoding="utf-8")
    path = os.pathsep.join((str(folder), environment.pop("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONDONTWRITEBYTECODE": "1",
            **environment,
            "PYTHONPATH": path,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_block_is_run() -> None:
    """The page has no block in another section than those that the tests here run."""
    sections = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    with_blocks = [section for section in sections if files(re.escape(section))]
    assert with_blocks == [
        "pytest",
        "What a worker would do",
        "unittest",
        "asyncio and FastAPI",
        "Django",
        "End to end with real servers",
    ]


def test_pytest(tmp_path: Path) -> None:
    """The blocks for pytest pass without Redis, with the plugin of the installed client."""
    blocks = ENROLMENT | files("pytest") | files("What a worker would do")
    blocks |= files("asyncio and FastAPI")
    assert "10 passed" in run(tmp_path, blocks, *PYTEST, "-p", "no:django", "-W", "error")


def test_unittest(tmp_path: Path) -> None:
    """The block for unittest passes without Redis."""
    printed = run(tmp_path, ENROLMENT | files("unittest"), "-W", "error", "-m", "unittest")
    assert "Ran 2 tests" in printed


@pytest.fixture
def django_environment(stack: LocalStack) -> Iterator[dict[str, str]]:
    """The environment of the Django service, on a server where it can create its test database."""
    with database(stack.database_url) as url:
        yield {
            **Database(url).environment,
            "DJANGO_SETTINGS_MODULE": "service_settings",
            "PYTHONPATH": str(SERVICE),
        }


RUNNER = ("-m", "django", "test", "--testrunner", "runner.Runner")
SETTINGS_WITH_SOCKET = """
from service_settings import *
DATABASES["default"] |= {"HOST": os.environ.pop("PGHOST"), "USER": os.environ.pop("PGUSER")}
"""


@pytest.mark.parametrize("settings", ["service_settings", "settings_with_socket"])
def test_django(tmp_path: Path, django_environment: dict[str, str], settings: str) -> None:
    """The blocks for Django pass, with the runner of the page and the platform's models.

    The settings name the server, by the folder of its socket, or leave that to libpq.
    """
    django_environment["DJANGO_SETTINGS_MODULE"] = settings
    files = DJANGO | {"settings_with_socket.py": SETTINGS_WITH_SOCKET}
    tests = ("test_services", "test_grants")
    assert "Ran 4 tests" in run(tmp_path, files, *RUNNER, *tests, **django_environment)


def test_failed_runner(tmp_path: Path, django_environment: dict[str, str]) -> None:
    """If the worker's migrations cannot be applied, the runner drops the test database."""
    without_command = {**django_environment, "PATH": os.defpath}
    with pytest.raises(AssertionError, match="FileNotFoundError"):
        run(tmp_path, DJANGO, *RUNNER, "test_grants", **without_command)
    name = django_environment["PGDATABASE"]
    server = Database(
        f"postgresql://{django_environment['PGUSER']}@/{name}?host={django_environment['PGHOST']}"
    )
    left = server.execute("SELECT datname FROM pg_database WHERE datname = 'test_' || %s", name)
    assert left == []


def test_pytest_django(tmp_path: Path, django_environment: dict[str, str]) -> None:
    """The blocks for pytest-django pass, with the tables that the page's fixture creates."""
    test = "test_with_pytest_django.py"
    assert "2 passed" in run(tmp_path, DJANGO, *PYTEST, test, **django_environment)


# --- CELERY_TASK_ALWAYS_EAGER ---------------------------------------------------------------------


@pytest.fixture
def eager() -> Celery:
    """A Celery app of a service, on a broker in memory, with the setting of the page."""
    app = Celery("service", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    return app


def test_send_task_ignores_the_eager_setting(eager: Celery) -> None:
    """Celery warns, and sends the message to the broker."""
    with pytest.warns(AlwaysEagerIgnored):
        eager.send_task(GRANT_ACCESS, args=["ann", []], queue=QUEUE)
    with eager.connection_for_read() as connection:
        message = connection.SimpleQueue(QUEUE).get(timeout=5)
        assert message.headers["task"] == GRANT_ACCESS


def test_a_direct_call_of_a_task_is_refused(eager: Celery) -> None:
    """The error says that the job must be enqueued."""
    dependencies = TaskDependencies(MemoryStorage, 1, 1, 1)
    task = eager.register_task(GrantAccessTask(dependencies))
    for call in task, task.delay(user_id="ann", interview_ids=[]).get, task.run:
        with pytest.raises(NotImplementedError, match="Enqueue it on the queue interview-access"):
            call()
