"""The client package and the README's examples, on a real worker."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from interview_access.contracts import JobProgress
from interview_access.errors import (
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobFailedError,
    NoAnswerInTimeError,
    QueueUnavailableError,
)
from interview_access.producer import InterviewAccessClient
from redis import Redis

from storage.samples import NAMED_SAMPLES, load_samples
from tests.database import database
from tests.stores import Background, until
from tests.workers import GRANT_ACCESS, QUEUE, ROOT, Site, held_grant, site, worker
from worker.local_stack import LocalStack

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHUNK = 10
BOUND = 10.0  # seconds within which a producer fails where Redis is away


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 6) as here,
        worker(here, tmp_path_factory.mktemp("client") / "worker.log", GRANT_CHUNK_SIZE=CHUNK),
    ):
        yield here


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """Ids of interviews that stand, sorted."""
    return sorted(load_samples(here.store.database_url, 3 * CHUNK))


@pytest.fixture
def client(here: Site) -> InterviewAccessClient:
    """A client of the site."""
    return InterviewAccessClient(here.broker)


@pytest.fixture
def idle(stack: LocalStack, migrated_url: str) -> Iterator[Site]:
    """A site without a worker."""
    with site(stack, migrated_url, 7) as idle:
        yield idle


def test_it_enqueues_and_waits(client: InterviewAccessClient, samples: list[str]) -> None:
    """A job's result comes back by its id."""
    job_id = client.enqueue("client-1", samples[:2])
    assert client.wait(job_id, timeout=30) == {"success": True, "created_access_count": 2}


def test_uuid_objects_are_their_strings(here: Site, client: InterviewAccessClient) -> None:
    """A caller may give UUID objects, as user and as interviews."""
    user = uuid.uuid4()
    job_id = client.enqueue(user, [uuid.UUID(one) for one in NAMED_SAMPLES])
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(NAMED_SAMPLES)
    assert here.store.granted(str(user)) == sorted(NAMED_SAMPLES)


def test_the_same_job_id_counts_once(client: InterviewAccessClient, samples: list[str]) -> None:
    """A job sent twice under one id has one effect and one answer."""
    job_id = client.enqueue("client-2", samples, job_id="client-2")
    client.wait(job_id, timeout=30)
    assert client.enqueue("client-2", samples, job_id="client-2") == job_id
    assert client.wait(job_id, timeout=30)["created_access_count"] == len(samples)


@pytest.mark.parametrize(
    ("user_id", "ids", "kind", "says"),
    [
        ("client-3", ["no-uuid"], InvalidInterviewIdException, "'no-uuid' is not a UUID"),
        ("", [], InvalidGrantRequestException, "user_id: expected a string of 1 to 36"),
    ],
    ids=["interview id", "request"],
)
def test_a_failure_comes_back_in_its_class(
    client: InterviewAccessClient, user_id: str, ids: list[str], kind: type[Exception], says: str
) -> None:
    """A failure for cause is raised as what the worker raised, with its details."""
    job_id = client.enqueue(user_id, ids)
    with pytest.raises(kind, match=says) as caught:
        client.wait(job_id, timeout=30)
    assert getattr(caught.value, "details", {})["total"] == 1


@pytest.mark.parametrize(
    ("status", "kind", "module"),
    [
        ("FAILURE", "WorkerLostError", "billiard.exceptions"),
        ("FAILURE", "NoSuchError", "nobodys.module"),
        ("REVOKED", "TaskRevokedError", "celery.exceptions"),
    ],
)
def test_a_foreign_failure_is_told_as_one(
    here: Site, client: InterviewAccessClient, status: str, kind: str, module: str
) -> None:
    """A failure that is none of the contract's, a lost worker say, comes as JobFailedError."""
    error = {"exc_type": kind, "exc_module": module, "exc_message": ["Exit 9"]}
    meta = {"status": status, "result": error, "traceback": None, "task_id": kind}
    here.redis.set(f"celery-task-meta-{kind}", json.dumps(meta))
    with pytest.raises(JobFailedError, match=f"{kind}: Exit 9") as caught:
        client.wait(kind, timeout=5)
    assert caught.value.details == {"exc_type": kind}


def test_a_wait_has_an_end(client: InterviewAccessClient) -> None:
    """Where no answer comes, the wait ends at its time and says the state."""
    with pytest.raises(NoAnswerInTimeError, match="state is PENDING") as caught:
        client.wait("client-4", timeout=0.05)
    assert caught.value.details == {"job_id": "client-4", "state": "PENDING"}


def test_progress_is_passed_on(
    here: Site, client: InterviewAccessClient, samples: list[str]
) -> None:
    """A caller that asks for it sees the progress of a job of several chunks."""
    seen: list[JobProgress] = []
    with held_grant(here, "client-5", samples[-1]):
        job_id = client.enqueue("client-5", samples)
        waiting = Background(lambda: client.wait(job_id, timeout=30, on_progress=seen.append))
        until(lambda: bool(seen))
    assert waiting.result()["created_access_count"] == len(samples)
    assert {one.total for one in seen} == {len(samples)}
    assert {one.done for one in seen} <= {CHUNK, 2 * CHUNK}


def test_enqueueing_leaves_no_subscription(idle: Site) -> None:
    """A producer subscribes to nothing, however much it sends."""
    client = InterviewAccessClient(idle.broker)
    before: Any = idle.redis.pubsub_channels()
    for _ in range(20):
        client.enqueue("client-6", [])
    assert idle.redis.llen(QUEUE) == 20
    assert idle.redis.pubsub_channels() == before
    assert not [name for name in before if b"celery-task-meta" in name]


def test_the_message_on_the_wire(idle: Site) -> None:
    """What is sent is the contract's message, with a short line for people."""
    ids = ["i"] * 5_000
    InterviewAccessClient(idle.broker).enqueue("client-7", ids, job_id="wire")
    raw: Any = idle.redis.lindex(QUEUE, 0)
    message = json.loads(raw)
    headers, properties = message["headers"], message["properties"]
    assert (message["content-type"], message["content-encoding"]) == ("application/json", "utf-8")
    assert (headers["task"], headers["id"], headers["lang"]) == (GRANT_ACCESS, "wire", "py")
    assert headers["argsrepr"] == "()"
    assert headers["kwargsrepr"] == "user_id='client-7', interview_ids=<a list of 5,000>"
    assert properties["correlation_id"] == "wire"
    assert properties["delivery_info"] == {"exchange": "", "routing_key": QUEUE}
    assert properties["body_encoding"] == "base64"
    args, kwargs, _ = json.loads(base64.b64decode(message["body"]))
    assert (args, kwargs) == ([], {"user_id": "client-7", "interview_ids": ids})


def test_a_job_id_that_is_none_is_not_sent(idle: Site) -> None:
    """A job id that could not stand in the ledger is a ValueError that says what was expected."""
    client = InterviewAccessClient(idle.broker)
    for job_id in ("", "a\nb", "j" * 256):
        with pytest.raises(ValueError, match="job id: expected 1 to 255 printable characters"):
            client.enqueue("client-8", [], job_id=job_id)
    assert idle.redis.llen(QUEUE) == 0


def test_redis_away_is_one_error(tmp_path: Path) -> None:
    """A queue that cannot be reached is one exception that says what to do."""
    client = InterviewAccessClient(f"redis+socket://{tmp_path}/none.sock")
    with pytest.raises(QueueUnavailableError, match="again under the same id is safe"):
        client.enqueue("client-9", [])
    with pytest.raises(QueueUnavailableError, match="poll it again"):
        client.wait("client-9", timeout=5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A Redis of these tests' own, which they may stop."""
    with LocalStack(tmp_path_factory.mktemp("server") / "data", durable=False) as stack:
        yield stack


@contextmanager
def failing(server: LocalStack, how: str) -> Iterator[None]:
    """The server takes no jobs meanwhile."""
    with Redis(unix_socket_path=server.broker_url.removeprefix("redis+socket://")) as redis:
        if how == "stopped":
            server.valkey.stop()
        elif how == "frozen":
            os.kill(server.valkey.pid, signal.SIGSTOP)
        elif how == "full":
            redis.config_set("maxmemory", 1)
        else:
            redis.replicaof("127.0.0.1", 1)
        try:
            yield
        finally:
            if how == "stopped":
                server.valkey.start()
            elif how == "frozen":
                os.kill(server.valkey.pid, signal.SIGCONT)
            elif how == "full":
                redis.config_set("maxmemory", 0)
            else:
                redis.replicaof("NO", "ONE")


@pytest.mark.parametrize("how", ["stopped", "frozen", "full", "read-only"])
def test_redis_that_takes_nothing_is_told_in_time(server: LocalStack, how: str) -> None:
    """Each call fails within 10 s with one error, and the same client goes on when it is over."""
    client = InterviewAccessClient(server.broker_url)
    client.enqueue("ann", [])
    with failing(server, how):
        for _ in range(1 if how == "frozen" else 2):
            began = time.monotonic()
            with pytest.raises(QueueUnavailableError, match="under the same id is safe"):
                client.enqueue("ann", [], job_id=how)
            assert time.monotonic() - began < BOUND
    assert client.enqueue("ann", [], job_id=how) == how


@pytest.mark.parametrize("number", [0, 1])
def test_the_readmes_examples_run(here: Site, samples: list[str], number: int) -> None:
    """The README's Python, run as it stands, enqueues and prints a result."""
    assert NAMED_SAMPLES[0] in samples
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
