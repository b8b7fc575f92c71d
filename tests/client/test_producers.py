"""Every block of docs/producers.md, unchanged, with a real worker."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from interview_access.contracts import Announcement
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.exceptions import NoPermissionError

from devstack.servers import LocalStack
from storage.dtos import FinishedJobFilterDTO
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.stores import until
from tests.support.workers import QUEUE, ROOT, Site, site_with_worker

PAGE = (ROOT / "docs/producers.md").read_text(encoding="utf-8")
NODE = ROOT / ".venv/node"
NUMBER = 11  # of the Redis database


def blocks(section: str, language: str) -> list[str]:
    """Find the blocks of the page in one language under one heading."""
    under = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", under, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} under {section}"
    return found


def replies_to(redis: Redis, block: str) -> list[Any]:
    """Send each line of a block to Redis, as redis-cli does, and return the replies."""
    words = [shlex.split(line) for line in block.splitlines()]
    return [redis.execute_command(*line) for line in words]  # type: ignore[no-untyped-call] # redis-py's


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and the interviews that the page uses."""
    folder = tmp_path_factory.mktemp("producers")
    with site_with_worker(stack, _migrated, NUMBER, folder) as here:
        load_samples(here.store.database_url, len(NAMED_SAMPLES))
        yield here


@pytest.fixture(scope="module")
def port(here: Site) -> Iterator[int]:
    """A loopback port on which Redis listens: not every client supports sockets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    here.redis.config_set("bind", "127.0.0.1")
    here.redis.config_set("port", port)
    yield port
    here.redis.config_set("port", 0)


def run(command: list[str], program: str, url: str, **environment: str) -> list[str]:
    """Run a program from standard input, and return the lines that it prints."""
    done = subprocess.run(
        command,
        input=program,
        env={"CELERY_BROKER_URL": url, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


PYTHON = [sys.executable, "-"]


@pytest.fixture(scope="module")
def url(port: int) -> str:
    """CELERY_BROKER_URL for the page."""
    return f"redis://127.0.0.1:{port}/{NUMBER}"


def test_the_client_package(here: Site, url: str) -> None:
    """Both clients enqueue a job, wait for it and read its status."""
    blocking, asyncio = blocks("Python, with the client package", "python")
    assert run(PYTHON, blocking, url) == ["1 created", "succeeded", "succeeded"]
    assert run(PYTHON, asyncio, url) == [
        "{'success': True, 'created_access_count': 1}",
        "succeeded",
    ]
    assert here.store.granted("ann") == here.store.granted("bob") == [NAMED_SAMPLES[0]]


def test_a_cohort(here: Site, url: str) -> None:
    """One job grants two users access to two interviews, and counts each user."""
    (program,) = blocks("A cohort in one job", "python")
    assert run(PYTHON, program, url) == ["4 created", "{'page-eve': 2, 'page-fay': 2}"]
    assert here.store.granted("page-fay") == sorted(NAMED_SAMPLES[:2])


def test_thousands_of_jobs_at_once(here: Site, url: str) -> None:
    """One call enqueues a thousand jobs, which are executed."""
    (program,) = blocks("Thousands of jobs at once", "python")
    assert run(PYTHON, program, url) == ["1 created"]
    for number in range(0, 1_000, 100):
        assert here.answer(f"page-many-{number}")["status"] == "SUCCESS"
    assert here.store.granted("page-many-0") == [NAMED_SAMPLES[0]]


def test_celery_alone(here: Site, url: str) -> None:
    """A Celery app enqueues a job, and reads a failure with its details."""
    (program,) = blocks("Python, with Celery alone", "python")
    printed = "InvalidInterviewIdException [{'value': 'no-uuid', 'reason': 'malformed'}]"
    assert run(PYTHON, program, url) == [printed]
    assert here.store.granted("cem") == []


def test_node(here: Site, url: str) -> None:
    """celery-node enqueues jobs, and reads a result and a failure."""
    assert (NODE / "ready").exists(), "make .venv/node/ready installs celery-node"
    (program,) = blocks("Node.js", "js")
    node = [str(Path(sys.executable).with_name("node")), "-"]
    succeeded, failed, *more = run(node, program, url, NODE_PATH=str(NODE / "node_modules"))
    assert succeeded == "{ success: true, created_access_count: 1 }"
    assert failed == "InvalidInterviewIdException ["
    assert "reason: 'unknown'" in "".join(more)
    assert here.store.granted("dan") == [NAMED_SAMPLES[0]]


def test_who_requests_a_job(here: Site, url: str) -> None:
    """Each way of the page to name an actor and a reason leads to the ledger."""
    section = "Who requests a job"
    (program,) = blocks(section, "js")
    client, celery = blocks(section, "python")
    assert run(PYTHON, client, url) == ["hr@example.org Second round 1"]
    assert run(PYTHON, celery, url) == ["{'success': True, 'created_access_count': 0}"]
    node = [str(Path(sys.executable).with_name("node")), "-"]
    printed = run(node, program, url, NODE_PATH=str(NODE / "node_modules"))
    assert printed == ["{ success: true, created_access_count: 0 }"]
    (push,) = blocks(section, "redis")
    with redis_cli(url) as redis:
        replies_to(redis, push)
    (statement,) = blocks(section, "sql")
    here.store.execute(statement.replace(":", r"\:"))
    wanted = FinishedJobFilterDTO(actor="hr@example.org", user_id="ivy")
    until(lambda: len(here.store.storage.list_finished_jobs(wanted, 9)) == 5)
    found = here.store.storage.list_finished_jobs(wanted, 9)
    assert {one.job.audit.reason for one in found} == {"Second round"}


@contextmanager
def redis_cli(url: str, user: str = "") -> Iterator[Redis]:
    """A single connection to Redis, as redis-cli has."""
    url = url.replace("//", f"//{user}@") if user else url
    with Redis.from_url(url, single_connection_client=True) as redis:
        yield redis


def test_any_redis_client(here: Site, url: str) -> None:
    """An LPUSH enqueues a job, and a GET reads the result that the page shows."""
    push, get, announced = blocks("Any Redis client", "redis")
    (shown,) = blocks("Any Redis client", "json")
    with redis_cli(url) as redis:
        replies_to(redis, push)
        here.answer("page-redis-1")
        (stored,) = replies_to(redis, get)
        wanted, got = json.loads(shown), json.loads(stored)
        assert list(wanted) == list(got)
        assert {**wanted, "date_done": got["date_done"]} == got
        replies_to(redis, announced)
        raw: Any = redis.get("interview-access:job:page-redis-2")
    assert Announcement.model_validate_json(raw).task == "interview_access.grant_access"
    assert here.answer("page-redis-2")["result"]["created_access_count"] == 0
    client = InterviewAccessClient(url)
    assert client.status("page-redis-1").state == "succeeded"
    here.redis.delete("celery-task-meta-page-redis-1")
    assert client.status("page-redis-1").created == 1  # the ledger has it
    client.close()


def test_a_control_request_from_any_redis_client(here: Site, url: str) -> None:
    """An LPUSH requests a job's status, and a GET reads the reply."""
    ask, read = blocks("Ask for a job's state from any Redis client", "redis")
    job_id = here.send("hal", [NAMED_SAMPLES[0]])
    here.answer(job_id)
    with redis_cli(url) as redis:
        replies_to(redis, ask.replace("page-redis-1", job_id))
        until(lambda: replies_to(redis, read) != [None])
        (reply,) = replies_to(redis, read)
        assert json.loads(reply)["result"]["state"] == "succeeded"
        assert 0 < redis.ttl("interview-access:reply:page-request-1") <= 60


def test_the_status_of_a_scheduled_job(url: str) -> None:
    """A scheduled job is queued if it was announced, and unknown otherwise."""
    push, _, announced = blocks("Any Redis client", "redis")
    later = '"headers": {"eta": "2099-01-01T00:00:00Z", '
    client = InterviewAccessClient(url)
    with redis_cli(url) as redis:
        for block in push, announced:
            replies_to(redis, block.replace('"headers": {', later).replace("page-", "later-"))
    assert client.status("later-redis-1").state == "unknown"
    assert client.status("later-redis-2").state == "queued"
    cancelled = client.cancel("later-redis-1")
    assert (cancelled.state, cancelled.cancel_requested) == ("unknown", True)
    client.close()


def test_the_status_between_two_attempts(here: Site, url: str) -> None:
    """A job that was not announced is queued while it waits for a retry."""
    here.store.raise_for_grants("NEW.user_id = 'fay'", "40001")
    job_id = here.send("fay", [NAMED_SAMPLES[0]])
    client = InterviewAccessClient(url)
    until(lambda: client.status(job_id).state == "queued")
    client.close()


def test_the_redis_users_have_sufficient_permissions(here: Site, url: str) -> None:
    """Each Redis user that the page names can do its work, and not that of another."""
    under = PAGE.partition("\n## A Redis user for producers\n")[2]
    names = re.findall(r"^\| `(\w+)` \|", under, re.MULTILINE)
    users = (ROOT / "deploy/redis/users.acl").read_text(encoding="ascii")
    for name in names:
        (rules,) = re.findall(rf"^user {name} (.*)$", users, re.MULTILINE)
        assert replies_to(here.redis, f"ACL SETUSER {name} >secret {rules}") == [b"OK"]
    client, pusher, sender = (f"{name}:secret" for name in names)
    try:
        sections = "Python, with the client package", "Thousands of jobs at once"
        for block in (block for section in sections for block in blocks(section, "python")):
            run(PYTHON, block, url.replace("//", f"//{client}@"))
        push, get, announced = blocks("Any Redis client", "redis")
        with redis_cli(url, pusher) as redis:
            replies_to(redis, push)
            here.answer("page-redis-1")
            assert replies_to(redis, get)[0]
            for refused in announced, f"LPOP {QUEUE}", "KEYS *":
                with pytest.raises(NoPermissionError):
                    replies_to(redis, refused)
        (program,) = blocks("Python, with Celery alone", "python")
        assert run(PYTHON, program, url.replace("//", f"//{sender}@"))
        with redis_cli(url, client) as redis, pytest.raises(NoPermissionError):
            replies_to(redis, "XRANGE interview-access:dead - +")
    finally:
        here.redis.acl_deluser(*names)
