"""`interview-access up`: the whole of it on one machine, until Ctrl-C.

Owns what runs (PostgreSQL, Valkey, a worker, Flower), that what dies is started again, what the
person at the terminal is told, and that nothing is left running. Decides nothing of the business.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from storage.samples import load_samples
from storage.schema import migrate
from worker.local_stack import LocalStack, LocalStackError, Service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_CHECKOUT = Path(__file__).parents[1]  # where celeryconfig.py and the worker package lie
_CELERY = (sys.executable, "-m", "celery", "-A", "worker")
_USER = "123e4567-e89b-12d3-a456-426614174000"  # of the example that is printed
_SAMPLES = 100  # interviews to try jobs with
_FLOWERS_PORT = 5555  # its own default; another where that is taken
_CHILDREN = 4  # of the worker at most: this is a person's own machine
_GRACE = 6.0  # seconds that running jobs have when it ends; within 10 s nothing may be left
_LOOK_EVERY = 0.2  # seconds
_FLOWER_WITHIN = 20.0  # seconds, after which it is not waited for
_FIRST_DELAY = 0.25  # seconds before something that died is started again; doubles each time
_TRIES = 4  # starts in a row that may fail before we give up
_SOUND_AFTER = 10.0  # seconds of running, after which an end is the first of a row


class _GivenUpError(Exception):
    """A service ends again and again."""


@dataclass(slots=True)
class _Watched:
    """A service that is started again when it ends.

    Attributes:
        service: What runs.
        failures: Ends and failed starts in a row.
        since: When it was started (monotonic seconds).
        again_at: When to start it again; None while it runs.
    """

    service: Service
    failures: int = 0
    since: float = 0.0
    again_at: float | None = 0.0

    def look(self, report: Callable[[str], None]) -> None:
        """Starts it where it is time, and notices its end.

        Raises:
            _GivenUpError: It ended too many times in a row.
        """
        now = time.monotonic()
        if self.again_at is None:
            if not self.service.alive:
                status = self.service.wait()
                self._failed(
                    f"{self.service.name} ended with status {status}" + self.service.last_words(),
                    report,
                )
        elif now >= self.again_at:
            try:
                self.service.start()
            except LocalStackError as error:
                self._failed(str(error), report)
            else:
                self.since, self.again_at = time.monotonic(), None

    def _failed(self, what: str, report: Callable[[str], None]) -> None:
        now = time.monotonic()
        sound = self.again_at is None and now - self.since > _SOUND_AFTER
        self.failures = 1 if sound else self.failures + 1
        if self.failures >= _TRIES:
            raise _GivenUpError(f"{what}\n{self.service.name} failed {_TRIES} times in a row.")
        delay = _FIRST_DELAY * 2 ** (self.failures - 1)
        self.again_at = now + delay
        report(f"{what}\nStarting {self.service.name} again in {delay:g} s.")


def run_up(
    data: Path,
    *,
    with_parent: bool = False,
    report: Callable[[str], None] = click.echo,
) -> int:
    """Runs PostgreSQL, Valkey, a worker and Flower until it is told to end.

    Ctrl-C, SIGTERM and the terminal's closing end it in order; should it be killed, all that it
    runs ends within ten seconds.

    Args:
        data: The folder of all data and logs.
        with_parent: Ends also when the process that started us ends, as a killed `make` does.
        report: Takes what the person at the terminal is to read.

    Returns:
        The status to end with: 0 where it was told to end, 1 where it could not start or go on.
    """

    def say(text: str) -> None:
        with suppress(OSError):  # the terminal may be closed
            report(text)

    try:
        with _one_interrupt(), ExitStack() as leaving:
            _run(LocalStack(data), leaving, say, parent=os.getppid() if with_parent else None)
    except KeyboardInterrupt:
        pass  # it was told to end, and has
    except (LocalStackError, _GivenUpError) as error:
        say(str(error))
        return 1
    return 0


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first of the signals that mean "end" interrupts; more of them do not disturb the end."""
    heard = False

    def interrupt(*_: object) -> None:
        nonlocal heard
        if not heard:
            heard = True
            raise KeyboardInterrupt

    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as `nohup` has it
        signals.append(signal.SIGHUP)
    before = [signal.signal(number, interrupt) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _run(
    stack: LocalStack, leaving: ExitStack, say: Callable[[str], None], *, parent: int | None
) -> None:
    """Starts everything, tells about it, and watches it for ever."""
    say(f"Starting PostgreSQL and Valkey in {stack.data} ...")
    stack.start()
    leaving.callback(say, "Stopped.")
    leaving.callback(stack.stop)
    migrate(stack.database_url, report=say)
    interviews = load_samples(stack.database_url, _SAMPLES)

    worker, flower = _worker(stack), _Flower(stack)
    leaving.callback(_stop, [worker, flower], say)
    now = time.monotonic()
    watched = [_Watched(worker), _Watched(flower)]
    watched += [_Watched(x, since=now, again_at=None) for x in (stack.postgres, stack.valkey)]

    environment = _write_environment(stack)
    leaving.callback(environment.unlink, missing_ok=True)
    told_of: int | None = None
    while parent in {None, os.getppid()}:
        for one in watched:
            one.look(say)
        if flower.port != told_of and flower.settled:
            if told_of is None:
                say(_guide(stack, environment, flower.port, interviews))
            else:
                say(f"Flower is at http://127.0.0.1:{flower.port} now.")
            told_of = flower.port
        time.sleep(_LOOK_EVERY)


def _environment(stack: LocalStack) -> dict[str, str]:
    environment = os.environ | stack.environment()
    environment.pop("CELERY_RESULT_BACKEND", None)  # results go beside the queue, which is ours
    return environment


def _worker(stack: LocalStack) -> Service:
    children = min(_CHILDREN, os.cpu_count() or 1)
    return Service(
        "worker",
        [*_CELERY, "worker", "--loglevel=INFO", f"--concurrency={children}"],
        log=stack.data / "worker.log",
        grace=_GRACE,
        environment=_environment(stack) | {"GRANT_STOP_GRACE": str(_GRACE / 2)},
        folder=_CHECKOUT,
    )


class _Flower(Service):
    """Flower, at a port that is free when it starts.

    Args:
        stack: The servers that it looks at.

    Attributes:
        port: The port, on the loopback address; 0 before the first start.
    """

    def __init__(self, stack: LocalStack) -> None:
        super().__init__(
            "flower",
            [],
            log=stack.data / "flower.log",
            grace=_GRACE,
            environment=_environment(stack),
            folder=_CHECKOUT,
        )
        self.port = 0
        self._since = 0.0

    def start(self) -> None:
        """Starts it.

        Raises:
            LocalStackError: It runs already, or no port is free.
        """
        if not self.alive:
            self.port = _free_port()
            self._command = [*_CELERY, "flower", "--address=127.0.0.1", f"--port={self.port}"]
            self._since = time.monotonic()
        super().start()

    @property
    def settled(self) -> bool:
        """Whether it answers, or takes too long to be waited for."""
        if not self.port:
            return False
        return _answers(self.port) or time.monotonic() > self._since + _FLOWER_WITHIN


def _stop(services: Sequence[Service], say: Callable[[str], None]) -> None:
    say(f"Stopping; running jobs have {_GRACE:.0f} s, what is left of them runs again later ...")
    for service in services:
        service.ask_to_stop()
    for service in services:
        service.stop()


def _free_port() -> int:
    for port in (_FLOWERS_PORT, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise LocalStackError("no TCP port is free on 127.0.0.1 for Flower")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _write_environment(stack: LocalStack) -> Path:
    """Writes the file that another shell reads with `source`."""
    path = stack.data / "environment"
    addresses = stack.environment()
    # As psql and every other program reads it.
    addresses["DATABASE_URL"] = addresses["DATABASE_URL"].replace("+psycopg", "", 1)
    path.write_text(
        "".join(f"export {k}={shlex.quote(v)}\n" for k, v in addresses.items()),
        encoding="utf-8",
    )
    return path


def _guide(stack: LocalStack, environment: Path, port: int, interviews: Sequence[str]) -> str:
    """How to enqueue and where to look."""
    command = "interview-access"
    if shutil.which(command) is None:
        command = shlex.quote(str(Path(sys.executable).with_name(command)))
    grant = f"{command} grant --wait --user {_USER}"
    for interview in interviews[:2]:
        grant += f" --interview {interview}"
    exports = environment.read_text(encoding="utf-8").strip().replace("\n", "\n  ")
    return f"""
It runs until Ctrl-C. To send a job, in another shell:

  source {shlex.quote(str(environment))}
  {grant}

That file says where the servers are, at another place after each start:

  {exports}

Where to look:

  Flower       http://127.0.0.1:{port}
  worker's log {stack.data / "worker.log"}
  other logs   flower.log, postgres.log and valkey.log beside it
"""
