"""The inline client of the test kit: it executes jobs, or says why it cannot."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from interview_access.errors import (
    InvalidInterviewIdException,
    JobExpiredException,
    StorageUnavailableException,
)
from interview_access.testing import AsyncInlineClient, InlineClient

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"


def test_an_inline_job_is_executed_when_it_is_enqueued() -> None:
    """Counts are exact, and the grants can be read."""
    client = InlineClient([FIRST, UUID(SECOND)])
    first, second = client.enqueue("ann", [FIRST]), client.enqueue("ann", [FIRST, SECOND])
    counts = [client.wait(one, timeout=1)["created_access_count"] for one in (first, second)]
    assert counts == [1, 1]
    assert client.granted("ann") == [FIRST, SECOND]
    assert client.granted("bob") == []
    client.assert_enqueued(user_id="ann", count=2)


def test_an_inline_job_with_a_countdown_is_executed_at_once() -> None:
    """A test does not wait; the countdown is kept for assertions."""
    client = InlineClient([FIRST])
    job_id = client.enqueue("ann", [FIRST], countdown=3600)
    assert client.status(job_id).state == "succeeded"
    assert client.jobs[0].countdown == 3600


@pytest.mark.parametrize("times", [{"expires": -1}, {"countdown": 60, "expires": 30}], ids=str)
def test_an_inline_job_that_expires_before_it_starts(times: dict[str, Any]) -> None:
    """It fails with JobExpiredException, and grants nothing."""
    client = InlineClient([FIRST])
    job_id = client.enqueue("ann", [FIRST], **times)
    with pytest.raises(JobExpiredException):
        client.wait(job_id, timeout=1)
    assert client.status(job_id).state == "expired"
    assert client.granted("ann") == []


def test_clear_keeps_the_ledger_of_an_inline_client() -> None:
    """A request under a job ID that is in the ledger has the first result, as after 30 days."""
    client = InlineClient([FIRST])
    client.enqueue("ann", [FIRST], job_id="one")
    client.clear()
    client.assert_nothing_enqueued()
    client.enqueue("bob", [FIRST], job_id="one")
    assert client.wait("one", timeout=1)["created_access_count"] == 1
    assert client.granted("bob") == []


def test_an_invalid_interview_of_an_inline_client_is_refused() -> None:
    """The error names the value."""
    with pytest.raises(ValueError, match="interviews: expected UUIDs, got the string 'x'"):
        InlineClient(["x"])


def test_an_inline_client_has_interviews_or_a_database() -> None:
    """A database has its own interviews."""
    with pytest.raises(ValueError, match="interviews: expected none with database_url"):
        InlineClient([FIRST], database_url="postgresql:///nowhere")


def test_an_invalid_database_url_is_refused() -> None:
    """The error names the argument, and does not repeat the password."""
    with pytest.raises(ValueError, match=r"^database_url: ") as caught:
        InlineClient(database_url="mysql://ann:secret@localhost/interviews")
    assert "secret" not in str(caught.value)


def test_an_unavailable_database_fails_the_job(tmp_path: Path) -> None:
    """The result is that of a worker without attempts left; the job can be sent again."""
    client = InlineClient(database_url=f"postgresql:///nowhere?host={tmp_path}")
    job_id = client.enqueue("ann", [FIRST])
    with pytest.raises(StorageUnavailableException, match="unavailable in all 1 attempts"):
        client.wait(job_id, timeout=1)
    assert client.status(job_id).state == "failed"
    with pytest.raises(StorageUnavailableException, match="The ledger cannot be read"):
        client.status("other")
    assert client.enqueue("ann", [FIRST], job_id=job_id) == job_id
    client.close()


def test_a_database_without_the_workers_tables_is_refused(database_url: str) -> None:
    """Every call raises one sentence that names the command which creates the tables."""
    client = InlineClient(database_url=database_url)
    calls = (
        lambda: client.enqueue("ann", [FIRST]),
        lambda: client.enqueue_attempt(interview_id=FIRST, user_id="ann"),
        lambda: client.status("other"),
        lambda: client.cancel("other"),
        lambda: client.granted("ann"),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"^database_url .* run `interview-access migrate`$"):
            call()
    client.close()


def test_the_asyncio_inline_client() -> None:
    """It has the results of the blocking one."""

    async def use() -> dict[str, Any]:
        client = AsyncInlineClient([FIRST])
        job_id = await client.enqueue("ann", [FIRST])
        result = await client.wait(job_id, timeout=1)
        await client.close()
        return result

    assert asyncio.run(use()) == {"success": True, "created_access_count": 1}


def test_an_inline_attempt() -> None:
    """Its result has the attempt's ID; an unknown interview fails it."""
    client = InlineClient([FIRST])
    result = client.wait(client.enqueue_attempt(FIRST, "ann"), timeout=1)
    assert str(UUID(result["interview_attempt_id"])) == result["interview_attempt_id"]
    with pytest.raises(InvalidInterviewIdException):
        client.wait(client.enqueue_attempt(SECOND, "ann"), timeout=1)


# --- Without the worker package -------------------------------------------------------------------

TRY_BOTH = """
from interview_access.testing import FakeClient, InlineClient
FakeClient().enqueue("ann", [])
try:
    InlineClient()
except ImportError as error:
    print(error)
"""


def environment_without(folder: Path, *missing: str) -> dict[str, str]:
    """Link the installed packages, but for some, in a folder; return PYTHONPATH for it."""
    for package in Path(pytest.__file__).parents[1].iterdir():
        if not package.name.startswith(missing):
            (folder / package.name).symlink_to(package)
    return {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "client", folder)))}


def run(*options: str, environment: dict[str, str]) -> str:
    """Run the program in an environment, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *options, "-c", TRY_BOTH],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_inline_client_without_the_worker_package(tmp_path: Path) -> None:
    """The fake client works; the inline client says what to install."""
    environment = environment_without(tmp_path, "interview_access_worker", "__editable__")
    assert run("-S", environment=environment) == (
        "InlineClient executes jobs with the worker's code: expected the package "
        "interview-access-worker in this environment, got none. Install it for the tests, "
        "or use FakeClient, which needs no worker."
    )


def test_an_inline_client_without_a_dependency_of_the_worker(tmp_path: Path) -> None:
    """The error names the dependency."""
    environment = environment_without(tmp_path, "celery", "__editable__")
    environment["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
    assert "expected its dependency celery, which is not installed" in run(
        "-S", environment=environment
    )


@pytest.mark.parametrize("place", ["tasks.py", "storage/__init__.py"])
def test_a_module_of_the_service_in_place_of_the_workers(tmp_path: Path, place: str) -> None:
    """The error names the file that is imported instead."""
    links, module = tmp_path / "links", tmp_path / "service" / place
    for folder in links, module.parent:
        folder.mkdir(parents=True)
    module.write_text("")
    environment = environment_without(links, "__editable__")
    path = [str(tmp_path / "service"), environment["PYTHONPATH"], str(ROOT)]
    printed = run("-S", environment={"PYTHONPATH": os.pathsep.join(path)})
    name = re.split("[/.]", place)[0]
    assert f"expected the package {name} of interview-access-worker, got {module}" in printed
    assert "Rename the service's own module of this name, or use FakeClient" in printed
