"""Run one service, and end it with all its descendants when its owner ends.

A program of its own (`python -I -S supervisor.py --owner PID ... -- COMMAND`), because it must
survive a SIGKILL of the owner, the process that starts it. It uses the standard library only, so
that it starts fast, and runs in its own session, so that Ctrl-C in a terminal does not reach it.

SIGTERM requests the end of the service. The first line on standard output is `pid N` once the
service runs, otherwise the reason why it cannot. The exit status is the service's, 128 + N if
signal N ended it.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from time import monotonic

_NOT_STARTED = 127  # the shell's status for a command that cannot be executed
_POLL_SECONDS = 0.25  # between two checks of the owner and of the grace period
_SIGNALS = (signal.SIGTERM, signal.SIGCHLD, signal.SIGALRM, signal.SIGINT, signal.SIGHUP)

# From linux/prctl.h; Python has no names for them.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the service that the command line describes until it ends.

    Returns:
        The exit status: the service's, or 127 if it could not be started.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--owner", type=int, required=True, help="process ID of the owner")
    parser.add_argument("--stop-signal", type=int, required=True, help="requests a shutdown")
    parser.add_argument("--grace", type=float, required=True, help="seconds from that to SIGKILL")
    parser.add_argument("--folder", required=True, help="working directory of the service")
    parser.add_argument("--remove", help="folder to remove at the end if the owner is gone")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()

    for number in _SIGNALS:
        # With a handler, because exec resets handlers to the default but keeps ignored signals.
        signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    signal.setitimer(signal.ITIMER_REAL, _POLL_SECONDS, _POLL_SECONDS)
    # Orphaned descendants of the service become children of this process.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        service = _start(options)
    except (OSError, subprocess.SubprocessError) as error:
        print(error, flush=True)  # noqa: T201 - the protocol with the owner
        return _NOT_STARTED
    with suppress(BrokenPipeError):  # the owner may be gone already
        os.write(1, b"pid %d\n" % service.pid)
    status = _supervise(service.pid, options)
    _kill_descendants(service.pid)
    if options.remove and os.getppid() != options.owner:
        shutil.rmtree(options.remove, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _start(options: argparse.Namespace) -> subprocess.Popen[bytes]:
    supervisor = os.getpid()

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        _prctl(_PR_SET_PDEATHSIG, options.stop_signal)
        if os.getppid() != supervisor:  # it was killed before the call above
            os._exit(_NOT_STARTED)

    return subprocess.Popen(  # noqa: S603 - the owner's command
        options.command,
        cwd=options.folder,
        stdout=2,
        close_fds=False,  # the service inherits the files that the owner passed on
        start_new_session=True,
        preexec_fn=prepare,  # noqa: PLW1509 - this process has one thread
    )


def _supervise(service: int, options: argparse.Namespace) -> int:
    """Wait for the service, and shut it down on SIGTERM or when the owner is gone.

    Returns:
        The wait status of the service.
    """
    kill_at: float | None = None
    while True:
        received = signal.sigwait(_SIGNALS)
        pid = -1
        while pid:  # reap orphaned descendants too
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == service:
                return status
        if kill_at is not None:
            if monotonic() >= kill_at:
                os.kill(service, signal.SIGKILL)
        # Not by the end of a pipe, which a fork of the owner might hold open.
        elif received == signal.SIGTERM or os.getppid() != options.owner:
            kill_at = monotonic() + options.grace
            os.kill(service, options.stop_signal)


def _kill_descendants(service: int) -> None:
    """Kill and reap all descendants of a service that has ended, also in other sessions."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(service, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            for child in _children():
                os.kill(child, signal.SIGKILL)
            os.waitpid(-1, 0)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:  # noqa: PTH123 - pathlib delays the start
            return [int(pid) for pid in children.read().split()]
    except FileNotFoundError:  # not Linux, where no orphan becomes a child of this process
        return []


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process, on Linux only.

    Raises:
        OSError: if the kernel refuses.
    """
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    sys.exit(main())
