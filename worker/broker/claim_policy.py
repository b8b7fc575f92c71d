"""What a worker may claim now: large or small messages, from which lists, and how many.

Owns the sizes by which jobs are batched, and the circuit breaker between outages and claims.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf

from celery.utils.log import get_logger

from worker.broker.claims import ANY_SIZE, Claimed
from worker.broker.delivery import Delivery

logger = get_logger(__name__)

BATCH_BYTES = 256 * 1024
"""Bytes of the messages that one pool process executes together: about 6,500 IDs. A larger message
is a batch by itself."""

SMALL_BYTES = 64 * 1024
"""Bytes of the largest small message: about 1,600 IDs. Others are large."""

HUGE_BYTES = 512 * 1024
"""Bytes above which a large message is huge: about 13,000 IDs, which take some 0.2 s. All pool
processes but one execute huge jobs, so that a small job never waits for one."""

_SMALL_SECONDS = 1.0
"""Seconds after a small job during which one pool process is reserved for small jobs."""

_LANE_READ_SECONDS = 1.0  # between two reads of a low-priority lane while nothing in it fits


class CircuitBreaker:
    """Stops claims during an outage, then admits a single job as a probe."""

    _BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
    """Seconds; the last one repeats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with a closed circuit.

        Args:
            clock: Seconds of a monotonic clock.
        """
        self._clock = clock
        self._failures = 0
        self._open_until = 0.0
        self._opened_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether nothing may be claimed now."""
        return self._clock() < self._open_until

    @property
    def is_probing(self) -> bool:
        """Whether no job has succeeded since an outage: only one job may be claimed."""
        return self._failures > 0

    @property
    def probing_since(self) -> float:
        """The time since which only one job may be claimed; infinite if the circuit is closed."""
        return self._opened_at if self.is_probing else inf

    @property
    def seconds_since_opening(self) -> float:
        """Seconds since the circuit opened last; infinite if it is closed."""
        return self._clock() - self._opened_at if self.is_probing else inf

    def record_failure(self, reason: str) -> None:
        """Open the circuit for the next back-off, unless it is open.

        Args:
            reason: The error, for the log.
        """
        if self.is_open:
            return
        back_off = self._BACK_OFF[min(self._failures, len(self._BACK_OFF) - 1)]
        self._opened_at = self._clock()
        self._open_until = self._opened_at + back_off
        self._failures += 1
        logger.warning("circuit open, no job is claimed: seconds=%.0f error=%s", back_off, reason)

    def record_success(self) -> None:
        """Close the circuit."""
        if self._failures:
            logger.info("circuit closed, jobs are claimed: failures=%d", self._failures)
        self._failures = 0


class ClaimPolicy:
    """Decides from a session's deliveries what its next claim may take.

    Attributes:
        breaker: Opens during an outage.
    """

    def __init__(
        self, deliveries: Callable[[], Sequence[Delivery]], clock: Callable[[], float]
    ) -> None:
        """Start without knowledge of the queues.

        Args:
            deliveries: Returns the session's deliveries.
            clock: Seconds of a monotonic clock.
        """
        self.breaker = CircuitBreaker(clock)
        self._deliveries = deliveries
        self._clock = clock
        self._has_large = False  # in a low-priority lane
        self._has_isolated = False
        self._lanes_read_at = 0.0
        self._largest_not_found = 0  # bytes of the largest message that could have been claimed
        self._small_at = -inf  # when a small job was last claimed

    @property
    def may_claim(self) -> bool:
        """Whether the circuit breaker admits another claim."""
        since = self.breaker.probing_since
        is_probed = any(one.claimed_at >= since for one in self._deliveries())
        return not (self.breaker.is_open or is_probed)

    def largest(self, processes: int) -> int:
        """Return the size in bytes of the largest message that may be claimed.

        Args:
            processes: Pool processes, including busy ones.
        """
        for_huge = max(processes - 1, 1)
        has_small = self._clock() < self._small_at + _SMALL_SECONDS
        if self._large_batches() >= (for_huge if has_small else processes):
            return SMALL_BYTES
        return HUGE_BYTES if self._large_batches(HUGE_BYTES) >= for_huge else ANY_SIZE

    def is_last_free(self, processes: int) -> bool:
        """Report whether all pool processes but one execute large jobs.

        Args:
            processes: Pool processes, including busy ones.
        """
        return self._large_batches() == processes - 1 > 0

    def isolated_room(self, largest: int) -> int:
        """Return how many poison candidates may be claimed, 0 or 1: each counts as huge.

        Args:
            largest: Bytes of the largest message that may be claimed.
        """
        is_executed = any(one.claim.attempts for one in self._deliveries())
        return 0 if largest <= HUGE_BYTES or is_executed else 1

    def reads_lanes(self, largest: int) -> bool:
        """Report whether to read the low-priority lanes: not often while nothing in them fits.

        Reading one message of 5 MB takes Redis as long as the rest of a claim.

        Args:
            largest: Bytes of the largest message that may be claimed.
        """
        is_recent = self._clock() < self._lanes_read_at + _LANE_READ_SECONDS
        return not (is_recent and largest <= self._largest_not_found)

    def may_claim_from_lane(self, processes: int) -> bool:
        """Report whether a message in a low-priority lane, or an isolated one, may be claimed.

        A wait for a queue does not watch these lists.

        Args:
            processes: Pool processes, including busy ones.
        """
        largest = self.largest(processes)
        has_isolated = self._has_isolated and self.isolated_room(largest) > 0
        has_large = self._has_large and largest > SMALL_BYTES
        return has_large or has_isolated

    def record(
        self, claimed: Claimed, deliveries: Sequence[Delivery], *, largest: int, read_lanes: bool
    ) -> None:
        """Record what a claim has found.

        Args:
            claimed: Its reply.
            deliveries: Those that it made.
            largest: Bytes of the largest message that it could take.
            read_lanes: Whether it read the low-priority lanes.
        """
        self._has_large = claimed.large_wait
        self._has_isolated = claimed.isolated > 0
        took_large = any(map(_is_large, deliveries))
        if deliveries and not took_large:
            self._small_at = self._clock()
        if read_lanes:
            self._lanes_read_at = self._clock()
            found_none = claimed.large_wait and not took_large and largest <= HUGE_BYTES
            self._largest_not_found = largest if found_none else 0

    def _large_batches(self, larger_than: int = SMALL_BYTES) -> int:
        """Count the pool processes with large jobs; poison candidates count as huge."""
        deliveries = self._deliveries()
        large = [one for one in deliveries if one.claim.attempts or one.claim.size > larger_than]
        return len({one.batch or one for one in large})


def _is_large(delivery: Delivery) -> bool:
    """Report whether a delivery counts as large: for its size, or as a poison candidate."""
    return bool(delivery.claim.attempts) or delivery.claim.size > SMALL_BYTES
