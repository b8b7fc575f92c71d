"""Sentry: a transaction for each job."""

from __future__ import annotations

from typing import Any

import sentry_sdk
from celery.signals import celeryd_init
from sentry_sdk.envelope import Envelope
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport

import worker.celery

app = worker.celery.app


class _Discarding(Transport):
    def capture_envelope(self, envelope: Envelope) -> None:
        """Discard an envelope, encoded as for sending."""
        envelope.serialize()


@celeryd_init.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _start(**_: Any) -> None:
    sentry_sdk.init(
        dsn="http://key@127.0.0.1:9/1",
        transport=_Discarding,
        traces_sample_rate=1.0,
        integrations=[CeleryIntegration()],
    )
