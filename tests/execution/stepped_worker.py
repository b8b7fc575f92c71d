"""A worker's main process in steps: a real lease and dispatcher, and a stepped pool."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from celery.worker import state as worker_state
from interview_access.contracts import GRANT_ACCESS

from tests.support.pools import SteppedPool
from tests.support.sessions import KEYS, QUEUE, SteppedLease, end_delays
from worker.broker.delivery import Delivery
from worker.execution.decoding import Limits
from worker.execution.dispatch import Dispatcher

LIMITS = Limits(interview_ids=10, attempts=3, seconds=600.0)
PROCESSES = 3


@dataclass
class SteppedWorker:
    """A worker's main process without an event loop.

    Attributes:
        redis: A client of the queue's database.
        lease: The worker's lease.
        pool: The stepped pool.
        dispatcher: The worker's dispatcher.
        events: The events that were sent, each with its type and fields.
        freed: The number of free pool processes at each call of ``on_free``.
    """

    redis: Any
    lease: SteppedLease
    pool: SteppedPool
    dispatcher: Dispatcher
    events: list[tuple[str, dict[str, Any]]]
    freed: list[int]

    def send(self, *job_ids: str, **headers: Any) -> None:
        """Publish messages."""
        for job_id in job_ids:
            self.redis.lpush(QUEUE, message(job_id, **headers))

    def pump(self) -> list[Delivery]:
        """Claim and dispatch once."""
        deliveries = self.lease.claim(KEYS, 1, PROCESSES)
        assert deliveries is not None
        self.dispatcher.dispatch(deliveries)
        return deliveries

    def kinds(self, job_id: str) -> list[str]:
        """Return the types of a job's events."""
        return [kind for kind, fields in self.events if fields["uuid"] == job_id]


def message(job_id: object, **headers: Any) -> str:
    """Return a message in Celery's protocol."""
    return json.dumps(
        {
            "body": json.dumps([[], {}, {}]),
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"id": job_id, "task": GRANT_ACCESS, **headers},
            "properties": {},
        }
    )


def is_idle(stepped: SteppedWorker) -> bool:
    """Whether no state is left of any delivery."""
    return (
        stepped.lease.tags == set()
        and stepped.dispatcher.free_processes == PROCESSES
        and not worker_state.requests
        and not worker_state.reserved_requests
        and not worker_state.active_requests
    )


def lose(stepped: SteppedWorker, job_id: str) -> None:
    """End a job's pool process, and then the delay of its redelivery."""
    stepped.pool.running(job_id).fail(RuntimeError("Worker exited prematurely: signal 9"))
    end_delays(stepped.redis)
    stepped.lease.beat()
