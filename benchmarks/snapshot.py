"""The part `snapshot`: an open snapshot prevents vacuum from removing dead tuples of jobs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg

from benchmarks.baselines import plain_url
from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.database import Database
from benchmarks.deployment import Deployment
from benchmarks.measuring import Bar, Figure
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on

_MINUTES = 10
_CHUNK = 500  # jobs that are enqueued and awaited together
_CHUNKS = 4  # queued or executed chunks, so that no pool process waits for jobs
_MEGABYTE = 1_000_000
_TABLES = """
    SELECT relname, n_dead_tup, pg_total_relation_size(relid) FROM pg_stat_user_tables
    WHERE n_live_tup + n_dead_tup > 0 AND relname NOT LIKE '%alembic%' ORDER BY relname
"""


def snapshot(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids for ten minutes while another transaction holds a snapshot: jobs a second.

    The part has one run, independently of `--runs`, and needs 10 GB of disk. The queue is never
    empty.
    """
    with bench.database(INTERVIEWS) as database, _held_snapshot(database):
        with bench.deploy(OURS, database) as deployment:
            deployment.reset()
            rates = _rates(deployment, bench.size(_CHUNK), 60 * bench.scale)
            deployment.settle()
        tables = _tables(database)  # a worker's sessions report their statistics when they end
    first = ("minute 1", (rates[0],))
    *between, last = range(2, _MINUTES + 1)
    return [
        Figure(first[0], "jobs/s", first[1]),
        *(Figure(f"minute {at}", "jobs/s", (rates[at - 1],), first) for at in between),
        Figure(f"minute {last}", "jobs/s", (rates[-1],), first, Bar(0.9, at_least=True)),
        *tables,
    ]


@contextmanager
def _held_snapshot(database: Database) -> Iterator[None]:
    with psycopg.connect(plain_url(database.url)) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT 1")
        yield


def _rates(deployment: Deployment, chunk: int, minute: float) -> Sequence[float]:
    """Keep the queue filled for ten minutes.

    Args:
        deployment: Executes the jobs.
        chunk: Number of jobs that are enqueued together.
        minute: Length of a minute in seconds, which is shorter in tests.

    Returns:
        The jobs a second in each minute.
    """
    finished = [0] * _MINUTES
    queued: deque[list[str]] = deque()
    began = time.monotonic()
    while (at := int((time.monotonic() - began) / minute)) < _MINUTES:
        while len(queued) < _CHUNKS:
            jobs = jobs_on(deployment.database.interviews, chunk, IDS)
            deployment.enqueue_many(jobs)
            queued.append([job.job_id for job in jobs])
        _collect(deployment, queued.popleft())
        finished[at] += chunk
    for job_ids in queued:
        _collect(deployment, job_ids)
    return [jobs / minute for jobs in finished]


def _collect(deployment: Deployment, job_ids: Sequence[str]) -> None:
    deployment.collect(job_ids)
    deployment.delete_results(job_ids)  # those of millions of jobs would fill the memory


def _tables(database: Database) -> list[Figure]:
    with psycopg.connect(plain_url(database.url)) as connection:
        rows = connection.execute(_TABLES).fetchall()
    return [
        figure
        for table, dead, size in rows
        for figure in (
            Figure(f"{table}, dead tuples", "tuples", (dead,)),
            Figure(f"{table} with its indexes", "MB", (size / _MEGABYTE,)),
        )
    ]
