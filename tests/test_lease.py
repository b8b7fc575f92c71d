"""A process's lease, on the real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from tests.stores import until
from worker.claims import PREFIX
from worker.lease import Lease
from worker.local_stack import LocalStack

NUMBER = 12
"""Of the Redis database."""


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Redis]:
    """An empty Redis database."""
    path = stack.broker_url.removeprefix("redis+socket://")
    with Redis(unix_socket_path=path, db=NUMBER) as client:
        client.flushdb()
        yield client


@pytest.fixture
def lease(redis: Redis) -> Iterator[Lease]:
    """A lease that is renewed eight times a second."""
    lease = Lease(redis, seconds=1.0, attempt_limit=5, grace=1.0)
    lease.open()
    yield lease
    lease.close()


def lose(redis: Redis) -> None:
    """Take all leases away, as others do when they have run out."""
    redis.delete(f"{PREFIX}leases", *redis.keys(f"{PREFIX}held:*"))


def test_a_lost_message_takes_no_room(lease: Lease, redis: Redis) -> None:
    """A message that was lost after its claim is not begun, and is in hand no more."""
    redis.lpush("queue", "message")
    (claim,) = lease.claim(["queue"], 1, 1) or []
    lose(redis)
    assert not lease.start(claim.receipt)
    assert lease.in_hand == 0


def test_a_lost_lease_is_followed_by_another(lease: Lease, redis: Redis) -> None:
    """A worker whose lease was taken away takes messages again, by itself."""
    lose(redis)
    until(lambda: redis.zcard(f"{PREFIX}leases") == 1)
    redis.lpush("queue", "message")
    (claim,) = lease.claim(["queue"], 1, 1) or []
    assert lease.start(claim.receipt)


def test_what_runs_under_a_lost_lease_is_let_go_of(lease: Lease, redis: Redis) -> None:
    """A job that runs when its lease is lost is others' by then; its end has no effect."""
    redis.lpush("queue", "message")
    (claim,) = lease.claim(["queue"], 1, 1) or []
    assert lease.start(claim.receipt)
    lose(redis)
    until(lambda: lease.in_hand == 0)
    redis.lpush("queue", "message")
    lease.acknowledge({claim.receipt: "job"})
    assert redis.lrange("queue", 0, -1) == [b"message"]
