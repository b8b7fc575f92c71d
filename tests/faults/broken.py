"""The worker with one of its promises' grounds taken away, to see the books go wrong.

`celery -A tests.faults.broken worker`; CHAOS_WITHOUT in the environment says which.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from kombu.transport import TRANSPORT_ALIASES
from sqlalchemy import text

from storage.dtos import FinishedJobDTO, JobDTO
from storage.postgres import PostgresTransaction
from worker.celery import app

app.loader.import_default_modules()


def without_transport() -> None:
    """Celery's own transport, request and consumer."""
    TRANSPORT_ALIASES.update(
        redis="kombu.transport.redis:Transport", rediss="kombu.transport.redis:Transport"
    )
    app.conf.worker_consumer = "celery.worker.consumer:Consumer"
    for task in app.tasks.values():
        task.Request = "celery.worker.request:Request"


def without_ledger() -> None:
    """A job's answer is forgotten when it comes again."""
    opened = PostgresTransaction.open_jobs

    def forgetful(
        self: PostgresTransaction, jobs: Sequence[JobDTO]
    ) -> Mapping[str, FinishedJobDTO]:
        self._connection.execute(
            text("DELETE FROM grant_access_job WHERE job_id = ANY (:ids)"),
            {"ids": [job.job_id for job in jobs]},
        )
        return opened(self, jobs)

    PostgresTransaction.open_jobs = forgetful  # type: ignore[method-assign] # the breach itself


def without_late_acknowledgement() -> None:
    """A message is acknowledged when its job begins."""
    app.conf.task_acks_late = False
    for task in app.tasks.values():
        task.acks_late = False


{
    "transport": without_transport,
    "ledger": without_ledger,
    "late-acknowledgement": without_late_acknowledgement,
}[os.environ["CHAOS_WITHOUT"]]()
