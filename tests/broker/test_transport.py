"""The worker's transport: reserved keys, servers that refuse writes, stock kombu clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from kombu import Connection, Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES
from kombu.transport.redis import PRIORITY_STEPS
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError

from devstack.servers import LocalStack
from tests.support.sessions import DATABASE, TTL, ManualClock, SteppedLease, connect
from worker.broker.claims import Action, Disposition
from worker.broker.transport import QueueRefusedError, list_key, refusal_as_connection_error

# An app that another test makes in this process replaces the transport of "redis".
TRANSPORT_ALIASES["stock"] = "kombu.transport.redis:Transport"
TRANSPORT_ALIASES["tolerant"] = "worker.broker.transport:Transport"


@pytest.fixture
def url(stack: LocalStack) -> str:
    """The URL of an empty database, for kombu's own transport."""
    with connect(stack) as redis:
        redis.flushdb()
    return f"{stack.broker_url.replace('redis+', 'stock+')}?virtual_host={DATABASE}"


@pytest.fixture
def redis(stack: LocalStack, url: str) -> Iterator[Redis]:
    """A client of this database."""
    assert url
    with connect(stack) as redis:
        yield redis


@pytest.fixture
def full(redis: Redis) -> Iterator[None]:
    """During the test the server refuses every write."""
    redis.config_set("maxmemory", 1)
    yield
    redis.config_set("maxmemory", 0)


@pytest.fixture
def demoted(redis: Redis) -> Iterator[None]:
    """During the test the server is a replica."""
    redis.replicaof("127.0.0.1", "1")
    yield
    redis.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    "queue", ["interview-access:tries", "celery-task-meta-x", "_kombu.binding.x", "unacked"]
)
def test_nothing_is_published_to_a_reserved_key(url: str, redis: Redis, queue: str) -> None:
    """The keys of the protocol, of results and of kombu are refused as queues."""
    with (
        Connection(tolerant(url)) as connection,
        pytest.raises(QueueRefusedError, match="expected one that is not reserved"),
    ):
        connection.Producer().publish("message", routing_key=queue)
    assert not redis.exists(queue)


def declare(url: str) -> None:
    """Declare a queue as Celery's remote control does when a worker starts."""
    with Connection(url) as connection, closing(connection.channel()) as channel:
        Queue("replies", Exchange("replies"), routing_key="replies")(channel).declare()


def tolerant(url: str) -> str:
    """Return the URL for the worker's transport."""
    return url.replace("stock+", "tolerant+")


@pytest.mark.usefixtures("full")
def test_a_worker_can_start_on_a_full_server(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Declaring the queues succeeds on a full server, so that the worker can drain it."""
    with pytest.raises(OutOfMemoryError):
        declare(url)
    declare(tolerant(url))
    assert "Redis is full, remote control may not reply" in caplog.text


@pytest.mark.usefixtures("demoted")
def test_a_demoted_server_is_a_lost_connection(url: str) -> None:
    """A write to a replica raises a lost connection, which makes the worker reconnect."""
    with pytest.raises(ReadOnlyError):
        declare(url)
    with pytest.raises(RedisConnectionError):
        declare(tolerant(url))


def test_other_errors_are_not_changed() -> None:
    """Only a refusal by the server is translated into a lost connection."""
    with pytest.raises(ValueError, match="other"), refusal_as_connection_error():
        raise ValueError("other")


def test_all_priorities_of_several_queues_are_claimed(url: str, stack: LocalStack) -> None:
    """Messages that kombu's producers publish at any priority are claimed in order of priority."""
    names = ("a", "b")
    with Connection(url) as stock:
        producer = stock.Producer()
        for priority in (9, 4, 0):
            for name in names:
                queue = Queue(name, Exchange(""), routing_key=name)
                producer.publish("-", routing_key=name, priority=priority, declare=[queue])
    lease = SteppedLease(ManualClock())
    keys = [list_key(name, priority) for priority in PRIORITY_STEPS for name in names]
    with connect(stack) as client:
        lease.open(client)
        came = [one for _ in range(6) for one in lease.claim(keys, 2, 1) or []]
        assert [one.claim.queue for one in came] == [
            *("a", "b"),
            *("a\x06\x163", "b\x06\x163"),
            *("a\x06\x169", "b\x06\x169"),
        ]
        lease.settle({one.claim.tag: Disposition(Action.ACKNOWLEDGE) for one in came})
        lease.close()
        assert not list(client.scan_iter("interview-access:*"))


def test_messages_of_a_stock_consumer_are_not_touched(
    url: str, redis: Any, stack: LocalStack
) -> None:
    """Messages that a stock worker has claimed on the same Redis are not restored."""
    with Connection(url) as stock:
        stock.Producer().publish("theirs", routing_key="theirs")
        message = stock.SimpleQueue(Queue("theirs", Exchange(""), routing_key="theirs")).get()
        before = redis.hgetall("unacked")
        assert before
        lease = SteppedLease(ManualClock())
        with Connection(tolerant(url)) as connection, connect(stack) as client:
            connection.default_channel.qos.restore_visible()
            lease.open(client)
            lease.claim(["theirs"], 1, 1)
            lease.beat_for(3 * TTL)
            lease.close()
        assert redis.hgetall("unacked") == before
        message.ack()
        assert not redis.hgetall("unacked")
