"""No password appears in a representation, an error or a command's output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from storage.postgres import PostgresStorage
from tests.support.commands import run_module
from tests.support.workers import ROOT, Site, started, worker_service
from worker.cli import main

SECRET = "s3cret-of-the-tests"  # noqa: S105 - of no server
URLS = {
    "DATABASE_URL": f"postgresql://me:{SECRET}@127.0.0.1:1/x?sslpassword={SECRET}",
    "CELERY_BROKER_URL": (
        f"sentinel://me:{SECRET}@127.0.0.1:1;me:{SECRET}@127.0.0.1:2/0?master_name=jobs"
    ),
    "CELERY_RESULT_BACKEND": f"redis://me:{SECRET}@127.0.0.1:1/0",
    "REDIS_SENTINEL_PASSWORD": SECRET,
}
ENVIRONMENT = {"PATH": os.environ["PATH"], **URLS}


def test_an_engine_shows_no_secret_option() -> None:
    """The representation of an engine omits the password and the passphrase of the client's key."""
    storage: Any = PostgresStorage(URLS["DATABASE_URL"])
    assert SECRET not in repr(storage._engine)
    storage.close()


SHOWN = (
    *("app.settings", "app.settings.broker", "app.settings.results", "app.storage()"),
    *("app.conf.humanize(with_defaults=True)", "app.backend.as_uri()"),
    *("app.connection_for_write()", "app.connection_for_write().info()"),
)


def test_a_representation_shows_no_password() -> None:
    """Settings, connections and what `inspect conf` and `inspect stats` report have none."""
    shown = ", ".join(f"{one}, repr({one})" for one in SHOWN)
    command = [sys.executable, "-c", f"from worker.celery import app; print({shown})"]
    output = subprocess.check_output(command, env=ENVIRONMENT, cwd=ROOT, text=True)
    assert "127.0.0.1" in output
    assert SECRET not in output


@pytest.mark.parametrize(
    "words",
    [
        ("celery", "-A", "worker", "report"),
        ("celery", "-A", "worker", "inspect", "ping", "--timeout", "1"),
        ("worker.cli", "status", "x"),
    ],
    ids=" ".join,
)
def test_a_process_prints_no_password(words: tuple[str, ...]) -> None:
    """Neither the output nor the error of a process has one, with every server away."""
    done = run_module(ENVIRONMENT, *words)
    assert done.stdout + done.stderr
    assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("dead-letters", "list"),
        ("grant", "--user", "x", "--interview", "x"),
        ("migrate",),
        ("status", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_prints_no_password(
    words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the output, the error nor the log of a command has one, with every server away."""
    done = CliRunner().invoke(main, words, env=ENVIRONMENT, catch_exceptions=False)
    assert done.output
    assert SECRET not in done.output + caplog.text


def test_a_traceback_shows_no_password() -> None:
    """Errors of all three connections, with their causes, have none."""
    code = """
import traceback
from worker.celery import app
for call in (
    lambda: app.storage().get_finished_job("x"),
    lambda: app.connection_for_write().ensure_connection(max_retries=1, timeout=1),
    lambda: app.backend.client.get("x"),
):
    try:
        call()
    except Exception:
        traceback.print_exc()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, check=True
    )
    assert done.stderr.count(b"Traceback") >= 3
    assert SECRET.encode() not in done.stderr


def test_process_titles_show_no_address(here: Site, tmp_path: Path) -> None:
    """The titles of a worker's processes, which every user of the machine sees, have no URL."""
    service = worker_service(tmp_path / "worker.log", here.environment())
    with started(service):
        process = psutil.Process(service.pid)
        titles = [one.cmdline() for one in (process, *process.children(recursive=True))]
    assert len(titles) > 1
    assert not any("://" in word for title in titles for word in title)
