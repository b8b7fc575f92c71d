"""A site with a worker, Flower and a job of each state, paused as it is."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from devstack.service import Service
from storage.samples import load_samples
from tests.support.stores import until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
    held_grant,
    ledger_missing,
    migrated_site,
    started,
    worker_service,
)
from worker.operations.pause import PauseSwitch

WORKER = "worker@grants-1"
_CHUNK = 2
_SAMPLES = 6

SHOWN = {
    "succeeded": ("SUCCESS", "{'success': True, 'created_access_count': 6}"),
    "failed": ("FAILURE", "failed: InvalidInterviewIdException"),
    "expired": ("REVOKED", "expired"),
    "cancelled": ("REVOKED", "cancelled"),
    "cancelled while it ran": ("REVOKED", "cancelled"),
    "retries exhausted": ("FAILURE", "dead letter"),
    "unknown task": ("FAILURE", "dead letter"),
    "reused job ID": (
        "SUCCESS",
        "dead letter beside the result {'success': True, 'created_access_count': 1}",
    ),
    "delayed": ("RECEIVED", "delayed until 2099-01-01 09:00:00 UTC"),
    "lost its process": ("RETRY", "waits for a retry"),
    "running": ("STARTED", "running"),
}
"""State and result of each job that workers have received, as Flower shows them."""

WAITING = {"waiting": 0, "waiting with priority": 3}
"""The jobs that no worker has received, with their priorities."""

COUNTS = {
    QUEUE: {"messages": 4, "messages_ready": 3, "messages_unacknowledged": 1},
    "interview-access: isolated": {"messages": 1},
    "interview-access: priority-0": {"messages": 1},
    "interview-access: priority-3": {"messages": 1},
    "interview-access: priority-6": {"messages": 0},
    "interview-access: priority-9": {"messages": 0},
    "interview-access: delayed": {"messages": 1},
    "interview-access: dead letters": {"messages": 4},
}
"""What the queue has. The job that lost its process waits in isolation for its retry."""


@dataclass
class Scene:
    """Where the jobs are.

    Attributes:
        here: The site of queue and worker.
        url: Address of Flower.
        jobs: Job IDs by what happened to the job.
    """

    here: Site
    url: str
    jobs: dict[str, str] = field(default_factory=dict)

    def page(self, path: str) -> str:
        """Return a page of Flower, also an error; empty while Flower does not respond."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as answer:  # noqa: S310 - ours
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return error.read().decode()
        except urllib.error.URLError:
            return ""


@contextmanager
def scene(stack: LocalStack, template: str, number: int, folder: Path) -> Iterator[Scene]:
    """Run Flower and a worker of two pool processes, and bring a job into each state.

    Args:
        stack: The servers.
        template: Name of the database that is copied.
        number: Number of the Redis database.
        folder: Where both log.
    """
    settings = {
        "GRANT_RETRY_LIMIT": 1,
        "GRANT_RETRY_MAX_DELAY": 1,
        "GRANT_CHUNK_SIZE": _CHUNK,
        "FLOWER_UNAUTHENTICATED_API": "true",
    }
    with migrated_site(stack, template, number) as here:
        environment = here.environment(**settings)
        service = worker_service(folder / "worker.log", environment, name=WORKER)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shown = Scene(here, f"http://127.0.0.1:{port}")
        flower = Service(
            "flower",
            [
                *(sys.executable, "-m", "celery", "-A", "worker", "flower"),
                *("--address=127.0.0.1", f"--port={port}"),
            ],
            log=folder / "flower.log",
            environment={**environment, "FLOWER_CONF": str(ROOT / "flowerconfig.py")},
            folder=folder,
        )
        flower.start()
        try:
            with started(service), InterviewAccessClient(here.broker) as client:
                # A heartbeat: Flower misses no later event.
                until(lambda: WORKER in shown.page("/workers?json=1") or not flower.alive)
                assert flower.alive, flower.log_tail()
                with _each_state(shown, client):
                    yield shown
        finally:
            flower.stop()


@contextmanager
def _each_state(shown: Scene, client: InterviewAccessClient) -> Iterator[None]:
    here, jobs, pause = shown.here, shown.jobs, PauseSwitch(shown.here.redis)
    samples = sorted(load_samples(here.store.database_url, _SAMPLES))
    jobs["delayed"] = _send(here, eta=datetime(2099, 1, 1, 9, tzinfo=UTC))
    jobs["succeeded"] = client.enqueue("user-1", samples)
    jobs["failed"] = here.send("user-2", ["no-uuid"])
    jobs["unknown task"] = here.send("user-3", task="interview_access.no_such_task")
    jobs["expired"] = _send(here, expires=datetime.now(UTC) - timedelta(minutes=1))
    jobs["reused job ID"] = here.send("user-4", samples[:1])
    for name in ("succeeded", "failed", "unknown task", "expired", "reused job ID"):
        here.answer(jobs[name])
    here.send("user-5", samples[:1], job_id=jobs["reused job ID"])
    here.redis.lpush(QUEUE, "not a message")
    until(lambda: len(here.dead_letters()) == len(["unknown task", "reused job ID", "no message"]))
    with ledger_missing(here):
        jobs["retries exhausted"] = here.send("user-6", samples[:1])
        here.answer(jobs["retries exhausted"])

    pause.pause("an operator", "a test")
    jobs["cancelled"] = here.send("user-7", samples[:1])
    client.cancel(jobs["cancelled"])
    pause.resume()

    with held_grant(here, "user-8", samples[_CHUNK]):
        jobs["cancelled while it ran"] = client.enqueue("user-8", samples)
        here.until_state(jobs["cancelled while it ran"], "PROGRESS")
        client.cancel(jobs["cancelled while it ran"], timeout=0.3)
    here.answer(jobs["cancelled while it ran"])

    with held_grant(here, "user-9", samples[0]):
        jobs["running"] = here.send("user-9", samples[:1])
        running = here.until_state(jobs["running"], "STARTED")
        jobs["lost its process"] = here.send("user-9", samples[:1])
        until(lambda: _state(shown, "lost its process") == "STARTED")
        lost = here.until_state(jobs["lost its process"], "STARTED")
        pause.pause("an operator", "maintenance of the database")
        os.kill(lost["result"]["pid"], signal.SIGKILL)
        for name, priority in WAITING.items():
            jobs[name] = _send(here, priority=priority)
        until(lambda: all(_state(shown, name) == state for name, (state, _) in SHOWN.items()))
        until(lambda: _has_counts(shown))
        # It runs until the end of the block, also when PostgreSQL ends its wait for the lock.
        os.kill(running["result"]["pid"], signal.SIGSTOP)
        yield
        os.kill(running["result"]["pid"], signal.SIGCONT)


def _has_counts(shown: Scene) -> bool:
    """Report whether each count of the queue is there: the heartbeat's is the last."""
    queues = json.loads(shown.page("/api/queues/length"))["active_queues"]
    return all(one.items() >= COUNTS[one["name"]].items() for one in queues)


def _send(here: Site, **options: Any) -> str:
    job_id = str(uuid4())
    here.producer.send_task(
        GRANT_ACCESS, args=["user-1", []], task_id=job_id, queue=QUEUE, **options
    )
    return job_id


def _state(shown: Scene, name: str) -> str:
    """Return the state of a job that Flower has received; empty before its first event."""
    page = shown.page(f"/api/task/info/{shown.jobs[name]}")
    return str(json.loads(page)["state"]) if page.startswith("{") else ""
