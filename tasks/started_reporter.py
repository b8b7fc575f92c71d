"""Reports work that does not end soon, from a thread of its own.

A job that finishes early pays for two assignments only: starting or waking a thread for each of
thousands of short jobs would take longer than some of them do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread

_POLL_SECONDS = 0.25


class StartedReporter:
    """One for a process; made after the fork, which threads do not survive."""

    def __init__(self) -> None:
        """Start its thread, which polls every quarter of a second while the process lives."""
        self._report: Callable[[], object] | None = None
        Thread(target=self._poll, name="started-reporter", daemon=True).start()

    @contextmanager
    def reporting(self, report: Callable[[], object]) -> Iterator[None]:
        """Call ``report`` once, in a quarter to half a second, unless the block has ended."""
        self._report = report
        try:
            yield
        finally:
            self._report = None

    def _poll(self) -> None:
        seen: Callable[[], object] | None = None
        done: Callable[[], object] | None = None
        while True:
            time.sleep(_POLL_SECONDS)
            report = self._report
            if report is not None and report is seen and report is not done:
                with suppress(Exception):  # a courtesy, which must not end this thread
                    report()
                done = report
            seen = report
