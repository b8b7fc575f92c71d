"""Celery's task signals, as an operator's module receives them."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

from tests.support.stores import until
from tests.support.workers import GRANT_ACCESS, QUEUE, Site, ledger_missing, worker
from worker.broker.claims import PREFIX

LISTENING = "tests.support.listening"


def received(file: Path, job_id: str) -> list[str]:
    """Return the signals of a job in their order, without the prefix ``task_``."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    pairs = map(json.loads, lines)
    return [name.removeprefix("task_") for name, one in pairs if one == job_id]


def test_signals_of_each_job(idle: Site, tmp_path: Path) -> None:
    """The signals tell success, failure, retry and expiry of a job apart."""
    file, log = tmp_path / "signals", tmp_path / "log"
    (interview,) = idle.store.add_interviews(1)
    with worker(idle, log, APP=LISTENING, SIGNALS=file, GRANT_RETRY_MAX_DELAY=1):
        granted, failed = idle.send("ann", [interview]), idle.send("ann", ["no UUID"])
        expired = str(uuid4())
        past = datetime.now(UTC) - timedelta(minutes=1)
        idle.producer.send_task(
            GRANT_ACCESS, ("ann", []), task_id=expired, queue=QUEUE, expires=past
        )
        for job_id in (granted, failed, expired):
            idle.answer(job_id)
        with ledger_missing(idle):
            retried = idle.send("bob", [interview])
            until(lambda: "retry" in received(file, retried))
        idle.answer(retried)
        until(lambda: received(file, retried)[-2:] == ["success", "postrun"])
    assert received(file, granted) == ["received", "prerun", "success", "postrun"]
    assert received(file, failed) == ["received", "prerun", "failure", "postrun"]
    assert received(file, expired) == ["received", "prerun", "revoked", "failure", "postrun"]
    assert received(file, retried)[:4] == ["received", "prerun", "retry", "postrun"]


def test_a_defect_outside_of_a_job_is_no_attempt(idle: Site, tmp_path: Path) -> None:
    """A defect outside of a job dead-letters it after its retries, without a final result."""
    settings = {"NO_THREADS": 1, "GRANT_RETRY_LIMIT": 1, "GRANT_RETRY_MAX_DELAY": 1}
    file, log = tmp_path / "signals", tmp_path / "log"
    with worker(idle, log, APP=LISTENING, SIGNALS=file, **settings) as service:
        job_id = idle.send("ann", [])
        until(lambda: idle.redis.xlen(f"{PREFIX}dead") == 1)
        assert service.alive
    (letter,) = idle.dead_letters()
    assert (letter["job_id"], letter["in_ledger"]) == (job_id, "0")
    assert letter["reason"] == "Unexpected error: RuntimeError"
    assert idle.redis.hlen(f"{PREFIX}tries") == 0
    assert received(file, job_id) == ["received", "received"]


def test_a_defect_after_the_transaction_ends_the_signals(idle: Site, tmp_path: Path) -> None:
    """A job whose result cannot be stored by a defect has `task_postrun` after `task_prerun`."""
    file, log = tmp_path / "signals", tmp_path / "log"
    settings = {"NO_SCRIPTS": 1, "GRANT_RETRY_LIMIT": 1, "GRANT_RETRY_MAX_DELAY": 1}
    with worker(idle, log, APP=LISTENING, SIGNALS=file, **settings):
        job_id = idle.send("ann", [])
        until(lambda: idle.redis.xlen(f"{PREFIX}dead") == 1)
    once = ["received", "prerun", "retry", "postrun"]
    assert received(file, job_id) == once * 2
