"""The pause of the queue, in the scripts and in a lease."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from tests.broker.leases import ACKNOWLEDGE, claim, dispatched, settle
from tests.support.sentinels import redis_of
from tests.support.sessions import QUEUE, SteppedLease
from worker.broker.claims import PAUSED
from worker.operations.inspection import inspect
from worker.operations.pause import Pause, PauseSwitch


@pytest.fixture
def switch(redis: Redis) -> PauseSwitch:
    """The switch of the queue's pause."""
    return PauseSwitch(redis)


def test_a_paused_queue_is_not_claimed(
    redis: Redis, lease: SteppedLease, switch: PauseSwitch
) -> None:
    """Once it is paused a claim returns nothing and leaves the messages where they are."""
    redis.lpush(QUEUE, "a", "b")
    assert switch.pause("ann", "deploy") is None
    assert claim(lease) == []
    assert lease.is_paused
    assert redis.lrange(QUEUE, 0, -1) == [b"b", b"a"]
    assert not lease.has_more


def test_a_resumed_queue_is_claimed(redis: Redis, lease: SteppedLease, switch: PauseSwitch) -> None:
    """After the pause the next claim returns the messages."""
    redis.lpush(QUEUE, "a")
    switch.pause("ann", "")
    claim(lease)
    assert switch.resume() is not None
    assert [one.claim.message for one in claim(lease)] == [b"a"]
    assert not lease.is_paused


def test_running_jobs_are_settled_during_a_pause(
    redis: Redis, lease: SteppedLease, switch: PauseSwitch
) -> None:
    """A delivery that was claimed before the pause is acknowledged."""
    redis.lpush(QUEUE, "a")
    running = dispatched(lease)
    switch.pause("ann", "")
    settle(lease, ACKNOWLEDGE, *running)
    assert lease.tags == set()
    assert redis.keys("interview-access:held:*") == []


def test_it_says_who_paused_when_and_why(switch: PauseSwitch) -> None:
    """A second pause changes nothing and returns the first one, as does the end of the pause."""
    assert switch.pause("ann", "deploy") is None
    first = switch.pause("bob", "other")
    assert first is not None
    assert (first.by, first.reason) == ("ann", "deploy")
    assert first.at is not None
    assert switch.resume() == first
    assert switch.resume() is None


@pytest.mark.parametrize("value", [b"", b"by hand", b"\xff", b"[]", b'{"at": 7}', b"[" * 9_999])
def test_any_value_pauses(
    redis: Redis, lease: SteppedLease, switch: PauseSwitch, value: bytes
) -> None:
    """A key with any value pauses the queue, by nobody known, and can be resumed."""
    redis.set(PAUSED, value)
    redis.lpush(QUEUE, "a")
    assert claim(lease) == []
    assert switch.pause("ann", "") == Pause("", None, "")
    assert switch.resume() == Pause("", None, "")


def test_a_key_of_another_type_pauses(
    redis: Any, lease: SteppedLease, switch: PauseSwitch, caplog: pytest.LogCaptureFixture
) -> None:
    """A key that is no string pauses the queue; the lease is renewed, and it can be resumed."""
    redis.lpush(PAUSED, "x")
    redis.lpush(QUEUE, "a")
    lease.beat_for(3)
    assert claim(lease) == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("queue paused")
    assert inspect(redis).pause == switch.pause("ann", "") == Pause("", None, "")
    assert switch.resume() == Pause("", None, "")
    assert len(claim(lease)) == 1


def test_a_full_server_can_be_paused(redis: Redis, switch: PauseSwitch) -> None:
    """A Redis that has reached its maxmemory stores a pause, and ends it."""
    redis.config_set("maxmemory", 1)
    try:
        assert switch.pause("ann", "full") is None
        assert redis.exists(PAUSED)
        assert switch.resume() is not None
    finally:
        redis.config_set("maxmemory", 0)


def test_a_user_who_may_not_read_the_pause_claims(
    redis: Any, client: Any, lease: SteppedLease, switch: PauseSwitch
) -> None:
    """A worker whose Redis user lacks the permission keeps its lease and claims as before."""
    keys = "~interview-access ~interview-access\x06* ~interview-access: ~interview-access:[^p]*"
    redis.execute_command("ACL", "SETUSER", "old", "on", "nopass", "&*", "+@all", *keys.split(" "))
    try:
        client.execute_command("AUTH", "old", "any")
        redis.lpush(QUEUE, "a")
        switch.pause("ann", "")
        lease.beat()
        assert [one.claim.message for one in claim(lease)] == [b"a"]
    finally:
        redis.execute_command("ACL", "DELUSER", "old")


def test_begin_and_end_of_a_pause_are_logged_once(
    redis: Redis, lease: SteppedLease, switch: PauseSwitch, caplog: pytest.LogCaptureFixture
) -> None:
    """An idle worker logs one line when the queue is paused, and one when it is resumed."""
    assert redis.ping()
    caplog.set_level(logging.WARNING)
    switch.pause("ann", "deploy\nforged line")
    lease.beat_for(3)
    switch.resume()
    lease.beat_for(3)
    begin, end = [record.getMessage() for record in caplog.records]
    assert begin.startswith("queue paused, running jobs finish: pause=")
    assert '"by": "ann"' in begin
    assert "\n" not in begin
    assert end == "queue resumed"


def test_a_pause_does_not_hold_a_takeover_up(
    redis: Any, lease: SteppedLease, other: SteppedLease, switch: PauseSwitch
) -> None:
    """The claims of a dead worker are requeued during a pause, and are claimed after it."""
    redis.lpush(QUEUE, "a")
    dispatched(other)
    switch.pause("ann", "")
    lease.beat_for(20)
    assert redis.keys("interview-access:held:*") == []
    assert claim(lease) == []
    switch.resume()
    assert [one.claim.message for one in claim(lease)] == [b"a"]


def test_a_pause_survives_a_restart_of_redis(tmp_path: Path) -> None:
    """With an append-only file Redis has the pause after a restart."""
    with redis_of(tmp_path) as port, Redis(port=port) as redis:
        assert PauseSwitch(redis).pause("ann", "upgrade of Redis") is None
    with redis_of(tmp_path) as port, Redis(port=port) as redis:
        pause = inspect(redis).pause
    assert pause
    assert (pause.by, pause.reason) == ("ann", "upgrade of Redis")
