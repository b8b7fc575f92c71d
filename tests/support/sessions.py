"""Stepped worker sessions on the real Redis: the test advances the clock and sends heartbeats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from devstack.servers import LocalStack
from worker.broker.claims import DEAD, PREFIX
from worker.broker.lease import Lease

DATABASE = 12
"""Number of the Redis database."""

QUEUE, LANE = "interview-access", "interview-access\x06\x169"
KEYS = (QUEUE, LANE)
"""The queue's keys by priority; the last one is the low-priority lane."""

LEASES, DEFERRED, DUE = f"{PREFIX}leases", f"{PREFIX}deferred", f"{PREFIX}due"
ISOLATED = f"{PREFIX}isolated"

TTL = 8.0
GRACE = 20.0
ORPHANED_AFTER = 10.0


def connect(stack: LocalStack) -> Redis:
    """Return a client that does not retry commands, as the worker's."""
    return Redis(
        unix_socket_path=stack.broker_url.removeprefix("redis+socket://"),
        db=DATABASE,
        retry=Retry(NoBackoff(), 0),
    )


@contextmanager
def unreachable(client: Redis) -> Iterator[None]:
    """Within the block the client's connections are cut and new ones fail."""
    pool = client.connection_pool
    path = pool.connection_kwargs["path"]
    pool.connection_kwargs["path"] = f"{path}.nobody-listens"
    pool.disconnect()
    pool.reset()
    try:
        yield
    finally:
        pool.connection_kwargs["path"] = path
        pool.reset()


class ManualClock:
    """A monotonic clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self.now


class SteppedLease(Lease):
    """A lease whose heartbeats are sent by the test instead of a thread."""

    def __init__(self, clock: ManualClock, **options: Any) -> None:
        options = {"ttl": TTL, "grace": GRACE, "orphaned_after": ORPHANED_AFTER} | options
        super().__init__(clock=clock, **options)
        self.clock = clock

    def _keep(self) -> None:
        """Start no thread."""

    @property
    def session(self) -> str:
        """The ID of the current session."""
        return self._session

    @property
    def tags(self) -> set[str]:
        """The delivery tags in the lease's table."""
        return set(self._deliveries)

    def beat(self, seconds: float = TTL / 8) -> None:
        """Advance the clock by so many seconds, turn the event loop and send a heartbeat."""
        self.clock.now += seconds
        self.loop_turned()
        self._beat()

    def beat_for(self, seconds: float) -> None:
        """Send the heartbeats that are due within so many seconds."""
        for _ in range(int(seconds / (TTL / 8))):
            self.beat()


def sessions(redis: Any) -> dict[str, float]:
    """Return the heartbeat counters, by session."""
    return {
        name.decode(): counter for name, counter in redis.zrange(LEASES, 0, -1, withscores=True)
    }


def claimed(redis: Any, session: str) -> list[bytes]:
    """Return the messages that a session has claimed, in order of their tags."""
    values = redis.hgetall(f"{PREFIX}held:{session}")
    return [values[tag].partition(b"\0")[2] for tag in sorted(values, key=int)]


def messages(redis: Any) -> Counter[bytes]:
    """Count the places that each message is in, over all places."""
    values: list[bytes] = redis.lrange(ISOLATED, 0, -1) + redis.hvals(DEFERRED)
    for key in redis.scan_iter(f"{PREFIX}held:*"):
        values += redis.hvals(key)
    everywhere = Counter(value.partition(b"\0")[2] for value in values)
    for queue in KEYS:
        everywhere.update(redis.lrange(queue, 0, -1))
    everywhere.update(letter[b"message"] for _, letter in redis.xrange(DEAD))
    return everywhere


def end_delays(redis: Any) -> None:
    """Make all delayed messages due."""
    for name in redis.zrange(DUE, 0, -1):
        redis.zadd(DUE, {name: 0})
