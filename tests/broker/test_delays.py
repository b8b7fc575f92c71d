"""Delayed messages: when they are due, also after a step of the server's clock."""

from __future__ import annotations

import time
from typing import Any

import pytest
from redis import Redis

from tests.support.claims import (
    CLOCK,
    DEFERRED,
    DUE,
    JOBS,
    LARGE,
    LATER,
    contents,
    settle,
    take,
    take_over,
)
from tests.support.stores import until
from worker.broker.claims import Action, Claims


def test_delays_survive_a_workers_end(redis: Redis, protocol: Claims) -> None:
    """A delayed message waits for its time, also after its worker's session was taken over."""
    redis.lpush(JOBS, "a", "b")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=LATER)
    settle(protocol, Action.DELAY, "2", delay=0.05)
    take_over(protocol)
    until(lambda: protocol.wake() or redis.llen(JOBS) == 1)
    assert redis.lrange(JOBS, 0, -1) == [b"b"]
    assert [*contents(redis)[DEFERRED].values()] == [f"{JOBS}\0a".encode()]


def test_large_delayed_messages_wake_in_steps(redis: Redis, protocol: Claims) -> None:
    """Each script wakes a few MB and reports that more messages are due."""
    redis.lpush(JOBS, *[LARGE] * 4)
    take(protocol, size=100_000_000)
    settle(protocol, Action.DELAY, *"1234")
    assert protocol.wake()
    assert redis.llen(JOBS) == 3
    assert not protocol.wake()
    assert redis.llen(JOBS) == 4


def due_in(redis: Redis) -> float:
    """Return the seconds until the one delayed message is due, by the server's clock."""
    seconds: Any = redis.time()
    ((_, due),) = contents(redis)[DUE]
    offset: Any = redis.hget(CLOCK, "offset") or 0
    return float((due - int(offset)) / 1_000 - seconds[0])


def test_a_delay_records_the_servers_clock(redis: Redis, protocol: Claims) -> None:
    """A delay records the clock's time, so that a later step back is detected."""
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=60)
    last: Any = redis.hget(CLOCK, "last")
    seconds: Any = redis.time()
    assert 0 <= seconds[0] - int(last) // 1_000 < 60


@pytest.mark.parametrize("step", [-600, 600])
def test_a_step_of_the_servers_clock_keeps_delays(
    redis: Redis, protocol: Claims, step: int
) -> None:
    """After a step back delays keep their length; a step forward can only shorten them."""
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=60)
    protocol.wake()
    before: Any = redis.hget(CLOCK, "last")
    # As if the clock had been ahead, or behind, by so much until now.
    redis.hset(CLOCK, "last", int(before) - step * 1_000)
    redis.zincrby(DUE, -step * 1_000, contents(redis)[DUE][0][0])
    protocol.wake()
    assert redis.llen(JOBS) == (step > 0)
    if step < 0:
        assert due_in(redis) == pytest.approx(60, abs=5)


def test_a_step_of_the_servers_clock_expires_no_session(redis: Redis, protocol: Claims) -> None:
    """A step of the server's clock expires no lease."""
    before = protocol.heartbeat("ann").sessions
    redis.hset(CLOCK, "last", int(time.time() + 600) * 1_000)
    protocol.wake()
    assert protocol.heartbeat("bob").sessions == before | {"bob": before["bob"] + 1}
