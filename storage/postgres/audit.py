"""Lists of finished jobs, newest first: who requested them, when, and with which outcome."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from uuid import UUID

from sqlalchemy import ColumnElement, Select, TextClause, any_, func, or_, select, text

from storage import models
from storage.dtos import FinishedJobDTO, FinishedJobFilterDTO
from storage.postgres.ledger import finished_job
from storage.postgres.session import Session

_FAILED = text("state <> 'succeeded'")  # the condition of the index, word for word


class PostgresAudit(Session):
    """Finished jobs by user, interview, actor, state and time; each filter has an index."""

    def list_finished_jobs(
        self, wanted: FinishedJobFilterDTO, limit: int
    ) -> Sequence[FinishedJobDTO]:
        """Return the finished jobs that a filter selects; see the interface of its reader."""
        return [finished_job(row) for row in self.query(selected_jobs(wanted, limit))]


def selected_jobs(wanted: FinishedJobFilterDTO, limit: int) -> Select[*tuple[object, ...]]:
    """Build the query of the finished jobs that a filter selects, newest first.

    Args:
        wanted: The filter.
        limit: Largest number of jobs.
    """
    newest = models.jobs.c.finished_at.desc()
    return select(models.jobs).where(*_conditions(wanted)).order_by(newest).limit(limit)


def _conditions(wanted: FinishedJobFilterDTO) -> Iterator[ColumnElement[bool] | TextClause]:
    jobs = models.jobs.c
    if wanted.interview_id is not None:
        yield _has_created_grants(wanted)
    elif wanted.user_id is not None:
        yield or_(jobs.user_id == wanted.user_id, _has_created_grants(wanted))
    if wanted.actor is not None:
        yield jobs.actor == wanted.actor
    if wanted.state is not None:
        yield jobs.state == wanted.state
        if wanted.state != "succeeded":
            yield _FAILED
    if wanted.since is not None:
        yield jobs.finished_at >= wanted.since
    if wanted.until is not None:
        yield jobs.finished_at < wanted.until


def _has_created_grants(wanted: FinishedJobFilterDTO) -> ColumnElement[bool]:
    """Select the jobs that created grants of the filter's user and interview."""
    grants = models.grants.c
    created = select(grants.created_by_job).distinct()
    if wanted.user_id is not None:
        created = created.where(grants.user_id == wanted.user_id)
    if wanted.interview_id is not None:
        created = created.where(grants.interview_id == UUID(wanted.interview_id))
    # Not IN, which the planner could turn into a scan of the whole ledger.
    return models.jobs.c.job_id == any_(func.array(created.scalar_subquery()))
