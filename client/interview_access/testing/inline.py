"""Jobs that are executed at once, by the worker's own code."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any
from uuid import UUID

from interview_access.contracts import JobStatus
from interview_access.errors import JobExpiredException
from interview_access.testing.jobs import EnqueuedJob
from interview_access.testing.queue import InMemoryQueue

if TYPE_CHECKING:  # imports the worker package
    from interview_access.testing.execution import Execution

_WORKER_PACKAGES = ("storage", "tasks")
_WORKER = "interview-access-worker"


class InlineResults(InMemoryQueue):
    """Jobs are executed when they are enqueued."""

    def __init__(
        self, interviews: Iterable[str | UUID] = (), *, database_url: str | None = None
    ) -> None:
        """Execute jobs in memory or on a database; see :class:`.InlineClient`."""
        super().__init__()
        self._execution = _new_execution(database_url)
        self.add_interviews(interviews)

    def add_interviews(self, interview_ids: Iterable[str | UUID]) -> None:
        """Add interviews to those that exist in memory.

        Args:
            interview_ids: UUIDs.

        Raises:
            ValueError: if an ID is not a UUID, or jobs are executed on a database.
        """
        self._execution.add_interviews(interview_ids)

    def granted(self, user_id: str | UUID) -> list[str]:
        """Read which interviews a user has access to.

        Args:
            user_id: 1 to 36 characters.

        Returns:
            The interviews' IDs, sorted.

        Raises:
            StorageUnavailableException: if the database is unavailable.
        """
        return self._execution.granted(str(user_id))

    def clear(self) -> None:
        """Forget the jobs that were enqueued; grants and the ledger stay."""
        super().clear()

    def _close_database(self) -> None:
        """Close the connections to the database; another call opens new ones."""
        self._execution.close()

    def _deliver(self, job: EnqueuedJob, arguments: Mapping[str, Any]) -> None:
        failure = None
        starts_at = max(job.sent_at, job.eta or job.sent_at)
        if job.expires_at and job.expires_at < starts_at:
            failure = JobExpiredException.of(job.job_id, job.expires_at.isoformat())
        self._execution.execute(job, arguments, failure)

    def _status(self, job_id: str) -> JobStatus:
        return self._execution.find_status(job_id) or self._unfinished(
            job_id, cancel_requested=self._execution.is_cancelled(job_id)
        )

    def _cancel(self, job_id: str) -> None:
        self._execution.cancel(job_id, self._announcement(job_id))

    def _forget_result(self, job_id: str) -> None:
        self._execution.forget_failure(job_id)


def _new_execution(database_url: str | None) -> Execution:
    try:
        from interview_access.testing.execution import (  # noqa: PLC0415 - see TYPE_CHECKING
            Execution,
        )
    except ImportError as error:
        raise ImportError(_reason(error), name=error.name) from None
    return Execution(database_url)


def _reason(error: ImportError) -> str:
    """Say why the worker's code cannot be imported, and what to do."""
    use = "InlineClient executes jobs with the worker's code:"
    instead = "or use FakeClient, which needs no worker."
    try:
        metadata.distribution(_WORKER)
    except metadata.PackageNotFoundError:
        return (
            f"{use} expected the package {_WORKER} in this environment, got none. "
            f"Install it for the tests, {instead}"
        )
    name = str(error.name).partition(".")[0]
    if name not in _WORKER_PACKAGES:
        return (
            f"{use} expected its dependency {name}, which is not installed. "
            f"Install {_WORKER} with its dependencies, {instead}"
        )
    return (
        f"{use} expected the package {name} of {_WORKER}, got {_place(name)}. "
        f"Rename the service's own module of this name, {instead}"
    )


def _place(name: str) -> str:
    """Return the file or the folder of a module that was imported."""
    module = sys.modules.get(name)
    paths = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return next((path for path in paths if path), "none")
