"""The composition root: `celery -A worker worker` finds its app here."""

from __future__ import annotations

import gc
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

from storage.postgres import PostgresStorage
from tasks.celery_tasks import (
    CreateInterviewAttemptTask,
    GrantAccessTask,
    GrantCohortAccessTask,
    Workplace,
)
from worker.desk import Desk
from worker.relay import Relay
from worker.settings import Settings, SettingsError
from worker.startup import check_servers
from worker.transport import lease_of_this_process

try:
    settings = Settings.from_environment()
except SettingsError as error:
    # No exception of an ordinary kind: Celery's command would print a trace over it.
    raise SystemExit(f"The worker cannot start:\n{error}") from None

for _scheme in ("redis", "rediss"):
    TRANSPORT_ALIASES[_scheme] = "worker.transport:Transport"
TRANSPORT_ALIASES["sentinel"] = "worker.transport:SentinelTransport"

app = Celery("interview_access_worker")
app.config_from_object("celeryconfig")
app.conf.update(
    broker_url=settings.celery_broker_url,
    result_backend=settings.celery_result_backend,
    broker_transport_options={
        **app.conf.broker_transport_options,
        "lease_seconds": settings.grant_lease_seconds,
        "attempt_limit": settings.grant_attempt_limit,
        "stop_grace": settings.grant_stop_grace,
        "batch_size": settings.grant_batch_size,
    },
)
app.loader.override_backends = dict.fromkeys(("redis", "rediss"), "worker.results:JobResults")


@lru_cache(maxsize=1)
def storage() -> PostgresStorage:
    """This process's store: a child makes its own, for connections do not survive a fork."""
    return PostgresStorage(settings.database_url, chunk_size=settings.grant_chunk_size)


@worker_process_init.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _forget_the_parents_storage(**_: Any) -> None:
    storage.cache_clear()


@celeryd_after_setup.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _prepare(**_: Any) -> None:
    check_servers(settings, app)
    gc.freeze()  # the children share what stands: a collection in one would make its own copy


rounds = (Desk(app, storage), Relay(app, storage))


@worker_ready.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _begin_rounds(**_: Any) -> None:
    for thread in rounds:
        thread.start()


@worker_shutting_down.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _drain(how: str, **_: Any) -> None:
    for thread in rounds:
        thread.stop()
    lease = lease_of_this_process()
    if lease is not None:
        lease.drain(at_once=how == "Cold")


@worker_shutdown.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _let_go(**_: Any) -> None:
    lease = lease_of_this_process()
    if lease is not None:
        lease.close()


workplace = Workplace(
    storage=storage,
    max_interview_ids=settings.grant_max_interview_ids,
    retry_limit=settings.grant_retry_limit,
    retry_max_delay=settings.grant_retry_max_delay,
)
for kind in (GrantAccessTask, GrantCohortAccessTask, CreateInterviewAttemptTask):
    task = kind(workplace)
    task.Request = "worker.delivery:JobRequest"
    app.register_task(task)
