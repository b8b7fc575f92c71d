"""The Celery workers that are compared."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from interview_access.contracts import GRANT_ACCESS, QUEUE


@dataclass(frozen=True, slots=True)
class Contender:
    """A Celery worker that executes grant jobs.

    Attributes:
        name: The name in tables.
        app: The module of its Celery app.
        queue: The name of its queue.
        task: The name of its task.
    """

    name: str
    app: str
    queue: str = "celery"
    task: str = "grant"

    @property
    def is_ours(self) -> bool:
        """Whether it is this project's worker, for which the client enqueues."""
        return self.task == GRANT_ACCESS

    def command(self, processes: int, log_level: str = "WARNING") -> list[str]:
        """Return the command of its worker: prefork, with events for Flower."""
        return [
            *(sys.executable, "-m", "celery", "-A", self.app, "worker", "-E"),
            *("-c", str(processes), "-l", log_level),
            "--without-mingle",  # mingling waits a second for other workers
        ]


OURS = Contender("ours", "worker", QUEUE, GRANT_ACCESS)
BARE = Contender("bare Celery task", "benchmarks.baselines.bare")
NOOP = Contender("Celery task that does nothing", "benchmarks.baselines.noop")
PLAN = Contender("the plan, on Django", "benchmarks.baselines.django_plan")
