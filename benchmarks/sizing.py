"""The part `sizing`: bytes of a waiting and of a finished job in Redis and in PostgreSQL."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import psycopg

from benchmarks.baselines import plain_url
from benchmarks.bench import Bench
from benchmarks.contenders import OURS
from benchmarks.deployment import Deployment
from benchmarks.measuring import Comparison, Figure, measure
from benchmarks.small_jobs import IDS, INTERVIEWS, jobs_on

_JOBS = 10_000
_WAITING = f"Redis: a waiting job of {IDS} ids"
_FINISHED = "Redis: a finished job, until its result expires"
_LEDGER = "PostgreSQL: a job in the ledger"
_GRANT = "PostgreSQL: a grant"


def sizing(bench: Bench) -> list[Figure]:
    """Bytes of a job in Redis while it waits and after it, of its ledger row, and of a grant."""
    with (
        bench.database(INTERVIEWS) as database,
        bench.deploy(OURS, database) as deployment,
    ):
        jobs = bench.size(_JOBS)
        comparison = Comparison(measure([partial(_bytes, deployment, jobs)], bench.runs), "bytes")
    return [comparison.figure(name) for name in (_WAITING, _FINISHED, _LEDGER, _GRANT)]


def _bytes(deployment: Deployment, count: int) -> Mapping[str, float]:
    jobs = jobs_on(deployment.database.interviews, count, IDS)
    deployment.reset()
    before, tables = _memory(deployment), _tables(deployment)
    deployment.stage(jobs)
    waiting = _memory(deployment)
    deployment.release()
    deployment.collect([job.job_id for job in jobs])
    deployment.settle()
    finished, filled = _memory(deployment), _tables(deployment)
    rows = (count, count * IDS)
    ledger, grant = (
        (after - empty) / number for after, empty, number in zip(filled, tables, rows, strict=True)
    )
    return {
        _WAITING: (waiting - before) / count,
        _FINISHED: (finished - before) / count,
        _LEDGER: ledger,
        _GRANT: grant,
    }


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
