"""Erasure: jobs and requests that name a user, and the replacement of what names it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import bindparam, update

from storage import models
from storage.dtos import FinishedJobDTO, JobPageDTO, NamingRequestDTO, RejectedIdsDTO
from storage.interface import Erasure
from storage.postgres.ledger import COLUMNS, by_user_columns, finished_job, rejected_columns
from storage.postgres.session import Session

_PAGE = "(SELECT * FROM grant_access_job WHERE job_id > %(after)s ORDER BY job_id LIMIT %(limit)s)"
_FIND_LAST = f"SELECT count(*), max(job_id) FROM {_PAGE} AS page"  # noqa: S608 - a constant
# jsonb stores characters, json the escapes with which it was written.
_NAMES = "(strpos({0}::text, %(escaped)s) > 0 OR strpos({0}::text, %(literal)s) > 0)"
_FIND_JOBS = f"""
    SELECT {COLUMNS}, finished_at,
           unknown_interview_ids, malformed_interview_ids, created_by_user
    FROM {_PAGE} AS page
    LEFT JOIN grant_access_rejection USING (job_id) LEFT JOIN grant_access_cohort USING (job_id)
    WHERE user_id = %(user_id)s
       OR strpos(actor, %(user_id)s) > 0 OR strpos(reason, %(user_id)s) > 0
       OR {_NAMES.format("error")} OR {_NAMES.format("created_by_user")}
       OR {_NAMES.format("unknown_interview_ids")} OR {_NAMES.format("malformed_interview_ids")}
"""  # noqa: S608 - constants
_REPLACE = """
    UPDATE grant_access_job AS job
    SET user_id = changed.user_id, actor = changed.actor, reason = changed.reason,
        error = changed.error
    FROM json_to_recordset(CAST(%(jobs)s AS json))
         AS changed (job_id text, user_id text, actor text, reason text, error jsonb)
    WHERE job.job_id = changed.job_id
"""
_FIND_REQUESTS = """
    SELECT * FROM (
        SELECT job_id, coalesce(user_id = %(user_id)s OR %(user_id)s = ANY (user_ids), false)
            AS is_for_user, headers ->> 'actor' AS actor, headers ->> 'reason' AS reason
        FROM grant_access_request
    ) AS requests
    WHERE is_for_user OR strpos(actor, %(user_id)s) > 0 OR strpos(reason, %(user_id)s) > 0
    ORDER BY job_id
"""


class PostgresErasure(Session, Erasure):
    """The details of the ledger, and the outbox, by the users that they name."""

    def find_jobs_naming(self, user_id: str, limit: int, *, after: str = "") -> JobPageDTO:
        """See the interface."""
        bounds = {"limit": limit, "after": after}
        ((count, last),) = self.query(_FIND_LAST, bounds)
        texts = {
            "user_id": user_id,
            "escaped": json.dumps(user_id)[1:-1],
            "literal": json.dumps(user_id, ensure_ascii=False)[1:-1],
        }
        jobs = []
        for row in self.query(_FIND_JOBS, bounds | texts):
            job = finished_job(row)
            ids = row.unknown_interview_ids, row.malformed_interview_ids
            rejected = None if ids == (None, None) else RejectedIdsDTO(*map(tuple, ids))
            outcome = replace(job.outcome, rejected=rejected, created_by_user=row.created_by_user)
            jobs.append(replace(job, outcome=outcome))
        return JobPageDTO(jobs, last if count == limit else None)

    def replace_details(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """See the interface."""
        jobs = sorted(jobs, key=lambda one: one.job.job_id)  # the order in which pruning locks rows
        changed = [
            {
                "job_id": one.job.job_id,
                "user_id": one.job.user_id,
                "actor": one.job.audit.actor,
                "reason": one.job.audit.reason,
                "error": one.outcome.error,
            }
            for one in jobs
        ]
        self.execute(_REPLACE, {"jobs": json.dumps(changed)})
        for table, columns in (
            (models.rejections, rejected_columns),
            (models.cohorts, by_user_columns),
        ):
            rows = [{"id": one.job.job_id, **columns(one.outcome)} for one in jobs]
            rows = [row for row in rows if len(row) > 1]
            if rows:
                self.execute(update(table).where(table.c.job_id == bindparam("id")), rows)

    def find_requests_naming(self, user_id: str) -> Sequence[NamingRequestDTO]:
        """See the interface."""
        return [NamingRequestDTO(*row) for row in self.query(_FIND_REQUESTS, {"user_id": user_id})]
