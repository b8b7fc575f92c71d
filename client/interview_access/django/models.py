"""The worker's tables that a service reads: requests of the outbox, and finished jobs.

The models only read: a row that is written past :mod:`interview_access.outbox` is not validated,
and a job without its row of the ledger could take effect again. The migrations of this app create
the tables where ``interview-access migrate`` has not.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar, NoReturn
from uuid import uuid4

from django.db import models
from django.db.models.functions import Now

from interview_access.contracts import (
    CREATE_INTERVIEW_ATTEMPT,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    MAX_JOB_ID_LENGTH,
)

TASKS = [
    (GRANT_ACCESS, "grant access"),
    (GRANT_COHORT_ACCESS, "grant cohort access"),
    (CREATE_INTERVIEW_ATTEMPT, "create interview attempt"),
]
"""The tasks, each with its description."""


class TextArrayField(models.Field):
    """A ``text[]``, read as a list. Elements may be None or lists."""

    def db_type(self, connection: Any) -> str:  # noqa: ARG002 - Django's signature
        """Return the column's type."""
        return "text[]"

    def value_to_string(self, obj: Any) -> str:
        """Serialize as ``dumpdata`` and Django's tests do; see :meth:`to_python`."""
        return json.dumps(self.value_from_object(obj))

    def to_python(self, value: Any) -> Any:
        """Deserialize as ``loaddata`` does."""
        return json.loads(value) if isinstance(value, str) else value


def random_id() -> str:
    """Return a random job ID, as the database chooses it by default."""
    return str(uuid4())


class _ReadOnlyQuerySet(models.QuerySet):
    """A query that refuses to write. The other methods that write call one of these or save()."""

    def bulk_create(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(self.model.remedy)

    def update(self, **_: Any) -> NoReturn:
        raise NotImplementedError(self.model.remedy)

    def delete(self) -> NoReturn:
        raise NotImplementedError(self.model.remedy)


class _ReadOnlyModel(models.Model):
    remedy: ClassVar[str]

    objects = _ReadOnlyQuerySet.as_manager()

    class Meta:
        abstract = True

    def save(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to write; Django loads fixtures by ``save_base``.

        Raises:
            NotImplementedError: always; it says what to use instead.
        """
        raise NotImplementedError(self.remedy)

    def delete(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse to delete the row.

        Raises:
            NotImplementedError: always; it says what to use instead.
        """
        raise NotImplementedError(self.remedy)


class OutboxRequest(_ReadOnlyModel):
    """A job requested in a transaction. The row is deleted when the job has a result.

    Attributes:
        user_id: None for a cohort.
        user_ids: The users of a cohort.
        sent_at: When a worker last enqueued the job; None before the first time.
        look_at: When a worker looks at the row next.
    """

    remedy = (
        "OutboxRequest is read-only: request a job with interview_access.outbox, which validates "
        "it, and cancel it with a client's cancel()"
    )

    job_id = models.CharField(max_length=MAX_JOB_ID_LENGTH, primary_key=True, default=random_id)
    task = models.TextField(choices=TASKS, db_default=GRANT_ACCESS)
    user_id = models.TextField(null=True)
    user_ids = TextArrayField(null=True)
    interview_ids = TextArrayField()
    requested_at = models.DateTimeField(db_default=Now())
    sent_at = models.DateTimeField(null=True)
    look_at = models.DateTimeField(db_default=Now())
    eta = models.DateTimeField(null=True)
    expires_at = models.DateTimeField(null=True)
    digest = models.TextField(null=True)
    headers = models.JSONField(null=True)

    class Meta:
        db_table = "grant_access_request"
        default_permissions = ("view",)
        ordering = ("-requested_at",)

    def __str__(self) -> str:
        return str(self.job_id)


class FinishedJob(_ReadOnlyModel):
    """A job's row of the ledger: its final state, its counts, and its result or error.

    The counts are None if the job did not succeed, `user_id` is None for a cohort. docs/audit.md
    describes the times, the attempts, and who requested the job.
    """

    remedy = (
        "FinishedJob is read-only: workers write the ledger, by which a repeated job takes "
        "effect once, and delete old rows; in tests, InlineClient executes jobs on a database"
    )

    job_id = models.CharField(max_length=MAX_JOB_ID_LENGTH, primary_key=True)
    task = models.CharField(max_length=255, choices=TASKS)
    state = models.CharField(
        max_length=16, choices=[(s, s) for s in ("succeeded", "failed", "cancelled", "expired")]
    )
    user_id = models.CharField(max_length=36, null=True)
    request_digest = models.CharField(max_length=64)
    requested = models.IntegerField(null=True)
    repeated = models.IntegerField(null=True)
    already_granted = models.IntegerField(null=True)
    created = models.IntegerField(null=True)
    result = models.JSONField(null=True)
    error = models.JSONField(null=True)
    finished_at = models.DateTimeField(null=True)
    requested_at = models.DateTimeField(null=True)
    enqueued_at = models.DateTimeField(null=True)
    started_at = models.DateTimeField(null=True)
    attempts = models.IntegerField(null=True)
    worker = models.CharField(max_length=255, null=True)
    actor = models.CharField(max_length=255, null=True)
    reason = models.CharField(max_length=1000, null=True)

    class Meta:
        db_table = "grant_access_job"
        default_permissions = ("view",)
        ordering = ("-finished_at",)

    def __str__(self) -> str:
        return str(self.job_id)
