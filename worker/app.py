"""The app factory: puts settings, storage, tasks, bootsteps and hooks together."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from typing import Any

from celery import Celery
from celery.signals import (
    after_setup_logger,
    after_setup_task_logger,
    celeryd_after_setup,
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
    worker_shutting_down,
)
from celery.utils.log import get_logger
from kombu.transport import TRANSPORT_ALIASES

from storage.postgres import PostgresStorage
from tasks.celery_tasks import (
    CreateInterviewAttemptTask,
    GrantAccessTask,
    GrantCohortAccessTask,
    TaskDependencies,
)
from worker.broker.lease import Lease
from worker.broker.transport import celery_settings, restrict_publishing
from worker.execution.consumer import Drain, JobClaims
from worker.execution.decoding import Limits
from worker.execution.dispatch import Dispatcher
from worker.execution.run import JobObserver
from worker.logs import format_task_lines, format_worker_lines, is_json
from worker.monitoring.bootstep import Monitoring
from worker.services.bootstep import BackgroundServices
from worker.services.control import ControlService
from worker.services.outbox_relay import OutboxRelay
from worker.services.pruner import Pruner
from worker.services.remote_control import register_commands
from worker.settings import Settings
from worker.startup.bootstep import StartupChecks

_TRANSPORTS = {
    **dict.fromkeys(("redis", "rediss"), "worker.broker.transport:Transport"),
    "sentinel": "worker.broker.transport:SentinelTransport",
}
_RESULT_BACKENDS = {
    **dict.fromkeys(("redis", "rediss"), "worker.broker.results:JobResults"),
    "sentinel": "worker.broker.results:SentinelJobResults",
}
logger = get_logger(__name__)

_OBSERVERS = {
    "opentelemetry.trace": "worker.tracing.spans",
    "sentry_sdk": "worker.tracing.sentry",
}
"""Libraries that a user's module sets up, and what reports jobs to each."""


class WorkerApp(Celery):  # type: ignore[misc] # Celery ships no types
    """Celery's app with what its bootsteps, background services and pool processes work with.

    Attributes:
        settings: The validated settings.
        limits: Limits of a message and its job.
        task_dependencies: Dependencies of the tasks.
        lease: The worker session, once the consumer has made it; None in a pool process.
        dispatcher: Likewise.
        relay: The outbox relay, once its bootstep has made it.
        pruner: The pruner, likewise.
        control_service: What replies to control requests, likewise.
        monitoring: Metrics and health, if a setting asks for them.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__("interview_access_worker", amqp="worker.execution.consumer:JobProtocol")
        self.settings = settings
        self.lease: Lease | None = None
        self.dispatcher: Dispatcher | None = None
        self.control_service: ControlService | None = None
        self.relay: OutboxRelay | None = None
        self.pruner: Pruner | None = None
        self.monitoring: Monitoring | None = None
        self._storage: PostgresStorage | None = None
        self._observers: Mapping[str, str] = _OBSERVERS
        self.backend_cls = settings.results.celery_url  # the environment overrides the setting
        self.config_from_object("celeryconfig")
        addresses = celery_settings(settings)
        addresses["broker_transport_options"] |= self.conf.broker_transport_options
        self.conf.update(**addresses)
        self.loader.override_backends = _RESULT_BACKENDS
        self.steps["worker"].update((StartupChecks, Drain, BackgroundServices, Monitoring))
        self.steps["consumer"].add(JobClaims)
        self.limits = Limits(
            interview_ids=settings.grant_max_interview_ids,
            attempts=settings.grant_attempt_limit,
            seconds=self.conf.task_time_limit,
        )
        self.task_dependencies = TaskDependencies(
            storage=self.storage,
            max_interview_ids=settings.grant_max_interview_ids,
            retry_limit=settings.grant_retry_limit,
            retry_max_delay=settings.grant_retry_max_delay,
        )
        for task_class in (GrantAccessTask, GrantCohortAccessTask, CreateInterviewAttemptTask):
            self.register_task(task_class(self.task_dependencies))

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        """The class of the worker."""
        name = "worker.console:LoggingWorker" if is_json() else "celery.apps.worker:Worker"
        return self.subclass_with_self(name)

    def new_storage(self) -> PostgresStorage:
        """Make a storage; it connects at its first use."""
        settings = self.settings
        return PostgresStorage(settings.database_url, chunk_size=settings.grant_chunk_size)

    def storage(self) -> PostgresStorage:
        """Return this process's storage."""
        if self._storage is None:
            self._storage = self.new_storage()
        return self._storage

    def active_observers(self) -> list[JobObserver]:
        """Return what traces jobs in this process: none unless a library is set up for it."""
        active: list[JobObserver] = []
        for library, name in self._observers.items():
            if library not in sys.modules:
                continue
            try:
                observer: JobObserver = import_module(name).OBSERVER
                if observer.is_active:
                    active.append(observer)
            except Exception:  # an earlier release of the library, say, which must fail no job
                logger.exception("tracing disabled: library=%s", library)
                self._observers = {
                    key: one for key, one in self._observers.items() if key != library
                }
        return active

    def end_session(self) -> None:
        """End what lasts until the pool has stopped: the lease, metrics and health."""
        if self.lease:
            self.lease.close()
        if self.monitoring:
            self.monitoring.end()

    def reset_after_fork(self) -> None:
        """Drop the connections, the lease and the socket that a fork inherits."""
        self._storage = None
        self.lease = self.dispatcher = None
        if self.monitoring:
            self.monitoring.close_inherited()
            self.monitoring = None


def create_app(settings: Settings) -> WorkerApp:
    """Create the worker's Celery app.

    kombu's table of transports and Celery's tables of signals and of remote control commands are
    global: a process has one such app.

    Args:
        settings: Of the environment, validated.
    """
    TRANSPORT_ALIASES.update(_TRANSPORTS)
    register_commands()
    app = WorkerApp(settings)
    _connect_signals(app)
    return app


def _connect_signals(app: WorkerApp) -> None:
    """Connect hooks for which Celery has no bootstep."""

    def prepare_pool_process(**_: Any) -> None:
        app.reset_after_fork()
        restrict_publishing(app.settings.grant_callback_queues)

    def flush_traces(**_: Any) -> None:
        for observer in app.active_observers():
            observer.flush()

    def prepare_fork(**_: Any) -> None:
        gc.freeze()  # a garbage collection in a pool process would copy shared memory

    def drain(how: str, **_: Any) -> None:
        # The grace period begins in the signal handler, not at the loop's next iteration.
        if app.lease:
            app.lease.drain(at_once=how == "Cold" or app.lease.is_draining)

    def end_session(**_: Any) -> None:
        # Bootsteps stop before the pool has; this signal follows it.
        app.end_session()

    for signal, hook in (
        (worker_process_init, prepare_pool_process),
        (worker_process_shutdown, flush_traces),
        (celeryd_after_setup, prepare_fork),
        (worker_shutting_down, drain),
        (worker_shutdown, end_session),
        (after_setup_logger, format_worker_lines),
        (after_setup_task_logger, format_task_lines),
    ):
        signal.connect(hook, weak=False)
