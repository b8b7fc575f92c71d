"""Storages under test, with the platform's side of each: filled and inspected from outside."""

from __future__ import annotations

import json
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
from sqlalchemy import Connection, Engine, event, insert, null, select, text
from sqlalchemy.exc import IntegrityError

from storage import models
from storage.dtos import AccessRequestDTO, InterviewAttemptDTO, InterviewDTO
from storage.errors import StorageError
from storage.interface import Storage
from storage.memory import MemoryStorage
from storage.memory import storage as memory
from storage.postgres import DatabaseLimits, PostgresStorage
from tasks.celery_tasks import grant_access_job, grant_cohort_access_job
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.ledger import JobResult
from tests.support.database import connected

CHUNK_SIZE = 3
"""Grants in one chunk: few, so that small requests take several chunks."""

PATIENCE_SECONDS = 30
"""Time limit of every wait in a test."""

BULK_THRESHOLD = 1_000
"""Default number of grants from which PostgreSQL gets statements for many grants."""

T = TypeVar("T")


class Background(Generic[T]):
    """A function that runs in a thread beside the test."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._error = error

    @property
    def over(self) -> bool:
        """Whether the function has ended."""
        return not self.thread.is_alive()

    def result(self) -> T:
        """Wait for the function. Returns its result or raises its exception."""
        self.thread.join(PATIENCE_SECONDS)
        assert self.over, "the function is still running"
        if self._error:
            raise self._error
        return self._result


def all_at_once(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Run functions at once, each in a thread. Returns their results in order."""
    start = threading.Barrier(len(functions))

    def started_by(function: Callable[[], T]) -> Callable[[], T]:
        def run() -> T:
            start.wait(PATIENCE_SECONDS)
            return function()

        return run

    running = [Background(started_by(function)) for function in functions]
    return [one.result() for one in running]


class Store(ABC):
    """A storage with the platform's side of it.

    Attributes:
        storage: The storage under test.
    """

    storage: Storage

    @abstractmethod
    def add_interview(self, interview: InterviewDTO, *, configured: bool = True) -> None:
        """Insert an interview, as the platform does, with its configuration unless disabled."""

    @abstractmethod
    def delete_interview(self, interview_id: str) -> bool:
        """Delete an interview, as the platform does. Returns False if a row refers to it."""

    @abstractmethod
    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """Return all attempts."""

    @abstractmethod
    def add_request(self, request: AccessRequestDTO) -> None:
        """Insert an outbox request, as a service does, and commit."""

    @abstractmethod
    def until_waiting(self, other: Background[Any]) -> None:
        """Return when the other function waits for a transaction, or has ended."""

    @abstractmethod
    def clear(self) -> None:
        """Delete all grants, attempts and jobs, but not the interviews."""

    def add_interviews(self, count: int) -> list[str]:
        """Insert interviews. Returns their IDs, sorted."""
        interviews = [an_interview() for _ in range(count)]
        for interview in interviews:
            self.add_interview(interview)
        return sorted(interview.id for interview in interviews)

    def granted(self, user_id: str) -> list[str]:
        """Return the interviews of the user's grants, sorted."""
        with self.storage.transaction() as transaction:
            grants = transaction.get_existing_user_access([user_id])
        assert {grant.user_id for grant in grants} <= {user_id}
        return sorted(grant.interview_id for grant in grants)

    def grant(self, *jobs: GrantAccessJob) -> list[JobResult]:
        """Execute jobs in one batch."""
        return GrantAccessInteractor(self.storage).grant_access(jobs)


class MemoryStore(Store):
    """The reference model."""

    def __init__(self) -> None:
        self.storage: MemoryStorage = MemoryStorage(chunk_size=CHUNK_SIZE)
        self._interviews: list[InterviewDTO] = []

    def add_interview(self, interview: InterviewDTO, *, configured: bool = True) -> None:
        """See the base class."""
        assert configured or not interview.is_default_access_allowed, "the default is another"
        self._interviews.append(interview)
        self.storage.add_interview(interview)

    def delete_interview(self, interview_id: str) -> bool:
        """See the base class."""
        try:
            self.storage.delete_interview(interview_id)
        except StorageError:
            return False
        return True

    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """See the base class."""
        return self.storage.attempts()

    def add_request(self, request: AccessRequestDTO) -> None:
        """See the base class."""
        self.storage.add_request(request)

    def until_waiting(self, other: Background[Any]) -> None:
        """See the base class: a thread that waits, waits inside the model for its lock."""

        def waits() -> bool:
            frame = sys._current_frames().get(other.thread.ident or 0)
            return frame is not None and frame.f_code.co_filename == memory.__file__

        until(lambda: other.over or waits())

    def clear(self) -> None:
        """See the base class."""
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
        """See the base class."""
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
        """See the base class. Deletes its configuration as well."""
        try:
            with connected(self.database_url) as connection:
                for statement in DELETE_INTERVIEW:
                    connection.execute(statement, {"id": interview_id})
                connection.commit()
        except IntegrityError:
            return False
        return True

    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """See the base class."""
        rows = self._platform.execute(select(models.interview_attempts)).mappings()
        return [
            InterviewAttemptDTO(
                **{**row, "id": str(row["id"]), "interview_id": str(row["interview_id"])}
            )
            for row in rows
        ]

    def add_request(self, request: AccessRequestDTO) -> None:
        """See the base class."""
        self._platform.execute(
            insert(models.requests).values(
                job_id=request.job_id,
                task=request.task,
                user_id=request.user_id,
                user_ids=None if request.user_ids is None else list(request.user_ids),
                interview_ids=list(request.interview_ids),
                eta=request.eta,
                expires_at=request.expires_at,
                headers=null() if request.headers is None else json.loads(request.headers),
                requested_at=request.requested_at,
                sent_at=request.sent_at,
            )
        )

    def until_waiting(self, other: Background[Any]) -> None:
        """See the base class: the server reports who waits for a lock."""
        until(lambda: other.over or self.value(_WAITING) > 0)

    def clear(self) -> None:
        """See the base class."""
        for table in _JOBS_TABLES:
            self.execute(f"DELETE FROM {table}")  # noqa: S608 - constants

    def empty(self) -> None:
        """Delete all rows."""
        self.clear()
        for table in _INTERVIEW_TABLES:
            self.execute(f"DELETE FROM {table}")  # noqa: S608 - constants

    def execute(self, statement: str, **values: object) -> None:
        """Execute one statement, as an operator or another service does."""
        self._platform.execute(text(statement), values)

    def value(self, statement: str, **values: object) -> Any:
        """Execute a query that returns one value."""
        return self._platform.execute(text(statement), values).scalar_one()

    def rows(self) -> int:
        """Return the number of all grants."""
        count: int = self.value("SELECT count(*) FROM interview_userinterviewaccess")
        return count

    def configure(self, setting: str, value: str) -> None:
        """Set a default of the database for later connections."""
        self.execute(
            f"DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET {setting} = %L',"
            f" current_database(), '{value}'); END $$"
        )

    def raise_for_grants(self, condition: str, sqlstate: str) -> None:
        """Create a trigger that rejects new grants for which a condition on ``NEW`` is true."""
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
        """Open another storage on the same database, with its own connections and limits."""
        storage = PostgresStorage(self.database_url, chunk_size=chunk_size, limits=limits)
        try:
            yield storage
        finally:
            storage.close()


DELETE_INTERVIEW = (
    text("DELETE FROM interview_interviewconfig WHERE interview_id = CAST(:id AS uuid)"),
    text("DELETE FROM interview_interview WHERE id = CAST(:id AS uuid)"),
)
"""Statements by which the platform deletes an interview without grants."""

_JOBS_TABLES = (
    "interview_userinterviewaccess",
    "interview_interviewattempt",
    "grant_access_job",
    "grant_access_request",
    "grant_access_cancellation",
    "grant_access_cohort",
    "grant_access_rejection",
    "grant_access_tombstone",
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
    """Use a database with all tables as an empty store."""
    with connected(database_url, autocommit=True) as platform:
        store = PostgresStore(database_url, platform, bulk_threshold=bulk_threshold)
        store.empty()
        try:
            yield store
        finally:
            store.storage.close()


def until(condition: Callable[[], bool], *, within: float = PATIENCE_SECONDS) -> None:
    """Return when the condition is true. Fails after ``within`` seconds."""
    assert eventually(condition, within), "the condition did not become true"


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll a condition, and return whether it became true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)  # between two polls
    return True


@contextmanager
def statements_counted() -> Iterator[list[str]]:
    """Collect the statements that any engine executes in the block."""
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
    """Return an interview with a new ID; by default configured like one without configuration."""
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
    """Parse a message of ``grant_access`` into a job."""
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
    """Parse a message of ``grant_cohort_access`` into a job."""
    return grant_cohort_access_job(
        job_id,
        (),
        {"user_ids": user_ids, "interview_ids": interview_ids},
        max_interview_ids=max_interview_ids,
    )


def created(result: JobResult) -> int:
    """Return the number of created grants of a successful job."""
    assert result.error is None
    assert result.outcome is not None
    assert result.outcome.error is None
    polled = result.outcome.result
    assert polled is not None
    assert polled.keys() == {"success", "created_access_count"}
    assert polled["success"] is True
    count: int = polled["created_access_count"]
    return count
