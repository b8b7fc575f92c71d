"""The circuit breaker between outages and claims."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

from celery.utils.log import get_logger

logger = get_logger(__name__)


class CircuitBreaker:
    """Stops claiming during an outage, then lets a single job probe."""

    _BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
    """Seconds; the last one repeats. Not above a retry's own delay, so that both end together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._opened_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether nothing is claimed now."""
        return self._clock() < self._open_until

    @property
    def is_probing(self) -> bool:
        """Whether the last job failed, so that only one is claimed."""
        return self._failures > 0

    @property
    def probing_since(self) -> float:
        """The time since which only one job may be claimed; infinite if the circuit is closed."""
        return self._opened_at if self.is_probing else inf

    def record_failure(self, reason: str) -> None:
        """Open the circuit for the next back-off, unless it is open."""
        if self.is_open:
            return
        back_off = self._BACK_OFF[min(self._failures, len(self._BACK_OFF) - 1)]
        self._opened_at = self._clock()
        self._open_until = self._opened_at + back_off
        self._failures += 1
        logger.warning("circuit open, no job is claimed: seconds=%.0f error=%s", back_off, reason)

    def record_success(self) -> None:
        """Close the circuit."""
        self._failures = 0
