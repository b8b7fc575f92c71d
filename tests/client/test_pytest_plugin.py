"""The pytest plugin of the test kit: its fixtures, and what it costs a service that uses none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

USES_FIXTURES = """
import asyncio
from interview_access.producer import InterviewAccessClient

CLIENT = InterviewAccessClient("redis://nowhere.invalid")
INTERVIEW = "89d96f4b-c19d-4e69-8eae-e818f3123b09"

def test_fake(interview_access_client):
    interview_access_client.enqueue("ann", [])
    interview_access_client.assert_enqueued(user_id="ann", count=1)

def test_async_fake(interview_access_async_client):
    asyncio.run(interview_access_async_client.enqueue("ann", []))
    interview_access_async_client.assert_enqueued(user_id="ann", count=1)

def test_inline(interview_access_inline_client):
    interview_access_inline_client.add_interviews([INTERVIEW])
    job_id = interview_access_inline_client.enqueue("ann", [INTERVIEW])
    assert interview_access_inline_client.status(job_id).created == 1

def test_async_inline(interview_access_async_inline_client):
    asyncio.run(interview_access_async_inline_client.enqueue("ann", []))
    assert interview_access_async_inline_client.granted("ann") == []

def test_captured(interview_access_captured):
    CLIENT.enqueue("ann", [])
    interview_access_captured.assert_enqueued(user_id="ann")

def test_failing(interview_access_client):
    interview_access_client.assert_enqueued(user_id="bob")
"""
USES_NONE = """
import sys

def test_light():
    heavy = {"redis", "pydantic", "celery", "django", "sqlalchemy"}
    assert heavy.isdisjoint(sys.modules)
    assert "interview_access.pytest_plugin" in sys.modules
    assert "interview_access.testing" not in sys.modules
"""


def test_the_fixtures_of_the_plugin(tmp_path: Path) -> None:
    """Pytest finds them by the entry point; a failed assertion is shown at the test's own line."""
    (tmp_path / "test_service.py").write_text(USES_FIXTURES)
    result = pytest_in(tmp_path, "-p", "no:django")
    assert "5 passed" in result
    assert "1 failed" in result
    assert ">       interview_access_client.assert_enqueued" in result
    assert "jobs.py" not in result


def test_the_plugin_costs_nothing_when_it_is_not_used(tmp_path: Path) -> None:
    """It imports no package but pytest."""
    (tmp_path / "test_service.py").write_text(USES_NONE)
    assert "1 passed" in pytest_in(tmp_path, "-p", "no:django", "-p", "no:xdist")


def pytest_in(folder: Path, *options: str) -> str:
    """Run pytest in a folder without this repository's settings, and return what it prints."""
    (folder / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout + done.stderr
