"""The ledger: finished jobs with their outcomes, and cancellation requests."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, fields, replace
from datetime import datetime
from typing import Any

from sqlalchemy import Row, select
from sqlalchemy.dialects.postgresql import insert as upsert

from storage import models, sqlstate
from storage.dtos import (
    AuditDTO,
    FiguresDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    JobDTO,
    LedgerTotalsDTO,
    OutcomeDTO,
    PrunedJobDTO,
    RejectedIdsDTO,
)
from storage.errors import LedgerConflictError, LedgerError, StorageError
from storage.interface import Ledger
from storage.postgres.session import Session

COLUMNS = (
    "job_id, task, state, user_id, request_digest,"
    " requested, repeated, already_granted, created, result, error,"
    " requested_at, enqueued_at, started_at, attempts, worker, actor, reason"
)
"""Columns of the ledger that a job sets."""

JOB_KEY = "CAST(encode(substring(sha256(convert_to(job_id, 'UTF8')) for 16), 'hex') AS uuid)"
"""The key of a job's tombstone, of the column ``job_id``."""

# Three index conditions, and no join that the planner could turn into a scan of a whole index:
# OFFSET 0 keeps the lookup of each tombstone.
_FIND_JOBS = f"""
    SELECT * FROM (
        SELECT {COLUMNS}, finished_at FROM grant_access_job
        WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
    ) AS finished FULL JOIN (
        SELECT job_id, true AS is_cancelled FROM grant_access_cancellation
        WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
    ) AS cancelled USING (job_id) FULL JOIN (
        SELECT job_id, tombstone.* FROM unnest(CAST(%(job_ids)s AS text[])) AS job_id
        CROSS JOIN LATERAL (
            SELECT true AS is_pruned, lpad(to_hex(digest), 8, '0') AS digest_prefix,
                   created AS pruned_created, result AS pruned_result, error AS pruned_error
            FROM grant_access_tombstone WHERE job_key = {JOB_KEY} OFFSET 0
        ) AS tombstone
    ) AS pruned USING (job_id)
"""  # noqa: S608 - a constant
_FIND_CANCELLED_JOBS = (
    "SELECT job_id FROM grant_access_cancellation WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))"
)
# The estimate of the last VACUUM or ANALYZE, which a crash leaves, and the current count of the
# statistics, which it resets.
_MEASURE = """
    SELECT greatest(reltuples, pg_stat_get_live_tuples(oid), 0)::bigint AS rows,
        pg_total_relation_size(oid) AS size,
        (SELECT min(finished_at) FROM grant_access_job) AS oldest_at
    FROM pg_class WHERE oid = 'grant_access_job'::regclass
"""
# Rows are passed as one JSON document: psycopg would inspect and adapt eighteen arrays.
_RECORD_JOBS = f"""
    INSERT INTO grant_access_job ({COLUMNS}, finished_at)
    SELECT jobs.*, clock_timestamp()
    FROM json_to_recordset(CAST(%(jobs)s AS json))
         AS jobs (job_id text, task text, state text, user_id text, request_digest text,
                  requested int, repeated int, already_granted int, created int,
                  result jsonb, error jsonb, requested_at timestamptz, enqueued_at timestamptz,
                  started_at timestamptz, attempts int, worker text, actor text, reason text)
    ORDER BY job_id COLLATE "C"
"""  # noqa: S608 - a constant


_AUDIT = tuple(field.name for field in fields(AuditDTO))


class PostgresLedger(Session, Ledger):
    """The tables of jobs, cancellation requests, rejected IDs and cohort counts."""

    def measure_ledger(self) -> LedgerTotalsDTO:
        """Return the size of the ledger; see the interface of its reader."""
        ((rows, size, oldest_at),) = self.query(_MEASURE, {})
        return LedgerTotalsDTO(rows, size, oldest_at)

    def find_jobs(self, job_ids: Collection[str]) -> FoundJobsDTO:
        """See the interface."""
        rows = self.query(_FIND_JOBS, {"job_ids": list(job_ids)})
        return FoundJobsDTO(
            {row.job_id: finished_job(row) for row in rows if row.state},
            frozenset(row.job_id for row in rows if row.is_cancelled),
            {row.job_id: _pruned_job(row) for row in rows if row.is_pruned},
        )

    def find_job_with_details(self, job_id: str) -> FinishedJobDTO | None:
        """Return a finished job with its rejected IDs and its counts by user, or None."""
        finished = self.find_jobs([job_id]).finished.get(job_id)
        if finished is None:
            return None
        rejections, cohorts = models.rejections.c, models.cohorts.c
        rejected = self.query(
            select(rejections.unknown_interview_ids, rejections.malformed_interview_ids).where(
                rejections.job_id == job_id
            )
        )
        by_user = self.query(select(cohorts.created_by_user).where(cohorts.job_id == job_id))
        outcome = replace(
            finished.outcome,
            created_by_user=next((counts for (counts,) in by_user), None),
            rejected=next((RejectedIdsDTO(*map(tuple, row)) for row in rejected), None),
        )
        return replace(finished, outcome=outcome)

    def request_cancellation(self, job_id: str) -> None:
        """See the interface."""
        self.execute(upsert(models.cancellations).values(job_id=job_id).on_conflict_do_nothing())

    def find_cancelled_jobs(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        rows = self.query(_FIND_CANCELLED_JOBS, {"job_ids": list(job_ids)})
        return frozenset(job_id for (job_id,) in rows)

    def record_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """See the interface."""
        if not jobs:
            return
        try:
            rows = json.dumps([_row(job) for job in jobs], default=datetime.isoformat)
            recorded = self.execute(_RECORD_JOBS, {"jobs": rows})
        except StorageError as error:
            if error.sqlstate != sqlstate.UNIQUE_VIOLATION:
                raise
            raise LedgerConflictError("another transaction has recorded one of the jobs") from error
        if recorded != len(jobs):
            raise LedgerError(f"expected to insert {len(jobs)} ledger rows, inserted {recorded}")
        for table, details in (
            (models.rejections, {job.job.job_id: rejected_columns(job.outcome) for job in jobs}),
            (models.cohorts, {job.job.job_id: by_user_columns(job.outcome) for job in jobs}),
        ):
            added = [{"job_id": job_id, **found} for job_id, found in details.items() if found]
            if added:
                put = upsert(table)
                columns = {name: put.excluded[name] for name in added[0] if name != "job_id"}
                put = put.on_conflict_do_update(index_elements=["job_id"], set_=columns)
                self.execute(put, added)


def _row(job: FinishedJobDTO) -> dict[str, Any]:
    outcome, audit = job.outcome, job.job.audit
    return {
        "job_id": job.job.job_id,
        "task": job.job.task,
        "state": outcome.state,
        "user_id": job.job.user_id,
        "request_digest": job.job.request_digest,
        "result": outcome.result,
        "error": outcome.error,
        **(asdict(outcome.figures) if outcome.figures else {}),
        **{name: getattr(audit, name) for name in _AUDIT},
    }


def rejected_columns(outcome: OutcomeDTO) -> dict[str, Any]:
    """Return the columns of a job's rejected IDs; empty if it has none."""
    rejected = outcome.rejected
    return (
        {
            "unknown_interview_ids": rejected.unknown,
            "malformed_interview_ids": rejected.malformed,
        }
        if rejected
        else {}
    )


def by_user_columns(outcome: OutcomeDTO) -> dict[str, Any]:
    """Return the column of a job's counts by user; empty if it has none."""
    by_user = outcome.created_by_user
    return {} if by_user is None else {"created_by_user": by_user}


def _pruned_job(row: Row[Any]) -> PrunedJobDTO:
    outcome = row.pruned_created, row.pruned_result, row.pruned_error
    return PrunedJobDTO(row.digest_prefix, *outcome)


def finished_job(row: Row[Any]) -> FinishedJobDTO:
    """Read a ledger row that has :data:`COLUMNS` and ``finished_at``."""
    figures = (
        FiguresDTO(row.requested, row.repeated, row.already_granted, row.created)
        if row.requested is not None
        else None
    )
    audit = AuditDTO(*(getattr(row, name) for name in _AUDIT))
    return FinishedJobDTO(
        JobDTO(row.job_id, row.task, row.user_id, row.request_digest, audit),
        OutcomeDTO(row.state, row.result, row.error, figures),
        row.finished_at,
    )
