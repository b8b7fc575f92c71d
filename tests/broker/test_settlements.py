"""Settlements: what each disposition does to a claimed message, its counts and its dead letter."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.support.claims import (
    CLOCK,
    DEFERRALS,
    DEFERRED,
    ISOLATED,
    JOBS,
    LATER,
    LEASES,
    TRIES,
    URGENT,
    WITH_ATTEMPT,
    WITHOUT_ATTEMPT,
    Requeue,
    claimed,
    contents,
    counts,
    delay,
    digest_of,
    letters,
    message_of,
    messages,
    settle,
    take,
    take_over,
)
from worker.broker.claims import DEAD, PREFIX, Action, Claim, Claims, Disposition


def test_settlements_have_effect_once(redis: Redis, protocol: Claims) -> None:
    """A repeated settlement and a settlement of an unclaimed delivery have no effect."""
    redis.lpush(JOBS, *"abcd")
    take(protocol)
    for _ in range(2):
        settle(protocol, Action.ACKNOWLEDGE, "1", "3", "99")
        settle(protocol, Action.REQUEUE, "1", "3")
        settle(protocol, Action.DEAD_LETTER, "1", "2", by="bob")
    assert claimed(contents(redis), "ann") == {"2": b"b", "4": b"d"}
    assert messages(contents(redis)) == Counter([b"b", b"d"])


def test_each_disposition_of_one_call_is_applied(redis: Redis, protocol: Claims) -> None:
    """One call settles deliveries in different ways."""
    redis.lpush(JOBS, *"abcdef")
    take(protocol)
    protocol.settle(
        "ann", {str(at): Disposition(action, LATER) for at, action in enumerate(Action, 1)}
    )
    state = contents(redis)
    assert [*Action] == [
        *(Action.ACKNOWLEDGE, Action.REQUEUE, Action.DELAY),
        *(Action.RETRY, Action.FAILED_ATTEMPT, Action.DEAD_LETTER),
    ]
    assert state[JOBS] == [b"b"]
    assert {message_of(value) for value in state[DEFERRED].values()} == {b"c", b"d", b"e"}
    assert counts(state, DEFERRALS) == {digest_of(b"d"): 1}
    assert counts(state, TRIES) == {digest_of(b"e"): 1}
    assert [letter[b"message"] for _, letter in state[DEAD]] == [b"f"]


def test_retries_and_attempts_are_counted_separately(redis: Redis, protocol: Claims) -> None:
    """A retry counts a retry, a lost process or worker an attempt, a requeue or delay neither."""
    redis.lpush(JOBS, "a")
    counted = []
    steps = [
        Action.REQUEUE,
        Action.RETRY,
        Action.DELAY,
        Action.FAILED_ATTEMPT,
        Action.RETRY,
        Action.REQUEUE,
    ]
    for tag, action in enumerate(steps, 1):
        (one,) = take(protocol, tag)
        counted.append((one.attempts, one.retries))
        settle(protocol, action, str(tag))
        protocol.wake()
    assert counted == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1), (1, 2)]
    take(protocol, 7)
    take_over(protocol)
    (one,) = take(protocol, 8, by="bob")
    assert (one.attempts, one.retries) == (2, 2)


def test_an_acknowledged_message_leaves_no_counts(redis: Redis, protocol: Claims) -> None:
    """An acknowledgement deletes the counts: another message may have the same bytes."""
    redis.lpush(JOBS, "a")
    take(protocol)
    delay(protocol, Action.RETRY, "1")
    take(protocol, 2)
    delay(protocol, Action.FAILED_ATTEMPT, "2")
    take(protocol, 3)
    settle(protocol, Action.ACKNOWLEDGE, "3")
    assert contents(redis).keys() == {LEASES, CLOCK}


def test_long_messages_are_distinguished_by_their_ends(redis: Redis, protocol: Claims) -> None:
    """Long messages that differ in length or at either end are counted separately."""
    filling = b"." * 20_000
    redis.lpush(JOBS, b"a" + filling, b"b" + filling, b"a" + filling + b"b", b"a" + filling + b".")
    take(protocol, room=1)
    delay(protocol, Action.RETRY, "1")
    assert [claim.retries for claim in take(protocol, 2, size=1_000_000)] == [1, 0, 0, 0]


def test_an_announcement_expires_after_its_job(redis: Redis, protocol: Claims) -> None:
    """A producer's announcement of a job is kept as long as the job's result."""
    redis.set(f"{PREFIX}job:j", "announced")
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.ACKNOWLEDGE, "1", job_id="j")
    assert 86_000 < redis.ttl(f"{PREFIX}job:j") <= 86_400


@pytest.mark.parametrize("requeue", WITHOUT_ATTEMPT.values(), ids=WITHOUT_ATTEMPT)
def test_a_requeued_message_is_next(redis: Redis, protocol: Claims, requeue: Requeue) -> None:
    """A message that is requeued without an attempt is the next one of its own queue."""
    redis.lpush(URGENT, "first", "second")
    take(protocol, room=1)
    requeue(protocol)
    assert redis.lrange(URGENT, 0, -1) == [b"second", b"first"]


@pytest.mark.parametrize("requeue", WITH_ATTEMPT.values(), ids=WITH_ATTEMPT)
def test_a_message_with_attempts_is_isolated(
    redis: Redis, protocol: Claims, requeue: Requeue
) -> None:
    """A message whose worker or pool process ended is isolated, with its origin queue."""
    redis.lpush(URGENT, "first", "second")
    take(protocol, room=1)
    requeue(protocol)
    assert redis.lrange(URGENT, 0, -1) == [b"second"]
    assert redis.lrange(ISOLATED, 0, -1) == [f"{URGENT}\0first".encode()]
    assert take(protocol, 2, by="bob") == [Claim("2", URGENT, b"first", 5, 1, 0)]


@pytest.mark.parametrize("requeue", WITHOUT_ATTEMPT.values(), ids=WITHOUT_ATTEMPT)
def test_attempts_survive_a_requeue(redis: Redis, protocol: Claims, requeue: Requeue) -> None:
    """A poison candidate that is requeued or delayed stays isolated, its attempts counted."""
    redis.lpush(JOBS, "poison")
    take(protocol)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    (poison,) = take(protocol, 2)
    assert poison.attempts == 1
    protocol.open("carl", ["ann"], ["2"])
    protocol.open("ann", ["carl"])
    (poison,) = take(protocol, 1)
    requeue(protocol)
    assert redis.llen(ISOLATED) == 1
    assert [claim.attempts for claim in take(protocol, 9, by="bob")] == [1]


@pytest.mark.parametrize("in_ledger", [False, True])
def test_a_dead_letter_is_complete_and_can_be_requeued(
    redis: Redis, protocol: Claims, in_ledger: bool
) -> None:
    """A dead letter has message, queue, attempts, reason and whether the ledger has a result."""
    redis.lpush(URGENT, b"\xff\0'")
    take(protocol)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    take(protocol, 2)
    delay(protocol, Action.RETRY, "2")
    take(protocol, 3)
    settle(
        *(protocol, Action.DEAD_LETTER, "3"),
        reason="because",
        job_id="j",
        task="t",
        in_ledger=in_ledger,
        attempts=2,
    )
    ((name, letter),) = letters(redis)
    seconds: Any = redis.time()
    assert abs(float(letter.pop(b"time")) - seconds[0]) < 60
    assert letter == {
        b"job_id": b"j",
        b"task": b"t",
        b"reason": b"because",
        b"in_ledger": b"1" if in_ledger else b"0",
        b"attempts": b"2",
        b"size": b"3",
        b"queue": URGENT.encode(),
        b"message": b"\xff\0'",
    }
    assert protocol.requeue_dead_letters([(name, JOBS)]) == [True]
    assert protocol.requeue_dead_letters([(name, JOBS)]) == [False]
    assert take(protocol, 4) == [Claim("4", URGENT, b"\xff\0'", 3, 0, 0)]


def test_a_dead_letter_without_queue_is_requeued_to_the_given_queue(
    redis: Redis, protocol: Claims
) -> None:
    """A dead letter that an earlier version wrote has no queue."""
    name: Any = redis.xadd(DEAD, {"message": "a"})
    assert protocol.requeue_dead_letters([(name.decode(), JOBS)]) == [True]
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


@pytest.mark.parametrize("requeue", WITHOUT_ATTEMPT.values(), ids=WITHOUT_ATTEMPT)
def test_a_message_whose_queue_is_not_a_list_is_dead_lettered(
    redis: Redis, protocol: Claims, requeue: Requeue
) -> None:
    """A message becomes a dead letter if its queue's key holds another type."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "not a list")
    requeue(protocol)
    ((_, letter),) = letters(redis)
    assert (letter[b"message"], letter[b"reason"]) == (b"a", b"Its queue is not a list.")
    assert letter[b"in_ledger"] == b""  # the ledger was not queried
    assert take(protocol, 2, by="bob") == []


@pytest.mark.parametrize(
    "requeue", (WITHOUT_ATTEMPT | WITH_ATTEMPT).values(), ids=WITHOUT_ATTEMPT | WITH_ATTEMPT
)
def test_a_message_without_destination_stays(
    redis: Redis, protocol: Claims, requeue: Requeue
) -> None:
    """If the dead letters' key holds another type too, the move fails and the message stays."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "not a list")
    redis.set(DEAD, "not a stream")
    redis.set(ISOLATED, "not a list")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        requeue(protocol)
    state = contents(redis)
    values = [*state.get(f"{PREFIX}held:ann", {}).values(), *state.get(DEFERRED, {}).values()]
    assert values == [f"{JOBS}\0a".encode()]


def test_an_isolated_message_without_origin_is_requeued_to_the_given_queue(
    redis: Redis, protocol: Claims
) -> None:
    """An isolated value that names no queue becomes a dead letter that can be requeued."""
    redis.lpush(ISOLATED, "no origin")
    assert take(protocol) == []
    ((name, letter),) = letters(redis)
    assert (letter[b"reason"], letter[b"in_ledger"]) == (b"It names no origin queue.", b"")
    assert protocol.requeue_dead_letters([(name, JOBS)]) == [True]
    assert redis.lrange(JOBS, 0, -1) == [b"no origin"]
    assert redis.llen(ISOLATED) == 0
