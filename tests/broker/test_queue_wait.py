"""Blocking waits for a queue: when they end, and that they leave the messages in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from select import select
from typing import Any

import pytest
from redis import ConnectionPool, Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.support.sentinels import redis_of
from tests.support.stores import until
from worker.broker.claims import Action, Claims, Disposition
from worker.broker.queue_wait import QueueWait, QueueWaitRefusedError

QUEUE = "jobs"
LONG_SECONDS, SHORT_SECONDS = 60.0, 0.05


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server for these tests alone."""
    with redis_of(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture
def redis(port: int) -> Iterator[Redis]:
    """An empty database."""
    with Redis(port=port) as redis:
        redis.flushdb()
        yield redis


@pytest.fixture
def wait(port: int) -> Iterator[QueueWait]:
    """Waits on a separate connection."""
    with closing(QueueWait(ConnectionPool(port=port))) as wait:
        yield wait


def blocked(redis: Redis) -> int:
    """Count the blocked clients."""
    info: Any = redis.info("clients")
    return int(info["blocked_clients"])


def read(wait: QueueWait, socket: Any) -> bool:
    """Return the result of a wait, as soon as it ends."""
    result = None
    while result is None:
        select([socket], [], [])
        result = wait.read()
    return result


def test_a_message_ends_the_wait_and_stays(redis: Redis, wait: QueueWait) -> None:
    """A wait reports a message and leaves it in the queue."""
    socket = wait.start(QUEUE, LONG_SECONDS)
    until(lambda: blocked(redis) == 1)
    redis.lpush(QUEUE, "a")
    assert read(wait, socket)
    assert wait.seconds is None
    assert redis.lrange(QUEUE, 0, -1) == [b"a"]


def test_a_message_that_is_there_ends_the_wait(redis: Redis, wait: QueueWait) -> None:
    """A wait on a queue with messages ends at once, also when repeated."""
    redis.lpush(QUEUE, "a", "b")
    assert [read(wait, wait.start(QUEUE, LONG_SECONDS)) for _ in range(3)] == [True] * 3


@pytest.mark.usefixtures("redis")
def test_a_wait_ends_without_a_message(wait: QueueWait) -> None:
    """A wait for an empty queue ends after its timeout, also when repeated."""
    assert [read(wait, wait.start(QUEUE, SHORT_SECONDS)) for _ in range(3)] == [False] * 3


def test_a_key_of_another_type_is_refused(redis: Redis, wait: QueueWait) -> None:
    """Redis refuses a key that is not a list; afterwards the connection can wait again."""
    redis.set(QUEUE, "not a list")
    with pytest.raises(QueueWaitRefusedError, match="WRONGTYPE"):
        read(wait, wait.start(QUEUE, LONG_SECONDS))
    redis.delete(QUEUE)
    redis.lpush(QUEUE, "a")
    assert read(wait, wait.start(QUEUE, LONG_SECONDS))


def test_a_refusal_to_suppress_a_reply_leaves_the_connection_usable(
    port: int, redis: Redis
) -> None:
    """Redis then sends the replies of all three commands; the next wait does not read them."""
    redis.acl_setuser(
        "narrow", enabled=True, nopass=True, keys="*", commands=["+@all", "-client|reply"]
    )
    redis.lpush(QUEUE, "a" * 100_000)
    try:
        with closing(QueueWait(ConnectionPool(port=port, username="narrow", password="x"))) as wait:  # noqa: S106 - any does
            for _ in range(3):
                with pytest.raises(QueueWaitRefusedError, match=r"client\|reply"):
                    read(wait, wait.start(QUEUE, LONG_SECONDS))
    finally:
        redis.acl_deluser("narrow")


def test_a_full_server_refuses_to_wait(redis: Redis, wait: QueueWait) -> None:
    """A server that refuses BLMOVE is not polled in a loop: the fifth refusal is raised."""
    redis.config_set("maxmemory", 1)
    try:
        for _ in range(4):  # another worker may have been quicker
            assert not read(wait, wait.start(QUEUE, LONG_SECONDS))
        with pytest.raises(QueueWaitRefusedError, match="BLMOVE"):
            read(wait, wait.start(QUEUE, LONG_SECONDS))
    finally:
        redis.config_set("maxmemory", 0)


def test_a_refusal_names_its_cause_until_redis_blocks_again(redis: Redis, wait: QueueWait) -> None:
    """Each wait on a full server is refused with Redis' error, until one has blocked."""
    redis.config_set("maxmemory", 1)
    try:
        for _ in range(4):
            read(wait, wait.start(QUEUE, LONG_SECONDS))
        for _ in range(3):
            with pytest.raises(QueueWaitRefusedError, match=r"OutOfMemoryError: .*maxmemory"):
                read(wait, wait.start(QUEUE, LONG_SECONDS))
    finally:
        redis.config_set("maxmemory", 0)
    redis.lpush(QUEUE, "a")
    assert read(wait, wait.start(QUEUE, LONG_SECONDS))
    assert wait.is_refused  # a message ends a wait at once, whether or not Redis would block
    redis.delete(QUEUE)
    assert not read(wait, wait.start(QUEUE, SHORT_SECONDS))
    assert not wait.is_refused


def test_a_full_server_reports_its_messages(redis: Redis, wait: QueueWait) -> None:
    """A wait reports messages on a server whose memory is full."""
    redis.lpush(QUEUE, "a")
    redis.config_set("maxmemory", 1)
    try:
        assert read(wait, wait.start(QUEUE, LONG_SECONDS))
    finally:
        redis.config_set("maxmemory", 0)


def test_a_lost_connection_is_an_error(redis: Redis, wait: QueueWait) -> None:
    """A connection that Redis closes while it waits raises an error."""
    socket = wait.start(QUEUE, LONG_SECONDS)
    until(lambda: blocked(redis) == 1)
    redis.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(RedisConnectionError):
        read(wait, socket)


def test_redis_holds_no_more_of_a_large_message_than_its_enqueuing_takes(tmp_path: Path) -> None:
    """Waiting for, claiming and acknowledging a message needs three copies of it at most.

    The client's MULTI alone needs these: list, query buffer, entry of the append-only file.
    """
    size = 20_000_000
    with redis_of(tmp_path) as port, Redis(port=port) as redis:

        def memory(figure: str) -> int:
            info: Any = redis.info("memory")
            return int(info[figure])

        claims = Claims(redis)
        claims.open("ann")
        waits = [QueueWait(ConnectionPool(port=port)) for _ in range(3)]
        sockets = [wait.start(QUEUE, LONG_SECONDS) for wait in waits]
        until(lambda: blocked(redis) == len(waits))
        before = memory("used_memory")
        with redis.pipeline(transaction=True) as pipeline:
            pipeline.lpush(QUEUE, b"a" * size).execute()
        assert all(map(read, waits, sockets))
        claimed = claims.claim("ann", [QUEUE], first_tag=1, room=1, size=size)
        assert claimed
        claims.settle("ann", {"1": Disposition(Action.ACKNOWLEDGE)})
        assert claimed.claims[0].size == size
        assert memory("used_memory_peak") - before < 3.5 * size
        for wait in waits:
            wait.close()
