"""SQLAlchemy models of the tables: four of the platform's Django service, and our ledger.

The first four stand to the name, type, index and key as Django declares them, so that a worker
pointed at that service's database works and the service reads what the worker wrote. Nothing
outside storage/ sees a model: what leaves is a DTO.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, DateTime, ForeignKey, Identity, Index, Integer, Interval, String
from sqlalchemy import Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

USER_ID_LENGTH = 36
"""Characters of a user id at most, as the platform's tables hold it."""


class Base(DeclarativeBase):
    """The metadata that the migrations and their check compare a database with."""


def _interview_key(**options: Any) -> Mapped[UUID]:
    """A reference to an interview as Django declares it: no action, checked at COMMIT."""
    key = ForeignKey("interview_interview.id", deferrable=True, initially="DEFERRED")
    return mapped_column(key, nullable=False, **options)


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
    interview_id: Mapped[UUID] = _interview_key(unique=True)
    is_default_access_allowed: Mapped[bool]
    should_end_interview_after_duration: Mapped[bool]


class InterviewAttempt(Base):
    """One user's start of one interview."""

    __tablename__ = "interview_interviewattempt"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    interview_id: Mapped[UUID] = _interview_key(index=True)
    user_id: Mapped[str] = mapped_column(String(USER_ID_LENGTH), index=True)
    start_datetime: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    end_datetime: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    scheduled_end_datetime: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class UserInterviewAccess(Base):
    """A grant: one user's access to one interview. The unique key is ours."""

    __tablename__ = "interview_userinterviewaccess"
    __table_args__ = (UniqueConstraint("user_id", "interview_id"),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    interview_id: Mapped[UUID] = _interview_key(index=True)
    user_id: Mapped[str] = mapped_column(String(USER_ID_LENGTH), index=True)


class GrantAccessJob(Base):
    """A row of the ledger: a finished job and its answer, written in the job's own transaction.

    ``open`` is the state between the two statements of that transaction; nobody else sees it.
    """

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
