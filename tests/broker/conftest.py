"""Fixtures: an empty Redis database, and the scripts with two worker sessions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis import Redis

from devstack.servers import LocalStack
from tests.support.sessions import ManualClock, SteppedLease, connect
from worker.broker.claims import Claims


@pytest.fixture
def path(stack: LocalStack) -> str:
    """The path of the Redis server's socket."""
    return stack.broker_url.removeprefix("redis+socket://")


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Redis]:
    """An empty Redis database."""
    with connect(stack) as client:
        client.flushdb()
        yield client


@pytest.fixture
def protocol(redis: Redis) -> Claims:
    """The scripts, with the sessions ``ann`` and ``bob``."""
    protocol = Claims(redis)
    protocol.open("ann")
    protocol.open("bob")
    return protocol


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Redis]:
    """The lease's client, which a test may disconnect."""
    with connect(stack) as client:
        yield client


@pytest.fixture
def clock() -> ManualClock:
    """The clock of both leases."""
    return ManualClock()


@pytest.fixture
def lease(redis: Redis, client: Redis, clock: ManualClock) -> Iterator[SteppedLease]:
    """A lease with a session on the empty database."""
    assert redis.dbsize() == 0
    lease = SteppedLease(clock, batch_size=10)
    lease.open(client)
    yield lease
    lease.close()


@pytest.fixture
def other(redis: Redis, stack: LocalStack, clock: ManualClock) -> Iterator[SteppedLease]:
    """Another worker's lease with a session."""
    assert redis.ping()
    lease = SteppedLease(clock, batch_size=10)
    with connect(stack) as client:
        lease.open(client)
        yield lease
        lease.close()
