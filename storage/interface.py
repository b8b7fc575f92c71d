"""What the business may ask of the data, and what every store must then do.

Each method's docstring is its obligation; each "must" has a test of its own that runs on
PostgreSQL and on the reference model alike. Every error of a driver leaves a store as
:class:`StorageError`, which is always retryable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from storage.dtos import (
    AccessOrderDTO,
    AccessRequestDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    UserInterviewAccessDTO,
)

ChunkDone = Callable[[int, int], None]
"""Called after each chunk with the grants looked at so far and in all."""

MAX_REQUEST_BYTES = 32_000_000
"""Memory that one request of the outbox may take up, about: 100 bytes for each interview ID."""

_JOB_CLASSES = frozenset({"21", "22", "23", "40", "44", "54", "P0", "XX"})
# The statement's own values and rows: cardinality, data, constraints, serialization and deadlocks,
# CHECK OPTION, limits of size, errors that a trigger raises, one corrupt page or tuple.
_STALE_STATEMENT = frozenset({"26000", "42P05", "0A000"})
# A prepared statement is missing, exists already, or returns other columns than it did.
_JOB_CODES = _STALE_STATEMENT | frozenset(
    {
        *("55P03", "57014"),  # a lock not obtained in time; a statement that took too long
        *("25P02", "25P03", "25P04"),  # a transaction that failed before, stalled, took too long
    }
)


class HasFileno(Protocol):
    """A socket, or another file whose readability ends a wait."""

    def fileno(self) -> int:
        """Its descriptor."""


class StorageError(Exception):
    """The database did not do it. The transaction kept nothing, and can be retried.

    No such error is a permanent result: it says nothing about the request, even where it comes
    again with each attempt (a missing privilege, a connection option that libpq does not know).

    Attributes:
        sqlstate: PostgreSQL's code, five characters; None where no server replied.
    """

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate
        super().__init__(reason, sqlstate)

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.sqlstate})" if self.sqlstate else str(self.args[0])

    @property
    def is_outage(self) -> bool:
        """Whether no other job would fare better now.

        It is, unless the code is known to concern the values, rows or locks of the one job:
        unknown codes, errors without a code, and errors of the driver or the configuration are
        outages. An outage that is taken for one job's error would fail job after job; the reverse
        costs one pause.
        """
        code = self.sqlstate or ""
        return code[:2] not in _JOB_CLASSES and code not in _JOB_CODES

    @property
    def needs_new_connection(self) -> bool:
        """Whether a retry on the same connection may fail for the connection's own state."""
        return self.is_outage or self.sqlstate in _STALE_STATEMENT


def is_outage(error: Exception | None) -> bool:
    """Whether an error, of the storage or not, is an outage of it."""
    return isinstance(error, StorageError) and error.is_outage


class JobBusyError(StorageError):
    """Another live transaction holds the job's lock. Nothing failed; the job is retried later."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, "55P03")


class LedgerError(StorageError):
    """The ledger's rows of a job are not as this code expects them: a defect, not an outage."""

    @property
    def is_outage(self) -> bool:
        """False: it concerns the jobs named."""
        return False


class LedgerConflictError(LedgerError):
    """The ledger has a job that this transaction was to record: another one was first."""


class InterviewTransactionInterface(ABC):
    """One open transaction, isolated as READ COMMITTED or more strictly.

    Every method may raise :class:`StorageError`; the transaction can then only be left.
    """

    @abstractmethod
    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
        """Lock these jobs until the transaction ends.

        Without ``wait``, must return the ids whose lock is free, and must never wait. With
        ``wait``, must return all of the ids, or raise :class:`JobBusyError` where a live
        transaction holds one for longer than a moment. A holder whose worker has stopped
        responding must be ended; a live one must never be. The caller must hold no other lock.
        """

    @abstractmethod
    def find_jobs(self, job_ids: Collection[str]) -> FoundJobsDTO:
        """The finished jobs among these, as first recorded, and those that are to be cancelled.

        Must see what other transactions have committed before this call. So the jobs must be
        locked first, or a transaction that finishes one of them may be about to commit.
        """

    @abstractmethod
    def request_cancellation(self, job_id: str) -> None:
        """Note that a job is to be cancelled. Twice is once."""

    @abstractmethod
    def find_cancelled_jobs(self, job_ids: Collection[str]) -> frozenset[str]:
        """The jobs among these that are to be cancelled.

        Must see what other transactions have kept before this call.
        """

    @abstractmethod
    def find_unknown_interviews(
        self, interview_ids: Collection[str], *, granted_to: str | None = None
    ) -> frozenset[str]:
        """The ids that no interview has.

        The other interviews must stand until this transaction ends: a delete waits for it. Those
        that the user ``granted_to`` has access to need not: while a grant stands, its interview
        does.
        """

    @abstractmethod
    def get_interview_details(self, interview_ids: Collection[str]) -> Sequence[InterviewDTO]:
        """The interviews that have these ids, in no order that can be relied on.

        They must stand until this transaction ends: a delete waits for it.
        """

    @abstractmethod
    def get_existing_user_access(
        self, user_ids: Collection[str]
    ) -> Sequence[UserInterviewAccessDTO]:
        """All grants of these users, in no order that can be relied on."""

    @abstractmethod
    def bulk_create_user_access(
        self, orders: Sequence[AccessOrderDTO], on_chunk: ChunkDone | None = None
    ) -> Sequence[int]:
        """Make the grants that are missing, and count the rows that each order added, in step.

        Must leave a grant that stands untouched and uncounted, also one that another transaction
        made after this one began. A grant that several orders ask for must be counted for the
        first of them. Must raise :class:`StorageError` (23503), adding nothing, where an interview
        does not exist.
        ``on_chunk`` must be called after each chunk with rising numbers, the last time with both
        equal, and not at all without grants.
        """

    @abstractmethod
    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """Add the attempts.

        Must raise :class:`StorageError` (23503) where an interview does not exist.
        """

    @abstractmethod
    def record_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """Insert finished jobs in the ledger, with all IDs that they rejected.

        Must wait for a transaction that has recorded one of them and has not ended. Must raise
        :class:`LedgerConflictError`, recording nothing, where the ledger has one of them: this
        decides between two transactions that execute one job without excluding each other. The job
        IDs must be distinct.
        """

    @abstractmethod
    def take_due_requests(
        self, limit: int, *, page_bytes: int = MAX_REQUEST_BYTES
    ) -> Sequence[AccessRequestDTO]:
        """Requests that are due: never sent ones first, then by how long they have been due.

        Must return no more than ``limit``, and none that another transaction has taken and has not
        ended; must never wait for one. Must return every row that a service can have written,
        whatever is in it.

        Args:
            limit: The number of requests.
            page_bytes: Memory that they may take up together, about; one alone may take up
                :data:`MAX_REQUEST_BYTES`. A larger one must be returned without its IDs.
        """

    @abstractmethod
    def forget_answered_requests(self, job_ids: Collection[str]) -> frozenset[str]:
        """Delete those of these requests whose job the ledger has an answer of, and name them."""

    @abstractmethod
    def look_again_at_requests(self, job_ids: Collection[str], *, sent: bool) -> None:
        """Make these requests due later: in as long as they stand already, but 1 to 60 s.

        Args:
            job_ids: Of requests that this transaction has taken.
            sent: Whether they were put on the queue just now.
        """


class InterviewStorageInterface(ABC):
    """A store of interviews, grants, attempts and finished jobs. Safe in threads."""

    @abstractmethod
    def transaction(self) -> AbstractContextManager[InterviewTransactionInterface]:
        """One transaction, for a with statement.

        At its end all of it must be kept, durably and visible to all at once; where the block
        raises, none of it. Must raise :class:`StorageError` where it is not known to be kept (a
        connection lost inside COMMIT, say): the ledger then knows.
        """

    @abstractmethod
    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """The job's row of the ledger and all that it rejected, or None where none has finished."""

    @abstractmethod
    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """The request under this id, or None where there is none, or none any more."""

    @abstractmethod
    def make_requests_due(self) -> None:
        """Make every outbox request due now."""

    @abstractmethod
    def has_due_requests(self) -> bool:
        """Whether :meth:`InterviewTransactionInterface.take_due_requests` may return any now."""

    @abstractmethod
    def wait_for_requests(self, seconds: float, wakeup: HasFileno | None = None) -> bool | None:
        """Wait until a service adds a request to the outbox.

        For one thread. Must return True, at the first call at once, where a request may have been
        added since the last call returned True; a transaction that adds one must end the wait at
        its commit. A notification may be lost, and is then replaced by no other: the caller must
        look at the requests now and then.

        Args:
            seconds: The longest wait.
            wakeup: Ends the wait when it is readable.

        Returns:
            Whether a request may have been added, or None, at once, if this store cannot notify.

        Raises:
            StorageError: if the connection is lost; the next call opens another.
        """

    @abstractmethod
    def is_cancelled(self, job_id: str) -> bool:
        """Whether the job was asked to be cancelled, whatever became of it."""
