"""Advisory locks of jobs, and the termination of transactions that hold one without a client."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from storage import sqlstate
from storage.errors import JobBusyError, StorageError
from storage.interface import JobLocks
from storage.postgres.session import SETTINGS, Session

# OFFSET 0 keeps the order, in which the locks are then taken.
_FOR_EACH_JOB = (
    "SELECT {columns} FROM ("
    "SELECT job_id, hashtextextended('grant_access_job:' || job_id, 0) AS key"
    " FROM unnest(CAST(%(job_ids)s AS text[])) AS job_id ORDER BY key OFFSET 0) AS jobs {joins}"
)
TRY_LOCK_JOBS = _FOR_EACH_JOB.format(
    columns="job_id, pg_try_advisory_xact_lock(key), pid",
    joins=f"CROSS JOIN ({SETTINGS}) AS settings",
)
_LOCK_JOBS = _FOR_EACH_JOB.format(columns="job_id, pg_advisory_xact_lock(key)", joins="")
_SET_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', %(lock)s, true)"

# pg_locks shows a 64-bit key in two halves.
_JOIN_HOLDERS = """
    JOIN pg_locks ON locktype = 'advisory' AND objsubid = 1 AND granted
     AND CAST(classid AS bigint) << 32 | CAST(objid AS bigint) = key AND pid <> pg_backend_pid()
     AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    JOIN pg_stat_activity USING (pid)
"""
_ARE_HELD_BY_OTHER_ROLES = _FOR_EACH_JOB.format(
    columns="coalesce(bool_and(usename <> current_user), false)", joins=_JOIN_HOLDERS
)
# A holder is unresponsive if its client is idle between two statements, or does not receive the
# rows of a statement that has exceeded its time limit: no timeout ends that one.
_TERMINATE_UNRESPONSIVE_HOLDERS = _FOR_EACH_JOB.format(
    columns="pg_terminate_backend(pid)",
    joins=_JOIN_HOLDERS
    + """
    WHERE state IN ('idle in transaction', 'idle in transaction (aborted)')
      AND state_change < clock_timestamp() - CAST(%(unresponsive)s AS interval)
       OR state = 'active' AND wait_event_type = 'Client'
      AND query_start < clock_timestamp() - CAST(%(statement)s AS interval)
""",
)


class PostgresJobLocks(Session, JobLocks):
    """Job locks by advisory locks that PostgreSQL releases at the end of the transaction."""

    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
        """See the interface."""
        if not job_ids:
            return frozenset()
        parameters = {"job_ids": list(job_ids)}
        timeout = self.limits.lock if wait else self.limits.batch_lock
        rows = self.begin(TRY_LOCK_JOBS, lock=timeout, **parameters)
        locked = frozenset(job_id for job_id, is_locked, _ in rows if is_locked)
        if not wait or len(locked) == len(job_ids):
            return locked
        is_locked = self._lock_briefly(parameters) or (
            self._terminate_unresponsive_holders(parameters) and self._lock_briefly(parameters)
        )
        # A lock of another role is no worker's: the ledger's primary key decides alone.
        if not is_locked and not self.value(_ARE_HELD_BY_OTHER_ROLES, parameters):
            raise JobBusyError
        return frozenset(job_ids)

    def _lock_briefly(self, parameters: Mapping[str, object]) -> bool:
        """Block on the locks for a moment. Returns whether all of them were obtained."""
        try:
            with self.savepoint():
                self.execute(_SET_LOCK_TIMEOUT, {"lock": f"{self.limits.busy}s"})
                self.execute(_LOCK_JOBS, parameters)
                self.execute(_SET_LOCK_TIMEOUT, {"lock": f"{self.limits.lock}s"})
        except StorageError as error:
            if error.sqlstate != sqlstate.LOCK_NOT_AVAILABLE:
                raise
            return False
        return True

    def _terminate_unresponsive_holders(self, parameters: Mapping[str, object]) -> bool:
        """Terminate holders whose client has stopped. Returns whether there was one."""
        limits = {
            "unresponsive": f"{self.limits.unresponsive}s",
            "statement": f"{self.limits.statement}s",
        }
        try:
            with self.savepoint():
                return bool(self.query(_TERMINATE_UNRESPONSIVE_HOLDERS, {**parameters, **limits}))
        except StorageError as error:
            if error.sqlstate != sqlstate.INSUFFICIENT_PRIVILEGE:
                raise
            return False
