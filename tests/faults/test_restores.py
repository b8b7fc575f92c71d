"""One server, or both, restored from an older backup; docs/operations.md describes the effects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from interview_access.outbox import enqueue_in_sqlalchemy
from interview_access.producer import InterviewAccessClient

from tests.faults.backups import Backup, command, lost_jobs
from tests.faults.workers import short_lease_worker, success
from tests.faults.workload import INTERVIEWS, Workload
from tests.support.database import connected
from tests.support.stores import until
from tests.support.workers import QUEUE, Site, worker


@pytest.fixture
def client(workload: Workload) -> Iterator[InterviewAccessClient]:
    """A producer."""
    with closing(InterviewAccessClient(workload.here.broker)) as client:
        yield client


def status(here: Site, job_id: str) -> dict[str, Any]:
    """Return the status of a job."""
    return dict(json.loads(command(here, "status", job_id, "--json")))


def request_job(here: Site, user_id: str, job_id: str) -> None:
    """Request a job in the database."""
    with connected(here.store.database_url) as connection:
        enqueue_in_sqlalchemy(connection, user_id, INTERVIEWS, job_id=job_id)
        connection.commit()


def test_postgresql_is_older_than_redis(
    workload: Workload, client: InterviewAccessClient, backup: Backup, tmp_path: Path
) -> None:
    """Jobs that finished after the backup are listed; they take effect when they are sent again."""
    here = workload.here
    with worker(here, tmp_path / "worker.log"):
        workload.send(3)
        workload.verify()
        command(here, "pause")
        request_job(here, "by-outbox", "sent")
        until(lambda: here.redis.llen(QUEUE) == 1)
    earlier = list(workload.sent)
    request_job(here, "also-by-outbox", "requested")
    client.enqueue("by-client", INTERVIEWS[:4], job_id="queued")
    backup.take()
    command(here, "resume")
    with worker(here, tmp_path / "worker.log"):
        workload.sent += ["sent", "requested", "queued", here.send("by-celery", INTERVIEWS[:2])]
        workload.verify()
    celery = workload.sent[-1]

    backup.restore_postgresql()

    lost = lost_jobs(here)
    assert lost.keys() == {"sent", "requested", "queued", celery}
    assert lost["queued"]["task"] == "interview_access.grant_access"
    assert lost["queued"]["result"] == {"success": True, "created_access_count": 4}
    assert status(here, "queued")["state"] == "succeeded"
    assert status(here, earlier[0])["created"] is not None
    assert here.store.granted("by-client") == []

    command(here, "lost-jobs", "--forget", "--yes")
    assert lost_jobs(here) == {}
    assert status(here, "queued")["state"] == "unknown"
    with worker(here, tmp_path / "worker.log"):
        assert here.answer("requested")["result"] == success(len(INTERVIEWS))
        assert here.answer("sent")["result"] == success(len(INTERVIEWS))
        client.enqueue("by-client", INTERVIEWS[:4], job_id="queued")
        here.send("by-celery", INTERVIEWS[:2], job_id=celery)
        workload.verify()


def test_redis_is_older_than_postgresql(
    workload: Workload, client: InterviewAccessClient, backup: Backup, tmp_path: Path
) -> None:
    """Old messages get their first counts; the outbox sends its jobs again; others are unknown."""
    here = workload.here
    with short_lease_worker(here, tmp_path):
        here.redis.lpush(QUEUE, "no JSON")
        until(lambda: len(here.dead_letters()) == 1)
        workload.send(3)
        claimed = workload.send_slow()
        client.enqueue("delays", INTERVIEWS[:5], countdown=3, job_id="delayed")
        until(lambda: here.redis.zcard("interview-access:due") == 1)
        command(here, "pause", "--reason", "backup")
        client.enqueue("waits", INTERVIEWS[:4], job_id="waiting")
        backup.take()

        command(here, "resume")
        workload.release()
        workload.sent += ["delayed", "waiting"]
        workload.verify()
        first = {job_id: status(here, job_id) for job_id in workload.sent}
        command(here, "dead-letters", "drop", "--all", "--yes")
        client.enqueue("late", INTERVIEWS[:2], job_id="finished later")
        here.answer("finished later")
        command(here, "pause")
        request_job(here, "by-outbox", "requested")
        client.enqueue("lost", INTERVIEWS[:6], job_id="unfinished")
        until(lambda: here.redis.llen(QUEUE) == 2)
        rows = here.store.rows()

        backup.restore_redis()

        assert '"reason": "backup"' in command(here, "queue", "--json")
        assert len(here.dead_letters()) == 1
        assert here.meta("finished later")["status"] == "PENDING"
        assert status(here, "finished later")["created"] == 2
        assert status(here, "unfinished")["state"] == "unknown"
        assert status(here, claimed[0]) == first[claimed[0]]

        command(here, "resume")
        workload.sent += ["requested"]
        workload.verify()
        assert {job_id: status(here, job_id) for job_id in first} == first
        assert here.store.rows() == rows + len(INTERVIEWS)
        for user_id, job_id, count in (("late", "finished later", 2), ("lost", "unfinished", 6)):
            client.enqueue(user_id, INTERVIEWS[:count], job_id=job_id)
            assert here.answer(job_id)["result"] == success(count)
            workload.sent.append(job_id)
        workload.verify()
