"""A contender with a running worker: enqueue jobs, wait for their results, check the rows."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from celery import Celery
from interview_access.contracts import GrantJob, result_key
from interview_access.errors import InvalidInterviewIdException
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.client import PubSub

from benchmarks.contenders import Contender
from benchmarks.database import Database
from benchmarks.measuring import TIMEOUT_SECONDS, BenchmarkError, until
from devstack.service import Service

_WINDOW = 200  # results read in one round trip
_HELD = "benchmark-held-back"  # a list that no worker reads
_COPIES = "benchmark-copies"  # a list that no worker reads
_RESULT_EXPIRES = 86_400  # seconds: this worker's retention, and Celery's default


@dataclass
class Deployment:
    """A contender with a running worker, a queue and a database.

    Attributes:
        contender: The contender.
        database: The database of its grants.
        redis: The Redis database of its queue and results.
        service: Its worker.
        broker: The URL of its queue.
        staging_broker: The URL of the Redis database in which messages are staged.
        staging_redis: The client of that database.
        created: The sum of its jobs' created counts since the last reset.
    """

    contender: Contender
    database: Database
    redis: Redis
    service: Service
    broker: str
    staging_broker: str
    staging_redis: Redis
    created: int = 0
    _client: InterviewAccessClient = field(init=False)
    _celery: Celery = field(init=False)

    def __post_init__(self) -> None:
        """Create the producers."""
        self._client = InterviewAccessClient(self.broker)
        self._celery = celery_producer(self.broker)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._celery.close()
        self.redis.close()
        self.staging_redis.close()

    def enqueue(self, job: GrantJob) -> None:
        """Enqueue one job as a user does."""
        if self.contender.is_ours:
            self._client.enqueue(job.user_id, job.interview_ids, job_id=job.job_id)
        else:
            send(self._celery, self.contender, job)

    def enqueue_many(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue many jobs of this project's worker."""
        self._client.enqueue_many(jobs)

    def stage(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue jobs invisibly to the worker, by the fastest way that users have."""
        if self.contender.is_ours:
            client = InterviewAccessClient(self.staging_broker)
            client.enqueue_many(jobs)
            client.close()
        else:
            # Without a result backend, whose subscriptions would outlive the producer.
            with Celery(broker=self.staging_broker, set_as_current=False) as producer:
                for job in jobs:
                    send(producer, self.contender, job)
        # Other keys that the producer has written are moved before the messages.
        queue = self.contender.queue.encode()
        keys = [key for key in self.staging_redis.scan_iter(count=1_000) if key != queue]
        with self.staging_redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.move(key, self._number)
            pipeline.execute()

    def release(self) -> None:
        """Make all staged messages visible to the worker at once."""
        self.staging_redis.move(self.contender.queue, self._number)

    def hold(self) -> None:
        """Move the staged messages to a list of the worker's database, for `release_next`."""
        self.staging_redis.rename(self.contender.queue, _HELD)
        self.staging_redis.move(_HELD, self._number)

    def release_next(self, count: int = 1) -> None:
        """Move the next held messages to the queue, as far as there are any."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for _ in range(count):
                pipeline.lmove(_HELD, self.contender.queue, "RIGHT", "LEFT")
            pipeline.execute()

    def drain(self, jobs: Sequence[GrantJob], *, failed: bool = False) -> float:
        """Measure the seconds from the queueing of all jobs to the last result.

        Args:
            jobs: The jobs.
            failed: Whether all jobs must fail for an unknown ID, instead of succeeding.
        """
        self.stage(jobs)
        return self._drain([job.job_id for job in jobs], failed=failed)

    def drain_twice(self, jobs: Sequence[GrantJob]) -> tuple[float, float]:
        """Measure as `drain` does, and again with copies of the same messages.

        The results are deleted in between, so that the second delivery's can be awaited.

        Raises:
            BenchmarkError: if the created counts differ the second time.
        """
        job_ids = [job.job_id for job in jobs]
        self.stage(jobs)
        self.staging_redis.copy(self.contender.queue, _COPIES)
        first = self._drain(job_ids)
        created, self.created = self.created, 0
        self.delete_results(job_ids)
        self.staging_redis.rename(_COPIES, self.contender.queue)
        second = self._drain(job_ids)
        if self.created != created:
            raise BenchmarkError(f"expected {created:,} rows again, got {self.created:,}")
        return first, second

    def _drain(self, job_ids: Sequence[str], *, failed: bool = False) -> float:
        started = time.perf_counter()
        self.release()
        self.collect(job_ids, failed=failed)
        return time.perf_counter() - started

    def time_one(self, job: GrantJob) -> float:
        """Measure the seconds from the enqueuing of a job to its result."""
        return self._timed(job.job_id, lambda: self.enqueue(job))

    def time_cohort(self, user_ids: Sequence[str], interview_ids: Sequence[str]) -> float:
        """Measure the seconds from the enqueuing of a job for many users to its result."""
        job_id = str(uuid4())
        return self._timed(
            job_id, lambda: self._client.enqueue_cohort(user_ids, interview_ids, job_id=job_id)
        )

    def _timed(self, job_id: str, enqueue: Callable[[], object]) -> float:
        key = result_key(job_id)
        with self.redis.pubsub() as channel:  # type: ignore[no-untyped-call] # redis-py's
            channel.subscribe(key)
            channel.get_message(timeout=TIMEOUT_SECONDS)  # the subscription's confirmation
            started = time.perf_counter()
            enqueue()
            created = self._await_result(channel, job_id)
            seconds = time.perf_counter() - started
        self.created += created
        return seconds

    def collect(self, job_ids: Sequence[str], *, failed: bool = False) -> None:
        """Wait for the results of all jobs; see `drain`."""
        left = deque(job_ids)
        read = _zero_of_failed if failed else _count

        def have_all() -> bool:
            self._check_alive()
            while left:
                window = [left.popleft() for _ in range(min(_WINDOW, len(left)))]
                stored: Any = self.redis.mget([result_key(job_id) for job_id in window])
                counts = [read(raw) for raw in stored]
                self.created += sum(count for count in counts if count is not None)
                late = [one for one, count in zip(window, counts, strict=True) if count is None]
                left.extendleft(reversed(late))
                if late:
                    return False
            return True

        until(have_all, f"{len(job_ids)} results of {self.contender.name}")

    def delete_results(self, job_ids: Sequence[str]) -> None:
        """Delete the stored results of the jobs."""
        self.redis.unlink(*(result_key(job_id) for job_id in job_ids))

    def stored_at(self, job_ids: Sequence[str]) -> list[float]:
        """Return when each result was stored, in seconds since 1970, to half a millisecond."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.pexpiretime(result_key(job_id))
            expiries = pipeline.execute()
        return [(at + 0.5) / 1_000 - _RESULT_EXPIRES for at in expiries]

    def settle(self, existing: int = 0) -> None:
        """Check that the created counts since the last reset equal the rows; no message is left.

        Args:
            existing: Number of rows that existed before.

        Raises:
            BenchmarkError: if the counts differ, or messages or dead letters are left.
        """
        until(lambda: self._unfinished() == 0, f"the queue of {self.contender.name} to be empty")
        rows = self.database.rows() - existing
        if rows != self.created:
            raise BenchmarkError(
                f"{self.contender.name}: its jobs counted {self.created:,} rows, got {rows:,}"
            )
        letters = self.redis.xlen("interview-access:dead")
        if letters:
            raise BenchmarkError(f"{self.contender.name}: {letters} dead letters, expected none")

    def reset(self) -> None:
        """Delete the grants and the ledger, and set `created` to 0; results are kept."""
        self.database.reset()
        self.created = 0

    def _unfinished(self) -> int:
        held = [b"unacked", *self.redis.scan_iter("interview-access:held:*", count=1_000)]
        queued: Any = self.redis.llen(self.contender.queue)
        return int(queued) + sum(int(self.redis.hlen(key.decode())) for key in held)

    def _check_alive(self) -> None:
        if not self.service.alive:
            raise BenchmarkError(f"{self.contender.name}: its worker has ended")

    def _await_result(self, channel: PubSub, job_id: str) -> int:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            message = channel.get_message(ignore_subscribe_messages=True, timeout=1.0)
            count = _count(message["data"]) if message else None
            if count is not None:
                return count
            self._check_alive()
        raise BenchmarkError(f"waited {TIMEOUT_SECONDS:.0f} s for the result of {job_id}")

    @property
    def _number(self) -> int:
        return int(self.redis.connection_pool.connection_kwargs["db"])


def celery_producer(broker: str) -> Celery:
    """Return a Celery app that sends messages."""
    return Celery(broker=broker, backend=broker, set_as_current=False)


def send(producer: Celery, contender: Contender, job: GrantJob) -> None:
    """Send one job as a Celery app does."""
    producer.send_task(
        contender.task,
        kwargs={"user_id": job.user_id, "interview_ids": job.interview_ids},
        task_id=job.job_id,
        queue=contender.queue,
    )


def _count(raw: bytes | None) -> int | None:
    """Return the created count of a stored result; None if the job has none yet."""
    if raw is None:
        return None
    stored = json.loads(raw)
    if stored["status"] == "SUCCESS":
        return int(stored["result"]["created_access_count"])
    if stored["status"] == "FAILURE":
        raise BenchmarkError(f"a job failed: {stored['result']}")
    return None


def _zero_of_failed(raw: bytes | None) -> int | None:
    """Return 0 for the failure of a job with an unknown ID; None if the job has no result yet."""
    if raw is None:
        return None
    stored = json.loads(raw)
    if stored["status"] == "SUCCESS":
        raise BenchmarkError(f"expected a failure, got {stored['result']}")
    if stored["status"] != "FAILURE":
        return None
    expected = InvalidInterviewIdException.__name__
    if stored["result"]["exc_type"] != expected:
        raise BenchmarkError(f"expected {expected}, got {stored['result']}")
    return 0
