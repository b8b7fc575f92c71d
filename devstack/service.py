"""Supervised processes, which never outlive the process that starts them.

Owns start, shutdown, log and readiness of one process. Does not know what the process does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from devstack import supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_READY_SECONDS = 30.0  # recovery after a crash is the slowest start
_POLL_SECONDS = 0.02
_MAX_LOG_BYTES = 10_000_000  # a larger log is rotated at the next start
_TAIL_BYTES, _TAIL_LINES = 20_000, 15  # of a log, in an error


class LocalStackError(Exception):
    """A local service cannot run; the text gives the reason and the remedy."""


class Service:
    """A process that ends, with its descendants, when it is stopped or when its owner ends.

    The owner is the process that calls `start`. Its end takes effect however it comes, SIGKILL
    included.

    Args:
        name: Name in messages.
        command: Program and arguments.
        log: File that receives standard output and standard error.
        stop_signal: Signal that requests a graceful shutdown.
        grace: Seconds between that signal and SIGKILL.
        environment: Environment; by default the owner's.
        folder: Working directory; by default the owner's.
        is_ready: Reports whether the service accepts requests; `start` waits for it.
        pid_files: Files to delete before each start. A server would believe a stale one if its
            process ID has been reused.
        inherit: File descriptors that the service and its descendants keep open.
        remove_if_orphaned: Folder to remove when the service ends because its owner has ended.

    Attributes:
        name: As given.
        log: As given.
        pid: Process ID of the latest start; 0 before the first.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace: float = 6.0,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        is_ready: Callable[[], bool] | None = None,
        pid_files: Sequence[Path] = (),
        inherit: Sequence[int] = (),
        remove_if_orphaned: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.pid = 0
        self._command = command
        self._options = [
            f"--stop-signal={int(stop_signal)}",
            f"--grace={grace}",
            f"--folder={folder or Path.cwd()}",
            *([f"--remove={remove_if_orphaned}"] if remove_if_orphaned else []),
        ]
        self._environment = environment
        self._is_ready = is_ready
        self._pid_files = pid_files
        self._inherit = inherit
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def alive(self) -> bool:
        """Whether the service runs."""
        return self._supervisor is not None and self._supervisor.poll() is None

    def start(self) -> None:
        """Start the service and wait until it is ready.

        Raises:
            LocalStackError: if it runs already, cannot be executed, ends before it is ready, or is
                not ready within 30 seconds.
        """
        if self.alive:
            raise LocalStackError(f"{self.name} runs already, as process {self.pid}")
        self.stop()  # its descendants, if its supervisor was killed
        for path in self._pid_files:
            path.unlink(missing_ok=True)
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(  # noqa: S603 - the command is the caller's
                [
                    *(sys.executable, "-I", "-S", supervisor.__file__, f"--owner={os.getpid()}"),
                    *(*self._options, "--", *self._command),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                pass_fds=self._inherit,
            )
        assert self._supervisor.stdout is not None  # noqa: S101 - it is a pipe
        with self._supervisor.stdout as output:
            report = output.readline().decode(errors="replace").strip()
        if not report.startswith("pid "):
            self.stop()
            reason = report or "its supervisor ended"
            raise LocalStackError(f"{self.name} cannot be started: {reason}{self.log_tail()}")
        self.pid = int(report.removeprefix("pid "))
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while self._is_ready and not self._is_ready():
            if not self.alive:
                raise LocalStackError(
                    f"{self.name} ended with status {self.wait()} before it was ready"
                    + self.log_tail()
                )
            if time.monotonic() > deadline:
                self.stop()
                raise LocalStackError(
                    f"{self.name} was not ready within {_READY_SECONDS:.0f} s{self.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the service to end.

        Args:
            timeout: Seconds; unlimited by default.

        Returns:
            Its exit status, 128 + N if signal N ended it, or None if it still runs. 0 if it is not
            started.
        """
        if self._supervisor is None:
            return 0
        try:
            return self._supervisor.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def request_stop(self) -> None:
        """Request a graceful shutdown without waiting for it."""
        if self._supervisor is not None:
            self._supervisor.terminate()

    def stop(self) -> None:
        """Shut the service down and wait for its end; kill it when its grace period is over."""
        if self._supervisor is None:
            return
        self.request_stop()
        if self._supervisor.wait() < 0 and self.pid:
            # The supervisor was killed, and its orphaned service might still shut down.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._supervisor = None

    def log_tail(self) -> str:
        """Return the last log lines since the latest start, formatted to follow an error."""
        try:
            with self.log.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(self._log_start, end - _TAIL_BYTES))
                lines = log.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        if not lines:
            return ""
        return f"\nThe end of {self.log}:\n" + "\n".join(f"  {x}" for x in lines[-_TAIL_LINES:])


def stop_all(services: Sequence[Service]) -> None:
    """Shut several services down at the same time."""
    for service in services:
        service.request_stop()
    for service in services:
        service.stop()
