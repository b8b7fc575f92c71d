"""LOG_FORMAT=json on a real worker: each line of its output is one JSON object."""

from __future__ import annotations

import json
import os
import re
import signal
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import psutil
import pytest

from devstack.servers import LocalStack
from tests.support.commands import run_module
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    Site,
    held_grant,
    ledger_missing,
    migrated_site,
    worker,
)
from worker.broker.claims import DEAD

HOSTILE = 'x\x1b]0;owned\x07\n{"level": "FORGED"}\r\x00\u202e'
Line = dict[str, Any]


class Run(NamedTuple):
    """The output of a worker that has ended, and the IDs of its jobs."""

    lines: list[Line]
    granted: str
    failed: str
    retried: str
    lost: str

    def settled(self, job_id: str) -> list[Line]:
        """Return the lines at INFO of a job that was settled."""
        return [one for one in self.lines if one.get("job_id") == job_id and one["level"] == "INFO"]

    def event(self, phrase: str) -> Line:
        """Return the first line with this event."""
        return next(one for one in self.lines if one["event"] == phrase)


@pytest.fixture(scope="module")
def run(stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of a worker whose jobs succeed, fail, are retried and lose their process."""
    log = tmp_path_factory.mktemp("json") / "worker.log"
    settings = {"LOG_FORMAT": "json", "GRANT_RETRY_MAX_DELAY": 1, "APP": "tests.support.noisy"}
    with migrated_site(stack, _migrated, 13) as here:
        one, other = here.store.add_interviews(2)
        with worker(here, log, **settings) as service:
            granted = here.send(user_id="ann", interview_ids=[one, one])
            failed = here.send(user_id="ann", interview_ids=[HOSTILE])
            here.answer(granted)
            here.answer(failed)
            here.push({"user_id": "ann", "interview_ids": []}, job_id=HOSTILE)
            here.send(task=f"interview_access.{HOSTILE}")
            here.redis.lpush("interview-access", b"\xff\x1b[2J no JSON")
            until(lambda: here.redis.xlen(DEAD) == 3)
            with ledger_missing(here):
                retried = here.send(user_id="bob", interview_ids=[one])
                until(lambda: b"job retried" in log.read_bytes())
            here.answer(retried)
            lost = lose_process(here, other, service.pid)
            os.kill(service.pid, signal.SIGUSR1)
            until(lambda: b"LOCAL VARIABLES" in log.read_bytes())
    text = log.read_bytes()
    assert text.isascii()
    return Run([json.loads(line) for line in text.splitlines()], granted, failed, retried, lost)


def lose_process(here: Site, interview_id: str, pid: int) -> str:
    """Kill the pool process of a job while it waits, and return the job's ID once it is settled."""
    with held_grant(here, "eve", interview_id):
        job_id = here.send(user_id="eve", interview_ids=[interview_id])
        started = here.until_state(job_id, "STARTED")
        psutil.Process(started["result"]["pid"]).kill()
    here.answer(job_id)
    assert psutil.pid_exists(pid)
    return job_id


def test_every_line_is_one_object(run: Run) -> None:
    """Each line has its time in UTC, its level, its logger, its event and its process."""
    for line in run.lines:
        assert datetime.fromisoformat(line["timestamp"]).utcoffset() == timedelta()
        assert line["level"] in {"INFO", "WARNING", "ERROR"}, line
        assert all(isinstance(line[name], str) for name in ("logger", "event", "process"))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", "".join(map(str, line.values())))


def test_a_settled_job_is_one_line(run: Run) -> None:
    """A job's only line at INFO has its figures, its task, its attempt and its duration."""
    (line,) = run.settled(run.granted)
    assert line["event"] == "job settled"
    assert line["task"] == "interview_access.grant_access"
    assert (line["attempt"], line["outcome"], line["already_finished"]) == (1, "succeeded", False)
    figures = ("requested", "repeated", "already_granted", "created")
    assert [line[name] for name in figures] == [2, 1, 0, 1]
    assert 0 < line["seconds"] < 60
    assert "ann" not in line.values()


def test_a_failed_job_has_its_error(run: Run) -> None:
    """The line of a failed job has the error's type and its sentence, escaped."""
    (line,) = run.settled(run.failed)
    assert (line["outcome"], line["error_type"]) == ("failed", "InvalidInterviewIdException")
    assert "\\x1b]0;owned" in line["error"]
    assert "requested" not in line


def test_a_retry_is_a_line_of_its_own(run: Run) -> None:
    """A retried job has a line for each retry, and one line once it is settled."""
    (line,) = run.settled(run.retried)
    assert line["attempt"] > 1
    retry = run.event("job retried")
    assert (retry["level"], retry["job_id"], retry["attempt"]) == ("WARNING", run.retried, 1)
    assert isinstance(retry["delay_seconds"], int | float)
    assert (retry["task"], retry["error_class"]) == (GRANT_ACCESS, "42")
    assert "grant_access_job" in retry["error"]
    assert 0 < retry["seconds"] < 60


def test_a_lost_process_is_named(run: Run) -> None:
    """The loss of a pool process is an error; the job's next attempt has its one line."""
    loss = run.event("pool process lost")
    assert (loss["level"], loss["job_id"], loss["task"]) == ("ERROR", run.lost, GRANT_ACCESS)
    assert (loss["attempt"], loss["reason"]) == (1, "crash")
    assert isinstance(loss["pid"], int)
    assert "signal 9 (SIGKILL)" in loss["error"]
    assert "detail" not in loss
    (line,) = run.settled(run.lost)
    assert (line["attempt"], line["created"]) == (2, 1)


def test_the_banner_is_a_record(run: Run) -> None:
    """The start, a stack on request and the shutdown are records, as are Celery's own lines."""
    start = run.event("worker starting")
    assert (start["processes"], start["queues"]) == (2, "interview-access")
    assert run.event("worker: Warm shutdown (MainProcess)")
    assert run.event(f"{start['node']} ready.")
    assert any("LOCAL VARIABLES" in one.get("stack", "") for one in run.lines)


def test_what_a_handler_prints_is_a_record(run: Run) -> None:
    """Prints and warnings are records; an exception is one with its type and its traceback."""
    events = [one["event"] for one in run.lines]
    assert "printed\\x1b[2J" in events
    assert "printed on standard error" in events
    assert any("UserWarning: a warning" in one for one in events)
    (failed, *_) = [one for one in run.lines if one.get("error_type") == "ValueError"]
    assert "ValueError: a handler's defect\n\\x1b[2J" in failed["exception"]


def test_a_refused_start_is_a_record(here: Site) -> None:
    """A worker that cannot start logs the reason, before and after its settings are read."""
    refused = "The worker cannot start"
    words = ("-A", "worker", "worker")
    for settings, options, reason in (
        ({"GRANT_BATCH_SIZE": "many"}, (), "GRANT_BATCH_SIZE: got 'many'"),
        ({}, ("-P", "solo"), "got the pool solo"),
    ):
        done = run_module(
            here.environment(LOG_FORMAT="json", **settings), "celery", *words, *options
        )
        assert done.returncode == 1
        lines = [json.loads(line) for line in (done.stdout + done.stderr).splitlines()]
        (line,) = [one for one in lines if one["event"] == refused]
        assert (line["level"], reason in line["detail"]) == ("CRITICAL", True)


def test_an_unknown_format_is_refused(here: Site) -> None:
    """A worker with another value of LOG_FORMAT does not start, and says so as text."""
    done = run_module(here.environment(LOG_FORMAT="xml"), "celery", "-A", "worker", "worker")
    assert done.returncode == 1
    refusal = "The worker cannot start: LOG_FORMAT: got 'xml', expected 'text' or 'json'"
    assert refusal in done.stderr.splitlines()
