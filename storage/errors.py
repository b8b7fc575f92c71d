"""The errors of every storage. A driver's error leaves a storage as one of these."""

from __future__ import annotations

from storage import sqlstate

_REMEDIES = {
    sqlstate.LOCK_NOT_AVAILABLE: "wait until the other transaction that holds the lock has ended, "
    "and run the command again",
    sqlstate.INSUFFICIENT_PRIVILEGE: "grant it to the role of DATABASE_URL, or use a role of "
    "deploy/postgresql/roles.sql",
    sqlstate.UNDEFINED_TABLE: "run `interview-access migrate`",
}


class StorageError(Exception):
    """A storage operation failed.

    Retry the whole transaction; it may have committed if COMMIT failed.

    A storage error is never a permanent result: it describes the database, not the request, even
    if every attempt raises it (a missing privilege, an unknown connection option).

    Attributes:
        sqlstate: PostgreSQL's five-character error code; None if no server replied.
    """

    def __init__(self, reason: str, sqlstate: str | None = None) -> None:
        self.sqlstate = sqlstate
        super().__init__(reason, sqlstate)

    def __str__(self) -> str:
        return f"{self.args[0]} ({self.sqlstate})" if self.sqlstate else str(self.args[0])

    @property
    def code_class(self) -> str:
        """The class of the error code, its first two characters; ``none`` without a reply."""
        return self.sqlstate[:2] if self.sqlstate else "none"

    @property
    def remedy(self) -> str | None:
        """What an operator does before the operation is repeated; None if nothing is known."""
        return _REMEDIES.get(self.sqlstate or "")

    @property
    def is_outage(self) -> bool:
        """Whether every other job would fail now as well.

        True unless the code is known to concern one job. Taking an outage for one job's error
        would fail job after job; the reverse costs one pause.
        """
        return not sqlstate.concerns_one_job(self.sqlstate)

    @property
    def needs_new_connection(self) -> bool:
        """Whether the connection's own state may fail a retry on the same connection."""
        return self.is_outage or sqlstate.is_stale_statement(self.sqlstate)


class JobBusyError(StorageError):
    """Another transaction holds the job's lock. Retry the job later."""

    def __init__(self, reason: str = "another transaction holds the job's lock") -> None:
        super().__init__(reason, sqlstate.LOCK_NOT_AVAILABLE)


class LedgerError(StorageError):
    """The ledger's rows of a job are not as this code expects: a defect, not an outage."""

    @property
    def is_outage(self) -> bool:
        """False: the error concerns the transaction's own jobs."""
        return False


class LedgerConflictError(LedgerError):
    """Another transaction has recorded a job that this transaction was to record."""


def is_outage(error: Exception | None) -> bool:
    """Return whether an error of any kind is an outage of the storage."""
    return isinstance(error, StorageError) and error.is_outage
