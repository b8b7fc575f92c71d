"""The composition root: `celery -A worker worker` finds its app here."""
# ruff: noqa: E402 - imports come between gc.disable() and gc.enable()

from __future__ import annotations

import gc

gc.disable()  # imports leave next to no garbage, and collections are a tenth of a worker's start

from functools import lru_cache
from typing import Any

from celery import Celery
from celery.signals import (
    celeryd_after_setup,
    worker_process_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from kombu.transport import TRANSPORT_ALIASES

import worker.logs
import worker.services.remote_control  # noqa: F401 - both connect to Celery: signals and commands
from storage.postgres import PostgresStorage
from tasks.celery_tasks import (
    CreateInterviewAttemptTask,
    GrantAccessTask,
    GrantCohortAccessTask,
    TaskDependencies,
)
from worker.broker.connections import celery_settings
from worker.broker.lease import Lease
from worker.broker.transport import restrict_publishing
from worker.execution.consumer import Drain, JobClaims
from worker.execution.delivery import Limits
from worker.services.control import ControlService
from worker.services.outbox_relay import OutboxRelay
from worker.settings import Settings, SettingsError
from worker.startup import StartupChecks

try:
    settings = Settings.from_environment()
except SettingsError as error:
    # No exception of an ordinary kind: Celery's command would print a trace over it.
    raise SystemExit(f"The worker cannot start: {error}") from None

for _scheme in ("redis", "rediss"):
    TRANSPORT_ALIASES[_scheme] = "worker.broker.transport:Transport"
TRANSPORT_ALIASES["sentinel"] = "worker.broker.transport:SentinelTransport"


class JobApp(Celery):  # type: ignore[misc] # Celery ships no types
    """Celery's app with what the worker's bootsteps and its pool processes work with."""

    settings: Settings
    limits: Limits
    task_dependencies: TaskDependencies
    lease: Lease | None = None


app = JobApp("interview_access_worker", amqp="worker.execution.consumer:JobProtocol")
app.backend_cls = settings.results.celery_url  # Celery's setting yields to the environment
app.settings = settings
app.config_from_object("celeryconfig")
addresses = celery_settings(settings)
addresses["broker_transport_options"] |= app.conf.broker_transport_options
app.conf.update(**addresses)
app.loader.override_backends = {
    **dict.fromkeys(("redis", "rediss"), "worker.broker.results:JobResults"),
    "sentinel": "worker.broker.results:SentinelJobResults",
}
app.steps["worker"].update((StartupChecks, Drain))
app.steps["consumer"].add(JobClaims)


def _new_storage() -> PostgresStorage:
    return PostgresStorage(settings.database_url, chunk_size=settings.grant_chunk_size)


storage = lru_cache(maxsize=1)(_new_storage)
"""This process's store: a pool process makes its own, connections do not survive a fork."""

relay_storage = lru_cache(maxsize=1)(_new_storage)
"""The outbox relay's store, on whose connection it waits for notifications."""


@worker_process_init.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _prepare_pool_process(**_: Any) -> None:
    storage.cache_clear()
    app.lease = None
    restrict_publishing(settings.grant_callback_queues)


@celeryd_after_setup.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _prepare(**_: Any) -> None:
    gc.freeze()  # pool processes share what exists: a collection in one would make its own copy


background_services = (
    ControlService(app, storage),
    OutboxRelay(app, relay_storage),
)


@worker_ready.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _start_background_services(**_: Any) -> None:
    for service in background_services:
        service.start()


@worker_shutting_down.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _drain(how: str, **_: Any) -> None:
    for service in background_services:
        service.stop()
    if app.lease:
        app.lease.drain(at_once=how == "Cold" or app.lease.is_draining)


@worker_shutdown.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _end_session(**_: Any) -> None:
    if app.lease:
        app.lease.close()


app.limits = Limits(
    interview_ids=settings.grant_max_interview_ids,
    attempts=settings.grant_attempt_limit,
    seconds=app.conf.task_time_limit,
)
app.task_dependencies = TaskDependencies(
    storage=storage,
    max_interview_ids=settings.grant_max_interview_ids,
    retry_limit=settings.grant_retry_limit,
    retry_max_delay=settings.grant_retry_max_delay,
)
for task_class in (GrantAccessTask, GrantCohortAccessTask, CreateInterviewAttemptTask):
    app.register_task(task_class(app.task_dependencies))

gc.freeze()  # or gc.enable() begins with a collection of all that was imported
gc.enable()
