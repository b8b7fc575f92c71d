"""What Celery's worker prints instead of logging, as log records: for ``LOG_FORMAT=json``."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from celery import VERSION_BANNER
from celery.apps import worker as celery_worker
from celery.utils.log import get_logger

from worker.logs import JsonFormatter

logger = get_logger(__name__)


class LoggingWorker(celery_worker.Worker):  # type: ignore[misc] # Celery ships no types
    """Celery's worker, which logs its banner and whatever is printed."""

    def on_init_blueprint(self) -> None:
        """Set up logging, and redirect what is printed from then on, not only after the start."""
        super().on_init_blueprint()
        if self.redirect_stdouts:
            self.app.log.redirect_stdouts(self.redirect_stdouts_level)

    def emit_banner(self) -> None:
        """Log what the banner says. Passwords in the addresses are masked."""
        logger.info(
            "worker starting: node=%s version=%s transport=%s results=%s processes=%d queues=%s",
            self.hostname,
            VERSION_BANNER,
            self.app.connection().as_uri(),
            self.app.backend.as_uri(),
            self.concurrency,
            ",".join(self.app.amqp.queues.consume_from),
        )

    def install_platform_tweaks(self, worker: Any) -> None:
        """Install the signal handlers, and have them print records."""
        celery_worker.safe_say = _say
        super().install_platform_tweaks(worker)


def _say(message: str, file: Any = sys.__stderr__) -> None:
    """Write a record without the log's buffer, into which a signal handler must not write."""
    event, _, stack = message.partition("\n")
    record = logging.LogRecord(logger.name, logging.INFO, "", 0, event, None, None, sinfo=stack)
    os.write(file.fileno(), f"{JsonFormatter().format(record)}\n".encode())
