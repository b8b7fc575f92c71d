"""Interviews with their configuration, and interview attempts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Row, insert, select

from storage import models
from storage.dtos import InterviewAttemptDTO, InterviewDTO
from storage.interface import InterviewStore
from storage.postgres.session import Session


class PostgresInterviews(Session, InterviewStore):
    """Interviews and attempts in the platform's tables."""

    def get_interview_details(self, interview_ids: Collection[str]) -> Sequence[InterviewDTO]:
        """See the interface."""
        interview, config = models.interviews.c, models.interview_configs.c
        rows = self.query(
            select(
                interview.id,
                interview.title,
                interview.description,
                interview.duration,
                config.is_default_access_allowed,
                config.should_end_interview_after_duration,
            )
            .outerjoin(models.interview_configs, config.interview_id == interview.id)
            .where(interview.id.in_(interview_ids))
            .order_by(interview.id)
            .with_for_update(read=True, key_share=True, of=models.interviews)
        )
        return [_interview(row) for row in rows]

    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """See the interface."""
        if not attempts:
            return
        self.execute(insert(models.interview_attempts), [asdict(attempt) for attempt in attempts])
        # The foreign keys are deferred. Checked here, a violation does not surface in COMMIT.
        self.execute("SET CONSTRAINTS ALL IMMEDIATE")


def _interview(row: Row[*tuple[Any, ...]]) -> InterviewDTO:
    is_configured = row.should_end_interview_after_duration is not None
    return InterviewDTO(
        id=str(row.id),
        title=row.title,
        description=row.description,
        duration=row.duration,
        is_default_access_allowed=row.is_default_access_allowed if is_configured else False,
        should_end_interview_after_duration=(
            row.should_end_interview_after_duration if is_configured else True
        ),
    )
