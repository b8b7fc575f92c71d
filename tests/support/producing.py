"""Producer processes that send many jobs, or that fork with an open client.

``python -m tests.support.producing flood URL KIND ROUNDS EACH`` (a line of JSON for each round;
KIND is ``blocking``, ``asyncio`` or ``many``),
``python -m tests.support.producing fork URL``, ``python -m tests.support.producing pool URL``.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import psutil
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient

THREADS = 8
CHILDREN, SENT_BY_EACH = 4, 50
DONE = "done"  # a job whose result is stored

_IDS = [str(uuid4()) for _ in range(20)]
_shared: list[InterviewAccessClient] = []


def flood(url: str, kind: str, rounds: int, each: int) -> None:
    """Send rounds of jobs from threads, from tasks or in one call; print a line for each."""
    sending: dict[str, Callable[[str, int, int], Iterator[float]]] = {
        "blocking": _from_threads,
        "asyncio": _from_tasks,
        "many": _in_one_call,
    }
    for seconds in sending[kind](url, rounds, each):
        rss = psutil.Process().memory_info().rss
        print(json.dumps({"seconds": seconds, "rss": rss}), flush=True)  # noqa: T201 - read by the parent process
        sys.stdin.readline()


def _from_threads(url: str, rounds: int, each: int) -> Iterator[float]:
    client = InterviewAccessClient(url)

    def send(_: int) -> None:
        for number in range(each):
            client.enqueue("ann", _IDS, job_id=str(uuid4()) if number % 2 else None)
            if number % 10 == 0:
                client.wait(DONE, timeout=5)

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(rounds):
            began = time.perf_counter()
            list(threads.map(send, range(THREADS)))
            yield time.perf_counter() - began


def _from_tasks(url: str, rounds: int, each: int) -> Iterator[float]:
    client = AsyncInterviewAccessClient(url)

    async def send() -> None:
        for number in range(each):
            await client.enqueue("ann", _IDS, job_id=str(uuid4()) if number % 2 else None)
            if number % 10 == 0:
                await client.wait(DONE, timeout=5)

    async def send_all() -> None:
        await asyncio.gather(*(send() for _ in range(THREADS)))

    with asyncio.Runner() as runner:
        for _ in range(rounds):
            began = time.perf_counter()
            runner.run(send_all())
            yield time.perf_counter() - began
        runner.run(client.close())


def _in_one_call(url: str, rounds: int, each: int) -> Iterator[float]:
    client = InterviewAccessClient(url)
    for _ in range(rounds):
        began = time.perf_counter()
        client.enqueue_many(GrantJob("ann", _IDS) for _ in range(THREADS * each))
        yield time.perf_counter() - began


def fork(url: str) -> None:
    """Send and wait in a process and its forked children at the same time, with one client."""
    client = InterviewAccessClient(url)
    client.enqueue("ann", [], job_id="before")
    children = []
    for number in range(CHILDREN):
        child = os.fork()
        if not child:
            os._exit(_send_many(client, f"child-{number}"))
        children.append(child)
    failed = _send_many(client, "parent")
    for child in children:
        failed += os.waitpid(child, 0)[1]
    sys.exit(failed)


def pool(url: str) -> None:
    """Send from a pool of processes, with the client of the parent process."""
    _shared.append(InterviewAccessClient(url))
    _shared[0].enqueue("ann", [], job_id="before")
    with multiprocessing.get_context("fork").Pool(CHILDREN) as processes:
        failed = processes.map(_send_shared, [f"call-{n}" for n in range(CHILDREN + 1)])
    sys.exit(sum(failed))


def _send_shared(name: str) -> int:
    return _send_many(_shared[0], name)


def _send_many(client: InterviewAccessClient, name: str) -> int:
    """Send jobs and wait; return 1 if a reply belonged to another call, otherwise 0."""
    for number in range(SENT_BY_EACH):
        job_id = f"{name}-{number}"
        if client.enqueue("ann", [], job_id=job_id) != job_id:
            return 1
        if client.wait(DONE, timeout=5) != {"success": True, "created_access_count": 0}:
            return 1
    return 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case "flood", url, kind, rounds, each:
            flood(url, kind, int(rounds), int(each))
        case "fork", url:
            fork(url)
        case "pool", url:
            pool(url)
