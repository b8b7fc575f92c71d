"""The use case of explaining a grant: which job created it, and what is known of that job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from interview_access.contracts import JobStatus

from storage.dtos import GrantOriginDTO
from storage.interface import GrantReader, JobReader
from tasks.outcomes import status_of, status_of_pruned


class ExplainingReader(GrantReader, JobReader, Protocol):
    """What this use case needs of a storage."""


@dataclass(frozen=True, slots=True)
class GrantExplanation:
    """One user's access to one interview, and the job that created it.

    Attributes:
        origin: Whether the interview and the grant exist, and the ID of the job that created it.
        job: The job's status: from the ledger, or from its tombstone, which has no task and no
            time. None if no job is named, and in the state ``unknown`` if neither has it.
        is_pruned: Whether the status is that of a tombstone.
    """

    origin: GrantOriginDTO
    job: JobStatus | None = None
    is_pruned: bool = False


def explain(storage: ExplainingReader, user_id: str, interview_id: str) -> GrantExplanation:
    """Find out which job created a grant.

    Args:
        storage: A storage, from which it only reads.
        user_id: The user.
        interview_id: A canonical interview ID.

    Raises:
        StorageError: if the database failed.
    """
    origin = storage.find_grant_origin(user_id, interview_id)
    job_id = origin.job_id
    if job_id is None:
        return GrantExplanation(origin)
    if finished := storage.get_finished_job(job_id):
        return GrantExplanation(origin, status_of(finished))
    if pruned := storage.get_pruned_job(job_id):
        return GrantExplanation(origin, status_of_pruned(job_id, pruned), is_pruned=True)
    return GrantExplanation(origin, JobStatus(job_id=job_id, state="unknown"))
