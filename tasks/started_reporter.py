"""Reports work that takes longer than a quarter of a second, from a thread of its own.

A job that finishes early pays for two assignments and one comparison. Starting a thread or
notifying one for each job would take longer than some jobs do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

_POLL_SECONDS = 0.25
_IDLE_POLLS = 8  # without work, after which the thread waits for the next block


class StartedReporter:
    """The reporter of one process. Create it after the fork: threads do not survive one."""

    def __init__(self) -> None:
        """Start the thread, which polls every quarter of a second while the process has work."""
        self._report: Callable[[], object] | None = None
        self._is_idle = False
        self._work_began = Event()
        Thread(target=self._poll, name="started-reporter", daemon=True).start()

    @contextmanager
    def reporting(self, report: Callable[[], object]) -> Iterator[None]:
        """Call ``report`` once after a quarter to half a second, unless the block has ended.

        Args:
            report: Called on the reporter's thread; its exceptions are suppressed.
        """
        self._report = report
        if self._is_idle:
            self._work_began.set()
        try:
            yield
        finally:
            self._report = None

    def _poll(self) -> None:
        seen: Callable[[], object] | None = None
        done: Callable[[], object] | None = None
        idle_polls = 0
        while True:
            time.sleep(_POLL_SECONDS)
            report = self._report
            idle_polls = 0 if report else idle_polls + 1
            if idle_polls >= _IDLE_POLLS:
                self._wait_for_work()
                idle_polls, report = 0, self._report
            if report is not None and report is seen and report is not done:
                with suppress(Exception):  # a failed report must not end the thread
                    report()
                done = report
            seen = report

    def _wait_for_work(self) -> None:
        self._is_idle = True
        # Read after _is_idle is set: a block that begins now ends the wait.
        if self._report is None:
            self._work_began.wait()
        self._is_idle = False
        self._work_began.clear()
