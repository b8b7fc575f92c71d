"""The part `sizing`: bytes of a waiting and of a finished job in Redis and in PostgreSQL.

The write-ahead log is measured after a checkpoint, so that it includes images of full pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import psycopg
from interview_access.contracts import GrantJob

from benchmarks.baselines import plain_url
from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.deployment import Deployment
from benchmarks.measuring import Comparison, Figure, measure
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on

_JOBS = 10_000
_FEWEST = 50  # large jobs of a sample
_SIZES = (1, IDS, 1_000)
_WAITING = {count: f"Redis: a waiting job of {count:,} ids" for count in _SIZES}
_FINISHED = "Redis: a finished job, until its result expires"
_LEDGER = "PostgreSQL: a job in the ledger"
_GRANT = "PostgreSQL: a grant"
_LOG = f"PostgreSQL: write-ahead log of a job of {IDS} ids"


def sizing(bench: Bench) -> list[Figure]:
    """Bytes of a job in Redis while it waits and after it, and of what it writes in PostgreSQL."""
    with (
        bench.database(INTERVIEWS) as database,
        bench.deploy(OURS, database) as deployment,
    ):
        jobs = bench.size(_JOBS)
        comparison = Comparison(measure([partial(_bytes, deployment, jobs)], bench.runs), "bytes")
    names = (*_WAITING.values(), _FINISHED, _LEDGER, _GRANT, _LOG)
    return [comparison.figure(name) for name in names]


def _bytes(deployment: Deployment, count: int) -> Mapping[str, float]:
    interviews = deployment.database.interviews
    waiting = {
        name: _waiting(deployment, jobs_on(interviews, max(count // ids, _FEWEST), ids))
        for ids, name in _WAITING.items()
    }
    jobs = jobs_on(interviews, count, IDS)
    deployment.reset()
    before, tables, log = _memory(deployment), _tables(deployment), _log(deployment)
    deployment.stage(jobs)
    deployment.release()
    deployment.collect([job.job_id for job in jobs])
    deployment.settle()
    finished, filled = _memory(deployment), _tables(deployment)
    rows = (count, count * IDS)
    ledger, grant = (
        (after - empty) / number for after, empty, number in zip(filled, tables, rows, strict=True)
    )
    return waiting | {
        _FINISHED: (finished - before) / count,
        _LEDGER: ledger,
        _GRANT: grant,
        _LOG: (_log(deployment) - log) / count,
    }


def _waiting(deployment: Deployment, jobs: Sequence[GrantJob]) -> float:
    """Return the bytes of a job that waits in Redis."""
    deployment.reset()
    before = _memory(deployment)
    deployment.stage(jobs)
    taken = _memory(deployment) - before
    deployment.staging_redis.delete(deployment.contender.queue)
    return taken / len(jobs)


def _log(deployment: Deployment) -> int:
    """Return the position in the write-ahead log, in bytes."""
    with psycopg.connect(plain_url(deployment.database.url)) as connection:
        row = connection.execute("SELECT pg_current_wal_lsn() - '0/0'::pg_lsn").fetchone()
    return int(row[0]) if row else 0


def _memory(deployment: Deployment) -> int:
    info: Any = deployment.redis.info("memory")
    return int(info["used_memory"])


def _tables(deployment: Deployment) -> tuple[int, int]:
    """Return the sizes of the ledger and of the grants, with their indexes."""
    with psycopg.connect(plain_url(deployment.database.url)) as connection:
        row = connection.execute(
            "SELECT pg_total_relation_size('grant_access_job'),"
            " pg_total_relation_size('interview_userinterviewaccess')"
        ).fetchone()
    ledger, grants = row or (0, 0)
    return ledger, grants
