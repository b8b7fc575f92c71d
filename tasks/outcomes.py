"""Outcomes of jobs: how the ledger keeps them, and what pollers and operators read of them.

The row of an old job is pruned. Its tombstone keeps the outcome in short.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from interview_access.contracts import GrantAccessResult, JobStatus
from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobFailedError,
)
from interview_access.stored_errors import from_record, to_record

from storage.dtos import FinishedJobDTO, JobDTO, OutcomeDTO, PrunedJobDTO, RejectedIdsDTO


def failed(error: InterviewAccessError, rejected: RejectedIdsDTO | None = None) -> OutcomeDTO:
    """Build the outcome of a job that ends with an error.

    Args:
        error: The error; its class decides the state.
        rejected: All interview IDs that the job rejected.
    """
    return OutcomeDTO(
        error.state,
        error=to_record(error),
        rejected=rejected,
    )


def result_of(outcome: OutcomeDTO) -> dict[str, Any]:
    """Return the result of a successful outcome.

    Raises:
        InterviewAccessError: the outcome's error in its own class, if the job did not succeed.
    """
    if outcome.error:
        raise from_record(outcome.error)
    return outcome.result or {}


def status_of(finished: FinishedJobDTO) -> JobStatus:
    """Build the status of a job that is in the ledger.

    Args:
        finished: Its row, with all details.
    """
    job, outcome = finished.job, finished.outcome
    figures, rejected = outcome.figures, outcome.rejected
    return JobStatus.model_validate(
        {
            "job_id": job.job_id,
            "state": outcome.state,
            "task": job.task,
            "user_id": job.user_id,
            "requested": figures and figures.requested,
            "repeated": figures and figures.repeated,
            "already_granted": figures and figures.already_granted,
            "created": figures and figures.created,
            "result": outcome.result,
            "error": outcome.error,
            "created_by_user": outcome.created_by_user,
            "unknown_interview_ids": rejected and rejected.unknown,
            "malformed_interview_ids": rejected and rejected.malformed,
            "finished_at": finished.finished_at,
            **asdict(job.audit),
        }
    )


def from_tombstone(entry: JobDTO, pruned: PrunedJobDTO) -> FinishedJobDTO:
    """Rebuild a finished job from its tombstone.

    Args:
        entry: The job as a delivery requests it, which may be another request.
        pruned: The tombstone.
    """
    prefix = pruned.digest_prefix
    is_same = prefix is None or entry.request_digest.startswith(prefix)
    known = entry if is_same else replace(entry, request_digest=f"{prefix}…")
    return FinishedJobDTO(known, _pruned_outcome(entry.job_id, pruned))


def status_of_pruned(job_id: str, pruned: PrunedJobDTO) -> JobStatus:
    """Build the status of a job whose ledger row was pruned.

    Args:
        job_id: The job's ID.
        pruned: Its tombstone.
    """
    outcome = _pruned_outcome(job_id, pruned)
    return JobStatus.model_validate(
        {
            "job_id": job_id,
            "state": outcome.state,
            "created": pruned.created,
            "result": outcome.result,
            "error": outcome.error,
        }
    )


def _pruned_outcome(job_id: str, pruned: PrunedJobDTO) -> OutcomeDTO:
    if pruned.error_type == JobCancelledException.__name__:
        return failed(JobCancelledException.of(job_id))
    if pruned.error_type:
        return failed(JobFailedError.of_pruned(job_id, pruned.error_type))
    if pruned.created is None:
        return OutcomeDTO("succeeded", pruned.result)
    result = GrantAccessResult(created_access_count=pruned.created)
    return OutcomeDTO("succeeded", result.model_dump())
