"""The commands ``grant``, ``attempt``, ``status``, ``cancel`` and ``migrate``, on a real worker."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result

from devstack.servers import LocalStack
from tests.support.commands import run_module
from tests.support.stores import a_job, until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
    held_grant,
    migrated_site,
    site_with_worker,
)
from worker.cli import main

FAILS_WITHIN = 10.0  # seconds in which a producer fails during an outage of Redis
CHUNK = 10
IDLE_NUMBER = 12  # of the Redis database of the site without a worker


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    folder = tmp_path_factory.mktemp("cli")
    with site_with_worker(stack, _migrated, 2, folder, GRANT_CHUNK_SIZE=CHUNK) as here:
        yield here


@pytest.fixture(scope="module")
def site_without_worker(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site without a worker."""
    with migrated_site(stack, _migrated, IDLE_NUMBER) as one:
        yield one


@pytest.fixture
def idle(site_without_worker: Site) -> Site:
    """The site without a worker, with an empty Redis database; no test writes to its ledger."""
    site_without_worker.redis.flushdb()
    return site_without_worker


def run(environment: Mapping[str, str | None], *words: str, stdin: str = "") -> Result:
    """Run the command in this process, without a terminal."""
    return CliRunner().invoke(main, words, input=stdin, env=environment, catch_exceptions=False)


def run_process(here: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process, without a terminal."""
    return run_module(here.environment(), "worker.cli", *words)


def status(here: Site, job_id: str, **settings: object) -> dict[str, Any]:
    """Return the status of a job as the command prints it with --json."""
    done = run(here.environment(**settings), "status", job_id, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


def by_interview(ids: list[str]) -> list[str]:
    """Return the options that name interviews."""
    return [word for one in ids for word in ("--interview", one)]


def progress_is_shown(terminal: int) -> bool:
    """Whether the terminal's output since the last call contains a count of grants."""
    if not select.select([terminal], [], [], 0)[0]:
        return False
    return re.search(rb"[12]0/30", os.read(terminal, 65_536)) is not None


class TestGrant:
    """interview-access grant."""

    def test_it_prints_the_job_id(self, here: Site, samples: list[str]) -> None:
        """Without --wait the output is the job's ID and nothing else."""
        done = run_process(here, "grant", "--user", "cli-1", *by_interview(samples[:2]))
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 1
        assert here.answer(done.stdout.strip())["status"] == "SUCCESS"

    def test_it_waits_and_prints_the_result(self, here: Site, samples: list[str]) -> None:
        """With --wait the output is the result as one line of JSON; a pipe gets no progress bar."""
        words = ["--user", "cli-2", *by_interview(samples), "--wait", "--job-id", "cli-2"]
        done = run(here.environment(), "grant", *words)
        assert done.exit_code == 0
        assert done.stdout == '{"success": true, "created_access_count": 30}\n'
        assert done.stderr == "job cli-2 is queued\n"

    @pytest.mark.parametrize("source", ["file", "standard input"])
    def test_it_reads_interviews_from_a_file(
        self, here: Site, samples: list[str], tmp_path: Path, source: str
    ) -> None:
        """IDs are read from a file or from standard input, one from each line."""
        lines = "\n".join([*samples, ""])
        file = tmp_path / "ids"
        file.write_text(lines, encoding="ascii")
        name, stdin = (str(file), "") if source == "file" else ("-", lines)
        words = ["grant", "--user", source, "--interviews-from", name, "--wait"]
        done = run(here.environment(), *words, stdin=stdin)
        assert json.loads(done.stdout)["created_access_count"] == len(samples)

    @pytest.mark.parametrize("source", ["file", "standard input"])
    def test_a_file_of_windows_is_read(
        self, here: Site, samples: list[str], tmp_path: Path, source: str
    ) -> None:
        """A byte order mark and the line ends of Windows are not part of an ID."""
        lines = "\r\n".join(["\ufeff" + samples[0], *samples[1:], "", ""])
        file = tmp_path / "ids"
        file.write_text(lines, encoding="utf-8", newline="")
        name, stdin = (str(file), "") if source == "file" else ("-", lines)
        words = ["grant", "--user", f"windows {source}", "--interviews-from", name, "--wait"]
        done = run(here.environment(), *words, stdin=stdin)
        assert json.loads(done.stdout)["created_access_count"] == len(samples)

    def test_an_empty_file_is_noted(self, idle: Site, tmp_path: Path) -> None:
        """A file without IDs makes a job that grants nothing, and the command says so."""
        file = tmp_path / "ids"
        file.write_text("\n \n", encoding="ascii")
        words = ["grant", "--user", "x", "--interviews-from", str(file)]
        done = run(idle.environment(), *words)
        assert done.exit_code == 0
        assert done.stderr == f"{file} has no interview IDs: the job grants nothing.\n"

    @pytest.mark.parametrize("source", ["options", "file"])
    def test_several_users_are_a_cohort(
        self, here: Site, samples: list[str], tmp_path: Path, source: str
    ) -> None:
        """Several users, or a file of users, are sent as one job."""
        users = [f"cohort-{source}-{n}" for n in range(3)]
        file = tmp_path / "users"
        file.write_text("\n".join(users), encoding="ascii")
        given = [word for user in users for word in ("--user", user)]
        words = given if source == "options" else ["--users-from", str(file)]
        job_id = f"cohort-{source}"
        done = run(
            here.environment(),
            *("grant", *words, *by_interview(samples[:2]), "--wait", "--job-id", job_id),
        )
        assert json.loads(done.stdout)["created_access_count"] == 6
        assert status(here, job_id)["created_by_user"] == dict.fromkeys(users, 2)

    def test_a_job_is_delayed_and_expires(self, idle: Site) -> None:
        """--countdown and --expires are announced with the job."""
        words = ["grant", "--user", "x", "--interview", "i", "--countdown", "3600"]
        job_id = run(idle.environment(), *words, "--expires", "2099-01-01T00:00:00Z").stdout.strip()
        known = status(idle, job_id)
        sent_at, eta = (datetime.fromisoformat(known[name]) for name in ("sent_at", "eta"))
        assert eta - sent_at == timedelta(hours=1)
        assert known["expires_at"] == "2099-01-01T00:00:00Z"

    def test_a_reused_job_id_ends_1(self, idle: Site) -> None:
        """The error for the ID of another request begins with what to do."""
        words = ["grant", "--interview", "i", "--job-id", "taken", "--user"]
        assert run(idle.environment(), *words, "x").exit_code == 0
        done = run(idle.environment(), *words, "y")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith(
            "JobIdReusedException: Send this request under a job ID of its own: 'taken' "
        )

    def test_a_failed_job_ends_1(self, here: Site, samples: list[str]) -> None:
        """The exit status for a failed job is 1; a malformed ID is sent unchanged."""
        words = ["--user", "cli-3", *by_interview([samples[0], "no-uuid"]), "--wait"]
        done = run_process(here, "grant", *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "InvalidInterviewIdException: " in done.stderr
        assert "'no-uuid' is not a UUID" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--user", "x"], "either by --interview or by --interviews-from"),
            (["--user", "x", "--interview", "i", "--interviews-from", "-"], "either by"),
            (["--interview", "i"], "--user"),
            (["--user", "x", "--interview", "i", "--job-id", "a\nb"], "1 to 255 printable"),
            (["--user", "x", "--interview", "i", "--timeout", "soon"], "got 'soon', expected sec"),
            (["--user", "x", "--interview", "i", "--timeout", "5"], "how long --wait waits"),
            (["--user", "x", "--users-from", "-", "--interview", "i"], "either by --user or"),
            (
                ["--user", "x", "--interview", "i", "--wait", "--timeout", "nan"],
                "got 'nan', expected",
            ),
            (["--user", "x" * 37, "--interview", "i"], "1 to 36 characters"),
            (["--user", "x", "--interview", "i", "--countdown", "-1"], "got '-1', expected"),
            (["--user", "x", "--interview", "i", "--expires", "soon"], "a time in ISO 8601"),
        ],
        ids=[
            *("no interviews", "both", "no user", "job id", "timeout", "timeout without wait"),
            *(
                "two sources",
                "timeout that is no number",
                "user",
                "countdown",
                "expires",
            ),
        ],
    )
    def test_a_usage_error_ends_2(self, idle: Site, words: list[str], message: str) -> None:
        """The exit status for a usage error is 2; the error is described and nothing is sent."""
        done = run(idle.environment(), "grant", *words)
        assert done.exit_code == 2
        assert message in done.stderr
        assert idle.redis.llen("interview-access") == 0

    def test_two_options_that_read_one_file_end_2(self, idle: Site) -> None:
        """Users and interviews cannot both be read from standard input."""
        done = run_process(idle, "grant", "--users-from", "-", "--interviews-from", "-")
        assert done.returncode == 2
        assert "read the same file" in done.stderr
        assert idle.redis.llen(QUEUE) == 0

    def test_no_broker_ends_2(self, idle: Site) -> None:
        """Without a broker in the environment the error names the variable."""
        environment = {**idle.environment(), "CELERY_BROKER_URL": None}
        done = run(environment, "grant", "--user", "x", "--interview", "i")
        assert done.exit_code == 2
        assert "CELERY_BROKER_URL" in done.stderr

    def test_no_result_in_time_ends_3(self, idle: Site) -> None:
        """The exit status for a result that does not come in time is 3."""
        words = ["--user", "x", "--interview", "i", "--wait", "--timeout", "0.3"]
        done = run(idle.environment(), "grant", *words)
        assert (done.exit_code, done.stdout) == (3, "")
        assert "had no result within 0.3 s" in done.stderr

    @pytest.mark.parametrize("how", ["refuses", "is frozen"])
    def test_an_outage_of_redis_fails_in_time(self, idle: Site, tmp_path: Path, how: str) -> None:
        """If Redis refuses or never replies, the command fails in time with one line."""
        path = tmp_path / "redis.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            if how == "is frozen":
                server.listen()
            environment = idle.environment(CELERY_BROKER_URL=f"redis+socket://:secret@{path}")
            started = time.monotonic()
            done = run(environment, "grant", "--user", "x", "--interview", "i", "--job-id", "j")
        assert time.monotonic() - started < FAILS_WITHIN
        assert (done.exit_code, done.stdout) == (3, "")
        assert "Job j might not have been queued: " in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "secret" not in done.stderr

    def test_a_terminal_shows_a_progress_bar(self, here: Site, samples: list[str]) -> None:
        """On a terminal a job of several chunks has a progress bar."""
        ours, theirs = pty.openpty()
        words = ["grant", "--user", "cli-bar", "--wait", *by_interview(samples)]
        with held_grant(here, "cli-bar", samples[-1]):
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.cli", *words],
                env={**here.environment(), "TERM": "xterm", "COLUMNS": "100"},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=theirs,
            )
            os.close(theirs)
            until(lambda: progress_is_shown(ours))
        output, _ = process.communicate(timeout=30)
        os.close(ours)
        assert process.returncode == 0
        assert json.loads(output)["created_access_count"] == 30


class TestAttempt:
    """interview-access attempt."""

    def test_it_waits_and_prints_the_result(self, here: Site, samples: list[str]) -> None:
        """With --wait the output is the result, which has the attempt's ID."""
        words = ["attempt", "--user", "cli-attempt", "--interview", samples[0], "--wait"]
        done = run_process(here, *words)
        (attempt,) = (one for one in here.store.attempts() if one.user_id == "cli-attempt")
        assert json.loads(done.stdout) == {"success": True, "interview_attempt_id": attempt.id}

    def test_it_accepts_the_options_of_a_job(self, idle: Site) -> None:
        """The job has the ID, the countdown and the expiry of the options."""
        words = ["--user", "x", "--interview", "i", "--job-id", "a", "--countdown", "9"]
        done = run(idle.environment(), "attempt", *words, "--expires", "60")
        assert done.stdout == "a\n"
        known = status(idle, "a")
        assert known["task"] == "interview_access.create_interview_attempt"
        assert known.keys() >= {"eta", "expires_at"}

    @pytest.mark.parametrize("option", ["--user", "--interview"])
    def test_it_refuses_a_repeated_option(self, idle: Site, option: str) -> None:
        """An attempt has one user and one interview: a second one is a usage error."""
        words = ["--user", "x", "--interview", "i", option, "second"]
        done = run(idle.environment(), "attempt", *words)
        assert (done.exit_code, done.stdout) == (2, "")
        assert f"{option}: got 2 values, expected one" in done.stderr
        assert idle.redis.llen(QUEUE) == 0


class TestStatus:
    """interview-access status."""

    def test_a_finished_job_is_read_from_the_ledger(self, here: Site, samples: list[str]) -> None:
        """A succeeded job has its figures and its result, also if Redis no longer has it."""
        job_id = here.send("status-1", [*samples[:3], samples[0]])
        here.answer(job_id)
        here.redis.delete(f"celery-task-meta-{job_id}")
        done = run_process(here, "status", job_id, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        known = json.loads(done.stdout)
        assert (known["job_id"], known["state"]) == (job_id, "succeeded")
        figures = ("requested", "repeated", "already_granted", "created")
        assert [known[figure] for figure in figures] == [4, 1, 0, 3]
        assert known["result"] == {"success": True, "created_access_count": 3}

    def test_a_failed_job_has_its_reason(self, here: Site) -> None:
        """A failed job has its error's class."""
        job_id = here.send("status-2", ["no-uuid"])
        here.answer(job_id)
        known = status(here, job_id)
        assert known["state"] == "failed"
        assert known["error"]["type"] == "InvalidInterviewIdException"

    def test_an_unclaimed_job_is_queued(self, idle: Site) -> None:
        """A job that no worker has claimed is queued, with what its producer announced."""
        job_id = run(idle.environment(), "grant", "--user", "x", "--interview", "i").stdout.strip()
        known = status(idle, job_id)
        assert (known["job_id"], known["state"], known["task"]) == (job_id, "queued", GRANT_ACCESS)
        assert known.keys() == {"job_id", "state", "task", "sent_at"}

    def test_an_id_without_a_job_is_unknown(self, idle: Site) -> None:
        """The status of an ID that was never sent is unknown, not queued."""
        job_id = str(uuid4())
        assert status(idle, job_id) == {"job_id": job_id, "state": "unknown"}
        words = run(idle.environment(), "status", job_id).stdout
        assert re.search(r"^state +unknown$", words, re.MULTILINE)

    def test_the_text_is_readable(self, here: Site, samples: list[str]) -> None:
        """Without --json the values are words and numbers, neither JSON nor Python."""
        job_id = here.send("status-3", [samples[0], "no-uuid"])
        here.answer(job_id)
        failed = run(here.environment(), "status", job_id).stdout
        assert re.search(
            r"^error +InvalidInterviewIdException: 1 interview ID cannot be granted: 'no-uuid'",
            failed,
            re.MULTILINE,
        )
        assert re.search(
            r"^malformed_interview_ids +1 \(--json names them\)$", failed, re.MULTILINE
        )
        job_id = here.send("status-3", samples[:1])
        here.answer(job_id)
        succeeded = run(here.environment(), "status", job_id).stdout
        assert re.search(
            r"^result +success: yes, created_access_count: 1$", succeeded, re.MULTILINE
        )
        for text in failed, succeeded:
            assert not re.search(r"[{}\[\]]|True|None", text)


class TestCancel:
    """interview-access cancel."""

    def test_an_id_that_was_never_sent_is_explained(self, idle: Site) -> None:
        """For an ID without a job the command says that the cancellation is kept."""
        done = run_process(idle, "cancel", "never-sent")
        assert done.returncode == 0
        assert re.search(r"^cancel_requested +yes$", done.stdout, re.MULTILINE)
        assert done.stderr.startswith("No job with this ID is known. The cancellation is kept")

    @pytest.mark.parametrize(
        ("job_id", "said"),
        [
            (
                "job-of-ann",
                "has succeeded, expected one that waits or runs; its outcome stays, and what ",
            ),
            ("job-of-bob", "has failed, expected one that waits or runs; its outcome stays.\n"),
        ],
    )
    @pytest.mark.parametrize("option", [[], ["--json"]], ids=str)
    def test_a_finished_job_is_an_error(
        self, idle: Site, job_id: str, said: str, option: list[str]
    ) -> None:
        """A finished job cannot be cancelled: its status is printed, and why it ends 1."""
        idle.store.grant(a_job("job-of-ann", "ann", []), a_job("job-of-bob", "bob", 7))
        done = run(idle.environment(), "cancel", job_id, *option)
        assert done.exit_code == 1
        assert job_id in done.stdout
        assert done.stderr.startswith(f"The job {job_id} {said}")
        assert done.stderr.count("\n") == 1


class TestMigrate:
    """interview-access migrate."""

    def test_it_needs_the_database_only(self, database_url: str) -> None:
        """With only DATABASE_URL set, --dry-run prints the steps, and a second run does nothing."""
        process_environment = {"PATH": os.environ["PATH"], "DATABASE_URL": database_url}
        would = run_module(process_environment, "worker.cli", "migrate", "--dry-run")
        assert would.returncode == 0
        assert "grant_access_job" in would.stdout
        environment = {"CELERY_BROKER_URL": None, "DATABASE_URL": database_url}
        assert run(environment, "migrate").exit_code == 0
        assert "nothing to do" in run(environment, "migrate").stdout

    def test_an_unreachable_database_is_named_without_its_password(self) -> None:
        """The error for an unreachable database contains its host and no password."""
        url = "postgresql://me:secret@127.0.0.1:1/x"
        done = run({"CELERY_BROKER_URL": None, "DATABASE_URL": url}, "migrate")
        assert done.exit_code == 1
        assert "127.0.0.1:1" in done.stderr
        assert "secret" not in done.stderr
        assert "Traceback" not in done.stderr
