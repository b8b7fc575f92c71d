"""What Sentry gets of a job, without a worker."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest
import sentry_sdk
from interview_access.errors import StorageUnavailableException
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from storage.driver_errors import driver_errors_translated
from storage.errors import StorageError
from tasks.ledger import JobResult
from worker.execution.decoding import NO_CALL
from worker.execution.request import Dispatched
from worker.execution.run import JobRun
from worker.tracing.sentry import SentryJobs

DETAIL = "DETAIL:  Key (user_id)=(secret-user) already exists."


class Events(Transport):
    """Keeps the events that Sentry's client sends."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Any] = []

    def capture_envelope(self, envelope: Envelope) -> None:
        """Keep an envelope's event."""
        self.events.append(envelope.get_event())


def test_details_of_postgresql_are_not_reported() -> None:
    """The chained error of the driver is reported without its details."""
    with pytest.raises(StorageError) as caught, driver_errors_translated():
        raise psycopg.errors.UniqueViolation(f"duplicate key\n{DETAIL}")
    transport = Events()
    client = sentry_sdk.Client(
        dsn="http://key@sentry.invalid/1",
        transport=transport,
        default_integrations=False,
    )
    delivery = Dispatched("a", "interview_access.grant_access", None, "", {}, 0, 0, None, "queue")
    run = JobRun(delivery, "worker@host", None, NO_CALL, None, JobResult(error=caught.value))
    with sentry_sdk.new_scope() as scope:
        scope.set_client(client)
        with SentryJobs().job(run):
            run.result = StorageUnavailableException.of(1, "duplicate key")
            run.result.__cause__ = caught.value
    (event,) = transport.events
    values = [one["value"] for one in event["exception"]["values"]]
    assert values[0] == "duplicate key"
