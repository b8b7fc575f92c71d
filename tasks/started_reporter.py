"""Reports work that does not end soon, from a thread of its own.

A job that finishes early pays for two assignments and one comparison: starting or waking a thread
for each of thousands of short jobs would take longer than some of them do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

_POLL_SECONDS = 0.25
_POLLS_AWAKE = 8  # without a block, after which the thread sleeps until the next one


class StartedReporter:
    """One for a process; made after the fork, which threads do not survive."""

    def __init__(self) -> None:
        """Start its thread, which polls every quarter of a second while the process has work."""
        self._report: Callable[[], object] | None = None
        self._is_asleep = False
        self._wake_up = Event()
        Thread(target=self._poll, name="started-reporter", daemon=True).start()

    @contextmanager
    def reporting(self, report: Callable[[], object]) -> Iterator[None]:
        """Call ``report`` once, in a quarter to half a second, unless the block has ended."""
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
                with suppress(Exception):  # a courtesy, which must not end this thread
                    report()
                done = report
            seen = report

    def _sleep(self) -> None:
        self._is_asleep = True
        if self._report is None:  # after the line above: a block that begins now wakes the thread
            self._wake_up.wait()
        self._is_asleep = False
        self._wake_up.clear()
