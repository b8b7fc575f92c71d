"""The outbox: requests that services insert in the table ``grant_access_request``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import Row, func, select, update

from storage import models
from storage.dtos import AccessRequestDTO, OutboxTotalsDTO
from storage.interface import MAX_HEADERS_BYTES, MAX_REQUEST_BYTES, Outbox
from storage.postgres.ledger import JOB_KEY
from storage.postgres.session import Session

HAS_DUE_REQUESTS = (
    "SELECT EXISTS (SELECT FROM grant_access_request WHERE look_at <= statement_timestamp())"
)

# Python has neither infinite timestamps nor years before 1.
_CLAMPED = """
    CASE WHEN {0} IS NOT NULL
    THEN greatest(least({0}, clock_timestamp(){1}), clock_timestamp() - interval '100 years') END
"""
_IN_FUTURE = " + interval '100 years'"
_REQUESTED_AT = _CLAMPED.format("requested_at", "")
_ETA = _CLAMPED.format("eta", _IN_FUTURE)
# Only strings become text: a jsonb of a few bytes may hold a number of 131,072 digits. The
# stored size comes first: jsonb_typeof() decompresses up to 256 MB.
_HEADERS = f"""
    CASE WHEN headers IS NULL THEN NULL
    WHEN pg_column_size(headers) > {MAX_HEADERS_BYTES} THEN ''
    WHEN jsonb_typeof(headers) = 'object' THEN (
        SELECT CASE WHEN length(strings) <= {MAX_HEADERS_BYTES} THEN strings ELSE '' END
        FROM (
            SELECT coalesce(jsonb_object_agg(
                key, CASE WHEN jsonb_typeof(value) = 'string' THEN value END), '{{}}')::text
            FROM jsonb_each(request.headers)
        ) AS readable (strings)
    ) ELSE '' END
"""  # noqa: S608 - a constant
_RETURNED = f"""
    job_id, task, {_REQUESTED_AT} AS requested_at, {_CLAMPED.format("sent_at", "")} AS sent_at,
    {_ETA} AS eta, {_CLAMPED.format("expires_at", _IN_FUTURE)} AS expires_at, {_HEADERS} AS headers
"""
_FIND_REQUEST = f"""
    SELECT {_RETURNED}, user_id, user_ids, interview_ids, false AS is_too_large
    FROM grant_access_request AS request WHERE job_id = %(job_id)s
"""  # noqa: S608 - a constant

# The table has an index in the order of each of these two.
_LOCK_DUE = """
    SELECT job_id, look_at, {size} AS size FROM grant_access_request
    WHERE {condition} AND look_at <= statement_timestamp()
    ORDER BY look_at LIMIT {limit} FOR UPDATE SKIP LOCKED
"""
# Not all columns: the role may lack privileges on later ones.
_READ = """
    job_id, task, user_id, user_ids, interview_ids, eta, expires_at, headers, requested_at, sent_at
"""
_STORED_SIZE = "pg_column_size(interview_ids)::bigint + coalesce(pg_column_size(user_ids), 0)"
_ID_COUNT = "cardinality(interview_ids)::bigint + coalesce(cardinality(user_ids), 0)"
_USER_SIZE = "coalesce(octet_length(user_id), 0)"
_LOCK_UNSENT = _LOCK_DUE.format(size=_STORED_SIZE, condition="sent_at IS NULL", limit="%(limit)s")
_LOCK_SENT = _LOCK_DUE.format(
    size=_STORED_SIZE,
    condition="sent_at IS NOT NULL",
    limit="%(limit)s - (SELECT count(*) FROM unsent)",
)
# First a page by compressed size, so that no more is decompressed. Then a page by the memory that
# it takes in Python: the text of the IDs, and about 64 bytes each.
LOCK_DUE_REQUESTS = f"""
    WITH unsent AS ({_LOCK_UNSENT}), sent AS ({_LOCK_SENT}), due AS (
        SELECT job_id, row_number() OVER page AS number, sum(size) OVER page AS stored
        FROM (SELECT 1 AS turn, * FROM unsent UNION ALL SELECT 2, * FROM sent) AS either
        WINDOW page AS (ORDER BY turn, look_at, job_id ROWS UNBOUNDED PRECEDING)
    ), sized AS (
        SELECT number, {_READ}, CASE
            WHEN {_STORED_SIZE} + {_USER_SIZE} <= %(request_bytes)s
             AND ({_ID_COUNT}) * 64 <= %(request_bytes)s
            THEN octet_length(array_send(interview_ids))::bigint + {_USER_SIZE}
                 + coalesce(octet_length(array_send(user_ids)), 0) + ({_ID_COUNT}) * 64
        END AS size
        FROM due JOIN grant_access_request AS request USING (job_id)
        WHERE number = 1 OR stored <= %(page_bytes)s
    ), page AS (
        SELECT *, size <= %(request_bytes)s IS TRUE AS is_read,
            sum(size) FILTER (WHERE size <= %(request_bytes)s) OVER (ORDER BY number) AS total
        FROM sized
    )
    SELECT {_RETURNED}, NOT is_read AS is_too_large,
        CASE WHEN is_read THEN user_id ELSE '' END AS user_id,
        CASE WHEN is_read THEN user_ids END AS user_ids,
        CASE WHEN is_read THEN interview_ids ELSE '{{}}' END AS interview_ids
    FROM page AS request
    WHERE number = 1 OR NOT is_read OR total <= %(page_bytes)s ORDER BY number
"""  # noqa: S608 - a constant
_COUNT = f"""
    SELECT count(*) FILTER (WHERE sent_at IS NULL) AS unsent,
        min({_REQUESTED_AT}) FILTER (WHERE sent_at IS NULL) AS oldest_unsent_at,
        count(sent_at) AS sent
    FROM grant_access_request
"""  # noqa: S608 - a constant
_RESCHEDULE = f"""
    UPDATE grant_access_request
    SET sent_at = CASE WHEN %(sent)s THEN clock_timestamp() ELSE sent_at END,
        look_at = clock_timestamp() + greatest(
            least(greatest(clock_timestamp() - {_REQUESTED_AT}, interval '1 s'), interval '60 s'),
            CASE WHEN %(sent)s OR sent_at IS NOT NULL THEN ({_ETA} - clock_timestamp()) / 2 END)
    WHERE job_id = ANY (CAST(%(job_ids)s AS text[]))
"""  # noqa: S608 - a constant
_DELETE_FINISHED = f"""
    DELETE FROM grant_access_request AS request
    WHERE job_id = ANY (CAST(%(job_ids)s AS text[])) AND (
        EXISTS (SELECT FROM grant_access_job AS job WHERE job.job_id = request.job_id)
        OR EXISTS (SELECT FROM grant_access_tombstone WHERE job_key = {JOB_KEY})
    )
    RETURNING job_id
"""  # noqa: S608 - a constant


class PostgresOutbox(Session, Outbox):
    """Outbox requests in the table ``grant_access_request``."""

    def find_request(self, job_id: str) -> AccessRequestDTO | None:
        """Return the request of a job, or None if there is none."""
        rows = self.query(_FIND_REQUEST, {"job_id": job_id})
        return next(map(_request, rows), None)

    def count_requests(self) -> OutboxTotalsDTO:
        """Count the requests."""
        ((unsent, oldest_unsent_at, sent),) = self.query(_COUNT, {})
        return OutboxTotalsDTO(unsent, oldest_unsent_at, sent)

    def list_unsent_requests(self, after: str, limit: int) -> Sequence[str]:
        """Return the job IDs of requests that were never enqueued; see the interface."""
        requests = models.requests.c
        rows = self.query(
            select(requests.job_id)
            .where(requests.job_id > after, requests.sent_at.is_(None))
            .order_by(requests.job_id)
            .limit(limit)
        )
        return [job_id for (job_id,) in rows]

    def lock_due_requests(
        self, limit: int, *, page_bytes: int = MAX_REQUEST_BYTES
    ) -> Sequence[AccessRequestDTO]:
        """See the interface."""
        bounds = {"limit": limit, "page_bytes": page_bytes, "request_bytes": MAX_REQUEST_BYTES}
        rows = self.query(LOCK_DUE_REQUESTS, bounds)
        return [_request(row) for row in rows]

    def delete_finished_requests(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        rows = self.query(_DELETE_FINISHED, {"job_ids": list(job_ids)})
        return frozenset(job_id for (job_id,) in rows)

    def reschedule_requests(self, job_ids: Collection[str], *, sent: bool) -> None:
        """See the interface."""
        self.execute(_RESCHEDULE, {"job_ids": list(job_ids), "sent": sent})

    def schedule_all_requests_now(self) -> None:
        """See the interface."""
        now = func.clock_timestamp()
        self.execute(
            update(models.requests).where(models.requests.c.look_at > now).values(look_at=now)
        )


def _request(row: Row[*tuple[Any, ...]]) -> AccessRequestDTO:
    return AccessRequestDTO(
        job_id=row.job_id,
        user_id=row.user_id,
        interview_ids=tuple(row.interview_ids),
        requested_at=row.requested_at,
        sent_at=row.sent_at,
        is_too_large=row.is_too_large,
        task=row.task,
        user_ids=None if row.user_ids is None else tuple(row.user_ids),
        eta=row.eta,
        expires_at=row.expires_at,
        headers=row.headers,
    )
