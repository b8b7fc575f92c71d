"""`interview-access up`: it runs everything, tells how to use it, and leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from celery import Celery

ROOT = Path(__file__).parent.parent
GONE_WITHIN = 10.0  # seconds after its end, however it came
TOLD_WITHIN = 40.0  # seconds; a start takes three, on a machine that does nothing else
INTERVIEWS = ["89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6"]

UP = """
import fcntl, os, signal, sys, termios
from pathlib import Path
from worker.up import run_up

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or it inherits that of `nohup make test`
if os.getsid(0) == os.getpid():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
sys.exit(run_up(Path(sys.argv[1]), with_parent="with-parent" in sys.argv[2:]))
"""


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


class Terminal:
    """A terminal in which `up` runs, and what it shows."""

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
        """All that was shown so far."""
        return self._screen.read_text(encoding="utf-8")

    def await_words(self, pattern: str) -> re.Match[str]:
        """Waits until something is shown."""

        def shown_or_ended() -> bool:
            return bool(re.search(pattern, self.shown())) or self.process.poll() is not None

        eventually(shown_or_ended, TOLD_WITHIN)
        match = re.search(pattern, self.shown())
        assert match, self.shown()
        return match

    def press_ctrl_c(self) -> None:
        """Presses Ctrl-C: the terminal signals all that stand in its foreground."""
        os.write(self._keyboard, b"\x03")

    def close(self) -> None:
        """Closes its window: the terminal hangs up."""
        if self._keyboard >= 0:
            os.close(self._keyboard)
            self._keyboard = -1

    def started(self) -> list[psutil.Process]:
        """All that runs for it."""
        return list(psutil.Process(self.process.pid).children(recursive=True))


@contextmanager
def up(data: Path, *, before: Sequence[str] = (), **settings: str) -> Iterator[Terminal]:
    """`up` in a terminal, started by another command where one stands before it."""
    terminal = Terminal(data, before, settings)
    try:
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        terminal.close()


def environment_of(data: Path) -> dict[str, str]:
    """What another shell has after `source`."""
    told = subprocess.run(
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
    return dict(zip(("DATABASE_URL", "CELERY_BROKER_URL"), told, strict=True))


def sockets_of(data: Path) -> Path:
    """The folder of the servers' sockets."""
    broker = environment_of(data)["CELERY_BROKER_URL"]
    return Path(broker.removeprefix("redis+socket://")).parent


def worker_among(processes: list[psutil.Process]) -> psutil.Process:
    """The worker's main process, which its children stand below."""
    workers = [one for one in processes if "worker" in one.cmdline()[5:6]]
    return next(one for one in workers if one.children())


def test_jobs_run_and_ctrl_c_ends_all_in_order(tmp_path: Path) -> None:
    """A job sent as told is done, Flower answers, and Ctrl-C, twice, ends all with status 0."""
    data = tmp_path / "data"
    with up(data) as terminal:
        flower = terminal.await_words(r"Flower +(http://127.0.0.1:\d+)")[1]
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
            assert result.get(timeout=TOLD_WITHIN, interval=0.1) == answer
            result.backend.client.connection_pool.disconnect()

        left = terminal.started()
        terminal.press_ctrl_c()
        terminal.await_words("Stopping")
        terminal.press_ctrl_c()
        assert terminal.process.wait(GONE_WITHIN) == 0
        assert not any(one.is_running() for one in left)
        assert not sockets.exists()
        assert not (data / "environment").exists()
        assert terminal.shown().endswith("Stopped.\n")


def test_a_killed_worker_is_replaced_and_a_killed_up_leaves_nothing(tmp_path: Path) -> None:
    """What dies is started again; after SIGKILL nothing runs, and the next start is clean."""
    data = tmp_path / "data"
    with up(data) as terminal:
        terminal.await_words("Flower +http")
        sockets = sockets_of(data)
        assert eventually(lambda: "ready" in (data / "worker.log").read_text(), TOLD_WITHIN)
        killed = worker_among(terminal.started())
        killed.kill()
        terminal.await_words("worker ended with status 137(.|\n)*Starting worker again")
        assert eventually(
            lambda: (data / "worker.log").read_text().count("ready.") == 2, TOLD_WITHIN
        )
        left = terminal.started()
        terminal.process.kill()
        terminal.process.wait()
        assert not psutil.wait_procs(left, GONE_WITHIN)[1]
        assert eventually(lambda: not sockets.exists(), 1.0)
    with up(data) as terminal:
        terminal.await_words("nothing to do: the schema")
        left = terminal.started()
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.process.wait(GONE_WITHIN) == 0
        assert not any(one.is_running() for one in left)


def test_a_closed_terminal_ends_all(tmp_path: Path) -> None:
    """When its terminal goes it ends in order and leaves nothing."""
    data = tmp_path / "data"
    with up(data) as terminal:
        terminal.await_words("Flower +http")
        left = terminal.started()
        terminal.close()
        assert terminal.process.wait(GONE_WITHIN) == 0
        assert not any(one.is_running() for one in left)


def test_it_ends_with_a_killed_parent_where_it_is_told_to(tmp_path: Path) -> None:
    """Started by a command that is then killed, as a `make` may be, it ends in order."""
    starter = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with up(tmp_path / "data", before=[sys.executable, "-c", starter]) as terminal:
        terminal.await_words("created table")
        left = terminal.started()
        terminal.process.kill()
        assert not psutil.wait_procs(left, GONE_WITHIN)[1]


def test_a_worker_that_cannot_run_ends_it_with_the_reason(tmp_path: Path) -> None:
    """After a few tries it ends with status 1, the worker's own words, and nothing left."""
    with up(tmp_path / "data", GRANT_CHUNK_SIZE="many") as terminal:
        terminal.await_words("Starting worker again")
        left = terminal.started()
        terminal.await_words("(worker|flower) failed 4 times in a row")
        assert "GRANT_CHUNK_SIZE: got 'many'" in terminal.shown()
        assert terminal.process.wait(GONE_WITHIN) == 1
        assert not any(one.is_running() for one in left)
