"""Pruning in Redis: dead letters by age and by bytes, and counts of attempts and retries."""

from __future__ import annotations

import time
from typing import Any

import pytest
from redis import Redis

from tests.support.claims import (
    DEFERRALS,
    JOBS,
    TRIES,
    contents,
    counts,
    delay,
    digest_of,
    settle,
    take,
)
from worker.broker.claims import DEAD, PREFIX, Action, Claims
from worker.broker.dead_letters import DeadLetterLimits, DeadLetters, Dropped

COUNTED, DROPPED = f"{PREFIX}counted", f"{PREFIX}dropped"
DAY = 86_400
ROOMY = 1_000_000_000


def add(redis: Redis, *, days: float = 0, size: int = 100, number: int = 0) -> bytes:
    """Add a dead letter of an age and a size; returns its ID."""
    at = f"{int((time.time() - days * DAY) * 1000)}-{number}"
    added: Any = redis.xadd(DEAD, {"queue": JOBS, "message": b"x" * size}, id=at)
    return bytes(added)


def left(redis: Redis) -> list[bytes]:
    """Return the IDs of the dead letters."""
    entries: Any = redis.xrange(DEAD)
    return [letter_id for letter_id, _ in entries]


def test_old_dead_letters_are_dropped(redis: Redis) -> None:
    """Dead letters older than the limit are dropped and counted; others stay."""
    add(redis, days=3)
    add(redis, days=2.1)
    kept = [add(redis, days=1.9), add(redis)]
    assert DeadLetters(redis).prune(DeadLetterLimits(ROOMY, 2)) == Dropped(False, 2, 0)
    assert left(redis) == kept
    assert redis.hgetall(DROPPED) == {b"age": b"2"}


def test_dead_letters_stay_without_a_limit_of_age(redis: Redis) -> None:
    """Without a limit of age no dead letter is too old."""
    kept = [add(redis, days=3_000)]
    assert DeadLetters(redis).prune(DeadLetterLimits(ROOMY)) == Dropped(False, 0, 0)
    assert left(redis) == kept
    assert not redis.exists(DROPPED)


def test_the_oldest_are_dropped_over_the_limit_of_bytes(redis: Redis) -> None:
    """The stream shrinks to the limit; the newest dead letters stay."""
    ids = [add(redis, days=1, size=10_000, number=number) for number in range(1, 401)]
    letters, limits = DeadLetters(redis), DeadLetterLimits(2_000_000)
    dropped = letters.prune(limits)
    while dropped.has_more:
        page = letters.prune(limits)
        dropped = Dropped(page.has_more, 0, dropped.excess + page.excess)
    assert letters.prune(limits) == Dropped(False, 0, 0)
    memory: Any = redis.memory_usage(DEAD, samples=0)
    assert 1_900_000 < memory <= 2_000_000
    assert left(redis) == ids[dropped.excess :]
    assert redis.hgetall(DROPPED) == {b"bytes": str(dropped.excess).encode()}


def test_a_page_is_bounded(redis: Redis) -> None:
    """One script deletes a limited number, and reports that there are more."""
    with redis.pipeline() as pipeline:
        for number in range(1_200):
            pipeline.xadd(DEAD, {"message": b""}, id=f"{1 + number}-0")
        pipeline.execute()
    assert DeadLetters(redis).prune(DeadLetterLimits(ROOMY, 1)) == Dropped(True, 1_000, 0)
    assert DeadLetters(redis).prune(DeadLetterLimits(ROOMY, 1)) == Dropped(False, 200, 0)


def test_pruning_works_on_a_full_server(redis: Redis) -> None:
    """A Redis that refuses writes can still drop dead letters."""
    add(redis, days=3)
    redis.config_set("maxmemory", 1)
    try:
        assert DeadLetters(redis).prune(DeadLetterLimits(ROOMY, 2)).aged == 1
    finally:
        redis.config_set("maxmemory", 0)


@pytest.mark.parametrize(
    ("action", "key"), [(Action.RETRY, DEFERRALS), (Action.FAILED_ATTEMPT, TRIES)]
)
def test_old_counts_are_deleted(redis: Redis, protocol: Claims, action: Action, key: str) -> None:
    """A count is deleted 30 days after its last change; younger ones stay."""
    redis.lpush(JOBS, b"a", b"b")
    take(protocol)
    settle(protocol, action, "1", "2")
    assert counts(contents(redis), key) == {digest_of(b"a"): 1, digest_of(b"b"): 1}
    redis.zadd(COUNTED, {digest_of(b"a"): time.time() - 31 * DAY}, xx=True)
    DeadLetters(redis).prune(DeadLetterLimits(ROOMY))
    assert counts(contents(redis), key) == {digest_of(b"b"): 1}
    assert redis.zrange(COUNTED, 0, -1) == [digest_of(b"b")]


def test_counts_of_a_finished_message_are_deleted(redis: Redis, protocol: Claims) -> None:
    """An acknowledged message leaves no count and no time of it."""
    redis.lpush(JOBS, b"a")
    take(protocol)
    delay(protocol, Action.RETRY, "1")
    assert redis.exists(DEFERRALS, COUNTED) == 2
    take(protocol, 2)
    settle(protocol, Action.ACKNOWLEDGE, "2")
    assert not redis.exists(DEFERRALS, COUNTED)
