"""Runs one service for an owner, and ends it when the owner ends, however the owner ends.

A program of its own (`python -I -S guard.py … -- COMMAND`), on the standard library alone so that
it is up in a moment. Its standard input is a pipe whose other end the owner holds: a byte on it
asks for the end, and its closing says that the owner is dead. It stands in a session of its own,
so that a terminal's Ctrl-C reaches the owner only, and the service in another, so that nothing
that is sent to the service's group reaches the guard.

On its standard output it says `pid N` once the service runs, or `STAGE: REASON` where it could not
be started; it ends with the service's status (128 + N where signal N ended it).

It knows nothing of what it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import select
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic

NAMESPACE = "namespace"
SWITCH = "switch"
SWITCH_WITH_FILE_ACCESS = "switch-with-file-access"

NOT_STARTED = 127  # the shell's status for a command that could not be started

# From Linux's own headers: Python has no names for them before 3.12, or at all.
_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_PR_SET_KEEPCAPS = 8
_PR_SET_CHILD_SUBREAPER = 36
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_RAISE = 2
_CAP_DAC_OVERRIDE = 1
_CAPABILITY_VERSION_3 = 0x20080522

_OWNER_CHECK = 1.0  # seconds between two looks at whether the owner is still our parent
_ON_LINUX = sys.platform == "linux"


def _linux(function: str, *arguments: object) -> None:
    """Calls one of the C library's functions that Python has no name for.

    Raises:
        OSError: as the call says in errno.
    """
    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _enter_user_namespace(uid: int) -> None:
    """Root goes by `uid` inside, with no more rights than any user; its files stay root's."""
    owner, group = os.geteuid(), os.getegid()
    _linux("unshare", _CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} {owner} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{uid} {group} 1", encoding="ascii")


def _become(uid: int, gid: int, *, file_access: bool) -> None:
    """Root becomes an ordinary user.

    Args:
        uid: The user.
        gid: Its group, and its only one.
        file_access: Keep the one right to pass folders that are closed to that user, so that none
            must be opened to it (Linux only).
    """
    if file_access:
        _linux("prctl", _PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    if file_access:
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        right = 1 << _CAP_DAC_OVERRIDE
        sets = (ctypes.c_uint32 * 6)(right, right, right, 0, 0, 0)
        _linux("capset", ctypes.byref(header), ctypes.byref(sets))
        _linux("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, _CAP_DAC_OVERRIDE, 0, 0)


def _run_service(options: argparse.Namespace, report: int, guard: int) -> None:
    """In the child: becomes the service, or writes to `report` why it cannot."""
    stage = "session"
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        stage = options.identity or "exec"
        if options.identity == NAMESPACE:
            _enter_user_namespace(options.uid)
        elif options.identity:
            _become(
                options.uid, options.gid, file_access=options.identity == SWITCH_WITH_FILE_ACCESS
            )
        if _ON_LINUX:
            # Should the guard itself be killed. After the switch of user, which would undo it.
            _linux("prctl", _PR_SET_PDEATHSIG, options.stop_signal, 0, 0, 0)
            if os.getppid() != guard:
                os._exit(NOT_STARTED)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.dup2(2, 1)
        os.chdir(options.folder)
        os.execv(options.command[0], options.command)  # noqa: S606 - no shell is wanted
    except OSError as error:
        os.write(report, f"{stage}: {error}".encode())
    os._exit(NOT_STARTED)


def _children() -> list[int]:
    """The processes whose parent we are, strays that were left to us included (Linux only)."""
    found = []
    for entry in os.listdir("/proc") if _ON_LINUX else ():  # noqa: PTH208 - Path's is slower
        if entry.isdigit():
            with suppress(OSError), open(f"/proc/{entry}/stat", "rb") as stat:  # noqa: PTH123 - likewise
                # The name stands in brackets and may hold anything; state and parent follow it.
                if int(stat.read().rpartition(b")")[2].split()[1]) == os.getpid():
                    found.append(int(entry))
    return found


def _sweep(service: int) -> None:
    """Kills and reaps whatever the service left, whichever session it has fled to."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(service, signal.SIGKILL)
    while True:
        # Whoever dies leaves its children to us, so that this ends with the last of them.
        for child in _children():
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _start(options: argparse.Namespace) -> int:
    """Starts the service and reports on it; returns its process id, or 0 where it cannot be."""
    reading, writing = os.pipe()
    guard = os.getpid()
    service = os.fork()
    if service == 0:
        os.close(reading)
        _run_service(options, writing, guard)
    os.close(writing)
    with open(reading, "rb") as report:  # noqa: PTH123 - a descriptor has no path
        problem = report.read()  # ends when the service's program has taken over
    with suppress(BrokenPipeError):  # the owner may have died meanwhile; _guard will see it
        os.write(1, problem or b"pid %d" % service)
    os.close(1)
    if problem:
        os.waitpid(service, 0)
        return 0
    return service


def _guard(options: argparse.Namespace, service: int, wake: int) -> tuple[int, bool]:
    """Waits for the service's end, and brings it about when it is time.

    Returns:
        The service's status as the system gives it, and whether the owner was seen to be gone.
    """
    kill_at: float | None = None
    orphaned = False
    while True:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == service:
                    return status, orphaned
                if pid == 0:
                    break
        if kill_at is not None and monotonic() >= kill_at:
            os.kill(service, signal.SIGKILL)
            return os.waitpid(service, 0)[1], orphaned
        watched = [wake] if kill_at is not None else [0, wake]
        wait = _OWNER_CHECK if kill_at is None else max(0.0, kill_at - monotonic())
        readable = select.select(watched, [], [], wait)[0]
        asked = False
        if wake in readable:
            asked = signal.SIGTERM in os.read(wake, 512)
        if 0 in readable:
            asked = True
            orphaned = os.read(0, 1) == b""
        # A process that the owner forked may hold the pipe open after the owner's death.
        if os.getppid() != options.owner:
            asked = orphaned = True
        if asked and kill_at is None:
            kill_at = monotonic() + options.grace
            with suppress(ProcessLookupError):
                os.kill(service, options.stop_signal)


def main() -> int:
    """Runs one service to its end; returns its status."""
    parser = argparse.ArgumentParser(prog="guard", description=__doc__)
    parser.add_argument("--owner", type=int, required=True, help="the process that started us")
    parser.add_argument("--stop-signal", type=int, default=int(signal.SIGTERM))
    parser.add_argument("--grace", type=float, default=6.0, help="seconds from that to SIGKILL")
    parser.add_argument("--folder", default="/", help="where the service works")
    parser.add_argument("--remove", help="folder to remove at the end if the owner has died")
    parser.add_argument("--identity", choices=[NAMESPACE, SWITCH, SWITCH_WITH_FILE_ACCESS])
    parser.add_argument("--uid", type=int)
    parser.add_argument("--gid", type=int)
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()

    waking, wake = os.pipe()
    for end in (waking, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if _ON_LINUX:
        _linux("prctl", _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    service = _start(options)
    if not service:
        return NOT_STARTED
    status, orphaned = _guard(options, service, waking)
    _sweep(service)
    if options.remove and (orphaned or os.getppid() != options.owner):
        shutil.rmtree(options.remove, ignore_errors=True)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
