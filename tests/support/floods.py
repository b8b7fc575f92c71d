"""A flood of jobs from one process, watched from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

from redis import Redis

from devstack.servers import LocalStack
from tests.support.producing import DONE, THREADS
from tests.support.workers import QUEUE, ROOT

DATABASE = 9


@dataclass(frozen=True, slots=True)
class Mark:
    """What was seen when so many jobs had been sent.

    Attributes:
        rate: Jobs sent in a second since the mark before.
        rss: Of the process, in bytes.
        connections: That it has open.
        subscriptions: That these have.
    """

    sent: int
    rate: float
    rss: int
    connections: int
    subscriptions: int


def flood(stack: LocalStack, kind: str, *, rounds: int, each: int) -> list[Mark]:
    """Send from eight threads (or tasks), each so many in a round; the marks of all rounds."""
    path = stack.broker_url.removeprefix("redis+socket://")
    with Redis(unix_socket_path=path, db=DATABASE) as redis:
        redis.flushdb()
        result = {"success": True, "created_access_count": 0}
        redis.set(f"celery-task-meta-{DONE}", json.dumps({"status": "SUCCESS", "result": result}))
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
                said = json.loads(line)
                ours = redis.client_id()
                clients = [
                    one
                    for one in redis.client_list()
                    if one["db"] == str(DATABASE) and one["id"] != str(ours)
                ]
                assert redis.llen(QUEUE) == each * THREADS
                redis.delete(QUEUE)
                marks.append(
                    Mark(
                        sent=len(marks) * each * THREADS + each * THREADS,
                        rate=each * THREADS / said["seconds"],
                        rss=said["rss"],
                        connections=len(clients),
                        subscriptions=sum(int(one["sub"]) + int(one["psub"]) for one in clients),
                    )
                )
                process.stdin.write("\n")
                process.stdin.flush()
        assert process.returncode == 0
        redis.flushdb()
        return marks
