"""The contract between producers and workers, version 1: names, requests, results, digests.

It does not depend on Celery, Redis or a database.
"""

from __future__ import annotations

from interview_access.contracts.digests import (
    RequestedInterviews,
    request_digest,
    unreadable_request_digest,
)
from interview_access.contracts.identifiers import (
    JOB_ID_RULE,
    InterviewId,
    canonical_interview_id,
    is_job_id,
)
from interview_access.contracts.jobs import (
    GrantCohortJob,
    GrantJob,
    InterviewAttemptJob,
    Job,
)
from interview_access.contracts.names import (
    ANNOUNCEMENT_DAYS,
    CANCEL_JOB,
    CONTROL_QUEUE,
    CREATE_INTERVIEW_ATTEMPT,
    DEFAULT_MAX_INTERVIEW_IDS,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    JOB_STATUS,
    KEY_PREFIX,
    LIMITS_KEY,
    MAX_JOB_ID_LENGTH,
    PROGRESS,
    QUEUE,
    REPLY_BYTES,
    announcement_key,
    reply_key,
    result_key,
)
from interview_access.contracts.origin import ORIGIN_LENGTHS, origin_headers, readable_origin
from interview_access.contracts.requests import (
    CreateInterviewAttemptRequest,
    GrantAccessRequest,
    GrantCohortAccessRequest,
)
from interview_access.contracts.results import (
    FINAL_STATES,
    Announcement,
    GrantAccessResult,
    InterviewAttemptResult,
    JobFailure,
    JobProgress,
    JobState,
    JobStatus,
    WorkerLimits,
)
from interview_access.text import describe

__all__ = [
    "ANNOUNCEMENT_DAYS",
    "CANCEL_JOB",
    "CONTROL_QUEUE",
    "CREATE_INTERVIEW_ATTEMPT",
    "DEFAULT_MAX_INTERVIEW_IDS",
    "FINAL_STATES",
    "GRANT_ACCESS",
    "GRANT_COHORT_ACCESS",
    "JOB_ID_RULE",
    "JOB_STATUS",
    "KEY_PREFIX",
    "LIMITS_KEY",
    "MAX_JOB_ID_LENGTH",
    "ORIGIN_LENGTHS",
    "PROGRESS",
    "QUEUE",
    "REPLY_BYTES",
    "Announcement",
    "CreateInterviewAttemptRequest",
    "GrantAccessRequest",
    "GrantAccessResult",
    "GrantCohortAccessRequest",
    "GrantCohortJob",
    "GrantJob",
    "InterviewAttemptJob",
    "InterviewAttemptResult",
    "InterviewId",
    "Job",
    "JobFailure",
    "JobProgress",
    "JobState",
    "JobStatus",
    "RequestedInterviews",
    "WorkerLimits",
    "announcement_key",
    "canonical_interview_id",
    "describe",
    "is_job_id",
    "origin_headers",
    "readable_origin",
    "reply_key",
    "request_digest",
    "result_key",
    "unreadable_request_digest",
]
