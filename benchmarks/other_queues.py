"""The part `queues`: other Python queues with the same work on the same servers."""

from __future__ import annotations

import json
import os
import pickle
import statistics
import subprocess
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import psycopg
from interview_access.contracts import GrantJob
from redis import Redis

from benchmarks.baselines import plain_url
from benchmarks.bench import ROOT, Bench
from benchmarks.contenders import BARE, OURS, Contender
from benchmarks.database import GRANTS, Database
from benchmarks.measuring import Bar, BenchmarkError, Comparison, Figure, measure, until
from benchmarks.small_jobs import IDS, INTERVIEWS, JOBS, drain_rate, jobs_on
from devstack.service import Service

_PYTHON = ROOT / ".venv/bench/bin/python"
_PROCRASTINATE = (
    *("-m", "procrastinate", "--log-level", "warning"),
    *("--app", "benchmarks.queues.procrastinate.app"),
)
_WARM_UP_JOBS = 400  # enough that every worker process executes some
_WINDOW = 200  # results read in one round trip
_HELD = "benchmark-held-back"  # a key that no worker reads


def queues(bench: Bench) -> list[Figure]:
    """A queue of jobs of 20 ids, by other Python queues: jobs a second.

    The workers have two processes, and have executed hundreds of jobs before. The jobs are
    enqueued by the queue's API invisibly to its workers: in another Redis database, or scheduled
    for later. The time begins when they become visible, and ends with the last result, or with the
    last row if the queue stores no results.
    """
    if not _PYTHON.exists():
        raise click.ClickException(
            ".venv/bench, where the other queues are, is missing: `make bench-full BENCH=queues`"
            " installs it"
        )
    jobs = bench.size(JOBS)
    with ExitStack() as opened:
        database = opened.enter_context(bench.database(INTERVIEWS))
        deployments = [opened.enter_context(bench.deploy(one, database)) for one in (BARE, OURS)]
        other_queues = [
            opened.enter_context(queue.open(bench, database)) for queue in _OTHER_QUEUES
        ]
        rates: dict[str, Callable[[int], float]] = {
            **{
                deployment.contender.name: partial(drain_rate, deployment)
                for deployment in deployments
            },
            **{other.name: other.drain_rate for other in other_queues},
        }
        for rate in rates.values():
            rate(_WARM_UP_JOBS)
        trials = [partial(_sample, name, rate, jobs) for name, rate in rates.items()]
        comparison = Comparison(measure(trials, bench.runs), "jobs/s")
    others = [name for name in rates if name != OURS.name]
    best = max(others, key=lambda name: statistics.median(comparison.samples[name]))
    return [
        comparison.figure(BARE.name),
        *(comparison.figure(other.name, BARE.name) for other in other_queues),
        comparison.figure(OURS.name, best, Bar(2.4, at_least=True)),
    ]


class _OtherQueue(ABC):
    """Another queue with running workers.

    Args:
        name: The name of its module in benchmarks.queues, and in tables.
        database: The database of its grants.
        services: Its workers.
    """

    def __init__(self, name: str, database: Database, services: Sequence[Service]) -> None:
        self.name = name
        self.database = database
        self._services = services

    def drain_rate(self, jobs: int) -> float:
        """Measure a queue of jobs of 20 ids in jobs a second, as `small_jobs.drain_rate` does."""
        self.database.reset()
        waiting = jobs_on(self.database.interviews, jobs, IDS)
        try:
            self.stage(waiting)
            started = time.perf_counter()
            self.release()
            created = self.collect([job.job_id for job in waiting])
            seconds = time.perf_counter() - started
        except BenchmarkError as error:
            words = "".join(service.log_tail() for service in self._services)
            raise BenchmarkError(f"{error}{words}") from error
        if created != jobs * IDS:
            raise BenchmarkError(f"{self.name}: its jobs counted {created:,} rows")
        self.database.expect(jobs * IDS)
        return jobs / seconds

    @abstractmethod
    def stage(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue jobs by the queue's API, invisibly to its workers."""

    @abstractmethod
    def release(self) -> None:
        """Make all staged jobs visible to the workers."""

    @abstractmethod
    def collect(self, job_ids: Sequence[str]) -> int:
        """Wait for all jobs, and return the sum of their created counts."""

    def _enqueue(self, jobs: Sequence[GrantJob], broker: str = "") -> None:
        lines = [
            json.dumps(
                {"job_id": one.job_id, "user_id": one.user_id, "interview_ids": one.interview_ids}
            )
            for one in jobs
        ]
        _run(["-m", "benchmarks.queues", self.name], self.database, broker, "\n".join(lines))

    def _check_alive(self) -> None:
        for service in self._services:
            if not service.alive:
                raise BenchmarkError(f"{self.name}: a worker has ended")


@dataclass(frozen=True, slots=True)
class _RedisQueue:
    """A queue whose messages are under one key in Redis.

    Attributes:
        name: The name of its module in benchmarks.queues, and in tables.
        worker: Python's arguments for its worker.
        key: The key of its messages.
        find: Reads the created counts of jobs' results; None for a job without a result.
        beside: Further keys of messages.
        settings: Further environment variables of its worker.
    """

    name: str
    worker: Sequence[str]
    key: str
    find: Callable[[Redis, Sequence[str]], list[int | None]]
    beside: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def open(self, bench: Bench, database: Database) -> Iterator[_OtherQueue]:
        """Start its worker."""
        with (
            bench.queue() as (number, waiting_number),
            bench.redis(number) as redis,
            bench.service(
                _contender(self.name),
                [str(_PYTHON), *self.worker],
                number,
                database,
                **_servers(database, bench.redis_url(number)),
                **self.settings,
            ) as service,
        ):
            service.start()
            yield _OnRedis(self, database, service, redis, bench.redis_url(waiting_number))


class _OnRedis(_OtherQueue):
    """A queue on Redis.

    Args:
        queue: The queue.
        database: The database of its grants.
        service: Its worker.
        redis: The Redis database that its worker reads.
        staging_broker: The URL of the Redis database in which messages are staged.
    """

    def __init__(
        self,
        queue: _RedisQueue,
        database: Database,
        service: Service,
        redis: Redis,
        staging_broker: str,
    ) -> None:
        super().__init__(queue.name, database, [service])
        self._queue = queue
        self._redis = redis
        self._waiting_room = staging_broker

    def stage(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue in another database, and move the messages to a key that no worker reads."""
        self._enqueue(jobs, self._waiting_room)
        with Redis.from_url(self._waiting_room) as waiting:
            waiting.rename(self._queue.key, _HELD)
            for key in (*self._queue.beside, _HELD):
                if not waiting.move(key, _number(self._redis)):
                    raise BenchmarkError(f"{self.name}: {key} of earlier jobs still exists")
            waiting.flushdb()

    def release(self) -> None:
        """Rename the key of the messages to the queue's, which wakes its workers."""
        self._redis.rename(_HELD, self._queue.key)

    def collect(self, job_ids: Sequence[str]) -> int:
        """Wait for the results as `Deployment.collect` does."""
        left = deque(job_ids)
        created = 0

        def have_all() -> bool:
            nonlocal created
            self._check_alive()
            while left:
                window = [left.popleft() for _ in range(min(_WINDOW, len(left)))]
                counts = self._queue.find(self._redis, window)
                created += sum(count for count in counts if count is not None)
                late = [one for one, count in zip(window, counts, strict=True) if count is None]
                left.extendleft(reversed(late))
                if late:
                    return False
            return True

        until(have_all, f"{len(job_ids)} results of {self.name}")
        return created


@dataclass(frozen=True, slots=True)
class _Procrastinate:
    """Procrastinate, whose jobs are rows in the database of the grants.

    Attributes:
        worker: Python's arguments for each of its two workers.
    """

    worker: Sequence[str]

    @contextmanager
    def open(self, bench: Bench, database: Database) -> Iterator[_OtherQueue]:
        """Create its tables, and start its workers."""
        _run([*_PROCRASTINATE, "schema", "--apply"], database)
        with ExitStack() as opened:
            services = [
                opened.enter_context(
                    bench.service(
                        _contender("procrastinate"),
                        [str(_PYTHON), *self.worker],
                        0,
                        database,
                        **_servers(database),
                    )
                )
                for _ in range(2)
            ]
            for service in services:
                service.start()
            connection = opened.enter_context(
                psycopg.connect(plain_url(database.url), autocommit=True)
            )
            yield _OnPostgres(database, services, connection)


class _OnPostgres(_OtherQueue):
    """Procrastinate with running workers.

    Args:
        database: The database of its jobs and grants.
        services: Its workers.
        connection: A connection to the database.
    """

    def __init__(
        self,
        database: Database,
        services: Sequence[Service],
        connection: psycopg.Connection[Any],
    ) -> None:
        super().__init__("procrastinate", database, services)
        self._connection = connection

    def stage(self, jobs: Sequence[GrantJob]) -> None:
        """Schedule jobs for later, and make them due without notifying the workers."""
        self._enqueue(jobs)
        self._connection.execute("UPDATE procrastinate_jobs SET scheduled_at = NULL")
        self._connection.execute("VACUUM ANALYZE procrastinate_jobs")
        self.database.expect(0)

    def release(self) -> None:
        """Notify the workers as of one new job, so that they fetch all due jobs."""
        self._connection.execute(
            "SELECT pg_notify('procrastinate_any_queue_v1', %s)",
            [json.dumps({"type": "job_inserted", "job_id": 0})],
        )

    def collect(self, job_ids: Sequence[str]) -> int:
        """Wait for the last row; rows are counted once their sequence has reached the number."""
        rows = len(job_ids) * IDS

        def have_all() -> bool:
            self._check_alive()
            last = self._connection.execute(
                "SELECT coalesce(pg_sequence_last_value(pg_get_serial_sequence(%s, 'id')), 0)",
                [GRANTS],
            ).fetchone()
            return last is not None and last[0] >= rows and self.database.rows() >= rows

        until(have_all, f"{rows:,} rows of procrastinate")
        return self.database.rows()


def _taskiq_results(redis: Redis, job_ids: Sequence[str]) -> list[int | None]:
    stored: Any = redis.mget(job_ids)
    results = [raw and json.loads(raw) for raw in stored]
    for result in results:
        if result and result["is_err"]:
            raise BenchmarkError(f"a job failed: {result['error']}")
    return [result and _count(result["return_value"]) for result in results]


def _huey_results(redis: Redis, job_ids: Sequence[str]) -> list[int | None]:
    stored: Any = redis.hmget("huey.results.grants", list(job_ids))
    try:
        results = [raw and pickle.loads(raw) for raw in stored]  # noqa: S301 - its own workers'
    except ImportError as error:
        raise BenchmarkError(f"a job failed: its result is an object of huey's ({error})") from None
    return [result and _count(result) for result in results]


def _dramatiq_results(redis: Redis, job_ids: Sequence[str]) -> list[int | None]:
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.lindex(f"dramatiq-results:default:grant:{job_id}", 0)
        results = [raw and json.loads(raw) for raw in pipeline.execute()]
    for result in results:
        if result and "success" not in result:
            raise BenchmarkError(f"a job failed: {result}")
    return [result and _count(result) for result in results]


_OTHER_QUEUES: Sequence[_RedisQueue | _Procrastinate] = [
    _RedisQueue(
        "taskiq",
        [
            *("-m", "taskiq", "worker", "benchmarks.queues.taskiq:broker"),
            *("--workers", "2", "--log-level", "WARNING"),
            "--no-parse",  # pydantic need not parse arguments that are strings
        ],
        key="taskiq",
        find=_taskiq_results,
    ),
    _RedisQueue(
        "huey",
        [
            *("-m", "huey.bin.huey_consumer", "benchmarks.queues.huey.huey"),
            *("-k", "process", "-w", "2", "--no-periodic", "--quiet"),
        ],
        key="huey.redis.grants",
        find=_huey_results,
    ),
    _RedisQueue(
        "dramatiq",
        [
            *("-m", "dramatiq", "benchmarks.queues.dramatiq:broker"),
            *("--processes", "2", "--threads", "16"),  # the fastest of 1 to 32
        ],
        key="dramatiq:default",
        find=_dramatiq_results,
        beside=["dramatiq:default.msgs"],
        # Milliseconds between polls of an idle queue; the default of 1,000 would be measured.
        settings={"dramatiq_worker_timeout": "100"},
    ),
    _Procrastinate(
        [
            *(*_PROCRASTINATE, "worker", "--concurrency", "8", "--delete-jobs", "successful"),
            *("--fetch-job-polling-interval", "600"),  # seconds; it also listens for notifications
        ],
    ),
]


def _sample(name: str, rate: Callable[[int], float], jobs: int) -> Mapping[str, float]:
    return {name: rate(jobs)}


def _contender(name: str) -> Contender:
    return Contender(name, f"benchmarks.queues.{name}")


def _run(arguments: Sequence[str], database: Database, broker: str = "", text: str = "") -> None:
    """Run Python of .venv/bench.

    Args:
        arguments: Arguments of Python.
        database: The database for its environment.
        broker: The URL of Redis for its environment, in redis-py's form.
        text: Standard input.

    Raises:
        BenchmarkError: if the process fails.
    """
    ended = subprocess.run(  # noqa: S603 - ours
        [_PYTHON, *arguments],
        input=text,
        env={"PATH": os.environ["PATH"], **_servers(database, broker)},
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    if ended.returncode != 0:
        raise BenchmarkError(f"{' '.join(arguments)} failed:\n{ended.stderr}")


def _servers(database: Database, broker: str = "") -> dict[str, str]:
    """Return the environment variables of the modules in benchmarks.queues."""
    return {"BROKER_URL": broker, "DATABASE_URL": plain_url(database.url)}


def _number(redis: Redis) -> int:
    return int(redis.connection_pool.connection_kwargs["db"])


def _count(result: Mapping[str, Any]) -> int:
    return int(result["created_access_count"])
