"""Stores for tests: a storage with the platform's side of its database.

Tests fill and read a store as the platform or an operator does, without the worker's code.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Generic, TypeVar
from uuid import UUID, uuid4

from interview_access.contracts import DEFAULT_MAX_INTERVIEW_IDS
from sqlalchemy import Connection, Engine, event, insert, select, text
from sqlalchemy.exc import IntegrityError

from storage import memory, models
from storage.dtos import AccessRequestDTO, InterviewAttemptDTO, InterviewDTO
from storage.errors import StorageError
from storage.interface import Storage
from storage.memory import MemoryStorage
from storage.postgres import DatabaseLimits, PostgresStorage
from tasks.celery_tasks import grant_access_job, grant_cohort_access_job
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.ledger import JobResult
from tests.support.database import connected

CHUNK_SIZE = 3
"""Grants in one chunk, few, so that small requests take several chunks."""

PATIENCE_SECONDS = 30
"""The timeout in seconds of every wait in a test."""

BULK_THRESHOLD = 1_000
"""Grants from which PostgreSQL gets other statements, unless a test says otherwise."""

T = TypeVar("T")


class Background(Generic[T]):
    """A function that runs in a separate thread."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001 - result() raises it again
            self._error = error

    @property
    def over(self) -> bool:
        """Whether the function has ended."""
        return not self.thread.is_alive()

    def result(self) -> T:
        """Wait for the function's end, and return its result or raise its exception."""
        self.thread.join(PATIENCE_SECONDS)
        assert self.over, "it still runs"
        if self._error:
            raise self._error
        return self._result


def all_at_once(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Start functions at the same time in separate threads, and return their results in order."""
    start = threading.Barrier(len(functions))

    def started_by(function: Callable[[], T]) -> Callable[[], T]:
        def run() -> T:
            start.wait(PATIENCE_SECONDS)
            return function()

        return run

    running = [Background(started_by(function)) for function in functions]
    return [one.result() for one in running]


class Store(ABC):
    """A storage with the platform's side of its database.

    Attributes:
        storage: The storage under test.
    """

    storage: Storage

    @abstractmethod
    def add_interview(self, interview: InterviewDTO, *, configured: bool = True) -> None:
        """Add an interview as the platform does, with its configuration unless it has none."""

    @abstractmethod
    def delete_interview(self, interview_id: str) -> bool:
        """Delete an interview as the platform does; return False if a row refers to it."""

    @abstractmethod
    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """Return all interview attempts."""

    @abstractmethod
    def add_request(self, request: AccessRequestDTO) -> None:
        """Request a job in a committed transaction, as another service does."""

    @abstractmethod
    def until_waiting(self, other: Background[Any]) -> None:
        """Wait until the other function waits for a transaction, or has ended."""

    @abstractmethod
    def clear(self) -> None:
        """Delete all grants, attempts and jobs; keep the interviews."""

    def add_interviews(self, count: int) -> list[str]:
        """Add interviews, and return their IDs, sorted."""
        interviews = [an_interview() for _ in range(count)]
        for interview in interviews:
            self.add_interview(interview)
        return sorted(interview.id for interview in interviews)

    def granted(self, user_id: str) -> list[str]:
        """Return the interview IDs of the user's grants, sorted."""
        with self.storage.transaction() as transaction:
            grants = transaction.get_existing_user_access([user_id])
        assert {grant.user_id for grant in grants} <= {user_id}
        return sorted(grant.interview_id for grant in grants)

    def grant(self, *jobs: GrantAccessJob) -> list[JobResult]:
        """Have jobs done, all in one call."""
        return GrantAccessInteractor(self.storage).grant_access(jobs)


class MemoryStore(Store):
    """The reference model."""

    def __init__(self) -> None:
        self.storage: MemoryStorage = MemoryStorage(chunk_size=CHUNK_SIZE)
        self._interviews: list[InterviewDTO] = []

    def add_interview(self, interview: InterviewDTO, *, configured: bool = True) -> None:
        """See :class:`Store`."""
        assert configured or not interview.is_default_access_allowed, "the default is another"
        self._interviews.append(interview)
        self.storage.add_interview(interview)

    def delete_interview(self, interview_id: str) -> bool:
        """See :class:`Store`."""
        try:
            self.storage.delete_interview(interview_id)
        except StorageError:
            return False
        return True

    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """See :class:`Store`."""
        return self.storage.attempts()

    def add_request(self, request: AccessRequestDTO) -> None:
        """See :class:`Store`."""
        self.storage.add_request(request)

    def until_waiting(self, other: Background[Any]) -> None:
        """See :class:`Store`: a waiting thread is inside the model, at its lock."""

        def waits() -> bool:
            frame = sys._current_frames().get(other.thread.ident or 0)
            return frame is not None and frame.f_code.co_filename == memory.__file__

        until(lambda: other.over or waits())

    def clear(self) -> None:
        """See :class:`Store`."""
        self.storage = MemoryStorage(chunk_size=CHUNK_SIZE)
        for interview in self._interviews:
            self.storage.add_interview(interview)


class PostgresStore(Store):
    """PostgreSQL."""

    def __init__(
        self, database_url: str, platform: Connection, *, bulk_threshold: int = BULK_THRESHOLD
    ) -> None:
        """Use a database with all tables.

        Args:
            database_url: The database.
            platform: A connection to it that commits each statement.
            bulk_threshold: Number of grants from which statements for many grants are used.
        """
        self.database_url = database_url
        self.storage: PostgresStorage = PostgresStorage(
            database_url, chunk_size=CHUNK_SIZE, bulk_threshold=bulk_threshold
        )
        self._platform = platform

    def add_interview(self, interview: InterviewDTO, *, configured: bool = True) -> None:
        """See :class:`Store`."""
        self._platform.execute(
            insert(models.interviews).values(
                id=UUID(interview.id),
                title=interview.title,
                description=interview.description,
                duration=interview.duration,
            )
        )
        if configured:
            self._platform.execute(
                insert(models.interview_configs).values(
                    interview_id=UUID(interview.id),
                    is_default_access_allowed=interview.is_default_access_allowed,
                    should_end_interview_after_duration=interview.should_end_interview_after_duration,
                )
            )

    def add_interviews_with_ids(self, interview_ids: Sequence[str]) -> None:
        """Add interviews without configuration, in one statement."""
        self.execute(
            "INSERT INTO interview_interview (id, title, duration) SELECT CAST(id AS uuid),"
            " 'Interview', interval '1 hour' FROM unnest(CAST(:ids AS text[])) AS id",
            ids=list(interview_ids),
        )

    def delete_interview(self, interview_id: str) -> bool:
        """See :class:`Store`; the configuration is deleted too."""
        try:
            with connected(self.database_url) as connection:
                for statement in DELETE_INTERVIEW:
                    connection.execute(statement, {"id": interview_id})
                connection.commit()
        except IntegrityError:
            return False
        return True

    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """See :class:`Store`."""
        rows = self._platform.execute(select(models.interview_attempts)).mappings()
        return [
            InterviewAttemptDTO(
                **{**row, "id": str(row["id"]), "interview_id": str(row["interview_id"])}
            )
            for row in rows
        ]

    def add_request(self, request: AccessRequestDTO) -> None:
        """See :class:`Store`."""
        self._platform.execute(
            insert(models.requests).values(
                job_id=request.job_id,
                user_id=request.user_id,
                interview_ids=list(request.interview_ids),
                requested_at=request.requested_at,
                sent_at=request.sent_at,
            )
        )

    def until_waiting(self, other: Background[Any]) -> None:
        """See :class:`Store`: PostgreSQL reports sessions that wait for a lock."""
        until(lambda: other.over or self.value(_WAITING) > 0)

    def clear(self) -> None:
        """See :class:`Store`."""
        for table in _JOBS_TABLES:
            self.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own

    def empty(self) -> None:
        """Delete all rows."""
        self.clear()
        for table in _INTERVIEW_TABLES:
            self.execute(f"DELETE FROM {table}")  # noqa: S608 - names of our own

    def execute(self, statement: str, **values: object) -> None:
        """Run a statement, as an operator or another service does."""
        self._platform.execute(text(statement), values)

    def value(self, statement: str, **values: object) -> Any:
        """Return a query's single value."""
        return self._platform.execute(text(statement), values).scalar_one()

    def rows(self) -> int:
        """Count all grants."""
        count: int = self.value("SELECT count(*) FROM interview_userinterviewaccess")
        return count

    def configure(self, setting: str, value: str) -> None:
        """Set a parameter for all later connections to this database."""
        self.execute(
            f"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {setting} = %L',"
            f" current_database(), '{value}'); END $$"
        )

    def raise_for_grants(self, condition: str, sqlstate: str) -> None:
        """Make the database refuse every new grant that meets a condition on ``NEW``."""
        self.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE 'refused' USING ERRCODE = '{sqlstate}'; END $$"
        )
        self.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON interview_userinterviewaccess "
            f"FOR EACH ROW WHEN ({condition}) EXECUTE FUNCTION refuse()"
        )

    @contextmanager
    def another(
        self, *, chunk_size: int = CHUNK_SIZE, limits: DatabaseLimits | None = None
    ) -> Iterator[PostgresStorage]:
        """Another storage on the same database, with separate connections and limits."""
        storage = PostgresStorage(self.database_url, chunk_size=chunk_size, limits=limits)
        try:
            yield storage
        finally:
            storage.close()


DELETE_INTERVIEW = (
    text("DELETE FROM interview_interviewconfig WHERE interview_id = CAST(:id AS uuid)"),
    text("DELETE FROM interview_interview WHERE id = CAST(:id AS uuid)"),
)
"""The statements by which the platform deletes an interview without grants."""

_JOBS_TABLES = (
    "interview_userinterviewaccess",
    "interview_interviewattempt",
    "grant_access_job",
    "grant_access_request",
    "grant_access_cancellation",
    "grant_access_cohort",
    "grant_access_rejection",
)
_INTERVIEW_TABLES = ("interview_interviewconfig", "interview_interview")
_WAITING = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


@contextmanager
def postgres_store(
    database_url: str, *, bulk_threshold: int = BULK_THRESHOLD
) -> Iterator[PostgresStore]:
    """A database with all tables as a store, empty."""
    with connected(database_url, autocommit=True) as platform:
        store = PostgresStore(database_url, platform, bulk_threshold=bulk_threshold)
        store.empty()
        try:
            yield store
        finally:
            store.storage.close()


def until(condition: Callable[[], bool], *, within: float = PATIENCE_SECONDS) -> None:
    """Wait until the condition is true; fail after so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "never came true"
        time.sleep(0.002)  # the polling interval


@contextmanager
def statements_counted() -> Iterator[list[str]]:
    """The statements that any connection runs within the block."""
    statements: list[str] = []

    def note(*arguments: Any) -> None:
        statements.append(arguments[2])

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def an_interview(
    *,
    title: str = "Systems design",
    description: str | None = None,
    duration: timedelta = timedelta(minutes=45),
    is_default_access_allowed: bool = False,
    should_end_interview_after_duration: bool = True,
) -> InterviewDTO:
    """Return an interview with a new ID; the defaults are those without configuration."""
    return InterviewDTO(
        id=str(uuid4()),
        title=title,
        description=description,
        duration=duration,
        is_default_access_allowed=is_default_access_allowed,
        should_end_interview_after_duration=should_end_interview_after_duration,
    )


def a_job(
    job_id: str,
    user_id: object,
    interview_ids: object,
    *,
    max_interview_ids: int = DEFAULT_MAX_INTERVIEW_IDS,
) -> GrantAccessJob:
    """Return the job of a message with these arguments."""
    return grant_access_job(
        job_id,
        (),
        {"user_id": user_id, "interview_ids": interview_ids},
        max_interview_ids=max_interview_ids,
    )


def a_cohort(
    job_id: str,
    user_ids: object,
    interview_ids: object,
    *,
    max_interview_ids: int = DEFAULT_MAX_INTERVIEW_IDS,
) -> GrantAccessJob:
    """Return the job of a message for several users."""
    return grant_cohort_access_job(
        job_id,
        (),
        {"user_ids": user_ids, "interview_ids": interview_ids},
        max_interview_ids=max_interview_ids,
    )


def created(outcome: JobResult) -> int:
    """The count that a job's success tells."""
    assert outcome.error is None
    assert outcome.outcome is not None
    assert outcome.outcome.error is None
    result = outcome.outcome.result
    assert result is not None
    assert result.keys() == {"success", "created_access_count"}
    assert result["success"] is True
    count: int = result["created_access_count"]
    return count


def error_of(outcome: JobResult) -> dict[str, Any]:
    """The error that a job's failure tells."""
    assert outcome.error is None
    assert outcome.outcome is not None
    assert outcome.outcome.result is None
    assert outcome.outcome.error is not None
    return outcome.outcome.error
