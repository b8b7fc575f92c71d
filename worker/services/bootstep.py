"""The bootstep of the background services."""

from __future__ import annotations

from typing import Any

from celery import bootsteps
from interview_access.contracts import WorkerLimits

from worker.broker.dead_letters import DeadLetterLimits
from worker.services.control import ControlService
from worker.services.outbox_relay import OutboxRelay
from worker.services.pruner import Pruner


class BackgroundServices(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
    """Worker bootstep: runs the background services until the worker is asked to stop.

    They start after the pool, because their threads do not survive a fork, and after the metrics,
    which count the jobs that the first control request cancels.
    """

    requires = ("celery.worker.components:Pool", "worker.monitoring.bootstep:Monitoring")

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        app, settings = worker.app, worker.app.settings
        limits = WorkerLimits(max_interview_ids=app.limits.interview_ids)
        dead_letters = DeadLetterLimits(
            settings.grant_dead_letter_bytes, settings.grant_dead_letter_days
        )
        app.relay = OutboxRelay(app, app.new_storage)
        app.pruner = Pruner(app, app.new_storage, settings.retention, dead_letters)
        app.control_service = ControlService(app, app.storage, limits)
        self._services = app.control_service, app.relay, app.pruner

    def start(self, _: Any) -> None:
        """Start the services."""
        for service in self._services:
            service.start()

    def close(self, _: Any) -> None:
        """Stop them: the worker has been asked to stop."""
        for service in self._services:
            service.stop()
