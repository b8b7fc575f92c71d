"""Read the contents of the Redis database that holds claims, and act as one worker session."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from redis import Redis

from worker.broker.claims import DEAD, PREFIX, Action, Claim, Claimed, Claims, Disposition

URGENT, JOBS, LANE = "jobs\x06\x163", "jobs", "jobs\x06\x169"
QUEUES = (URGENT, JOBS, LANE)
"""By priority; the last one is the low-priority lane."""

LEASES, DUE, DEFERRED = f"{PREFIX}leases", f"{PREFIX}due", f"{PREFIX}deferred"
ISOLATED, TRIES, DEFERRALS = f"{PREFIX}isolated", f"{PREFIX}tries", f"{PREFIX}deferrals"
CLOCK = f"{PREFIX}clock"
LATER = 3_600
"""Seconds of a delay that does not end within a test."""

LARGE = b"." * 2_000_000
"""A large message: two of them and a little more are what one script moves."""

State = dict[str, Any]


def contents(redis: Redis) -> State:
    """Read the contents of the database, by key."""
    keys: Any = sorted(redis.keys())
    pipeline = redis.pipeline(transaction=False)
    reads: dict[bytes, Callable[[bytes], object]] = {
        b"list": lambda key: pipeline.lrange(key, 0, -1),
        b"hash": pipeline.hgetall,
        b"set": pipeline.smembers,
        b"zset": lambda key: pipeline.zrange(key, 0, -1, withscores=True),
        b"stream": pipeline.xrange,
        b"string": pipeline.get,
    }
    for key in keys:
        pipeline.type(key)
    for key, kind in zip(keys, pipeline.execute(), strict=True):
        reads[kind](key)
    return {key.decode(): value for key, value in zip(keys, pipeline.execute(), strict=True)}


def by_suffix(state: State, name: str) -> dict[str, Any]:
    """Select the keys with this prefix (after that of the protocol), by the rest of the name."""
    start = PREFIX + name
    return {key.removeprefix(start): state[key] for key in state if key.startswith(start)}


def message_of(value: bytes) -> bytes:
    """Return the message of a value that also names its origin queue."""
    return value.partition(b"\0")[2]


def claimed(state: State, session: str) -> dict[str, bytes]:
    """Return the messages that a session has claimed, by delivery tag."""
    values = state.get(f"{PREFIX}held:{session}", {})
    return {tag.decode(): message_of(value) for tag, value in values.items()}


def counters(state: State) -> dict[str, float]:
    """Return the heartbeat counters, by session."""
    return {name.decode(): counter for name, counter in state.get(LEASES, [])}


def counts(state: State, key: str) -> dict[bytes, int]:
    """Return the counts that a hash holds, by digest."""
    return {digest: int(count) for digest, count in state.get(key, {}).items()}


def digest_of(message: bytes) -> bytes:
    """Return the digest by which the scripts count a short message."""
    return hashlib.sha1(message).hexdigest().encode()  # noqa: S324 - no security


def messages(state: State) -> Counter[bytes]:
    """Count the places that each message is in, over all places."""
    everywhere = Counter[bytes]()
    for queue in QUEUES:
        everywhere.update(state.get(queue, []))
    for values in (*by_suffix(state, "held:").values(), state.get(DEFERRED, {})):
        everywhere.update(map(message_of, values.values()))
    everywhere.update(map(message_of, state.get(ISOLATED, [])))
    everywhere.update(letter[b"message"] for _, letter in state.get(DEAD, []))
    return everywhere


def claim(protocol: Claims, first_tag: int, *, by: str = "ann", **limits: Any) -> Claimed:
    """Claim for a session whose lease is valid."""
    limits = {"room": 100, "size": 1_000} | limits
    got = protocol.claim(by, QUEUES, first_tag=first_tag, **limits)
    assert got is not None
    return got


def take(protocol: Claims, first_tag: int = 1, *, by: str = "ann", **limits: Any) -> list[Claim]:
    """Claim for a session whose lease is valid, and return the claimed messages."""
    return claim(protocol, first_tag, by=by, **limits).claims


def settle(protocol: Claims, action: Action, *tags: str, by: str = "ann", **fields: Any) -> None:
    """Settle deliveries in the same way."""
    protocol.settle(by, {tag: Disposition(action, **fields) for tag in tags})


def counter(protocol: Claims, session: str) -> float:
    """Return a session's heartbeat counter, as another session observes it."""
    return protocol.heartbeat("observer").sessions[session]


def take_over(protocol: Claims, session: str = "ann") -> None:
    """Take over a session whose counter does not change."""
    observed = counter(protocol, session)
    while protocol.take_over(session, observed) > 0:
        pass


def delay(protocol: Claims, action: Action, tag: str) -> None:
    """Settle a delivery of ``ann`` by an action that has a delay, and end the delay."""
    settle(protocol, action, tag)
    protocol.wake()


def letters(redis: Redis) -> list[tuple[str, dict[bytes, bytes]]]:
    """Return the dead letters, each with its ID."""
    return [(name.decode(), fields) for name, fields in contents(redis).get(DEAD, [])]


Requeue = Callable[[Claims], object]
WITHOUT_ATTEMPT: dict[str, Requeue] = {
    "requeued": lambda protocol: settle(protocol, Action.REQUEUE, "1"),
    "closed": lambda protocol: protocol.close("ann"),
    "reopened": lambda protocol: protocol.open("ann again", ["ann"]),
    "delayed": lambda protocol: delay(protocol, Action.DELAY, "1"),
    "retried": lambda protocol: delay(protocol, Action.RETRY, "1"),
}
"""Ways of requeueing a message without counting an attempt."""
WITH_ATTEMPT: dict[str, Requeue] = {
    "taken over": take_over,
    "pool process ended": lambda protocol: delay(protocol, Action.FAILED_ATTEMPT, "1"),
}
"""Ways of requeueing a message that count an attempt."""
