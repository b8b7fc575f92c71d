"""SQLAlchemy models of the tables: four of the platform's Django service, and four of ours.

The first four stand to the name, type, index and key as Django declares them, so that a worker
pointed at that service's database works and the service reads what the worker wrote. Nothing
outside storage/ sees a model: what leaves is a DTO.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Interval,
    String,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

USER_ID_LENGTH = 36
"""Characters of a user id at most, as the platform's tables hold it."""


class Base(DeclarativeBase):
    """The metadata that the migrations and their check compare a database with."""


def _interview_key(name: str, *, unique: bool = False) -> Mapped[UUID]:
    """A reference to an interview as Django declares it: no action, checked at COMMIT."""
    key = ForeignKey("interview_interview.id", name=name, deferrable=True, initially="DEFERRED")
    return mapped_column(key, unique=unique or None, nullable=False)


def _user_indexes(name: str) -> tuple[Index, Index]:
    """What Django makes for indexed text: one index for equality and one for LIKE."""
    by_prefix = {"user_id": "varchar_pattern_ops"}
    return Index(name, "user_id"), Index(f"{name}_like", "user_id", postgresql_ops=by_prefix)


def _now() -> Mapped[datetime]:
    return mapped_column(DateTime(timezone=True), server_default=text("clock_timestamp()"))


class Interview(Base):
    """An interview that users can be given access to."""

    __tablename__ = "interview_interview"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(255))
    description: Mapped[str | None] = mapped_column(Text)
    duration: Mapped[timedelta] = mapped_column(Interval)


class InterviewConfig(Base):
    """How one interview is run; an interview without one has the defaults."""

    __tablename__ = "interview_interviewconfig"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    interview_id: Mapped[UUID] = _interview_key(
        "interview_interviewc_interview_id_04c037b4_fk_interview", unique=True
    )
    is_default_access_allowed: Mapped[bool]
    should_end_interview_after_duration: Mapped[bool]


class InterviewAttempt(Base):
    """One user's start of one interview."""

    __tablename__ = "interview_interviewattempt"
    __table_args__ = (
        Index("interview_interviewattempt_interview_id_a47e01a3", "interview_id"),
        *_user_indexes("interview_interviewattempt_user_id_ee1d88a1"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    interview_id: Mapped[UUID] = _interview_key(
        "interview_interviewa_interview_id_a47e01a3_fk_interview"
    )
    user_id: Mapped[str] = mapped_column(String(USER_ID_LENGTH))
    start_datetime: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    end_datetime: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    scheduled_end_datetime: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class UserInterviewAccess(Base):
    """A grant: one user's access to one interview. The unique key is ours."""

    __tablename__ = "interview_userinterviewaccess"
    __table_args__ = (
        UniqueConstraint("user_id", "interview_id"),
        Index("interview_userinterviewaccess_interview_id_473ac53f", "interview_id"),
        *_user_indexes("interview_userinterviewaccess_user_id_0f6e2105"),
    )

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    interview_id: Mapped[UUID] = _interview_key(
        "interview_userinterv_interview_id_473ac53f_fk_interview"
    )
    user_id: Mapped[str] = mapped_column(String(USER_ID_LENGTH))


class GrantAccessJob(Base):
    """A row of the ledger: a finished job and its answer, inserted by the job's own transaction."""

    __tablename__ = "grant_access_job"
    __table_args__ = (Index("grant_access_job_finished_at_idx", "finished_at"),)

    job_id: Mapped[str] = mapped_column(String(255, collation="C"), primary_key=True)
    task: Mapped[str] = mapped_column(String(255))
    state: Mapped[str] = mapped_column(String(16))
    user_id: Mapped[str | None] = mapped_column(String(USER_ID_LENGTH))
    request_digest: Mapped[str] = mapped_column(String(64))
    requested: Mapped[int | None] = mapped_column(Integer)
    repeated: Mapped[int | None] = mapped_column(Integer)
    already_granted: Mapped[int | None] = mapped_column(Integer)
    created: Mapped[int | None] = mapped_column(Integer)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    error: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    finished_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class GrantAccessRequest(Base):
    """A job that a service asked for in a transaction of its own, until the ledger has its answer.

    Attributes:
        sent_at: When it was last put on the queue.
        look_at: When a relay looks at it next.
    """

    __tablename__ = "grant_access_request"
    __table_args__ = (
        CheckConstraint("job_id ~ '^[ -~]{1,255}$'", name="grant_access_request_job_id_check"),
        Index("grant_access_request_look_at_idx", "look_at"),
        Index(
            "grant_access_request_unsent_idx",
            "look_at",
            postgresql_where=text("sent_at IS NULL"),
        ),
    )

    job_id: Mapped[str] = mapped_column(
        String(255, collation="C"),
        primary_key=True,
        server_default=text("gen_random_uuid()::text"),
    )
    user_id: Mapped[str] = mapped_column(Text)
    interview_ids: Mapped[list[str]] = mapped_column(ARRAY(Text))
    requested_at: Mapped[datetime] = _now()
    sent_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    look_at: Mapped[datetime] = _now()


class GrantAccessCancellation(Base):
    """That a job is to be cancelled. What becomes of that, the ledger says."""

    __tablename__ = "grant_access_cancellation"

    job_id: Mapped[str] = mapped_column(String(255, collation="C"), primary_key=True)
    requested_at: Mapped[datetime] = _now()


class GrantAccessRejection(Base):
    """All ids for which a job failed, as they were given; its error names the first of them."""

    __tablename__ = "grant_access_rejection"

    job_id: Mapped[str] = mapped_column(String(255, collation="C"), primary_key=True)
    # The type json keeps every string that JSON can hold; jsonb refuses NUL and lone surrogates.
    unknown_interview_ids: Mapped[list[str]] = mapped_column(JSON)
    malformed_interview_ids: Mapped[list[str]] = mapped_column(JSON)


class GrantAccessCohort(Base):
    """How many grants each user had of a job for several: ``{"user id": count}``."""

    __tablename__ = "grant_access_cohort"

    job_id: Mapped[str] = mapped_column(String(255, collation="C"), primary_key=True)
    # The type json, for jsonb would sort the users and take ten times as long.
    created_by_user: Mapped[dict[str, int]] = mapped_column(JSON)
