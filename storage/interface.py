"""What the business may ask of the data, and what every store must then do.

Each method's docstring is its obligation; each "must" has a test of its own that runs on
PostgreSQL and on the reference model alike. Whatever a driver says leaves a store as one of the
two errors here, and by their type it is decided what is tried again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager

from storage.dtos import (
    AccessOrderDTO,
    AccessRequestDTO,
    FinishedJobDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    JobDTO,
    UserInterviewAccessDTO,
)

ChunkDone = Callable[[int, int], None]
"""Called after each chunk with the grants looked at so far and in all."""


class StorageError(Exception):
    """The database refused, for a reason that trying again does not mend.

    Attributes:
        sqlstate: PostgreSQL's code, five characters, or None where no server answered.
    """

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate
        super().__init__(reason, sqlstate)

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.sqlstate})" if self.sqlstate else str(self.args[0])


class TransientStorageError(StorageError):
    """The database could not do it now; the whole transaction can be tried again."""

    @property
    def unreachable(self) -> bool:
        """Whether no job would fare better: none answers, or it ends, is full or read-only."""
        if self.sqlstate is None or self.sqlstate == "25006":
            return True
        # 57014 is one statement's: it took too long.
        return self.sqlstate[:2] in {"08", "53", "57"} and self.sqlstate != "57014"


class InterviewTransactionInterface(ABC):
    """One open transaction, isolated as READ COMMITTED or more strictly.

    Every method may raise :class:`StorageError`; the transaction can then only be left.
    """

    @abstractmethod
    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
        """Keep other transactions that lock their jobs away from these until the end of this one.

        With ``wait``, must return all of the ids, after whoever holds one has ended, or was ended
        for holding it long, frozen perhaps; without, must never wait for another lock, and must
        return only the ids that it got. To hold no other lock while it waits is the caller's part.
        """

    @abstractmethod
    def open_jobs(self, jobs: Sequence[JobDTO]) -> Mapping[str, FinishedJobDTO]:
        """Enter jobs in the ledger, unless they stand there.

        Must return the finished jobs among them by id, as first finished, whatever request they
        come with now; must enter each of the others, open, for this transaction to finish. Must
        wait for a transaction that has entered one of them and is not over, and heed its outcome.
        The job ids must be distinct.
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
        first of them. Must fail as transient, adding nothing, where an interview does not exist.
        ``on_chunk`` must be called after each chunk with rising numbers, the last time with both
        equal, and not at all without grants.
        """

    @abstractmethod
    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """Add the attempts. Must fail as transient where an interview does not exist."""

    @abstractmethod
    def finish_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """Write the answers of jobs that this transaction opened, with all ids they rejected.

        Must raise :class:`StorageError` where one of them is not open in this transaction.
        """

    @abstractmethod
    def take_due_requests(self, limit: int) -> Sequence[AccessRequestDTO]:
        """Requests that are to be looked at: never sent ones first, then by how long they waited.

        Must return no more than ``limit``, and none that another transaction has taken and is not
        over; must never wait for one.
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
        raises, none of it. Must raise :class:`StorageError`, keeping nothing, where a job that it
        opened was not finished; must raise :class:`TransientStorageError` where it is not known
        to be kept (a connection lost inside COMMIT, say): the ledger then knows.
        """

    @abstractmethod
    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """The job's row of the ledger and all that it rejected, or None where none has finished."""

    @abstractmethod
    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """The request under this id, or None where there is none, or none any more."""

    @abstractmethod
    def make_requests_due(self) -> None:
        """Have every request looked at now."""

    @abstractmethod
    def is_cancelled(self, job_id: str) -> bool:
        """Whether the job was asked to be cancelled, whatever became of it."""
