"""The dead-letter list: messages that could not be done, kept in Redis for an operator."""

from __future__ import annotations

import time

from celery import Celery
from kombu.utils.json import dumps

from tasks.celery_tasks import Args, Kwargs

STREAM = "interview-access:dead"
"""The Redis stream that holds them; each entry is one message."""


class RedisDeadLetters:
    """Keeps dead letters in a stream beside the queue."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def bury(
        self, job_id: str, task: str, args: Args, kwargs: Kwargs, *, reason: str, attempts: int
    ) -> None:
        """Keep the message with its reason; raises what Redis raises."""
        message = dumps({"task": task, "id": job_id, "args": args, "kwargs": kwargs})
        with self._app.connection_for_write() as connection:
            connection.default_channel.client.xadd(
                STREAM,
                {
                    "job_id": job_id,
                    "task": task,
                    "reason": reason,
                    "time": f"{time.time():.3f}",
                    "attempts": attempts,
                    "size": len(message),
                    "message": message,
                },
            )
