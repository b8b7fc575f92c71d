"""The part about a snapshot that is held open elsewhere: vacuum cannot remove what jobs leave."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg

from benchmarks.baselines import plain_url
from benchmarks.measuring import Bar, Figure
from benchmarks.site import OURS, Bench, Crew, Database
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on

_MINUTES = 10
_CHUNK = 500  # jobs that are enqueued and awaited together
_CHUNKS = 4  # in the queue or executed, so that no pool process waits for jobs
_MEGABYTE = 1_000_000
_TABLES = """
    SELECT relname, n_dead_tup, pg_total_relation_size(relid) FROM pg_stat_user_tables
    WHERE n_live_tup + n_dead_tup > 0 AND relname NOT LIKE '%alembic%' ORDER BY relname
"""


def snapshot(bench: Bench) -> list[Figure]:
    """Jobs of 20 ids for ten minutes while another transaction holds a snapshot: jobs a second.

    It is run once, whatever `--runs` says, and takes some 10 GB of disk. The queue is never empty.
    """
    with bench.database(INTERVIEWS) as database, _held_snapshot(database):
        with bench.crew(OURS, database) as crew:
            crew.reset()
            rates = _rates(crew, bench.size(_CHUNK), 60 * bench.scale)
            crew.settle()
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


def _rates(crew: Crew, chunk: int, minute: float) -> Sequence[float]:
    """Keep the queue filled for ten minutes.

    Args:
        crew: Whose worker executes the jobs.
        chunk: Jobs that are enqueued together.
        minute: Its length in seconds.

    Returns:
        The jobs a second that finished in each of the minutes.
    """
    finished = [0] * _MINUTES
    queued: deque[list[str]] = deque()
    began = time.monotonic()
    while (at := int((time.monotonic() - began) / minute)) < _MINUTES:
        while len(queued) < _CHUNKS:
            jobs = jobs_on(crew.database.interviews, chunk, IDS)
            crew.enqueue_many(jobs)
            queued.append([job.job_id for job in jobs])
        _collect(crew, queued.popleft())
        finished[at] += chunk
    for job_ids in queued:
        _collect(crew, job_ids)
    return [jobs / minute for jobs in finished]


def _collect(crew: Crew, job_ids: Sequence[str]) -> None:
    crew.collect(job_ids)
    crew.delete_results(job_ids)  # of millions of jobs they would fill the memory


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
