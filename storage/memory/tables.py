"""The tables of the reference model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from datetime import datetime

from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    PrunedJobDTO,
    UserInterviewAccessDTO,
)


@dataclass(slots=True)
class Tables:
    """All tables; a transaction works on a copy."""

    interviews: dict[str, InterviewDTO] = field(default_factory=dict)
    grants: dict[UserInterviewAccessDTO, str | None] = field(default_factory=dict)
    attempts: dict[str, InterviewAttemptDTO] = field(default_factory=dict)
    jobs: dict[str, FinishedJobDTO] = field(default_factory=dict)
    cancellations: dict[str, datetime] = field(default_factory=dict)
    pruned: dict[str, PrunedJobDTO] = field(default_factory=dict)
    requests: dict[str, AccessRequestDTO] = field(default_factory=dict)
    due_at: dict[str, datetime] = field(default_factory=dict)

    def copy(self) -> Tables:
        """Return a copy whose rows can be replaced."""
        return Tables(*(dict(getattr(self, table.name)) for table in fields(self)))
