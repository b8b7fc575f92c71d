"""A flood of jobs from one process, with its rate, memory and connections."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from interview_access.contracts import result_key
from redis import Redis

from devstack.servers import LocalStack
from tests.support.producing import DONE, THREADS
from tests.support.workers import QUEUE, ROOT

DATABASE = 9


@dataclass(frozen=True, slots=True)
class Mark:
    """Measurements after a number of jobs.

    Attributes:
        sent: Number of jobs sent so far.
        rate: Jobs a second since the previous mark.
        rss: Resident memory of the process in bytes.
        connections: Number of its connections to Redis.
        subscriptions: Number of the connections' subscriptions.
    """

    sent: int
    rate: float
    rss: int
    connections: int
    subscriptions: int


def flood(stack: LocalStack, kind: str, *, rounds: int, each: int) -> list[Mark]:
    """Send jobs from eight threads or tasks.

    Args:
        stack: The servers.
        kind: ``blocking``, ``asyncio`` or ``many``; see :mod:`tests.support.producing`.
        rounds: Number of rounds.
        each: Number of jobs that each thread or task sends in a round.

    Returns:
        A mark for each round.
    """
    path = stack.broker_url.removeprefix("redis+socket://")
    with Redis(unix_socket_path=path, db=DATABASE) as redis:
        redis.flushdb()
        result = {"success": True, "created_access_count": 0}
        redis.set(result_key(DONE), json.dumps({"status": "SUCCESS", "result": result}))
        marks: list[Mark] = []
        with subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.support.producing", "flood"),
                *(f"{stack.broker_url}?virtual_host={DATABASE}", kind, str(rounds), str(each)),
            ],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout
            assert process.stdin
            for line in process.stdout:
                measured = json.loads(line)
                own_id = redis.client_id()
                clients = [
                    one
                    for one in redis.client_list()
                    if one["db"] == str(DATABASE) and one["id"] != str(own_id)
                ]
                assert redis.llen(QUEUE) == each * THREADS
                redis.delete(QUEUE)
                marks.append(
                    Mark(
                        sent=len(marks) * each * THREADS + each * THREADS,
                        rate=each * THREADS / measured["seconds"],
                        rss=measured["rss"],
                        connections=len(clients),
                        subscriptions=sum(int(one["sub"]) + int(one["psub"]) for one in clients),
                    )
                )
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
        redis.flushdb()
        return marks
