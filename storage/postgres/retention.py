"""Retention: old ledger rows and cancellation requests, replaced by tombstones."""

from __future__ import annotations

from datetime import datetime, timedelta

from storage.dtos import PruneCountsDTO, PrunedBatchDTO
from storage.interface import Retention
from storage.postgres.job_locks import PostgresJobLocks
from storage.postgres.ledger import JOB_KEY

LOCK = 3_118_604_507_220_935_871
"""Key of the advisory lock of pruners: an arbitrary number."""

_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(%(key)s)"

# statement_timestamp() is stable, as an index condition must be. The lower bound skips what earlier
# batches deleted: without it each batch reads their dead index entries again.
_FIND_OLD_JOBS = """
    SELECT job_id, finished_at FROM grant_access_job
    WHERE finished_at < statement_timestamp() - CAST(%(older_than)s AS interval)
      AND finished_at >= coalesce(CAST(%(since)s AS timestamptz), '-infinity')
    ORDER BY finished_at LIMIT %(limit)s
"""
_DELETED = "DELETE FROM {table} WHERE job_id = ANY (CAST(%(job_ids)s AS text[])) RETURNING 1"
_PRUNE_JOBS = f"""
    WITH jobs AS (
        DELETE FROM grant_access_job WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
        RETURNING job_id, request_digest, created, result, error
    ), tombstones AS (
        INSERT INTO grant_access_tombstone (job_key, digest, created, result, error)
        SELECT {JOB_KEY}, CAST(CAST('x' || left(request_digest, 8) AS bit(32)) AS int),
               created, CASE WHEN created IS NULL THEN result END, error ->> 'type'
        FROM jobs ON CONFLICT (job_key) DO NOTHING
    ), rejections AS ({_DELETED.format(table="grant_access_rejection")}
    ), cohorts AS ({_DELETED.format(table="grant_access_cohort")}
    ), cancellations AS ({_DELETED.format(table="grant_access_cancellation")}
    ), requests AS (
        DELETE FROM grant_access_request WHERE job_id IN (
            SELECT job_id FROM grant_access_request
            WHERE job_id = ANY (CAST(%(job_ids)s AS text[])) FOR UPDATE SKIP LOCKED
        ) RETURNING 1
    )
    SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM rejections),
           (SELECT count(*) FROM cohorts), (SELECT count(*) FROM cancellations),
           (SELECT count(*) FROM requests)
"""  # noqa: S608 - constants
_PRUNE_CANCELLATIONS = f"""
    WITH cancellations AS (
        DELETE FROM grant_access_cancellation WHERE job_id IN (
            SELECT job_id FROM grant_access_cancellation
            WHERE requested_at < statement_timestamp() - CAST(%(older_than)s AS interval)
            ORDER BY requested_at LIMIT %(limit)s
        ) RETURNING job_id
    ), tombstones AS (
        INSERT INTO grant_access_tombstone (job_key, error)
        SELECT {JOB_KEY}, 'JobCancelledException' FROM cancellations
        WHERE NOT EXISTS (
            SELECT FROM grant_access_job AS job WHERE job.job_id = cancellations.job_id
        ) ON CONFLICT (job_key) DO NOTHING
    )
    SELECT count(*) FROM cancellations
"""  # noqa: S608 - constants
_COUNT_PRUNABLE = """
    WITH old AS MATERIALIZED (
        SELECT job_id FROM grant_access_job
        WHERE finished_at < statement_timestamp() - CAST(%(older_than)s AS interval)
    )
    SELECT (SELECT count(*) FROM old),
           (SELECT count(*) FROM grant_access_rejection JOIN old USING (job_id)),
           (SELECT count(*) FROM grant_access_cohort JOIN old USING (job_id)),
           (SELECT count(*) FROM grant_access_cancellation AS one
            WHERE requested_at < statement_timestamp() - CAST(%(older_than)s AS interval)
               OR EXISTS (SELECT FROM old WHERE old.job_id = one.job_id)),
           (SELECT count(*) FROM grant_access_request JOIN old USING (job_id))
"""


class PostgresRetention(PostgresJobLocks, Retention):
    """Pruning of the worker's tables."""

    def lock_pruning(self) -> bool:
        """See the interface."""
        return bool(self.value(_TRY_LOCK, {"key": LOCK}))

    def prune_jobs(
        self, older_than: timedelta, limit: int, *, since: datetime | None = None
    ) -> PrunedBatchDTO:
        """See the interface."""
        bounds = {"older_than": older_than, "limit": limit, "since": since}
        found = self.query(_FIND_OLD_JOBS, bounds)
        if not found:
            return PrunedBatchDTO(PruneCountsDTO(), None)
        locked = self.lock_jobs([job_id for job_id, _ in found], wait=False)
        ((*counts,),) = self.query(_PRUNE_JOBS, {"job_ids": list(locked)})
        pruned = PruneCountsDTO(*counts)
        has_more = len(found) == limit and pruned.jobs  # not if others have locked them all
        return PrunedBatchDTO(pruned, found[-1].finished_at if has_more else None)

    def prune_cancellations(self, older_than: timedelta, limit: int) -> PruneCountsDTO:
        """See the interface."""
        count = self.value(_PRUNE_CANCELLATIONS, {"older_than": older_than, "limit": limit})
        return PruneCountsDTO(cancellations=count)

    def count_prunable(self, older_than: timedelta) -> PruneCountsDTO:
        """See the interface."""
        ((*counts,),) = self.query(_COUNT_PRUNABLE, {"older_than": older_than})
        return PruneCountsDTO(*counts)
