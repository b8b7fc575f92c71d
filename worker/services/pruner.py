"""The pruner: a background service that deletes what is older than its retention.

The pruners of all workers share the work: each transaction excludes the others, and a pruner that
is excluded waits for the next pass. Redis deletes dead letters and counts in one script.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache

from celery import Celery
from celery.utils.log import get_logger
from redis import Redis

from storage.dtos import PruneCountsDTO
from storage.interface import Storage
from tasks.retention import prune
from worker.broker.dead_letters import DeadLetterLimits, DeadLetters
from worker.services.background import BackgroundService

logger = get_logger(__name__)

_PASS_SECONDS = 20.0  # on average between two passes
PAUSE_FACTOR = 2
"""Pause after a transaction, in its durations: pruning takes a third of the time."""


class Pruner(BackgroundService):
    """Deletes old jobs, dead letters and counts."""

    def __init__(
        self,
        app: Celery,
        new_storage: Callable[[], Storage],
        retention: timedelta | None,
        dead_letters: DeadLetterLimits,
    ) -> None:
        """Connect to nothing before :meth:`start`.

        Args:
            app: Connects to the queue.
            new_storage: Makes the storage of this service.
            retention: Time after which a finished job is pruned; None: never.
            dead_letters: Limits of the dead letters.
        """
        super().__init__(app)
        self._storage = lru_cache(maxsize=1)(new_storage)
        self._retention = retention
        self._limits = dead_letters
        self.dropped = {"age": 0, "bytes": 0}
        """Numbers of dead letters that this service has dropped, by reason."""

    def run_once(self, redis: Redis) -> None:
        """Run one pass, then wait for the next."""
        self._drop_dead_letters(redis)
        if self._retention:
            self._prune_jobs(self._retention)
        self.pause(_PASS_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    def _drop_dead_letters(self, redis: Redis) -> None:
        has_more = True
        while has_more and not self.is_stopping:
            dropped = DeadLetters(redis).prune(self._limits)
            has_more = dropped.has_more
            for count, reason, limit in (
                (dropped.aged, "age", f"{self._limits.days} days"),
                (dropped.excess, "bytes", f"{self._limits.bytes} bytes"),
            ):
                if count:
                    self.dropped[reason] += count
                    logger.warning(
                        "dead letters dropped: count=%d reason=%s limit=%s", count, reason, limit
                    )

    def _prune_jobs(self, older_than: timedelta) -> None:
        total, seconds = PruneCountsDTO(), 0.0
        for batch in prune(self._storage(), older_than):
            if batch.counts is None:
                break  # another process prunes
            total, seconds = total + batch.counts, seconds + batch.seconds
            if self.is_stopping:
                break
            self.pause(batch.seconds * PAUSE_FACTOR)
        if total != PruneCountsDTO():
            logger.info(
                "jobs pruned: jobs=%d cancellations=%d seconds=%.2f",
                *(total.jobs, total.cancellations, seconds),
            )
