"""The producers of a chaos run."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from uuid import UUID

from interview_access.errors import JobIdReusedException, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from redis.exceptions import RedisError

from tests.faults.injector import INTERVIEWS, USERS
from tests.support.workers import QUEUE, Site

QUEUED = 40
"""Messages on the queue at most: enough that a fault always meets a job."""

_UNKNOWN_INTERVIEW = str(UUID(int=(0xD << 124)))


class Producer(threading.Thread):
    """Sends jobs, and repeats each one until Redis has accepted it.

    Attributes:
        accepted: The IDs of accepted jobs.
        is_idle: Whether the producer is paused or has ended.
    """

    def __init__(self, here: Site, seed: str, count: int) -> None:
        """Send nothing yet; see :meth:`start`.

        Args:
            here: The site.
            seed: Repeats the choice of jobs; also part of the job IDs.
            count: Number of jobs to send at least; further ones until :meth:`finish`.
        """
        super().__init__(daemon=True)
        self.accepted: list[str] = []
        self.is_idle = False
        self._here = here
        self._rng = random.Random(seed)  # noqa: S311 - must be repeatable
        self._seed = seed
        self._count = count
        self._finish = threading.Event()
        self._running = threading.Event()
        self._running.set()

    def pause(self) -> None:
        """Send no further job until :meth:`resume`."""
        self._running.clear()

    def resume(self) -> None:
        """Continue sending."""
        self._running.set()

    def finish(self) -> None:
        """End after the minimum number of jobs."""
        self._finish.set()

    def cancel(self) -> None:
        """End after the current job."""
        self._count = 0
        self._finish.set()
        self._running.set()

    def run(self) -> None:
        """Send jobs, as long as the queue is not too long."""
        client = InterviewAccessClient(self._here.broker)
        while len(set(self.accepted)) < self._count or not self._finish.is_set():
            if not self._running.is_set():
                self.is_idle = True
                self._running.wait()
                self.is_idle = False
            if self._queued() > QUEUED:
                self._finish.wait(0.02)
                continue
            self._send(client)
        self.is_idle = True

    def _send(self, client: InterviewAccessClient) -> None:
        job_id = f"job-{self._seed}-{len(self.accepted)}"
        if self.accepted and self._rng.random() < 0.05:
            job_id = self._rng.choice(self.accepted[-20:])  # a duplicate or a reused ID
        user = self._rng.choice(USERS)
        ids = self._rng.sample(INTERVIEWS, self._rng.randrange(30))
        if self._rng.random() < 0.03:
            ids.append(_UNKNOWN_INTERVIEW)
        while True:
            with suppress(QueueUnavailableError, RedisError):
                try:
                    client.enqueue(user, ids, job_id=job_id)
                except JobIdReusedException:  # workers must refuse the reused ID as well
                    self._here.push({"user_id": user, "interview_ids": ids}, job_id=job_id)
                break
        self.accepted.append(job_id)

    def _queued(self) -> int:
        try:
            return int(self._here.redis.llen(QUEUE))
        except RedisError:
            return QUEUED + 1
