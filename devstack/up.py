"""`interview-access up`: PostgreSQL, Valkey, a worker and Flower on one machine until Ctrl-C.

Owns which services run, restarts those that end, and prints how to use them.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from devstack.servers import LocalStack
from devstack.service import LocalStackError, Service, stop_all
from storage.samples import load_samples
from storage.schema import migrate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_CHECKOUT = Path(__file__).parents[1]  # the folder of celeryconfig.py and the worker package
_CELERY = (sys.executable, "-m", "celery", "-A", "worker")
_USER = "123e4567-e89b-12d3-a456-426614174000"  # of the printed example
_SAMPLES = 100  # interviews to try jobs with
_FLOWER_PORT = 5555  # Flower's default; a free port if it is taken
_POOL_PROCESSES = 4  # of the worker at most, because it shares a developer's machine
_GRACE = 6.0  # seconds from the request to stop to SIGKILL; everything must end within ten
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POLL_SECONDS = 0.2
_FLOWER_SECONDS = 20.0  # to wait for Flower before the guide is printed
_FIRST_DELAY = 0.25  # seconds before the first restart; doubles with each failure
_ATTEMPTS = 4  # consecutive failures of a service that end everything
_STABLE_SECONDS = 10.0  # of running, after which the count of failures restarts


class _RestartsFailedError(Exception):
    """A service ended too many times in a row."""


class _Restarter:
    """Restarts a service when it ends, with exponential back-off.

    Args:
        service: The service, which is started already.
        report: Receives messages for the user.
    """

    def __init__(self, service: Service, report: Callable[[str], None]) -> None:
        self._service = service
        self._report = report
        self._started_at = time.monotonic()
        self._failures = 0

    def poll(self) -> None:
        """Restart the service if it has ended.

        Raises:
            _RestartsFailedError: if it failed four times in a row.
        """
        service = self._service
        if service.alive:
            return
        if time.monotonic() - self._started_at > _STABLE_SECONDS:
            self._failures = 0
        problem = f"{service.name} ended with status {service.wait()}{service.log_tail()}"
        while not service.alive:
            self._failures += 1
            if self._failures >= _ATTEMPTS:
                raise _RestartsFailedError(
                    f"{problem}\n{service.name} failed {_ATTEMPTS} times in a row."
                )
            delay = _FIRST_DELAY * 2 ** (self._failures - 1)
            self._report(f"{problem}\nStarting {service.name} again in {delay:g} s.")
            time.sleep(delay)
            self._started_at = time.monotonic()
            try:
                service.start()
            except LocalStackError as error:
                problem = str(error)
            else:
                return


def run_up(
    data: Path,
    *,
    with_parent: bool = False,
    report: Callable[[str], None] = click.echo,
) -> int:
    """Run PostgreSQL, Valkey, a worker and Flower until interrupted.

    Ctrl-C, SIGTERM and SIGHUP cause a graceful shutdown. After a SIGKILL all services end within
    ten seconds.

    Args:
        data: Folder of all data and logs.
        with_parent: Also shut down when the parent process ends, for example a killed `make`.
        report: Receives messages for the user.

    Returns:
        The exit status: 0 if interrupted, 1 if the services could not start or keep running.
    """

    def say(text: str) -> None:
        with suppress(OSError):  # the terminal may be closed
            report(text)

    try:
        for number in _STOP_SIGNALS:
            # `nohup` ignores SIGHUP.
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _interrupt)
        with ExitStack() as cleanup:
            _run(LocalStack(data), cleanup, say, parent=os.getppid() if with_parent else None)
    except KeyboardInterrupt:
        pass  # the shutdown is complete
    except (LocalStackError, _RestartsFailedError) as error:
        say(str(error))
        return 1
    return 0


def _interrupt(*_: object) -> NoReturn:
    """Raise KeyboardInterrupt on the first stop signal, and ignore others during the shutdown."""
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _run(
    stack: LocalStack, cleanup: ExitStack, say: Callable[[str], None], *, parent: int | None
) -> None:
    """Start all services, print the guide, and restart what ends until the parent ends."""
    say(f"Starting PostgreSQL and Valkey in {stack.data} ...")
    stack.start()
    cleanup.callback(say, "Stopped.")
    cleanup.callback(stack.stop)
    migrate(stack.database_url, report=say)
    interviews = load_samples(stack.database_url, _SAMPLES)
    environment_file = _write_environment(stack)
    cleanup.callback(environment_file.unlink, missing_ok=True)

    port, processes = _free_port(), min(_POOL_PROCESSES, os.cpu_count() or 1)
    celery = [
        _celery(stack, "worker", "--loglevel=INFO", f"--concurrency={processes}"),
        _celery(stack, "flower", "--address=127.0.0.1", f"--port={port}"),
    ]
    cleanup.callback(stop_all, celery)
    cleanup.callback(say, "Stopping; jobs that do not finish in time are requeued ...")
    for service in celery:
        service.start()
    services = (*celery, stack.postgres, stack.valkey)
    restarters = [_Restarter(service, say) for service in services]
    guide_by: float | None = time.monotonic() + _FLOWER_SECONDS
    while parent in {None, os.getppid()}:
        for restarter in restarters:
            restarter.poll()
        if guide_by is not None and (_accepts(port) or time.monotonic() > guide_by):
            say(_guide(stack, environment_file, port, interviews))
            guide_by = None
        time.sleep(_POLL_SECONDS)


def _celery(stack: LocalStack, command: str, *arguments: str) -> Service:
    environment = os.environ | stack.environment() | {"GRANT_STOP_GRACE": str(_GRACE / 2)}
    environment.pop("CELERY_RESULT_BACKEND", None)  # results are stored in the stack's Valkey
    return Service(
        command,
        [*_CELERY, command, *arguments],
        log=stack.data / f"{command}.log",
        grace=_GRACE,
        environment=environment,
        folder=_CHECKOUT,
    )


def _free_port() -> int:
    for port in (_FLOWER_PORT, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise LocalStackError("no TCP port is free on 127.0.0.1 for Flower")


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _write_environment(stack: LocalStack) -> Path:
    """Write a file that sets the servers' addresses in a shell with `source`."""
    path = stack.data / "environment"
    addresses = stack.environment()
    # Without the driver's name, as psql and other programs read it.
    addresses["DATABASE_URL"] = addresses["DATABASE_URL"].replace("+psycopg", "", 1)
    lines = [f"export {name}={shlex.quote(value)}\n" for name, value in addresses.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _guide(stack: LocalStack, environment: Path, port: int, interviews: Sequence[str]) -> str:
    """Return instructions to enqueue a job and to find the logs."""
    command = "interview-access"
    if shutil.which(command) is None:
        command = shlex.quote(str(Path(sys.executable).with_name(command)))
    grant = f"{command} grant --wait --user {_USER}"
    for interview in interviews[:2]:
        grant += f" --interview {interview}"
    exports = environment.read_text(encoding="utf-8").strip().replace("\n", "\n  ")
    return f"""
Everything runs until Ctrl-C. To enqueue a job, in another shell:

  source {shlex.quote(str(environment))}
  {grant}

Without --wait the command prints the job's ID. To report the job's state:

  {command} status JOB_ID

The first line sets the addresses of the servers:

  {exports}

Where to look:

  Flower       http://127.0.0.1:{port}
  worker's log {stack.data / "worker.log"}
  other logs   flower.log, postgres.log and valkey.log beside it
"""
