"""The tables: four of the platform's Django service, and six of the worker.

The platform's tables have the names, types, indexes and keys that Django declares, so that worker
and service can share them. Storages return DTOs, never rows. SQLAlchemy's ORM is not used:
importing it would take a tenth of a worker's start.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from storage.dtos import ACTOR_LENGTH, DEFAULT_REQUEST_TASK, REASON_LENGTH, WORKER_LENGTH

USER_ID_LENGTH = 36
"""Largest number of characters of a user ID, as in the platform's tables."""

METADATA = MetaData()
"""The schema that migrations and the check at a worker's start compare a database with."""


def _interview_key(name: str, *, unique: bool = False) -> Column[UUID]:
    """Build a foreign key to interviews as Django declares it: no action, checked at COMMIT."""
    key = ForeignKey("interview_interview.id", name=name, deferrable=True, initially="DEFERRED")
    return Column("interview_id", Uuid, key, unique=unique or None, nullable=False)


def _user_id() -> Column[str]:
    return Column("user_id", String(USER_ID_LENGTH), nullable=False)


def _user_indexes(name: str) -> tuple[Index, Index]:
    """Build the two indexes that Django creates for text: for equality and for LIKE."""
    by_prefix = {"user_id": "varchar_pattern_ops"}
    return Index(name, "user_id"), Index(f"{name}_like", "user_id", postgresql_ops=by_prefix)


def _job_id() -> Column[str]:
    return Column("job_id", String(255, collation="C"), primary_key=True)


def _now(name: str) -> Column[datetime]:
    now = text("clock_timestamp()")
    return Column(name, DateTime(timezone=True), server_default=now, nullable=False)


def _time(name: str, *, nullable: bool = True) -> Column[datetime]:
    return Column(name, DateTime(timezone=True), nullable=nullable)


interviews = Table(
    "interview_interview",
    METADATA,
    Column("id", Uuid, primary_key=True),
    Column("title", String(255), nullable=False),
    Column("description", Text),
    Column("duration", Interval, nullable=False),
)
"""Interviews that users can be given access to."""

interview_configs = Table(
    "interview_interviewconfig",
    METADATA,
    Column("id", BigInteger, Identity(), primary_key=True),
    _interview_key("interview_interviewc_interview_id_04c037b4_fk_interview", unique=True),
    Column("is_default_access_allowed", Boolean, nullable=False),
    Column("should_end_interview_after_duration", Boolean, nullable=False),
)
"""Configuration of interviews. An interview without a row has the defaults."""

interview_attempts = Table(
    "interview_interviewattempt",
    METADATA,
    Column("id", Uuid, primary_key=True),
    _interview_key("interview_interviewa_interview_id_a47e01a3_fk_interview"),
    _user_id(),
    _time("start_datetime", nullable=False),
    _time("end_datetime"),
    _time("scheduled_end_datetime"),
    Index("interview_interviewattempt_interview_id_a47e01a3", "interview_id"),
    *_user_indexes("interview_interviewattempt_user_id_ee1d88a1"),
)
"""Interview attempts: each row is one user's attempt at one interview."""

grants = Table(
    "interview_userinterviewaccess",
    METADATA,
    Column("id", BigInteger, Identity(), primary_key=True),
    _interview_key("interview_userinterv_interview_id_473ac53f_fk_interview"),
    _user_id(),
    Column("created_by_job", String(255, collation="C")),
    UniqueConstraint("user_id", "interview_id"),
    Index("interview_userinterviewaccess_interview_id_473ac53f", "interview_id"),
    *_user_indexes("interview_userinterviewaccess_user_id_0f6e2105"),
)
"""Grants: each row is one user's access to one interview. The worker adds the unique key, and the
column that holds the ID of the job that created the row."""

jobs = Table(
    "grant_access_job",
    METADATA,
    _job_id(),
    Column("task", String(255), nullable=False),
    Column("state", String(16), nullable=False),
    Column("user_id", String(USER_ID_LENGTH)),
    Column("request_digest", String(64), nullable=False),
    Column("requested", Integer),
    Column("repeated", Integer),
    Column("already_granted", Integer),
    Column("created", Integer),
    Column("result", JSONB),
    Column("error", JSONB),
    _time("finished_at"),
    _time("requested_at"),
    _time("enqueued_at"),
    _time("started_at"),
    Column("attempts", Integer),
    Column("worker", String(WORKER_LENGTH)),
    Column("actor", String(ACTOR_LENGTH)),
    Column("reason", String(REASON_LENGTH)),
    Index("grant_access_job_finished_at_idx", "finished_at"),
    Index(
        "grant_access_job_user_idx",
        "user_id",
        postgresql_using="hash",
        postgresql_where=text("user_id IS NOT NULL"),
    ),
    Index(
        "grant_access_job_actor_idx",
        "actor",
        "finished_at",
        postgresql_ops={"actor": "varchar_pattern_ops"},
        postgresql_where=text("actor IS NOT NULL"),
    ),
    Index(
        "grant_access_job_state_idx",
        "state",
        "finished_at",
        postgresql_ops={"state": "varchar_pattern_ops"},
        postgresql_where=text("state <> 'succeeded'"),
    ),
)
"""The ledger: finished jobs and their outcomes, each inserted by the job's own transaction."""

requests = Table(
    "grant_access_request",
    METADATA,
    Column(
        "job_id",
        String(255, collation="C"),
        primary_key=True,
        server_default=text("gen_random_uuid()::text"),
    ),
    Column("user_id", Text),
    Column("interview_ids", ARRAY(Text), nullable=False),
    _now("requested_at"),
    _time("sent_at"),
    _now("look_at"),
    Column("task", Text, nullable=False, server_default=DEFAULT_REQUEST_TASK),
    Column("user_ids", ARRAY(Text)),
    _time("eta"),
    _time("expires_at"),
    Column("digest", Text),
    Column("headers", JSONB),
    CheckConstraint("job_id ~ '^[ -~]{1,255}$'", name="grant_access_request_job_id_check"),
    Index("grant_access_request_look_at_idx", "look_at"),
    Index("grant_access_request_unsent_idx", "look_at", postgresql_where=text("sent_at IS NULL")),
)
"""The outbox: jobs that services request in their own transactions, until the jobs finish.

``sent_at`` is when a request was last enqueued, ``look_at`` when it is due next. ``digest`` is set
and read by the client package alone. Migration 0007 constrains the arguments by ``task``.
"""

cancellations = Table(
    "grant_access_cancellation",
    METADATA,
    _job_id(),
    _now("requested_at"),
    Index("grant_access_cancellation_requested_at_idx", "requested_at"),
)
"""Cancellation requests. The ledger has the outcome."""

rejections = Table(
    "grant_access_rejection",
    METADATA,
    _job_id(),
    # The type json stores every JSON string; jsonb rejects NUL and lone surrogates.
    Column("unknown_interview_ids", JSON, nullable=False),
    Column("malformed_interview_ids", JSON, nullable=False),
)
"""All interview IDs that failed a job, as its request spelled them. Its error names the first."""

tombstones = Table(
    "grant_access_tombstone",
    METADATA,
    Column("job_key", Uuid, primary_key=True),
    Column("digest", Integer),
    Column("created", Integer),
    Column("result", JSONB),
    Column("error", Text),
)
"""What is kept of pruned jobs, so that a late delivery does not execute one again.

``job_key`` is the first half of the job ID's SHA-256, ``digest`` the first 4 bytes of the request's
digest (null: unknown), ``created`` the number of grants created, ``result`` the result if it is not
that number, and ``error`` the class of the error. Most rows take 92 bytes with their index entry.
"""

cohorts = Table(
    "grant_access_cohort",
    METADATA,
    _job_id(),
    # Not jsonb, which would sort the users and take ten times as long.
    Column("created_by_user", JSON, nullable=False),
)
"""Numbers of grants that a cohort job created, as ``{user ID: count}``."""
