"""The transport by itself: several queues and priorities, strangers on its Redis, its seams."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from kombu import Connection, Consumer, Exchange, Queue
from kombu.transport import TRANSPORT_ALIASES
from redis import Redis

from tests.workers import ROOT
from worker.local_stack import LocalStack
from worker.transport import lease_of_this_process, missing_seam

TRANSPORT_ALIASES["lossless"] = "worker.transport:Transport"
QUEUES = [Queue(name, Exchange("", type="direct"), routing_key=name) for name in ("a", "b")]


@pytest.fixture
def url(stack: LocalStack) -> str:
    """An empty queue's."""
    with Redis(unix_socket_path=stack.broker_url.removeprefix("redis+socket://"), db=12) as redis:
        redis.flushdb()
    return f"{stack.broker_url}?virtual_host=12"


@pytest.fixture
def redis(stack: LocalStack, url: str) -> Iterator[Redis]:
    """What an operator sees of it."""
    assert url
    with Redis(unix_socket_path=stack.broker_url.removeprefix("redis+socket://"), db=12) as one:
        yield one


def lossless(url: str) -> Connection:
    """A connection by our transport."""
    return Connection(url.replace("redis+", "lossless+"))


def test_several_queues_and_priorities_are_taken_from(url: str, redis: Redis) -> None:
    """Messages of two queues and three priorities all come, the urgent first, and none stays."""
    sent = [(queue, priority) for priority in (9, 3, 0) for queue in ("a", "b")]
    with Connection(url) as stock:
        producer = stock.Producer()
        for queue, priority in sent:
            producer.publish([queue, priority], routing_key=queue, priority=priority)
    came: list[tuple[str, int]] = []

    def take(body: Any, message: Any) -> None:
        came.append(tuple(body))
        message.ack()

    with lossless(url) as connection, Consumer(connection, QUEUES, callbacks=[take]):
        while len(came) < len(sent):
            connection.drain_events(timeout=10)
        lease = lease_of_this_process()
        assert lease is not None
        lease.close()
    assert sorted(came) == sorted(sent)
    assert [priority for _, priority in came] == [0, 0, 3, 3, 9, 9]
    assert not list(redis.scan_iter("interview-access:*"))


def test_a_stock_consumers_messages_are_its_own(url: str, redis: Redis) -> None:
    """What a stock worker holds on the same Redis is neither restored nor touched."""
    with Connection(url, transport_options={"visibility_timeout": 0}) as stock:
        stock.Producer().publish("theirs", routing_key="theirs")
        message = stock.SimpleQueue(Queue("theirs", Exchange(""), routing_key="theirs")).get()
        before = redis.hgetall("unacked")
        with lossless(url) as connection:
            connection.default_channel.qos.restore_visible()
        assert redis.hgetall("unacked") == before
        assert before
        message.ack()


def test_the_installed_kombu_has_all_seams() -> None:
    """Each method that is overridden is there, with the arguments that it is called by."""
    assert missing_seam() is None


def test_a_kombu_without_a_seam_stops_the_start() -> None:
    """A worker on a kombu that does otherwise does not start, and says what is missing."""
    program = (
        "from kombu.transport import redis; del redis.Channel._brpop_start\n"
        "import worker.startup; worker.startup.check_servers(None, None)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "expected kombu's Channel._brpop_start(self, timeout)" in ended.stderr
