"""Worker sessions: heartbeats, takeovers and the handover of claims to another session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from tests.support.claims import (
    ISOLATED,
    JOBS,
    LARGE,
    LEASES,
    QUEUES,
    TRIES,
    claimed,
    contents,
    counter,
    counters,
    take,
    take_over,
)
from tests.support.sessions import DATABASE
from worker.broker.claims import PREFIX, Claims


def test_a_lost_lease_is_reported(redis: Redis, protocol: Claims) -> None:
    """A claim and a heartbeat report that the session was taken over; nothing is claimed."""
    redis.lpush(JOBS, "a")
    take_over(protocol)
    assert protocol.claim("ann", QUEUES, first_tag=1, room=1, size=1) is None
    assert not protocol.heartbeat("ann").alive
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


def test_a_late_heartbeat_prevents_the_takeover(redis: Redis, protocol: Claims) -> None:
    """A takeover has no effect once the counter has increased since it was observed."""
    redis.lpush(JOBS, "a")
    take(protocol)
    observed = counter(protocol, "ann")
    assert protocol.heartbeat("ann").alive
    before = contents(redis)
    assert protocol.take_over("ann", observed) == -1
    assert contents(redis) == before


def test_a_session_of_an_earlier_version_is_taken_over(redis: Redis, protocol: Claims) -> None:
    """A deadline in ms, as the first version wrote, counts as a heartbeat counter."""
    deadline = 1_795_000_000_123
    redis.zadd(LEASES, {"old": deadline})
    redis.hset(f"{PREFIX}held:old", "7", f"{JOBS}\0a")
    redis.sadd(f"{PREFIX}started:old", "7")
    observed = counter(protocol, "old")
    assert observed == deadline
    assert protocol.take_over("old", observed) == 0
    assert [one.attempts for one in take(protocol, by="bob")] == [1]
    assert contents(redis).keys() == {LEASES, TRIES, f"{PREFIX}counted", f"{PREFIX}held:bob"}


@pytest.mark.parametrize("end", ["close", "take over", "reopen"])
def test_the_name_of_a_worker_is_kept_as_long_as_its_session(
    redis: Redis, protocol: Claims, end: str
) -> None:
    """A session's node name is deleted with it, however it ends."""
    protocol.open("carl", node="celery@one")
    assert protocol.describe("carl") == ("celery@one", 0)
    if end == "close":
        protocol.close("carl")
    elif end == "take over":
        take_over(protocol, "carl")
    else:
        protocol.open("carl again", ["carl"])
    assert not redis.exists(f"{PREFIX}nodes")


def test_the_name_of_a_worker_that_another_release_ended_is_deleted(
    redis: Redis, protocol: Claims
) -> None:
    """A session that is opened deletes the node names of sessions that do not exist."""
    redis.hset(f"{PREFIX}nodes", mapping={"ann": "celery@ann", "gone": "celery@gone"})
    protocol.open("carl", node="celery@carl")
    assert redis.hkeys(f"{PREFIX}nodes") == [b"ann", b"carl"]


def test_a_session_needs_no_permission_for_the_names(redis: Redis, protocol: Claims) -> None:
    """A user who may not use the key of the node names opens, inspects and ends sessions."""
    redis.set(f"{PREFIX}nodes", "a key of another type is refused, too")
    protocol.open("carl", node="celery@carl")
    assert protocol.describe("carl") == ("", 0)
    protocol.close("carl")
    assert "carl" not in counters(contents(redis))


def test_a_session_needs_no_permission_to_delete_names(redis: Redis) -> None:
    """A user who may only read the node names opens a session beside a stale one."""
    redis.hset(f"{PREFIX}nodes", "gone", "celery@gone")
    keys = ["%R~*", f"~{PREFIX}", f"~{PREFIX}leases", f"~{PREFIX}held:*"]
    redis.execute_command("ACL", "SETUSER", "reader", "on", "nopass", "+@all", *keys)  # type: ignore[no-untyped-call] # redis-py's
    path = redis.connection_pool.connection_kwargs["path"]
    try:
        with Redis(unix_socket_path=path, db=DATABASE, username="reader") as limited:
            Claims(limited).open("carl", node="celery@carl")
    finally:
        redis.execute_command("ACL", "DELUSER", "reader")  # type: ignore[no-untyped-call] # likewise
    assert "carl" in counters(contents(redis))
    assert redis.hkeys(f"{PREFIX}nodes") == [b"gone"]


def test_a_large_session_is_taken_over_in_steps(redis: Redis, protocol: Claims) -> None:
    """Each script moves a few MB; another worker may continue a takeover."""
    redis.lpush(JOBS, *[LARGE + bytes([letter]) for letter in b"abcde"])
    assert len(take(protocol, size=100_000_000)) == 5
    observed = counter(protocol, "ann")
    assert protocol.take_over("ann", observed) == 1
    assert len(claimed(contents(redis), "ann")) == 2
    assert counter(protocol, "ann") == observed
    assert protocol.take_over("ann", observed) == 0
    assert protocol.take_over("ann", observed) == -1
    assert redis.llen(ISOLATED) == 5
    assert counters(contents(redis)).keys() == {"bob"}


class CountedRedis(Redis):
    """A client that counts its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Count and send a command."""
        self.commands += 1
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py's


@pytest.mark.parametrize(
    "moves",
    [
        lambda protocol: protocol.close("ann"),
        lambda protocol: protocol.open("ann again", ["ann"]),
        lambda protocol: protocol.open("ann again", ["ann"], [*"1234567"]),
    ],
    ids=["closed", "reopened", "continued"],
)
def test_large_claims_move_in_steps(
    redis: Redis, path: str, moves: Callable[[Claims], object]
) -> None:
    """A close or a new session moves a few MB in each script until all claims are moved."""
    redis.lpush(JOBS, *[LARGE] * 7)
    with CountedRedis(unix_socket_path=path, db=DATABASE) as client:
        protocol = Claims(client)
        protocol.open("ann")
        protocol.open("loads the scripts", [])
        protocol.close("loads the scripts")
        take(protocol, size=100_000_000)
        client.commands = 0
        moves(protocol)
        assert client.commands == 3
    again = claimed(contents(redis), "ann again")
    assert redis.llen(JOBS) + len(again) == 7
    assert "ann" not in counters(contents(redis))


@pytest.mark.parametrize("name", ["due", "isolated", "held:ann"])
def test_a_heartbeat_reports_messages_outside_of_queues(
    redis: Redis, protocol: Claims, name: str
) -> None:
    """A heartbeat reports delayed and isolated messages, and the session's claims."""
    assert not protocol.heartbeat("ann", [JOBS]).has_messages
    redis.hset(f"{PREFIX}{name}", "1", "only the key's existence is checked")
    assert protocol.heartbeat("ann", [JOBS]).has_messages


def test_a_lease_lost_before_the_message_is_read_claims_nothing(
    redis: Redis, protocol: Claims, path: str
) -> None:
    """A claim reports the lost lease if the session is taken over while it reads a message."""
    message = b"a" * 2_000_000

    class FrozenRedis(Redis):
        """A client that freezes before it reads, for long enough to lose its lease."""

        def hget(self, *arguments: Any) -> Any:
            take_over(protocol)
            return super().hget(*arguments)

    redis.lpush(JOBS, message)
    with FrozenRedis(unix_socket_path=path, db=DATABASE) as client:
        claims = Claims(client)
        assert claims.claim("ann", QUEUES, first_tag=1, room=1, size=1) is None
    assert redis.lrange(ISOLATED, 0, -1) == [f"{JOBS}\0".encode() + message]
