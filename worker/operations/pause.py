"""The pause of the queue: while it lasts no worker claims a job.

The pause is one key in Redis, which the script that claims reads. So no job is claimed after
:meth:`PauseSwitch.pause` has returned, and restarts of the workers do not end the pause.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Self

from redis import Redis

from worker.broker.claims import PREFIX
from worker.broker.scripts import claims_script

MAX_CHARACTERS = 200
"""Characters of the name and of the reason of a pause."""

READ_BYTES = 4_096
"""Bytes that are read of a pause: it fits if this module has written it."""


@dataclass(frozen=True, slots=True)
class Pause:
    """Who paused the queue, when and why.

    Attributes:
        by: Who paused it; empty if the key holds something else.
        at: When, timezone-aware; None likewise.
        reason: Why; may be empty.
    """

    by: str
    at: datetime | None
    reason: str

    @classmethod
    def read(cls, stored: bytes) -> Self | None:
        """Read a stored pause. Any value of the key pauses the queue; an empty one is none.

        Args:
            stored: The first :data:`READ_BYTES` of the key.
        """
        if not stored:
            return None
        with suppress(ValueError, TypeError, KeyError, RecursionError):
            given = json.loads(stored)
            at = datetime.fromisoformat(given["at"])
            return cls(str(given["by"]), at.astimezone(UTC), str(given["reason"]))
        return cls("", None, "")


class PauseSwitch:
    """Pauses and resumes the queue. Every method raises redis-py's errors."""

    def __init__(self, redis: Redis) -> None:
        """Connect at the first call.

        Args:
            redis: Client of the queue's Redis.
        """
        self._pause = redis.register_script(claims_script("pause"))
        self._resume = redis.register_script(claims_script("resume"))

    def pause(self, by: str, reason: str) -> Pause | None:
        """Pause the queue, durably: running jobs finish, and no other is claimed.

        Args:
            by: Who pauses it, at most :data:`MAX_CHARACTERS`.
            reason: Why, likewise.

        Returns:
            None, or the pause that existed before and stays.
        """
        at = datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({"by": by, "at": at, "reason": reason})
        stored: Any = self._pause([PREFIX], [text, READ_BYTES])
        return None if stored is None else Pause.read(stored) or Pause("", None, "")

    def resume(self) -> Pause | None:
        """Resume the queue. Returns the pause that ended, or None if the queue was not paused."""
        # A script: a full Redis 7.0 refuses every command in MULTI.
        stored: Any = self._resume([PREFIX], [READ_BYTES])
        return None if stored is None else Pause.read(stored) or Pause("", None, "")
