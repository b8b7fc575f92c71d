"""The storage interface outside a transaction: what is read, watched and waited for.

The obligations are stated as in :mod:`storage.interface`, which combines the roles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Protocol

from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FinishedJobFilterDTO,
    GrantOriginDTO,
    LedgerTotalsDTO,
    OutboxTotalsDTO,
    PrunedJobDTO,
)


class HasFileno(Protocol):
    """A socket or another file whose readability ends a wait."""

    def fileno(self) -> int:
        """Return the file descriptor."""


class JobReader(Protocol):
    """What is stored about jobs. Each call is a transaction of its own."""

    @abstractmethod
    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """Return a job's ledger row with all details, or None if it has not finished."""

    @abstractmethod
    def get_pruned_job(self, job_id: str) -> PrunedJobDTO | None:
        """Return a job's tombstone, or None if it was not pruned."""

    @abstractmethod
    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """Return the outbox request of a job, or None if there is none."""

    @abstractmethod
    def is_cancelled(self, job_id: str) -> bool:
        """Return whether cancellation of the job was requested, whatever came of it."""

    @abstractmethod
    def list_finished_jobs(
        self, wanted: FinishedJobFilterDTO, limit: int
    ) -> Sequence[FinishedJobDTO]:
        """Return the finished jobs that a filter selects, newest first.

        Must be answered from an index, unless the filter selects all jobs of a period. The rejected
        IDs and the counts by user may be missing.

        Args:
            wanted: The filter; its fields combine.
            limit: Largest number of jobs.
        """

    @abstractmethod
    def measure_ledger(self) -> LedgerTotalsDTO:
        """Return the size of the ledger, without reading all of its rows."""


class GrantReader(Protocol):
    """Which jobs created grants. Each call is a transaction of its own."""

    @abstractmethod
    def find_grant_origin(self, user_id: str, interview_id: str) -> GrantOriginDTO:
        """Find a grant and the job that created it.

        Must name exactly the job whose number of created grants includes the grant. Must keep the
        job when its ledger row is pruned or a person is erased from it. A grant that was deleted
        and created again names the later job.

        Args:
            user_id: The user.
            interview_id: A canonical interview ID.
        """


class OutboxMonitor(Protocol):
    """Counts outbox requests and waits for them. Each call is a transaction of its own."""

    @abstractmethod
    def count_requests(self) -> OutboxTotalsDTO:
        """Count the requests. Times must be clamped as those of :class:`AccessRequestDTO`."""

    @abstractmethod
    def list_unsent_requests(self, after: str, limit: int) -> Sequence[str]:
        """Return the job IDs of requests that were never enqueued, in the order of their bytes.

        Args:
            after: Must be less than each job ID; empty at first.
            limit: Largest number of job IDs.
        """

    @abstractmethod
    def schedule_all_requests_now(self) -> None:
        """Make the outbox requests that are due later due now.

        Must not change the order of those that are due already.
        """

    @abstractmethod
    def has_due_requests(self) -> bool:
        """Return whether ``lock_due_requests`` of the outbox may return any request now."""

    @abstractmethod
    def wait_for_requests(self, seconds: float, wakeup: HasFileno | None = None) -> bool | None:
        """Wait until a service adds a request to the outbox. For one thread.

        The commit of a transaction that adds a request must end the wait. The first call must
        return True immediately. A notification may be lost; the caller must poll now and then.

        Args:
            seconds: Longest wait.
            wakeup: Ends the wait when it becomes readable.

        Returns:
            Whether a request may have been added since the last call that returned True; None,
            immediately, if this storage cannot notify.

        Raises:
            StorageError: if the connection is lost; the next call opens another.
        """
