"""The part `retention`: full load beside pruning, and the growth of the worker's tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from threading import Event, Thread

import psycopg
from interview_access.contracts import announcement_key, result_key
from redis import Redis

from benchmarks.baselines import plain_url
from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.database import Database
from benchmarks.measuring import Bar, BenchmarkError, Comparison, Figure, measure
from benchmarks.small_jobs import IDS, INTERVIEWS, JOBS, jobs_on
from storage.postgres import PostgresStorage
from tasks.retention import prune
from worker.services.pruner import PAUSE_FACTOR

_OLD_JOBS = 100_000
_DAY = timedelta(days=1)
_ALONE, _BESIDE = "without pruning", "beside pruning"
_PRUNED = "jobs pruned meanwhile"
_FILL = """
    INSERT INTO grant_access_job
    SELECT gen_random_uuid()::text, 'interview_access.grant_access', 'succeeded',
           gen_random_uuid()::text, encode(sha256(number::text::bytea), 'hex'), 20, 0, 0, 20,
           '{"success": true, "created_access_count": 20}', NULL,
           clock_timestamp() - interval '90 days',
           NULL, clock_timestamp(), clock_timestamp(), 1, 'celery@worker-7d4b9c6f5-x2x8q'
    FROM generate_series(1, %s) AS number
"""
_SIZE = """
    SELECT pg_total_relation_size('grant_access_job')
           + pg_total_relation_size('grant_access_tombstone')
"""
_GRANTS_SIZE = "SELECT pg_total_relation_size('interview_userinterviewaccess')"


def retention(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids with and without pruning, and the bytes that a job takes."""
    jobs, old_jobs = bench.size(JOBS), bench.size(_OLD_JOBS)
    with ExitStack() as stack:
        database = stack.enter_context(bench.database(INTERVIEWS))
        deployment = stack.enter_context(bench.deploy(OURS, database))

        def rate(variant: str, is_pruning: bool) -> Mapping[str, float]:
            deployment.reset()
            _execute(database, _FILL, old_jobs)
            requests = jobs_on(database.interviews, jobs, IDS)
            with _pruning(database) if is_pruning else _nothing() as pruned:
                began = time.monotonic()
                seconds = deployment.drain(requests)
                elapsed = time.monotonic() - began
            deployment.settle()
            if not is_pruning:
                return {variant: jobs / seconds}
            return {variant: jobs / seconds, _PRUNED: sum(pruned) / elapsed}

        trials = [partial(rate, _ALONE, False), partial(rate, _BESIDE, True)]
        rates = Comparison(measure(trials, bench.runs), "jobs/s")
        grants = _execute(database, _GRANTS_SIZE) / jobs
        results = _redis_bytes(deployment.redis)
        before, after = _growth(database, old_jobs)
    return [
        rates.figure(_ALONE),
        rates.figure(_BESIDE, _ALONE, Bar(0.85, at_least=True)),
        rates.figure(_PRUNED),
        Figure("ledger, with indexes", "B/job", (before,)),
        Figure(
            "tombstones, with indexes",
            "B/job",
            (after,),
            ("ledger, with indexes", (before,)),
            Bar(0.25),
        ),
        Figure("results and announcements, for a day", "B/job", (results,)),
        Figure("grants, with indexes", "B/job", (grants,)),
    ]


def _redis_bytes(redis: Redis) -> float:
    """Return the memory of a finished job's keys."""
    results = list(redis.scan_iter(f"{result_key('')}*", count=1_000))
    announced = list(redis.scan_iter(f"{announcement_key('')}*", count=1_000))
    with redis.pipeline(transaction=False) as pipeline:
        for key in (*results, *announced):
            pipeline.memory_usage(key)
        total: float = sum(pipeline.execute())
    return total / len(results)


def _growth(database: Database, jobs: int) -> tuple[float, float]:
    """Return the bytes per job before and after pruning, with the tables as dense as they get."""
    database.reset()
    empty = _execute(database, _SIZE)
    _execute(database, _FILL, jobs)
    before = _execute(database, _SIZE)
    storage = PostgresStorage(database.url)
    for batch in prune(storage, _DAY):
        if batch.counts is None:
            raise BenchmarkError("another process prunes the database of the benchmark")
    storage.close()
    _execute(database, "VACUUM FULL grant_access_job")
    after = _execute(database, _SIZE)
    return (before - empty) / jobs, (after - empty) / jobs


@contextmanager
def _pruning(database: Database) -> Iterator[list[int]]:
    """Prune in a thread, as a worker does. Yields the number of jobs of each transaction."""
    storage, ended, pruned = PostgresStorage(database.url), Event(), list[int]()

    def run() -> None:
        for batch in prune(storage, _DAY):
            pruned.append(batch.counts.jobs if batch.counts else 0)
            if ended.wait(batch.seconds * PAUSE_FACTOR):
                return

    thread = Thread(target=run, daemon=True)
    thread.start()
    try:
        yield pruned
    finally:
        ended.set()
        thread.join()
        storage.close()


@contextmanager
def _nothing() -> Iterator[list[int]]:
    yield []


def _execute(database: Database, statement: str, *values: object) -> int:
    with psycopg.connect(plain_url(database.url), autocommit=True) as connection:
        done = connection.execute(statement.encode(), values or None)
        row = done.fetchone() if done.description else None
        return int(row[0]) if row else 0
