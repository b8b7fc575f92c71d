"""The bootstep of metrics and health."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from celery import bootsteps

from storage.dtos import LedgerTotalsDTO, OutboxTotalsDTO
from storage.postgres import DatabaseLimits, PostgresStorage
from worker.broker.transport import CLIENT_NAME
from worker.logs import refused_start
from worker.monitoring.health import HealthCheck, HealthFile

_SECONDS = 2.0  # to connect to a server, and for each reply


class Monitoring(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
    """Worker bootstep: serves metrics and health, and writes the health file, if they are set.

    Both run until the worker has ended: a worker that stops is live until then.
    """

    requires = ("celery.worker.components:Pool",)  # threads do not survive a fork

    def include_if(self, worker: Any) -> bool:
        """Report whether a setting asks for it."""
        settings = worker.app.settings
        return bool(settings.metrics_address or settings.health_file)

    def create(self, worker: Any) -> None:
        """Bind the address before the pool is forked.

        Raises:
            SystemExit: with one sentence and status 1, if the address or the file cannot be used.
        """
        self._server: Any = None
        self._file: HealthFile | None = None
        settings = worker.app.settings
        if address := settings.metrics_address:
            # Imported here: a worker without metrics starts a tenth of a second earlier.
            server = import_module("worker.monitoring.server")
            try:
                self._server = server.MonitoringServer(address.host, address.port)
            except OSError as error:
                raise refused_start(
                    f"METRICS_ADDRESS: got {address}, expected an address of this host with a "
                    f"free port: {error.strerror or error}."
                ) from None
        if path := settings.health_file:
            try:
                path.write_text("")
                path.unlink()
            except OSError as error:
                raise refused_start(
                    f"HEALTH_FILE: got {str(path)!r}, expected a file in a folder that the worker "
                    f"can write to: {error.strerror}."
                ) from None
        worker.app.monitoring = self

    def start(self, worker: Any) -> None:
        """Start the threads."""
        app = worker.app
        check = HealthCheck(app.lease, app.dispatcher, app.relay)
        if app.settings.health_file:
            self._file = HealthFile(app.settings.health_file, check)
            self._file.start()
        if self._server:
            self._server.start(_registry(app, check), check)

    def close_inherited(self) -> None:
        """Close the socket in a pool process, which would keep the port after its parent."""
        if self._server:
            with suppress(OSError):
                self._server.socket.close()

    def end(self) -> None:
        """End the threads, once the pool has stopped."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
        if self._file:
            self._file.stop()


def _registry(app: Any, check: HealthCheck) -> Any:
    """Return the registry of all metrics, and connect it to the dispatcher."""
    from interview_access.connections import connect  # noqa: PLC0415 - for metrics only
    from prometheus_client import CollectorRegistry  # noqa: PLC0415 - likewise

    from worker.monitoring.metrics import JobMetrics  # noqa: PLC0415 - likewise
    from worker.monitoring.state import Source, State  # noqa: PLC0415 - likewise
    from worker.operations.inspection import inspect  # noqa: PLC0415 - likewise

    settings = app.settings
    redis = connect(
        settings.broker, client_name=CLIENT_NAME, connect_timeout=_SECONDS, timeout=_SECONDS
    )
    storage = PostgresStorage(
        settings.database_url, limits=DatabaseLimits(lock=_SECONDS, statement=_SECONDS)
    )

    def read_tables() -> tuple[OutboxTotalsDTO, LedgerTotalsDTO]:
        return storage.count_requests(), storage.measure_ledger()

    registry = CollectorRegistry()
    jobs = JobMetrics(registry, [name for name in app.tasks if not name.startswith("celery.")])
    app.dispatcher.monitor, app.control_service.on_cancelled = jobs, jobs.cancelled
    queue, tables = Source("redis", lambda: inspect(redis)), Source("postgresql", read_tables)
    registry.register(
        State(
            *(app.lease, app.dispatcher, check, queue, tables),
            retention=settings.retention,
            dead_letter_bytes=settings.grant_dead_letter_bytes,
            dropped=app.pruner.dropped,
        )
    )
    return registry
