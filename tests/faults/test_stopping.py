"""Workers with running jobs are stopped in the ways that operators use.

The grace period is kept, no attempt is counted, the worker session ends, and unfinished jobs are
redelivered to another worker. ``slow_stopping.py`` has further ways.
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
from tests.faults.invariants import PREFIX
from tests.faults.workers import short_lease_worker, success
from tests.faults.workload import INTERVIEWS, Workload
from tests.support.stores import until
from tests.support.workers import Site

GRACE, LONG_GRACE = 2.0, 60.0
END_SECONDS = 5.0
"""For the end of a worker after its last job, or after its grace period."""

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
def module_workload(shared_site: Site) -> Workload:
    """A workload of the shared site."""
    return Workload(shared_site)


@pytest.fixture
def workload(module_workload: Workload) -> Iterator[Workload]:
    """The workload without jobs; slow jobs are blocked."""
    module_workload.sent.clear()
    module_workload.here.redis.flushdb()
    module_workload.here.store.clear()
    module_workload.block()
    yield module_workload
    module_workload.release()


@contextmanager
def stopped(
    workload: Workload, folder: Path, grace: float, jobs: int, stop: Stop
) -> Iterator[Service]:
    """A worker that was asked to stop while slow jobs run."""
    with short_lease_worker(workload.here, folder, GRANT_STOP_GRACE=grace) as service:
        pool = psutil.Process(service.pid).children()
        with closing(InterviewAccessClient(workload.here.broker)) as client:
            slow = [GrantJob(f"slow-{number}", INTERVIEWS) for number in range(jobs)]
            workload.sent += client.enqueue_many(slow)
        until(lambda: workload.blocked() > 0)
        stop(workload.here, service)
        yield service
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)


def counted_attempts(workload: Workload) -> int:
    """Count the messages that have attempts."""
    count: int = workload.here.redis.hlen(f"{PREFIX}tries")
    return count


@pytest.mark.parametrize("way", IN_SUITE)
def test_job_finishes_within_the_grace_period(workload: Workload, tmp_path: Path, way: str) -> None:
    """A running job finishes in its worker, and a later job stays queued for another worker."""
    with stopped(workload, tmp_path, LONG_GRACE, 1, WAYS[way]) as service:
        time.sleep(1)  # in which a worker without a grace period would end
        assert workload.blocked() == 1
        late = workload.send(1)
        workload.release()
        assert workload.here.answer(workload.sent[0])["result"] == success(len(INTERVIEWS))
        until(lambda: counted_attempts(workload) == 0)
        if "SIGHUP" not in way:  # on SIGHUP Celery may restart the worker in the same process
            assert service.wait(END_SECONDS) is not None
            assert workload.queued() == len(late)


@pytest.mark.parametrize("way", IN_SUITE)
def test_jobs_outlast_the_grace_period(workload: Workload, tmp_path: Path, way: str) -> None:
    """Jobs that run after the grace period are requeued without an attempt; the worker ends."""
    with stopped(workload, tmp_path, GRACE, 6, WAYS[way]) as service:
        pool = psutil.Process(service.pid).children()
        time.sleep(GRACE - 0.5)
        assert workload.blocked() > 0, "the grace period is not kept"
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)
        if "SIGHUP" not in way:
            assert service.wait(END_SECONDS) is not None
        assert counted_attempts(workload) == 0
        workload.release()
    with short_lease_worker(workload.here, tmp_path):
        workload.verify()


@pytest.mark.parametrize("way", ["SIGTERM twice"])
def test_a_second_signal_ends_the_grace_period(
    workload: Workload, tmp_path: Path, way: str
) -> None:
    """After a second signal jobs are requeued without an attempt, and the worker ends."""
    with stopped(workload, tmp_path, LONG_GRACE, 6, AT_ONCE[way]) as service:
        assert service.wait(END_SECONDS) is not None
        assert counted_attempts(workload) == 0
        workload.release()
    with short_lease_worker(workload.here, tmp_path):
        workload.verify()


@pytest.mark.parametrize("way", ["SIGTERM to the group"])
def test_idle_worker_ends(workload: Workload, tmp_path: Path, way: str) -> None:
    """A worker without jobs ends without its grace period."""
    with short_lease_worker(workload.here, tmp_path, GRANT_STOP_GRACE=LONG_GRACE) as service:
        pool = psutil.Process(service.pid).children()
        WAYS[way](workload.here, service)
        until(lambda: not any(process.is_running() for process in pool), within=END_SECONDS)
        assert "SIGHUP" in way or service.wait(END_SECONDS) is not None
