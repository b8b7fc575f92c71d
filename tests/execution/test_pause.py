"""The pause of the queue, with real workers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from devstack.service import Service
from tests.support.sessions import sessions
from tests.support.stores import Background, until
from tests.support.workers import (
    QUEUE,
    Site,
    held_grant,
    migrated_site,
    started,
    worker_service,
)
from worker.operations.inspection import QueueSnapshot, inspect
from worker.operations.pause import PauseSwitch

WORKERS = 2


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site whose workers have one pool process each and batches of one job."""
    with migrated_site(stack, _migrated, 12) as here:
        yield here


@contextmanager
def another_worker(here: Site, log: Path) -> Iterator[Service]:
    """A ready worker with one pool process, which claims one job at a time."""
    environment = here.environment(GRANT_BATCH_SIZE=1)
    name = f"{log.stem}@host"
    with started(worker_service(log, environment, processes=1, name=name)) as worker:
        yield worker


@pytest.fixture(scope="module")
def workers(here: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Service]]:
    """The two workers."""
    folder = tmp_path_factory.mktemp("pause")
    with ExitStack() as stack:
        yield [
            stack.enter_context(another_worker(here, folder / f"worker-{number}.log"))
            for number in range(WORKERS)
        ]


@pytest.fixture
def switch(here: Site) -> Iterator[PauseSwitch]:
    """The switch of the queue's pause, which the test leaves resumed."""
    switch = PauseSwitch(here.redis)
    yield switch
    switch.resume()


def log_text(worker: Service) -> str:
    """Return what a worker has logged."""
    return worker.log.read_text(encoding="utf-8")


def heartbeats(here: Site) -> int:
    """Return the lowest number of heartbeats of a session, without a script."""
    return int(min(sessions(here.redis).values()))


def until_heartbeats(here: Site, number: int) -> None:
    """Wait until each session has sent so many more heartbeats."""
    until_reached = heartbeats(here) + number
    until(lambda: heartbeats(here) >= until_reached)


@pytest.mark.usefixtures("workers")
def test_nothing_is_claimed_after_the_pause_and_nothing_is_lost(
    here: Site, switch: PauseSwitch, samples: list[str]
) -> None:
    """Under load the queue only grows after the pause; then each job runs, with exact counts."""
    stop = threading.Event()
    sent: list[str] = []

    def send() -> None:
        with InterviewAccessClient(here.broker) as client:
            while not stop.is_set():
                user_id = f"load-{len(sent)}"
                sent.append(client.enqueue(user_id, samples[:3]))

    producer = Background(send)
    until(lambda: inspect(here.redis).claimed > 0 and len(sent) > 100)
    switch.pause("test", "")
    seen: list[QueueSnapshot] = [inspect(here.redis)]
    until(lambda: bool(seen.append(inspect(here.redis))) or len(seen) > 200)  # type: ignore[func-returns-value] # appends
    until(lambda: inspect(here.redis).claimed == 0)
    stop.set()
    producer.result()
    waiting, claimed = [one.waiting for one in seen], [one.claimed for one in seen]
    assert waiting == sorted(waiting)
    assert claimed == sorted(claimed, reverse=True)
    switch.resume()
    results = [here.answer(job_id)["result"]["created_access_count"] for job_id in sent]
    assert results == [3] * len(sent)


@pytest.mark.usefixtures("workers")
def test_all_workers_resume_within_a_second(
    here: Site, switch: PauseSwitch, samples: list[str], user: str
) -> None:
    """Each of two workers claims a job less than a second after the pause."""
    switch.pause("test", "")
    with held_grant(here, user, samples[0]):
        jobs = [here.send(user, [samples[0], samples[at]]) for at in range(1, 4)]
        until_heartbeats(here, 2)
        assert inspect(here.redis).claimed == 0
        switch.resume()
        resumed_at = time.monotonic()
        until(lambda: [one.claimed for one in inspect(here.redis).sessions] == [1, 1])
        assert time.monotonic() - resumed_at < 1.0
    assert {here.answer(job_id)["status"] for job_id in jobs} == {"SUCCESS"}


def test_a_pause_costs_a_worker_nothing(
    here: Site, workers: list[Service], switch: PauseSwitch
) -> None:
    """While jobs wait in a paused queue a worker sends few commands, and logs one line."""
    lines = [log_text(worker).count("queue paused") for worker in workers]
    switch.pause("test", "many jobs")
    jobs = [here.send("ann", []) for _ in range(20)]
    until_heartbeats(here, 1)
    calls = script_calls(here)
    until_heartbeats(here, 4)
    # Each second: the claims of two polls, a tick and a heartbeat, and a check for due messages.
    assert script_calls(here) - calls < 5 * WORKERS * 6
    for worker, before in zip(workers, lines, strict=True):
        assert log_text(worker).count("queue paused") == before + 1
    assert here.redis.llen(QUEUE) == 20
    switch.resume()
    assert {here.answer(job_id)["status"] for job_id in jobs} == {"SUCCESS"}
    until(lambda: all("queue resumed" in log_text(one) for one in workers))


def script_calls(here: Site) -> int:
    """Return the number of calls of scripts, those by this test included."""
    stats: Any = here.redis.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


@pytest.mark.usefixtures("workers")
def test_a_worker_that_starts_during_a_pause_heeds_it(
    here: Site, switch: PauseSwitch, tmp_path: Path
) -> None:
    """A worker that starts on a paused queue claims nothing, and claims after the pause."""
    switch.pause("test", "")
    jobs = [here.send("ann", []) for _ in range(3)]
    with another_worker(here, tmp_path / "late.log") as late:
        until(lambda: "queue paused" in log_text(late))
        assert here.redis.llen(QUEUE) == 3
        switch.resume()
        assert {here.answer(job_id)["status"] for job_id in jobs} == {"SUCCESS"}


@pytest.mark.usefixtures("workers")
def test_status_and_cancel_are_answered_during_a_pause(here: Site, switch: PauseSwitch) -> None:
    """The workers answer control requests, and a job reads `queued` until it is cancelled."""
    switch.pause("test", "")
    with InterviewAccessClient(here.broker) as client:
        job_id = client.enqueue("ann", [])
        assert client.status(job_id).state == "queued"
        assert client.cancel(job_id).state == "cancelled"
