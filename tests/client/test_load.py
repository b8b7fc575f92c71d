"""Both clients under load: in threads, forked processes and an event loop."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.connections import CLIENT_NAME
from interview_access.contracts import GrantJob, result_key
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, longest_gap
from tests.support.floods import flood
from tests.support.producing import CHILDREN, DONE, SENT_BY_EACH, THREADS
from tests.support.stores import Background, all_at_once
from tests.support.workers import QUEUE, ROOT

MANY = 150  # more than the 100 connections that redis-py's pools allow by themselves


def connections(redis: Redis) -> int:
    """Count the connections of clients to the server."""
    return len([one for one in redis.client_list() if one["name"] == CLIENT_NAME])


def queued(redis: Redis) -> list[str]:
    """Collect the IDs of the jobs on the queue, sorted."""
    raws: Any = redis.lrange(QUEUE, 0, -1)
    return sorted(json.loads(raw)["headers"]["id"] for raw in raws)


@pytest.mark.parametrize("kind", CLIENTS)
def test_many_calls_leak_nothing(stack: LocalStack, kind: str) -> None:
    """After 4,000 jobs and 400 waits, memory and connections are as after 2,000."""
    marks = flood(stack, kind, rounds=2, each=250)
    assert {mark.subscriptions for mark in marks} == {0}
    assert max(mark.connections for mark in marks) <= THREADS + 1
    assert marks[1].rss - marks[0].rss < 3_000_000


def test_large_calls_leak_nothing(stack: LocalStack) -> None:
    """After 20,000 jobs in four calls, memory is as after 10,000."""
    marks = flood(stack, "many", rounds=4, each=625)
    assert {mark.connections for mark in marks} == {1}
    assert marks[3].rss - marks[1].rss < 10_000_000  # a call that was kept would be 15 MB


@pytest.mark.parametrize("how", ["fork", "pool"])
def test_a_client_works_in_forked_processes(broker: str, redis: Redis, how: str) -> None:
    """A process and its forks send at once with one client, and each reads only its own replies."""
    result = {"success": True, "created_access_count": 0}
    redis.set(result_key(DONE), json.dumps({"status": "SUCCESS", "result": result}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.producing", how, broker],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job_ids = queued(redis)
    assert len(job_ids) == len(set(job_ids)) == 1 + (CHILDREN + 1) * SENT_BY_EACH


def test_threads_of_a_web_server_share_a_client(broker: str, redis: Redis) -> None:
    """Requests that a web server handles in threads enqueue with one client."""
    client = InterviewAccessClient(broker)

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
            returned = all_at_once([lambda n=n: ask(n) for n in range(MANY)])  # type: ignore[misc] # n
        finally:
            server.shutdown()
            serving.result()
    client.close()
    assert returned == [f"/{number}" for number in range(MANY)]
    assert queued(redis) == sorted(returned)


def test_more_threads_than_the_default_number_of_connections(broker: str, redis: Redis) -> None:
    """Each of many threads that call at once is served."""
    client = InterviewAccessClient(broker)
    returned = all_at_once([lambda: client.enqueue("ann", []) for _ in range(MANY)])
    client.close()
    assert queued(redis) == sorted(returned)


def test_more_tasks_than_connections(broker: str, redis: Redis) -> None:
    """A thousand tasks that call at once share few connections."""

    async def send() -> list[str]:
        client = AsyncInterviewAccessClient(broker)
        returned = await asyncio.gather(*(client.enqueue("ann", []) for _ in range(1_000)))
        assert connections(redis) <= 50
        await client.close()
        return returned

    assert sorted(asyncio.run(send())) == queued(redis)


def test_a_job_of_100_000_ids_does_not_block_the_loop(broker: str, redis: Redis) -> None:
    """The asyncio client blocks the loop for less time than the blocking client."""
    ids = [str(uuid4()) for _ in range(100_000)]
    blocking = InterviewAccessClient(broker)

    async def block() -> str:
        return blocking.enqueue("ann", ids)

    async def is_shorter() -> bool:
        """Whether one of its gaps is, the shortest: others share this machine."""
        client = AsyncInterviewAccessClient(broker)
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


def test_2_000_jobs_do_not_block_the_loop(broker: str, redis: Redis) -> None:
    """The asyncio client blocks the loop for less time than the blocking client."""
    ids = [str(uuid4()) for _ in range(20)]
    blocking = InterviewAccessClient(broker)

    def jobs() -> list[GrantJob]:
        return [GrantJob("ann", ids) for _ in range(2_000)]

    async def block() -> list[str]:
        return blocking.enqueue_many(jobs())

    async def gaps() -> tuple[float, float]:
        client = AsyncInterviewAccessClient(broker)
        await client.enqueue("ann", [])
        awaited = [(await longest_gap(client.enqueue_many(jobs())))[0] for _ in range(3)]
        blocked = [(await longest_gap(block()))[0] for _ in range(3)]
        await client.close()
        return min(awaited), min(blocked)  # the least: others share this machine

    awaited, blocked = asyncio.run(gaps())
    blocking.close()
    assert awaited < blocked / 3
    assert redis.llen(QUEUE) == 1 + 6 * 2_000


def test_cancelled_tasks_do_not_mix_up_replies(broker: str, redis: Redis) -> None:
    """Calls that are cancelled at any moment do not affect the replies to later calls."""

    async def give_up() -> None:
        client = AsyncInterviewAccessClient(broker)
        for number in range(200):
            job_id = f"given-up-{number}"
            given_up = asyncio.timeout(number / 40_000)
            with suppress(TimeoutError):
                async with given_up:
                    await client.enqueue("ann", [str(number)], job_id=job_id)
                    await client.wait(job_id, timeout=30)
            assert given_up.expired()
        redis.set(result_key("whole"), '{"status": "SUCCESS", "result": {"success": true}}')
        for _ in range(60):
            assert await client.wait("whole", timeout=5) == {"success": True}
        assert await client.enqueue("ann", [], job_id="after") == "after"
        await client.close()

    asyncio.run(give_up())
    assert connections(redis) == 0
