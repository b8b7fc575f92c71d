"""Both clients under load, in threads, in forked processes and on an event loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, longest_gap
from tests.support.floods import flood
from tests.support.producing import CHILDREN, DONE, SENT_BY_EACH, THREADS
from tests.support.stores import Background, all_at_once
from tests.support.workers import QUEUE, ROOT

NUMBER = 15
MANY = 150  # more than the 100 connections that redis-py's pools allow by themselves


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Redis]:
    """An empty Redis database, to which no other test connects."""
    path = stack.broker_url.removeprefix("redis+socket://")
    with Redis(unix_socket_path=path, db=NUMBER) as redis:
        redis.flushdb()
        yield redis
        redis.flushdb()


@pytest.fixture
def url(stack: LocalStack) -> str:
    """That database, as Celery writes it."""
    return f"{stack.broker_url}?virtual_host={NUMBER}"


def connections(redis: Redis) -> int:
    """How many there are to that database, this one included."""
    return len([one for one in redis.client_list() if one["db"] == str(NUMBER)])


def sent(redis: Redis) -> list[str]:
    """The ids of the jobs in the queue, sorted."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return sorted(json.loads(raw)["headers"]["id"] for raw in raws)


@pytest.mark.parametrize("kind", CLIENTS)
def test_much_leaves_nothing_behind(stack: LocalStack, kind: str) -> None:
    """After 4,000 jobs and 400 waits, memory and connections are as after 2,000."""
    marks = flood(stack, kind, rounds=2, each=250)
    assert {mark.subscriptions for mark in marks} == {0}
    assert max(mark.connections for mark in marks) <= THREADS + 1
    assert marks[1].rss - marks[0].rss < 3_000_000


def test_many_at_once_leave_nothing_behind(stack: LocalStack) -> None:
    """After 20,000 jobs in four calls, memory is as after 10,000."""
    marks = flood(stack, "many", rounds=4, each=625)
    assert {mark.connections for mark in marks} == {1}
    assert marks[3].rss - marks[1].rss < 10_000_000  # a call that was kept would be 15 MB


@pytest.mark.parametrize("how", ["fork", "pool"])
def test_a_client_goes_on_in_forked_processes(url: str, redis: Redis, how: str) -> None:
    """Processes forked off a client's, and its own, send at once and hear only their answers."""
    result = {"success": True, "created_access_count": 0}
    redis.set(f"celery-task-meta-{DONE}", json.dumps({"status": "SUCCESS", "result": result}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.producing", how, url],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job_ids = sent(redis)
    assert len(job_ids) == len(set(job_ids)) == 1 + (CHILDREN + 1) * SENT_BY_EACH


def test_a_web_server_of_many_threads_shares_a_client(url: str, redis: Redis) -> None:
    """Requests that a web server handles in threads of their own enqueue with one client."""
    client = InterviewAccessClient(url)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            job_id = client.enqueue("ann", [], job_id=self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(job_id.encode())

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - http.server's
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = MANY

    with Server(("127.0.0.1", 0), Handler) as server:
        serving = Background(server.serve_forever)

        def ask(number: int) -> str:
            with urlopen(f"http://127.0.0.1:{server.server_port}/{number}") as answer:
                return str(answer.read().decode())

        try:
            told = all_at_once([lambda n=n: ask(n) for n in range(MANY)])  # type: ignore[misc] # n
        finally:
            server.shutdown()
            serving.result()
    client.close()
    assert told == [f"/{number}" for number in range(MANY)]
    assert sent(redis) == sorted(told)


def test_more_threads_than_a_pool_has_connections(url: str, redis: Redis) -> None:
    """Every one of very many threads that call at the same moment is served."""
    client = InterviewAccessClient(url)
    told = all_at_once([lambda: client.enqueue("ann", []) for _ in range(MANY)])
    client.close()
    assert sent(redis) == sorted(told)


def test_more_tasks_than_a_pool_has_connections(url: str, redis: Redis) -> None:
    """A thousand tasks that call at the same moment are served on few connections."""

    async def send() -> list[str]:
        client = AsyncInterviewAccessClient(url)
        told = await asyncio.gather(*(client.enqueue("ann", []) for _ in range(1_000)))
        assert connections(redis) <= 51
        await client.close()
        return told

    assert sorted(asyncio.run(send())) == sent(redis)


def test_the_loop_goes_on_while_100_000_ids_are_enqueued(url: str, redis: Redis) -> None:
    """The asyncio client lets other tasks run during its largest job; the blocking one does not."""
    ids = [str(uuid4()) for _ in range(100_000)]
    blocking = InterviewAccessClient(url)

    async def block() -> str:
        return blocking.enqueue("ann", ids)

    async def is_shorter() -> bool:
        """Whether one of its gaps is, the shortest: others share this machine."""
        client = AsyncInterviewAccessClient(url)
        await client.enqueue("ann", [])
        blocked = min([(await longest_gap(block()))[0] for _ in range(3)])
        for _ in range(60):
            gap, _ = await longest_gap(client.enqueue("ann", ids))
            if gap < blocked / 1.5:
                break
            redis.delete(QUEUE)
        await client.close()
        return gap < blocked / 1.5

    assert asyncio.run(is_shorter())
    blocking.close()


def test_the_loop_goes_on_while_2_000_jobs_are_enqueued(url: str, redis: Redis) -> None:
    """The asyncio client lets other tasks run during a call for many; the blocking one does not."""
    ids = [str(uuid4()) for _ in range(20)]
    blocking = InterviewAccessClient(url)

    def jobs() -> list[GrantJob]:
        return [GrantJob("ann", ids) for _ in range(2_000)]

    async def block() -> list[str]:
        return blocking.enqueue_many(jobs())

    async def gaps() -> tuple[float, float]:
        client = AsyncInterviewAccessClient(url)
        await client.enqueue("ann", [])
        awaited = [(await longest_gap(client.enqueue_many(jobs())))[0] for _ in range(3)]
        blocked = [(await longest_gap(block()))[0] for _ in range(3)]
        await client.close()
        return min(awaited), min(blocked)  # the least: others share this machine

    awaited, blocked = asyncio.run(gaps())
    blocking.close()
    assert awaited < blocked / 3
    assert redis.llen(QUEUE) == 1 + 6 * 2_000


def test_a_task_that_is_cancelled_leaves_the_client_whole(url: str, redis: Redis) -> None:
    """Calls that their callers give up at any moment do not mix up the answers of later ones."""

    async def give_up() -> None:
        client = AsyncInterviewAccessClient(url)
        for number in range(200):
            job_id = f"given-up-{number}"
            given_up = asyncio.timeout(number / 40_000)
            with suppress(TimeoutError):
                async with given_up:
                    await client.enqueue("ann", [str(number)], job_id=job_id)
                    await client.wait(job_id, timeout=30)
            assert given_up.expired()
        redis.set("celery-task-meta-whole", '{"status": "SUCCESS", "result": {"success": true}}')
        for _ in range(60):
            assert await client.wait("whole", timeout=5) == {"success": True}
        assert await client.enqueue("ann", [], job_id="after") == "after"
        await client.close()

    asyncio.run(give_up())
    assert connections(redis) == 1
