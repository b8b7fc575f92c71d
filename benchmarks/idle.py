"""The part `idle`: the load of a worker without jobs on the machine and on both servers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psutil
import psycopg
from redis import Redis

from benchmarks.baselines import plain_url
from benchmarks.bench import Bench
from benchmarks.contenders import BARE, OURS, Contender
from benchmarks.database import Database
from benchmarks.measuring import Bar, Comparison, Figure, measure

_SETTLE_SECONDS = 12.0  # idle sessions of PostgreSQL write their statistics within 10 s
_WINDOW_SECONDS = 20.0  # much longer than any interval of a worker or of PostgreSQL's statistics
_CPU, _REDIS, _POSTGRESQL = "CPU", "Redis commands", "PostgreSQL transactions"


def idle(bench: Bench) -> list[Figure]:
    """A worker of two pool processes without jobs: CPU, Redis commands, transactions."""
    with bench.database(1) as database:
        samples = measure(
            [partial(_worker, bench, one, database) for one in (BARE, OURS)], bench.runs
        )
    cpu, per_second = Comparison(samples, "% of a core"), Comparison(samples, "/s")
    return [
        cpu.figure(f"{_CPU}, {BARE.name}"),
        cpu.figure(f"{_CPU}, {OURS.name}", bar=Bar(0.3)),
        per_second.figure(f"{_REDIS}, {BARE.name}"),
        per_second.figure(f"{_REDIS}, {OURS.name}", bar=Bar(5)),
        per_second.figure(f"{_POSTGRESQL}, {BARE.name}"),
        per_second.figure(f"{_POSTGRESQL}, {OURS.name}", bar=Bar(0.5)),
    ]


def _worker(bench: Bench, contender: Contender, database: Database) -> Mapping[str, float]:
    with (
        bench.deploy(contender, database) as deployment,
        # A connection to another database, whose own transactions are not counted.
        psycopg.connect(plain_url(bench.servers.database_url), autocommit=True) as server,
    ):
        time.sleep(_SETTLE_SECONDS)
        began = time.monotonic()
        main = psutil.Process(deployment.service.pid)
        processes = [main, *main.children(recursive=True)]
        before = (
            cpu_seconds(processes),
            _commands(deployment.redis),
            _transactions(server, database),
        )
        time.sleep(bench.scale * _WINDOW_SECONDS)
        after = (
            cpu_seconds(processes),
            _commands(deployment.redis),
            _transactions(server, database),
        )
        seconds = time.monotonic() - began
    cpu, commands, transactions = (
        (late - early) / seconds for early, late in zip(before, after, strict=True)
    )
    return {
        f"{_CPU}, {contender.name}": 100 * cpu,
        f"{_REDIS}, {contender.name}": commands - 1 / seconds,  # without this part's INFO command
        f"{_POSTGRESQL}, {contender.name}": transactions,
    }


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU time of the processes, with a resolution of 10 ms."""
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def _commands(redis: Redis) -> float:
    """Count the commands that the server has executed, also within scripts."""
    statistics: Any = redis.info("commandstats")
    return float(sum(one["calls"] for one in statistics.values()))


def _transactions(server: psycopg.Connection, database: Database) -> float:
    """Count the finished transactions of a database."""
    name = urlsplit(database.url).path.removeprefix("/")
    rows = server.execute(
        "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s", [name]
    ).fetchall()
    return float(rows[0][0])
