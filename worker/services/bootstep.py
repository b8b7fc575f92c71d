"""The bootstep of the background services."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from interview_access.contracts import WorkerLimits

from worker.services.control import ControlService
from worker.services.outbox_relay import OutboxRelay


class BackgroundServices(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
    """Worker bootstep: runs the background services until the worker is asked to stop.

    They start after the pool, because their threads do not survive a fork.
    """

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        app = worker.app
        limits = WorkerLimits(max_interview_ids=app.limits.interview_ids)
        self._services = (
            ControlService(app, app.storage, limits),
            OutboxRelay(app, app.new_storage),
        )

    def start(self, _: Any) -> None:
        """Start the services."""
        for service in self._services:
            service.start()

    def close(self, _: Any) -> None:
        """Stop them: the worker has been asked to stop."""
        for service in self._services:
            service.stop()
