"""Reports work that takes longer than a quarter of a second, from a thread of its own.

A job that finishes early pays for two assignments and one comparison. Starting or waking a thread
for each job would take longer than some jobs do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

_POLL_SECONDS = 0.25
_POLLS_AWAKE = 8  # without work, after which the thread sleeps until the next block


class StartedReporter:
    """The reporter of one process. Create it after the fork: threads do not survive one."""

    def __init__(self) -> None:
        """Start the thread, which polls every quarter of a second while the process has work."""
        self._report: Callable[[], object] | None = None
        self._is_asleep = False
        self._wake_up = Event()
        Thread(target=self._poll, name="started-reporter", daemon=True).start()

    @contextmanager
    def reporting(self, report: Callable[[], object]) -> Iterator[None]:
        """Call ``report`` once after a quarter to half a second, unless the block has ended.

        Args:
            report: Called on the reporter's thread; its exceptions are suppressed.
        """
        self._report = report
        if self._is_asleep:
            self._wake_up.set()
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
            if idle_polls >= _POLLS_AWAKE:
                self._sleep()
                idle_polls, report = 0, self._report
            if report is not None and report is seen and report is not done:
                with suppress(Exception):  # a failed report must not end the thread
                    report()
                done = report
            seen = report

    def _sleep(self) -> None:
        self._is_asleep = True
        if self._report is None:  # read after _is_asleep is set: a block that begins now wakes it
            self._wake_up.wait()
        self._is_asleep = False
        self._wake_up.clear()
