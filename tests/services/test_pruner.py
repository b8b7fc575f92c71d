"""The pruner of a real worker, and a message that was kept aside for longer than the retention."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devstack.servers import LocalStack
from storage.samples import load_samples
from tests.monitoring.endpoint import Endpoint
from tests.support.stores import a_job, created, until
from tests.support.workers import QUEUE, Site, migrated_site, worker

JOBS = "SELECT count(*) FROM grant_access_job"
DEAD = "interview-access:dead"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker's log."""
    return tmp_path_factory.mktemp("pruner") / "worker.log"


@pytest.fixture(scope="module")
def endpoint() -> Endpoint:
    """The worker's monitoring endpoint."""
    return Endpoint()


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str, log: Path, endpoint: Endpoint) -> Iterator[Site]:
    """A site with a job of eight days, an old dead letter and two that are too large.

    Its worker prunes all of them. A copy of the job's message is kept aside. The grants were
    revoked after the job.
    """
    settings = {
        "GRANT_RETENTION_DAYS": 7,
        "GRANT_DEAD_LETTER_DAYS": 2,
        "GRANT_DEAD_LETTER_BYTES": 1_000_000,
        "METRICS_ADDRESS": endpoint.address,
    }
    with migrated_site(stack, _migrated, 14) as here:
        ids = load_samples(here.store.database_url, 3)
        assert created(*here.store.grant(a_job("old", "ann", ids))) == 3
        here.push({"user_id": "ann", "interview_ids": ids}, job_id="old", queue="aside")
        here.store.execute("DELETE FROM interview_userinterviewaccess")
        here.store.execute("UPDATE grant_access_job SET finished_at = now() - interval '8 days'")
        here.redis.xadd(DEAD, {"message": b"x"}, id="1000-1")
        for _ in range(2):
            here.redis.xadd(DEAD, {"message": b"x" * 1_100_000})
        with worker(here, log, **settings):
            yield here


def test_a_late_copy_of_a_pruned_job_grants_nothing(here: Site, log: Path) -> None:
    """A copy that is delivered after the retention has the first count, and grants nothing."""
    until(lambda: here.store.value(JOBS) == 0)
    until(lambda: b"jobs pruned: jobs=1 cancellations=0 " in log.read_bytes())

    here.redis.rpoplpush("aside", QUEUE)

    assert here.answer("old")["result"] == {"success": True, "created_access_count": 3}
    assert here.store.rows() == 0
    assert here.store.value(JOBS) == 0


def test_old_dead_letters_are_dropped_with_a_warning(here: Site, log: Path) -> None:
    """A worker drops dead letters that are too old or too large, logs how many, and counts them."""
    until(lambda: not here.redis.exists(DEAD) or not here.redis.xlen(DEAD))
    lines = (
        b"dead letters dropped: count=1 reason=age limit=2 days",
        b"dead letters dropped: count=2 reason=bytes limit=1000000 bytes",
    )
    until(lambda: all(line in log.read_bytes() for line in lines))
    dropped: Any = here.redis.hgetall("interview-access:dropped")
    assert dropped == {b"age": b"1", b"bytes": b"2"}


def test_dropped_dead_letters_are_a_metric(here: Site, endpoint: Endpoint) -> None:
    """A worker counts the dead letters that it dropped by reason, and no other worker's."""

    def dropped() -> list[float]:
        name = "dead_letters_dropped_total"
        return [endpoint.value(name, reason=reason) for reason in ("age", "bytes")]

    here.redis.hincrby("interview-access:dropped", "age", 5)  # another worker's
    try:
        until(lambda: dropped() == [1, 2])
    finally:
        here.redis.hincrby("interview-access:dropped", "age", -5)
