"""Claims: which messages one claim takes, in which order, and what it returns of each."""

from __future__ import annotations

from collections import Counter

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.support.claims import (
    ISOLATED,
    JOBS,
    LANE,
    URGENT,
    claim,
    claimed,
    contents,
    counter,
    delay,
    letters,
    messages,
    settle,
    take,
    take_over,
)
from worker.broker.claims import PREFIX, Action, Claim, Claimed, Claims


def test_equal_bytes_are_two_messages(redis: Redis, protocol: Claims) -> None:
    """Two messages with the same bytes, Celery's delivery tag included, are settled separately."""
    redis.lpush(JOBS, "same", "same")
    assert [claim.tag for claim in take(protocol)] == ["1", "2"]
    settle(protocol, Action.ACKNOWLEDGE, "1")
    assert claimed(contents(redis), "ann") == {"2": b"same"}
    settle(protocol, Action.REQUEUE, "2")
    assert redis.lrange(JOBS, 0, -1) == [b"same"]


def test_messages_are_claimed_by_priority_and_age(redis: Redis, protocol: Claims) -> None:
    """A claim reads the queues in their order, and each queue from its oldest message."""
    redis.lpush(JOBS, "1", "2")
    redis.lpush(URGENT, "3", "4")
    claims = take(protocol, room=3)
    assert [(claim.queue, claim.message) for claim in claims] == [
        (URGENT, b"3"),
        (URGENT, b"4"),
        (JOBS, b"1"),
    ]


def test_an_isolated_message_is_claimed_alone(redis: Redis, protocol: Claims) -> None:
    """A claim takes one poison candidate at most, and candidates block no other messages."""
    redis.lpush(JOBS, "poison 1", "poison 2")
    take(protocol)
    take_over(protocol)
    protocol.open("ann")
    redis.lpush(JOBS, "a", "b")
    assert claim(protocol, 1) == Claimed(
        [Claim("1", JOBS, b"poison 1", 8, 1, 0)], large_wait=False, isolated=1, has_more=True
    )
    assert [one.message for one in take(protocol, 2, isolated_room=0)] == [b"a", b"b"]
    assert [one.message for one in take(protocol, 4, by="bob")] == [b"poison 2"]
    assert redis.llen(ISOLATED) == 0


@pytest.mark.parametrize("lane", [JOBS, LANE])
def test_a_copy_of_a_message_with_attempts_is_isolated(
    redis: Redis, protocol: Claims, lane: str
) -> None:
    """A claim moves a message that has attempts from any queue to the isolated list."""
    redis.lpush(JOBS, "poison", "a")
    take(protocol, room=1)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    take(protocol, 2, room=1)
    redis.lpush(lane, "poison")
    assert [one.message for one in take(protocol, 3, small=4, isolated_room=0)] == [b"a"]
    take(protocol, 4, small=4, isolated_room=0)
    assert redis.lrange(ISOLATED, 0, -1) == [f"{lane}\0poison".encode()]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (10, 1), (11, 2), (21, 3)])
def test_a_claim_ends_at_its_size(redis: Redis, protocol: Claims, size: int, count: int) -> None:
    """A claim stops at its number of bytes, and takes at least one message."""
    redis.lpush(JOBS, *["0123456789"] * 4)
    assert len(take(protocol, size=size)) == count


def test_a_claim_returns_both_ends_of_an_oversized_message(redis: Redis, protocol: Claims) -> None:
    """A message over the limit is claimed whole, but only its two ends reach the worker."""
    message = b"head" + b"." * 200_000 + b"tail"
    redis.lpush(JOBS, message)
    (one,) = take(protocol, max_bytes=200_007)
    assert (one.size, len(one.message)) == (200_008, 2 * 65_536)
    assert one.message.startswith(b"head.")
    assert one.message.endswith(b".tail")
    settle(protocol, Action.REQUEUE, "1")
    assert redis.lrange(JOBS, 0, -1) == [message]
    (one,) = take(protocol, 2, max_bytes=200_008)
    assert one.message == message


def test_a_full_server_drains(redis: Redis, protocol: Claims) -> None:
    """Every script that moves messages works on a server whose memory is full."""
    redis.lpush(JOBS, *"abcdef")
    protocol.open("gone")
    take(protocol, by="gone", room=1)
    observed = counter(protocol, "gone")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(ResponseError, match="maxmemory"):
            redis.lpush(JOBS, "g")
        protocol.open("carl", ["bob"])
        assert protocol.heartbeat("ann").alive
        assert len(take(protocol)) == 5
        settle(protocol, Action.ACKNOWLEDGE, "1")
        settle(protocol, Action.RETRY, "2")
        assert not protocol.wake()
        settle(protocol, Action.DEAD_LETTER, "3", reason="because")
        settle(protocol, Action.REQUEUE, "4")
        delay(protocol, Action.FAILED_ATTEMPT, "5")
        assert protocol.take_over("gone", observed) == 0
        protocol.put(JOBS, b"h")
        ((name, _),) = letters(redis)
        assert protocol.requeue_dead_letters([(name, JOBS)]) == [True]
        protocol.close("carl")
    finally:
        redis.config_set("maxmemory", 0)
    assert messages(contents(redis)) == Counter({bytes([letter]): 1 for letter in b"acdefh"})


def test_a_large_message_is_claimed_whole(redis: Redis, protocol: Claims) -> None:
    """A message that the claim's reply omits is returned like any other."""
    message = bytes(range(256)) * 8_192
    redis.lpush(JOBS, message, "a")
    large, small = take(protocol, size=4_000_000)
    assert (large.message, large.size) == (message, len(message))
    assert small.message == b"a"


@pytest.mark.parametrize(
    ("key", "values"),
    [(JOBS, [b"b", b"a"]), (ISOLATED, [b"jobs\0b", b"jobs\0a"])],
    ids=["queue", "isolated"],
)
def test_a_message_that_cannot_be_claimed_stays(
    redis: Redis, protocol: Claims, key: str, values: list[bytes]
) -> None:
    """Where the key of a session's claims is of another type, its messages stay in their order."""
    redis.rpush(key, *values)
    redis.set(f"{PREFIX}held:ann", "not a hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        take(protocol)
    assert redis.lrange(key, 0, -1) == values
