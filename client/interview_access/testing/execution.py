"""Execution of jobs with the worker's use cases and storages, as in a pool process.

The only module of the client that imports the worker package, and only the inline clients import
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    DEFAULT_MAX_INTERVIEW_IDS,
    GRANT_COHORT_ACCESS,
    Announcement,
    JobFailure,
    JobStatus,
    canonical_interview_id,
    describe,
)
from interview_access.errors import InterviewAccessError, StorageUnavailableException
from interview_access.stored_errors import to_record
from interview_access.testing.jobs import EnqueuedJob
from storage.dtos import AuditDTO, InterviewDTO
from storage.errors import StorageError
from storage.interface import Storage
from storage.memory import MemoryStorage
from storage.postgres import PostgresStorage
from storage.schema import check_schema
from tasks import ledger, outcomes
from tasks.audit import announced_job
from tasks.celery_tasks import grant_access_job, grant_cohort_access_job, interview_attempt_job
from tasks.grant_access import GrantAccessInteractor
from tasks.interview_attempts import InterviewAttemptInteractor

_WORKER = "InlineClient"  # the node name in the status of a job
_UNFIT = "42"  # class: a table, a column or a privilege is missing


class Execution:
    """Executes jobs in memory or on a database. Close it if it is on a database."""

    def __init__(self, database_url: str | None) -> None:
        """Prepare the storage; a database is connected to by the first job.

        Args:
            database_url: URL of a database with the worker's tables; None: in memory.

        Raises:
            ValueError: if the URL is not a PostgreSQL URL.
        """
        self._database_url = database_url
        self._memory = None if database_url else MemoryStorage()
        self._storage: Storage = self._memory or _database(str(database_url))
        self._unavailable: dict[str, tuple[str, StorageUnavailableException]] = {}

    def execute(
        self,
        job: EnqueuedJob,
        arguments: Mapping[str, Any],
        failure: InterviewAccessError | None,
    ) -> None:
        """Execute a job.

        Args:
            job: The job.
            arguments: Its named arguments.
            failure: A predetermined failure, if the job is not to be executed.

        Raises:
            ValueError: if the database does not fit, such as one without the worker's tables.
        """
        result = self._settle(job, arguments, failure)
        if isinstance(result.error, StorageError):
            self._refuse_unfit_database(result.error)
            error = StorageUnavailableException.of(1, str(result.error))
            self._unavailable[job.job_id] = job.task, error
        elif result.error:
            raise result.error

    def _settle(
        self,
        enqueued: EnqueuedJob,
        arguments: Mapping[str, Any],
        failure: InterviewAccessError | None,
    ) -> ledger.JobResult:
        job_id, task = enqueued.job_id, enqueued.task
        audit = AuditDTO(
            enqueued_at=enqueued.sent_at,
            started_at=datetime.now(UTC),
            attempts=1,
            worker=_WORKER,
            actor=enqueued.actor,
            reason=enqueued.reason,
        )
        if task == CREATE_INTERVIEW_ATTEMPT:
            attempt = interview_attempt_job(job_id, (), arguments)
            entry = replace(attempt.entry, audit=audit)
            attempt = replace(attempt, entry=entry, failure=attempt.failure or failure)
            (result,) = InterviewAttemptInteractor(self._storage).create_interview_attempt(
                [attempt]
            )
            return result
        read = grant_cohort_access_job if task == GRANT_COHORT_ACCESS else grant_access_job
        job = read(job_id, (), arguments, max_interview_ids=DEFAULT_MAX_INTERVIEW_IDS)
        entry = replace(job.entry, audit=audit)
        job = replace(job, entry=entry, failure=job.failure or failure)
        (result,) = GrantAccessInteractor(self._storage).grant_access([job])
        return result

    def find_status(self, job_id: str) -> JobStatus | None:
        """Report a job that has ended; None if it has not.

        Raises:
            StorageUnavailableException: if the ledger cannot be read.
            ValueError: if the database does not fit.
        """
        try:
            with self._ledger_errors():
                finished = self._storage.get_finished_job(job_id)
        except StorageUnavailableException:
            if job_id not in self._unavailable:
                raise
            finished = None
        if finished:
            return outcomes.status_of(finished)
        if job_id not in self._unavailable:
            return None
        task, error = self._unavailable[job_id]
        reason = JobFailure.model_validate(to_record(error))
        return JobStatus(job_id=job_id, state=error.state, task=task, error=reason)

    def is_cancelled(self, job_id: str) -> bool:
        """Report whether cancellation of a job was requested.

        Raises:
            StorageUnavailableException: if the ledger cannot be read.
            ValueError: if the database does not fit.
        """
        with self._ledger_errors():
            return self._storage.is_cancelled(job_id)

    def cancel(self, job_id: str, announcement: Announcement | None) -> None:
        """Cancel a job unless it has finished.

        Args:
            job_id: The job's ID.
            announcement: The job's announcement; None if the job is not known.

        Raises:
            StorageUnavailableException: if the ledger cannot be reached.
            ValueError: if the database does not fit.
        """
        entry = announced_job(job_id, announcement)
        with self._ledger_errors():
            ledger.cancel(self._storage, job_id, entry)

    def forget_failure(self, job_id: str) -> None:
        """Forget that the database was unavailable to a job, which is sent again."""
        self._unavailable.pop(job_id, None)

    def add_interviews(self, interview_ids: Iterable[str | UUID]) -> None:
        """Add interviews to the storage in memory.

        Args:
            interview_ids: UUIDs.

        Raises:
            ValueError: if an ID is not a UUID, or the storage is a database.
        """
        for given in interview_ids:
            if self._memory is None:
                raise ValueError(
                    "interviews: expected none with database_url, in which they are rows; "
                    f"got {describe(given)}. Insert them with the service's own models."
                )
            interview_id = canonical_interview_id(str(given))
            if interview_id is None:
                raise ValueError(f"interviews: expected UUIDs, got {describe(given)}")
            self._memory.add_interview(
                InterviewDTO(
                    id=interview_id,
                    title="Interview",
                    description=None,
                    duration=timedelta(hours=1),
                    is_default_access_allowed=False,
                    should_end_interview_after_duration=False,
                )
            )

    def granted(self, user_id: str) -> list[str]:
        """Read the IDs of the interviews that a user has access to, sorted.

        Raises:
            StorageUnavailableException: if the database is unavailable.
            ValueError: if it does not fit.
        """
        with self._ledger_errors(), self._storage.transaction() as transaction:
            return sorted(
                one.interview_id for one in transaction.get_existing_user_access([user_id])
            )

    def close(self) -> None:
        """Close the connections; another call opens new ones."""
        if isinstance(self._storage, PostgresStorage):
            self._storage.close()

    @contextmanager
    def _ledger_errors(self) -> Iterator[None]:
        """Translate errors of the storage as the control service does."""
        try:
            yield
        except StorageError as error:
            self._refuse_unfit_database(error)
            raise StorageUnavailableException.of_ledger(str(error)) from error

    def _refuse_unfit_database(self, error: StorageError) -> None:
        """Raise a ValueError if a statement failed because of the schema or a missing privilege."""
        if not self._database_url or not (error.sqlstate or "").startswith(_UNFIT):
            return
        try:
            problem = check_schema(self._database_url)
        except StorageError:  # the database became unavailable
            return
        if problem:
            raise ValueError(f"database_url of InlineClient: {problem}") from None


def _database(url: str) -> PostgresStorage:
    try:
        return PostgresStorage(url)
    except StorageError as error:
        raise ValueError(f"database_url: {error}") from None
