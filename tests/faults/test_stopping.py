"""Stop a worker in every way that operators use, while it works.

The grace is kept, no attempt is counted, the worker session ends, and what did not finish is
redelivered to another worker. ``slow_stopping.py`` has the ways that differ less.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient

from devstack.service import Service
from tests.faults.books import INTERVIEWS, PREFIX, Books
from tests.faults.sites import another, created
from tests.support.stores import until
from tests.support.workers import Site

GRACE, LONG_GRACE = 2.0, 60.0
END_SECONDS = 5.0
"""For the end of a worker after the last job, or after the grace."""

Stop = Callable[[Site, Service], object]


def _signal(number: signal.Signals) -> Stop:
    return lambda _, service: os.kill(service.pid, number)


def _signal_to_group(number: signal.Signals) -> Stop:
    return lambda _, service: os.killpg(service.pid, number)


def _control_shutdown(here: Site, _: Service) -> None:
    here.producer.control.shutdown()


def _twice(number: signal.Signals) -> Stop:
    def stop(_: Site, service: Service) -> None:
        os.kill(service.pid, number)
        time.sleep(1)  # two signals at once may arrive as one
        os.kill(service.pid, number)

    return stop


WAYS: dict[str, Stop] = {
    "SIGTERM": _signal(signal.SIGTERM),
    "SIGTERM to the group": _signal_to_group(signal.SIGTERM),
    "SIGINT": _signal(signal.SIGINT),
    "SIGINT to the group": _signal_to_group(signal.SIGINT),
    "SIGHUP": _signal(signal.SIGHUP),
    "SIGHUP to the group": _signal_to_group(signal.SIGHUP),
    "control shutdown": _control_shutdown,
}
IN_SUITE = ("SIGTERM to the group", "SIGHUP", "control shutdown")
AT_ONCE: dict[str, Stop] = {
    "SIGTERM twice": _twice(signal.SIGTERM),
    "SIGINT twice": _twice(signal.SIGINT),
    "SIGQUIT": _signal(signal.SIGQUIT),
}


@pytest.fixture(scope="module")
def module_books(shared_site: Site) -> Books:
    """The books of the site that these tests share."""
    return Books(shared_site)


@pytest.fixture
def books(module_books: Books) -> Iterator[Books]:
    """The same, with the brake on and no job."""
    module_books.sent.clear()
    module_books.here.redis.flushdb()
    module_books.here.store.clear()
    module_books.brake()
    yield module_books
    module_books.release()


@contextmanager
def stopped(books: Books, folder: Path, grace: float, jobs: int, stop: Stop) -> Iterator[Service]:
    """A worker that was told to stop while it held so many slow jobs."""
    with another(books.here, folder, GRANT_STOP_GRACE=grace) as service:
        pool = psutil.Process(service.pid).children()
        with closing(InterviewAccessClient(books.here.broker)) as client:
            slow = [GrantJob(f"slow-{number}", INTERVIEWS) for number in range(jobs)]
            books.sent += client.enqueue_many(slow)
        until(lambda: books.braked() > 0)
        stop(books.here, service)
        yield service
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)


def attempts(books: Books) -> int:
    """How many messages have an attempt counted."""
    count: int = books.here.redis.hlen(f"{PREFIX}tries")
    return count


@pytest.mark.parametrize("way", IN_SUITE)
def test_job_finishes_within_the_grace(books: Books, tmp_path: Path, way: str) -> None:
    """A running job finishes where it runs, and a job sent meanwhile waits for another worker."""
    with stopped(books, tmp_path, LONG_GRACE, 1, WAYS[way]) as service:
        time.sleep(1)  # in which a worker without a grace would end
        assert books.braked() == 1
        late = books.order(1)
        books.release()
        assert books.here.answer(books.sent[0])["result"] == created(len(INTERVIEWS))
        until(lambda: attempts(books) == 0)
        if "SIGHUP" not in way:  # by which Celery may restart a worker in its own place
            assert service.wait(END_SECONDS) is not None
            assert books.waiting() == len(late)


@pytest.mark.parametrize("way", IN_SUITE)
def test_jobs_outlive_the_grace(books: Books, tmp_path: Path, way: str) -> None:
    """Jobs that go on after the grace are requeued uncounted, and the worker ends."""
    with stopped(books, tmp_path, GRACE, 6, WAYS[way]) as service:
        pool = psutil.Process(service.pid).children()
        time.sleep(GRACE - 0.5)
        assert books.braked() > 0, "the grace is not kept"
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)
        if "SIGHUP" not in way:
            assert service.wait(END_SECONDS) is not None
        assert attempts(books) == 0
        books.release()
    with another(books.here, tmp_path):
        books.until_balanced()


@pytest.mark.parametrize("way", ["SIGTERM twice"])
def test_jobs_do_not_hold_a_worker_that_must_end(books: Books, tmp_path: Path, way: str) -> None:
    """A second signal ends the grace: jobs are requeued uncounted, and the worker ends."""
    with stopped(books, tmp_path, LONG_GRACE, 6, AT_ONCE[way]) as service:
        assert service.wait(END_SECONDS) is not None
        assert attempts(books) == 0
        books.release()
    with another(books.here, tmp_path):
        books.until_balanced()


@pytest.mark.parametrize("way", ["SIGTERM to the group"])
def test_idle_worker_ends(books: Books, tmp_path: Path, way: str) -> None:
    """A worker without jobs ends without waiting for its grace."""
    with another(books.here, tmp_path, GRANT_STOP_GRACE=LONG_GRACE) as service:
        pool = psutil.Process(service.pid).children()
        WAYS[way](books.here, service)
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)
        assert "SIGHUP" in way or service.wait(END_SECONDS) is not None
