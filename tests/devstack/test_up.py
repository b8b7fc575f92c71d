"""`interview-access up`: running, restarting and stopping all services."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from celery import Celery

from tests.support.stores import eventually

ROOT = Path(__file__).parents[2]
END_SECONDS = 10.0  # within which everything ends
OUTPUT_SECONDS = 40.0  # a start takes three on an idle machine
INTERVIEWS = ["89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"]

UP = """
import fcntl, os, signal, sys, termios
from pathlib import Path
from devstack.up import run_up

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it
if os.getsid(0) == os.getpid():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(run_up(Path(sys.argv[1]), with_parent="with-parent" in sys.argv[2:]))
"""


class Terminal:
    """A terminal in which `up` runs, with its output."""

    def __init__(self, data: Path, before: Sequence[str], settings: dict[str, str]) -> None:
        self._keyboard, screen = pty.openpty()
        self._screen = data.with_suffix(".screen")
        with self._screen.open("wb") as output:
            self.process = subprocess.Popen(
                [*before, sys.executable, "-c", UP, str(data), *(["with-parent"] * bool(before))],
                stdin=screen,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=os.environ | settings,
                start_new_session=True,
            )
        os.close(screen)

    def shown(self) -> str:
        """Return the output so far."""
        return self._screen.read_text(encoding="utf-8")

    def await_output(self, pattern: str) -> re.Match[str]:
        """Wait until a pattern is printed."""

        def shown_or_ended() -> bool:
            return bool(re.search(pattern, self.shown())) or self.process.poll() is not None

        eventually(shown_or_ended, OUTPUT_SECONDS)
        match = re.search(pattern, self.shown())
        assert match, self.shown()
        return match

    def press_ctrl_c(self) -> None:
        """Press Ctrl-C: the terminal signals its foreground process group."""
        os.write(self._keyboard, b"\x03")

    def close(self) -> None:
        """Close the terminal, which sends SIGHUP."""
        if self._keyboard >= 0:
            os.close(self._keyboard)
            self._keyboard = -1

    def descendants(self) -> list[psutil.Process]:
        """Return all processes that `up` has started."""
        return list(psutil.Process(self.process.pid).children(recursive=True))


@contextmanager
def up(data: Path, *, before: Sequence[str] = (), **settings: str) -> Iterator[Terminal]:
    """Run `up` in a terminal, as an argument of the command `before` if there is one."""
    terminal = Terminal(data, before, settings)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()


def environment_of(data: Path) -> dict[str, str]:
    """Return what another shell has after `source`."""
    printed = subprocess.run(
        [
            "/bin/sh",
            "-c",
            '. "$0" && echo "$DATABASE_URL $CELERY_BROKER_URL"',
            data / "environment",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return dict(zip(("DATABASE_URL", "CELERY_BROKER_URL"), printed, strict=True))


def sockets_of(data: Path) -> Path:
    """Return the folder of the servers' sockets."""
    broker = environment_of(data)["CELERY_BROKER_URL"]
    return Path(broker.removeprefix("redis+socket://")).parent


def worker_among(processes: list[psutil.Process]) -> psutil.Process:
    """Return the worker's main process, the parent of its pool processes."""
    workers = [one for one in processes if "worker" in one.cmdline()[5:6]]
    return next(one for one in workers if one.children())


def test_jobs_run_and_ctrl_c_stops_everything(tmp_path: Path) -> None:
    """A job sent to the printed address succeeds, Flower responds, Ctrl-C twice exits with 0."""
    data = tmp_path / "data"
    with up(data) as terminal:
        flower = terminal.await_output(r"Flower +(http://127.0.0.1:\d+)")[1]
        assert all(f"--interview {interview}" in terminal.shown() for interview in INTERVIEWS)
        environment, sockets = environment_of(data), sockets_of(data)
        assert all(f"export {name}=" in terminal.shown() for name in environment)
        with urllib.request.urlopen(flower) as page:  # noqa: S310 - the pattern above has http
            assert page.status == 200

        broker = environment["CELERY_BROKER_URL"]
        with Celery(broker=broker, backend=broker) as producer:
            result = producer.send_task(
                "interview_access.grant_access",
                kwargs={"user_id": "somebody", "interview_ids": INTERVIEWS},
                queue="interview-access",
            )
            answer = {"success": True, "created_access_count": 2}
            assert result.get(timeout=OUTPUT_SECONDS, interval=0.1) == answer
            result.backend.client.connection_pool.disconnect()

        left = terminal.descendants()
        terminal.press_ctrl_c()
        terminal.await_output("Stopping")
        terminal.press_ctrl_c()
        assert terminal.process.wait(END_SECONDS) == 0
        assert not any(one.is_running() for one in left)
        assert not sockets.exists()
        assert not (data / "environment").exists()
        assert terminal.shown().endswith("Stopped.\n")


def test_a_killed_worker_is_replaced_and_a_killed_up_leaves_nothing(tmp_path: Path) -> None:
    """A killed worker is restarted; after SIGKILL of `up` nothing runs, and it starts again."""
    data = tmp_path / "data"
    with up(data) as terminal:
        terminal.await_output("Flower +http")
        sockets = sockets_of(data)
        assert eventually(lambda: "ready" in (data / "worker.log").read_text(), OUTPUT_SECONDS)
        killed = worker_among(terminal.descendants())
        killed.kill()
        terminal.await_output("worker ended with status 137(.|\n)*Starting worker again")
        assert eventually(
            lambda: (data / "worker.log").read_text().count("ready.") == 2, OUTPUT_SECONDS
        )
        left = terminal.descendants()
        terminal.process.kill()
        terminal.process.wait()
        assert not psutil.wait_procs(left, END_SECONDS)[1]
        assert eventually(lambda: not sockets.exists(), 1.0)
    with up(data) as terminal:
        terminal.await_output("nothing to do: the schema")
        left = terminal.descendants()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(END_SECONDS) == 0
        assert not any(one.is_running() for one in left)


@pytest.mark.parametrize("command", ["demo", "up"])
def test_a_missing_extra_is_reported_with_the_remedy(command: str) -> None:
    """An installation without the local servers prints one sentence, and no traceback."""
    program = "import sys; sys.modules['devstack'] = None; from worker.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"No module devstack.*: .*`pip install 'interview-access-worker\[local\]'`\.\n", done.stderr
    )


def test_a_closed_terminal_stops_everything(tmp_path: Path) -> None:
    """When its terminal closes, `up` shuts down gracefully and leaves no process."""
    data = tmp_path / "data"
    with up(data) as terminal:
        terminal.await_output("Flower +http")
        left = terminal.descendants()
        terminal.close()
        assert terminal.process.wait(END_SECONDS) == 0
        assert not any(one.is_running() for one in left)


def test_with_parent_ends_with_a_killed_parent(tmp_path: Path) -> None:
    """If the command that started it is killed, as `make` may be, `up` shuts down gracefully."""
    starter = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with up(tmp_path / "data", before=[sys.executable, "-c", starter]) as terminal:
        terminal.await_output("created table")
        left = terminal.descendants()
        terminal.process.kill()
        assert not psutil.wait_procs(left, END_SECONDS)[1]


def test_a_worker_that_cannot_run_ends_up_with_the_reason(tmp_path: Path) -> None:
    """After four failures `up` prints the worker's log, exits with 1 and leaves no process."""
    with up(tmp_path / "data", GRANT_CHUNK_SIZE="many") as terminal:
        terminal.await_output("Starting worker again")
        left = terminal.descendants()
        terminal.await_output("(worker|flower) failed 4 times in a row")
        assert "GRANT_CHUNK_SIZE: got 'many'" in terminal.shown()
        assert terminal.process.wait(END_SECONDS) == 1
        assert not any(one.is_running() for one in left)
