"""Locks that writers would queue behind, asked for so that no writer waits longer than a moment.

A statement that waits for a table's lock holds up everyone who comes after it. So it gives up
after a tenth of a second, lets the others pass, and asks again.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy.exc import DBAPIError

LOCK_TIMEOUT_MILLISECONDS = 100
"""How long a statement of a migration waits for a lock; the session is opened with it."""

_PAUSE_SECONDS = 0.4  # between two tries: four fifths of the time belong to the others
_LOCK_NOT_AVAILABLE = "55P03"


def sqlstate(error: DBAPIError) -> str | None:
    """PostgreSQL's code of an error, or None where no server answered."""
    code: str | None = getattr(error.orig, "sqlstate", None)
    return code


def is_lock_timeout(error: DBAPIError) -> bool:
    """Whether a statement gave up waiting for a lock."""
    return sqlstate(error) == _LOCK_NOT_AVAILABLE


def got_briefly(action: Callable[[], object], *, seconds: float) -> bool:
    """Do what needs a lock, as often as it takes for ``seconds``; False where it never got it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            action()
        except DBAPIError as error:
            if not is_lock_timeout(error):
                raise
            if time.monotonic() >= deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
