"""Celery's task signals, as an operator's own module receives them of each job."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from devstack.servers import LocalStack
from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, Site, ledger_missing, site, worker
from worker.broker.claims import PREFIX

LISTENING = "tests.support.listening"


@pytest.fixture
def here(stack: LocalStack, migrated_url: str) -> Iterator[Site]:
    """A site without a worker."""
    with site(stack, migrated_url, 9) as here:
        yield here


def received(file: Path, job_id: str) -> list[str]:
    """The signals of a job, in their order, without Celery's prefix."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    pairs = map(json.loads, lines)
    return [name.removeprefix("task_") for name, one in pairs if one == job_id]


def test_signals_of_each_job(here: Site, tmp_path: Path) -> None:
    """They say how a job ended: with a result, an error, a retry, or before it was executed."""
    file, log = tmp_path / "signals", tmp_path / "log"
    (interview,) = here.store.add_interviews(1)
    with worker(here, log, APP=LISTENING, SIGNALS=file, GRANT_RETRY_MAX_DELAY=1):
        granted, failed = here.send("ann", [interview]), here.send("ann", ["no UUID"])
        expired = str(uuid4())
        past = datetime.now(UTC) - timedelta(minutes=1)
        here.producer.send_task(
            GRANT_ACCESS, ("ann", []), task_id=expired, queue=QUEUE, expires=past
        )
        for job_id in (granted, failed, expired):
            here.answer(job_id)
        with ledger_missing(here):
            retried = here.send("bob", [interview])
            until(lambda: "retry" in received(file, retried))
        here.answer(retried)
        until(lambda: received(file, retried)[-2:] == ["success", "postrun"])
    assert received(file, granted) == ["received", "prerun", "success", "postrun"]
    assert received(file, failed) == ["received", "prerun", "failure", "postrun"]
    assert received(file, expired) == ["received", "prerun", "revoked", "failure", "postrun"]
    assert received(file, retried)[:4] == ["received", "prerun", "retry", "postrun"]


def test_a_defect_outside_of_a_job_is_no_attempt(here: Site, tmp_path: Path) -> None:
    """The jobs are retried and then dead letters to requeue; none fails for good by it."""
    settings = {"NO_THREADS": 1, "GRANT_RETRY_LIMIT": 1, "GRANT_RETRY_MAX_DELAY": 1}
    log = tmp_path / "log"
    with worker(here, log, APP=LISTENING, SIGNALS=tmp_path / "signals", **settings) as service:
        job_id = here.send("ann", [])
        until(lambda: here.redis.xlen(f"{PREFIX}dead") == 1)
        assert service.alive
    (letter,) = here.dead_letters()
    assert (letter["job_id"], letter["in_ledger"]) == (job_id, "0")
    assert letter["reason"] == "A defect: RuntimeError"
    assert here.redis.hlen(f"{PREFIX}tries") == 0
