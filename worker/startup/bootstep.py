"""The bootstep of the start-up checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from celery import bootsteps

from worker.logs import refused_start
from worker.startup import StartupError
from worker.startup.options import check_options
from worker.startup.seams import check_seams
from worker.startup.servers import check_servers


class StartupChecks(bootsteps.Step):  # type: ignore[misc] # Celery ships no types
    """Worker bootstep: ends a worker that must not start, before its pool is forked."""

    def __init__(self, worker: Any, **options: Any) -> None:
        """Take the time limit over, before the pool is created.

        The dispatcher enforces it; the pool would keep a timer of each batch until its end.
        """
        super().__init__(worker, **options)
        worker.app.limits = replace(worker.app.limits, seconds=worker.time_limit)
        worker.time_limit = None

    def create(self, worker: Any) -> None:
        """Verify packages, options and servers.

        Raises:
            SystemExit: with one sentence and status 1, if the worker must not start.
        """
        try:
            check_seams()
            check_options(worker)
            check_servers(worker.app.settings)
        except StartupError as error:
            raise refused_start(error) from None
