"""The command and the client, on a real worker."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.contracts import JobProgress
from interview_access.errors import (
    InvalidInterviewIdException,
    JobFailedError,
    NoAnswerInTimeError,
    QueueUnavailableError,
)
from interview_access.producer import InterviewAccessClient

from storage.samples import load_samples
from tests.database import database
from tests.stores import Background, until
from tests.workers import ROOT, Site, held_grant, site, worker
from worker.local_stack import LocalStack

README = (ROOT / "README.md").read_text(encoding="utf-8")
BOUND = 10.0  # seconds within which a producer fails where Redis is away
CHUNK = 10


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 2) as here,
        worker(here, tmp_path_factory.mktemp("cli") / "worker.log", GRANT_CHUNK_SIZE=CHUNK),
    ):
        yield here


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """Ids of interviews that stand, sorted."""
    return sorted(load_samples(here.store.database_url, 3 * CHUNK))


@pytest.fixture
def idle(stack: LocalStack, migrated_url: str) -> Iterator[Site]:
    """A site without a worker."""
    with site(stack, migrated_url, 3) as idle:
        yield idle


@pytest.fixture
def client(here: Site) -> InterviewAccessClient:
    """A client of the site."""
    return InterviewAccessClient(here.broker)


def run(
    environment: dict[str, str], *words: str, told: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run the command as a shell in a pipe does."""
    return subprocess.run(
        [sys.executable, "-m", "worker.cli", *words],
        env=environment,
        cwd=ROOT,
        input=told,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def status(here: Site, job_id: str) -> dict[str, Any]:
    """What the command tells of a job."""
    done = run(here.environment(), "status", job_id, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return dict(json.loads(done.stdout))


def by_interview(ids: list[str]) -> list[str]:
    """The options that name interviews."""
    return [word for one in ids for word in ("--interview", one)]


class TestGrant:
    """interview-access grant."""

    def test_it_prints_the_job_id(self, here: Site, samples: list[str]) -> None:
        """Without --wait it prints the job's id and nothing else."""
        done = run(here.environment(), "grant", "--user", "cli-1", *by_interview(samples[:2]))
        assert (done.returncode, done.stderr) == (0, "")
        assert here.answer(done.stdout.strip())["status"] == "SUCCESS"

    def test_it_waits_and_prints_the_result(self, here: Site, samples: list[str]) -> None:
        """With --wait standard output is the result as one line of JSON, in a pipe without bar."""
        words = ["--user", "cli-2", *by_interview(samples), "--wait", "--job-id", "cli-2"]
        done = run(here.environment(), "grant", *words)
        assert done.returncode == 0
        assert done.stdout == '{"success": true, "created_access_count": 30}\n'
        assert done.stderr == "job cli-2 is queued\n"

    @pytest.mark.parametrize("source", ["file", "standard input"])
    def test_it_reads_interviews_from_a_file(
        self, here: Site, samples: list[str], tmp_path: Path, source: str
    ) -> None:
        """Ids come from a file or from standard input, one a line."""
        lines = "\n".join([*samples, ""])
        file = tmp_path / "ids"
        file.write_text(lines, encoding="ascii")
        name, told = (str(file), "") if source == "file" else ("-", lines)
        words = ["grant", "--user", source, "--interviews-from", name, "--wait"]
        done = run(here.environment(), *words, told=told)
        assert json.loads(done.stdout)["created_access_count"] == len(samples)

    def test_a_failed_job_ends_1(self, here: Site, samples: list[str]) -> None:
        """A job that failed ends 1 with its reason; a malformed id is sent as it is."""
        words = ["--user", "cli-3", *by_interview([samples[0], "no-uuid"]), "--wait"]
        done = run(here.environment(), "grant", *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert "InvalidInterviewIdException: " in done.stderr
        assert "'no-uuid' is not a UUID" in done.stderr
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--user", "x"], "either by --interview or by --interviews-from"),
            (["--user", "x", "--interview", "i", "--interviews-from", "-"], "either by"),
            (["--interview", "i"], "--user"),
            (["--user", "x", "--interview", "i", "--job-id", "a\nb"], "1 to 255 printable"),
            (["--user", "x", "--interview", "i", "--timeout", "soon"], "soon"),
        ],
        ids=["no interviews", "both", "no user", "job id", "timeout"],
    )
    def test_a_wrong_call_ends_2(self, idle: Site, words: list[str], says: str) -> None:
        """A wrong call ends 2, says what is wrong, and sends nothing."""
        done = run(idle.environment(), "grant", *words)
        assert done.returncode == 2
        assert says in done.stderr
        assert idle.redis.llen("interview-access") == 0

    def test_no_broker_ends_2(self, idle: Site) -> None:
        """Without a broker in the environment it says which variable to set."""
        environment = idle.environment()
        del environment["CELERY_BROKER_URL"]
        done = run(environment, "grant", "--user", "x", "--interview", "i")
        assert done.returncode == 2
        assert "CELERY_BROKER_URL" in done.stderr

    def test_no_answer_in_time_ends_3(self, idle: Site) -> None:
        """Where no worker listens, the wait ends 3 at its time."""
        words = ["--user", "x", "--interview", "i", "--wait", "--timeout", "0.3"]
        done = run(idle.environment(), "grant", *words)
        assert (done.returncode, done.stdout) == (3, "")
        assert "had no answer within 0.3 s" in done.stderr

    @pytest.mark.parametrize("how", ["refuses", "is frozen"])
    def test_redis_away_fails_in_time(self, idle: Site, tmp_path: Path, how: str) -> None:
        """Where Redis refuses or never answers, it fails in time with one clear error."""
        path = tmp_path / "redis.sock"
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
            if how == "is frozen":
                server.listen()
            environment = idle.environment(CELERY_BROKER_URL=f"redis+socket://:secret@{path}")
            started = time.monotonic()
            done = run(environment, "grant", "--user", "x", "--interview", "i", "--job-id", "j")
        assert time.monotonic() - started < BOUND
        assert (done.returncode, done.stdout) == (3, "")
        assert "Job j may not be queued: Redis at" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "secret" not in done.stderr

    def test_a_terminal_sees_a_bar(self, here: Site, samples: list[str]) -> None:
        """On a terminal a job of several chunks shows its progress."""
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
            shown = b""
            while b"10/30" not in shown:
                shown += os.read(ours, 4096)
        output, _ = process.communicate(timeout=30)
        os.close(ours)
        assert process.returncode == 0
        assert json.loads(output)["created_access_count"] == 30


class TestStatus:
    """interview-access status."""

    def test_a_finished_job_is_told_from_the_ledger(self, here: Site, samples: list[str]) -> None:
        """A success has its figures and its result, also when Redis no longer has it."""
        job_id = here.send("status-1", [*samples[:3], samples[0]])
        here.answer(job_id)
        here.redis.delete(f"celery-task-meta-{job_id}")
        told = status(here, job_id)
        assert (told["job_id"], told["state"]) == (job_id, "succeeded")
        figures = ("requested", "repeated", "already_granted", "created")
        assert [told[figure] for figure in figures] == [4, 1, 0, 3]
        assert told["result"] == {"success": True, "created_access_count": 3}

    def test_a_failed_job_is_told_with_its_reason(self, here: Site) -> None:
        """A failure has its class and its sentence."""
        job_id = here.send("status-2", ["no-uuid"])
        here.answer(job_id)
        told = status(here, job_id)
        assert told["state"] == "failed"
        assert told["error"]["type"] == "InvalidInterviewIdException"

    def test_a_waiting_job_is_queued(self, idle: Site) -> None:
        """A job that no worker has taken is queued."""
        job_id = idle.send("status-3", [])
        assert status(idle, job_id) == {"job_id": job_id, "state": "queued"}

    def test_an_id_that_nobody_sent_is_unknown(self, idle: Site) -> None:
        """An id that neither ledger, results nor queue have is unknown, never queued."""
        job_id = str(uuid4())
        assert status(idle, job_id) == {"job_id": job_id, "state": "unknown"}
        words = run(idle.environment(), "status", job_id).stdout
        assert re.search(r"^state +unknown$", words, re.MULTILINE)


class TestMigrate:
    """interview-access migrate."""

    def test_it_needs_the_database_only(self, database_url: str) -> None:
        """With DATABASE_URL alone it tells what it would do, does it, then has nothing to do."""
        environment = {"PATH": os.environ["PATH"], "DATABASE_URL": database_url}
        would = run(environment, "migrate", "--dry-run")
        assert would.returncode == 0
        assert "grant_access_job" in would.stdout
        assert run(environment, "migrate").returncode == 0
        assert "nothing to do" in run(environment, "migrate").stdout

    def test_a_bad_address_is_named_without_its_password(self) -> None:
        """A database that cannot be reached is one line, without the password."""
        url = "postgresql://me:secret@127.0.0.1:1/x"
        done = run({"PATH": os.environ["PATH"], "DATABASE_URL": url}, "migrate")
        assert done.returncode == 1
        assert "127.0.0.1:1" in done.stderr
        assert "secret" not in done.stderr
        assert "Traceback" not in done.stderr


class TestClient:
    """The client package."""

    def test_it_enqueues_and_waits(self, client: InterviewAccessClient, samples: list[str]) -> None:
        """A job's result comes back by its id."""
        job_id = client.enqueue("client-1", samples[:2])
        assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 2}

    def test_a_failure_comes_back_in_its_class(self, client: InterviewAccessClient) -> None:
        """A failure for cause is raised as what the worker raised."""
        job_id = client.enqueue("client-2", ["no-uuid"])
        with pytest.raises(InvalidInterviewIdException, match="'no-uuid' is not a UUID") as caught:
            client.wait(job_id, timeout=30)
        assert caught.value.details["total"] == 1

    def test_a_foreign_failure_is_told_as_one(
        self, here: Site, client: InterviewAccessClient
    ) -> None:
        """A failure of Celery's own, a lost worker say, comes as JobFailedError."""
        meta = {
            "status": "FAILURE",
            "result": {
                "exc_type": "WorkerLostError",
                "exc_module": "billiard.exceptions",
                "exc_message": ["Worker exited prematurely"],
            },
        }
        here.redis.set("celery-task-meta-client-3", json.dumps(meta))
        with pytest.raises(JobFailedError, match="WorkerLostError: Worker exited prematurely"):
            client.wait("client-3", timeout=5)

    def test_a_wait_has_an_end(self, client: InterviewAccessClient) -> None:
        """Where no answer comes, the wait ends at its time and says the state."""
        with pytest.raises(NoAnswerInTimeError, match="state is PENDING"):
            client.wait(str(uuid4()), timeout=0.05)

    def test_progress_is_passed_on(
        self, here: Site, client: InterviewAccessClient, samples: list[str]
    ) -> None:
        """A caller that asks for it sees the progress of a job of several chunks."""
        seen: list[JobProgress] = []
        with held_grant(here, "client-4", samples[-1]):
            job_id = client.enqueue("client-4", samples)
            waiting = Background(lambda: client.wait(job_id, timeout=30, on_progress=seen.append))
            until(lambda: bool(seen))
        assert waiting.result()["created_access_count"] == len(samples)
        assert (seen[0].done, seen[0].total) == (CHUNK, len(samples))

    def test_enqueueing_leaves_no_subscription(self, idle: Site) -> None:
        """A producer subscribes to nothing, however much it sends."""
        client = InterviewAccessClient(idle.broker)
        for _ in range(20):
            client.enqueue("client-5", [])
        assert idle.redis.llen("interview-access") == 20
        channels: Any = idle.redis.pubsub_channels("*celery-task-meta*")
        assert channels == []

    def test_the_message_on_the_wire(self, idle: Site) -> None:
        """What is sent is the contract's message, with a short line for people."""
        InterviewAccessClient(idle.broker).enqueue("client-6", ["i"] * 5_000, job_id="wire")
        raw: Any = idle.redis.lindex("interview-access", 0)
        message = json.loads(raw)
        assert message["content-type"] == "application/json"
        assert message["headers"]["task"] == "interview_access.grant_access"
        assert message["headers"]["id"] == "wire"
        assert (
            message["headers"]["kwargsrepr"]
            == "user_id='client-6', interview_ids=<a list of 5,000>"
        )
        assert message["properties"]["delivery_info"]["routing_key"] == "interview-access"

    def test_redis_away_is_one_error(self, tmp_path: Path) -> None:
        """A queue that cannot be reached is one exception that says what to do."""
        client = InterviewAccessClient(f"redis+socket://{tmp_path}/none.sock")
        with pytest.raises(QueueUnavailableError, match="again under the same id is safe"):
            client.enqueue("client-7", [])
        with pytest.raises(QueueUnavailableError, match="poll it again"):
            client.wait("client-7", timeout=5)

    @pytest.mark.parametrize("number", [0, 1])
    def test_the_readmes_examples_run(self, here: Site, samples: list[str], number: int) -> None:
        """The README's Python, run as it stands, enqueues and prints a result."""
        assert "89d96f4b-c19d-4e69-8eae-e818f3123b09" in samples
        blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        assert len(blocks) == 2
        done = subprocess.run(
            [sys.executable, "-c", blocks[number]],
            env=here.environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"\d created\n|\{'success': True, .*\}\n", done.stdout)
