"""What a producer reads of a job: result, progress, status; and the announcement of a job."""

from __future__ import annotations

from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    PositiveInt,
    WithJsonSchema,
)

from interview_access.contracts.names import DIGEST_LENGTH
from interview_access.contracts.origin import ORIGIN_LENGTHS, readable_origin

_ON_FIRST_USE = ConfigDict(defer_build=True)  # most processes use few of these models
_NO_NUL = r"^[^\x00]*$"  # which PostgreSQL cannot store


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class GrantAccessResult(_Result):
    """The result of a grant-access job, for one user or for a cohort.

    Attributes:
        created_access_count: Number of grants (rows) that the job created.
    """

    success: Literal[True] = True
    created_access_count: int


class InterviewAttemptResult(_Result):
    """The result of a create-interview-attempt job.

    Attributes:
        interview_attempt_id: The ID of the attempt, a UUID.
    """

    success: Literal[True] = True
    interview_attempt_id: str


class JobProgress(BaseModel):
    """The progress of a running job of several chunks.

    Attributes:
        done: Number of requested grants that have been processed.
        total: Number of grants requested.
    """

    model_config = _ON_FIRST_USE

    done: int
    total: int


class JobFailure(BaseModel):
    """Why a job failed, was cancelled or expired.

    Attributes:
        type: Name of the error's class.
        sentence: The reason for people, in one sentence.
        details: The reason for programs; its keys depend on the type.
    """

    model_config = _ON_FIRST_USE

    type: str
    sentence: str
    details: dict[str, Any] = {}


# pydantic's own strings have no lone surrogates, of which JSON allows the escape.
_AsGiven = Annotated[
    list[str], PlainValidator(list), WithJsonSchema({"type": "array", "items": {"type": "string"}})
]


def _origin_schema(name: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "minLength": 1, "maxLength": ORIGIN_LENGTHS[name]})


# Any value is accepted, as in a message's header: it makes no announcement invalid.
_Actor = Annotated[str, PlainValidator(partial(readable_origin, "actor")), _origin_schema("actor")]
_Reason = Annotated[
    str, PlainValidator(partial(readable_origin, "reason")), _origin_schema("reason")
]

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "expired", "unknown"]

FINAL_STATES: frozenset[JobState] = frozenset({"succeeded", "failed", "cancelled", "expired"})


class JobStatus(BaseModel):
    """The status of a job. Its JSON omits fields that are not known or do not apply.

    Attributes:
        job_id: The job's ID.
        state: ``queued``: sent and not started, or waiting for a retry. ``running``: started and
            not finished. ``succeeded`` and ``failed``: finished. ``cancelled`` and ``expired``: it
            ended without any effect. ``unknown``: no job with this ID was announced, started or
            finished.
        task: Name of the job's task.
        user_id: The user, if the job is for one user and its request is valid.
        sent_at: When the job was announced.
        eta: Time before which it is not started.
        expires_at: Time after which it is not started.
        cancel_requested: Cancellation was requested, and the job has not ended. It will not start,
            or it stops after its current chunk unless that is its last.
        progress: Progress of a running job of several chunks.
        requested: Number of grants requested by a job that succeeded, with duplicates: interview
            IDs as given, times user IDs as given. It is the sum of `repeated`, `already_granted`
            and `created`.
        repeated: Number of requested grants that are duplicates, in whatever spelling.
        already_granted: Number of requested grants that already existed.
        created: Number of grants that the job created.
        created_by_user: Number of grants created for each user of a cohort.
        result: The result of a job that succeeded.
        error: The reason of a job that failed, was cancelled or expired.
        unknown_interview_ids: IDs that no interview has, as given. It is all of them, unless
            `omitted` names the field. Remove them from the request.
        malformed_interview_ids: IDs that are not UUIDs, likewise.
        omitted: Number of omitted entries of each field named here: a reply is limited to about
            256 KB. `interview-access status JOB_ID --json` prints all entries.
        finished_at: When a job in the ledger ended.
        requested_at: When the job was requested in the outbox, if it was.
        enqueued_at: When the message of a job in the ledger was enqueued, by its producer's clock.
        started_at: When the attempt began that recorded the outcome of a job in the ledger. Not set
            if the job ended without an attempt, such as one that was cancelled while it waited.
        attempts: Number of attempts, that one included.
        worker: Node name of the worker of that attempt.
        actor: Who requested the job, by its producer.
        reason: Why, by its producer.
    """

    model_config = _ON_FIRST_USE

    job_id: str
    state: JobState
    task: str | None = None
    user_id: str | None = None
    sent_at: datetime | None = None
    eta: datetime | None = None
    expires_at: datetime | None = None
    cancel_requested: Literal[True] | None = None
    progress: JobProgress | None = None
    requested: int | None = None
    repeated: int | None = None
    already_granted: int | None = None
    created: int | None = None
    created_by_user: dict[str, int] | None = None
    result: dict[str, Any] | None = None
    error: JobFailure | None = None
    unknown_interview_ids: _AsGiven | None = None
    malformed_interview_ids: _AsGiven | None = None
    omitted: dict[str, int] | None = None
    finished_at: datetime | None = None
    requested_at: datetime | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    attempts: int | None = None
    worker: str | None = None
    actor: str | None = None
    reason: str | None = None

    @property
    def final(self) -> bool:
        """Whether the state is final."""
        return self.state in FINAL_STATES


class Announcement(BaseModel):
    """Makes a job known before a worker starts it.

    A producer may store it in the same MULTI as the job's message; the client package does.

    Attributes:
        task: Name of the job's task.
        digest: Digest of the request. With it the client package refuses to send another request
            under this job ID.
        sent_at: When the job was sent.
        eta: Time before which the job is not started.
        expires_at: Time after which the job is not started.
        actor: Who requested the job, as in the message's header.
        reason: Why, likewise.
    """

    model_config = _ON_FIRST_USE

    task: Annotated[str, Field(max_length=255, pattern=_NO_NUL)]
    digest: Annotated[str, Field(max_length=DIGEST_LENGTH, pattern=_NO_NUL)] | None = None
    sent_at: datetime
    eta: datetime | None = None
    expires_at: datetime | None = None
    actor: _Actor | None = None
    reason: _Reason | None = None


class WorkerLimits(BaseModel):
    """The limits that the workers state, so that clients check them before they send.

    Attributes:
        max_interview_ids: The workers' GRANT_MAX_INTERVIEW_IDS: grants that one job may request.
    """

    model_config = _ON_FIRST_USE

    max_interview_ids: PositiveInt
