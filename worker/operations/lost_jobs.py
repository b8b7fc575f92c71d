"""Jobs that PostgreSQL has lost: Redis has their results, and the ledger does not have them.

PostgreSQL loses finished jobs and their grants when it is restored from an older backup. Every
result that is read here was stored after the commit of its job, which inserted a ledger row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple

from celery import states
from celery.backends.redis import RedisBackend
from interview_access.contracts import announcement_key, is_job_id
from redis import Redis

from storage.interface import JobTransaction, Transactions
from worker.operations.inspection import announcements

_PAGE = 500
_RESULT_FIELDS = ("created_access_count", "interview_attempt_id")


class LostJob(NamedTuple):
    """A job that succeeded before PostgreSQL was restored.

    Attributes:
        job_id: Its ID.
        result: What pollers read.
        task: Name of its task; None if its producer did not announce it, or too long ago.
        sent_at: When it was sent; None likewise.
    """

    job_id: str
    result: dict[str, Any]
    task: str | None
    sent_at: datetime | None


class LostJobs:
    """Finds lost jobs, and deletes what Redis has of them.

    Every method raises StorageError and redis-py's errors.
    """

    def __init__(
        self, storage: Transactions[JobTransaction], results: RedisBackend, redis: Redis
    ) -> None:
        """Connect at the first use.

        Args:
            storage: The storage with the ledger.
            results: The result backend.
            redis: Client of the queue's Redis.
        """
        self._storage = storage
        self._results = results
        self._redis = redis

    def __iter__(self) -> Iterator[LostJob]:
        """Yield each lost job, in no order. Its result must not have expired."""
        keys = iter(
            self._results.client.scan_iter(self._results.get_key_for_task("*"), count=_PAGE)
        )
        while page := list(dict.fromkeys(islice(keys, _PAGE))):
            succeeded = self._succeeded(page)
            # After the results: a job that finishes meanwhile is in the ledger.
            with self._storage.transaction() as transaction:
                found = transaction.find_jobs(list(succeeded))
            lost = succeeded.keys() - found.finished.keys() - found.pruned.keys()
            announced = announcements(self._redis, sorted(lost))
            for job_id in sorted(lost):
                known = announced.get(job_id)
                yield LostJob(
                    job_id,
                    succeeded[job_id],
                    known.task if known else None,
                    known.sent_at if known else None,
                )

    def forget(self, job_ids: Sequence[str]) -> None:
        """Delete results and announcements, as if the jobs had never been sent.

        A request of the outbox is then sent again at its next turn.

        Args:
            job_ids: IDs of lost jobs.
        """
        if job_ids:
            self._results.client.delete(*map(self._results.get_key_for_task, job_ids))
            self._redis.delete(*map(announcement_key, job_ids))

    def _succeeded(self, keys: Sequence[bytes]) -> dict[str, dict[str, Any]]:
        """Read the results of successful jobs of the contract, by job ID."""
        succeeded: dict[str, dict[str, Any]] = {}
        for value in self._results.client.mget(keys):
            with suppress(ValueError, RecursionError, TypeError, KeyError, AttributeError):
                meta = json.loads(value or b"{}")
                job_id, result = meta["task_id"], meta["result"]
                is_ours = meta["status"] == states.SUCCESS and {*_RESULT_FIELDS} & result.keys()
                if is_ours and is_job_id(job_id):
                    succeeded[job_id] = result
        return succeeded
