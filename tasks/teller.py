"""Tells of work that does not end soon, from a thread of its own.

Work that does costs two assignments: a thread that is started, or woken, for each of thousands of
short jobs would take longer than some of them do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

_LOOK_SECONDS = 0.25


class Teller:
    """One for a process; make it after the fork, for threads do not survive that."""

    def __init__(self) -> None:
        """Its thread looks every quarter of a second, for as long as the process lives."""
        self._tell: Callable[[], object] | None = None
        Thread(target=self._look, name="teller", daemon=True).start()

    @contextmanager
    def told(self, tell: Callable[[], object]) -> Iterator[None]:
        """Have it told, once, in a quarter to half a second, unless the block has ended by then."""
        self._tell = tell
        try:
            yield
        finally:
            self._tell = None

    def _look(self) -> None:
        seen: Callable[[], object] | None = None
        done: Callable[[], object] | None = None
        while True:
            time.sleep(_LOOK_SECONDS)
            tell = self._tell
            if tell is not None and tell is seen and tell is not done:
                tell()
                done = tell
            seen = tell
