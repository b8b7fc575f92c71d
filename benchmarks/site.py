"""What variants need: servers, databases with interviews, workers, and a way to wait for results.

Every way to run jobs is driven alike and looked at from outside: messages in Redis, results in
Redis, rows in PostgreSQL. What is measured is decided in the parts.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from celery import Celery
from interview_access.contracts import GRANT_ACCESS, QUEUE, GrantJob, result_key
from interview_access.errors import InvalidInterviewIdException
from interview_access.producer import InterviewAccessClient
from psycopg import sql
from redis import Redis
from redis.client import PubSub

from benchmarks.baselines import plain_url
from devstack.servers import LocalStack
from devstack.service import Service
from storage.samples import load_samples
from storage.schema import migrate

ROOT = Path(__file__).parent.parent
GRANTS = "interview_userinterviewaccess"

_PATIENCE = 600.0  # seconds; an end for every wait, which none takes when all is well
_LOOK_EVERY = 0.002  # seconds between two looks at what is about to happen
_WINDOW = 200  # results looked at in one round trip
_WARM_UP_JOBS = 8  # enough that each of two children has had one, and its connection stands
_HELD_BACK = "benchmark-held-back"  # a list that no worker looks at
_COPIES = "benchmark-copies"  # likewise
_GRANTS_EACH = 100  # of a user that only fills the table
_RESULT_EXPIRES = 86_400  # seconds: ours, and Celery's default


class BenchmarkError(Exception):
    """A variant did not do its work, so its time means nothing; the text says what was found."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to run grant jobs by Celery.

    Attributes:
        name: What tables call it.
        app: The module of its Celery app.
        queue: Where it listens.
        task: Its task's name.
    """

    name: str
    app: str
    queue: str = "celery"
    task: str = "grant"

    @property
    def is_ours(self) -> bool:
        """Whether jobs are enqueued by our client."""
        return self.task == GRANT_ACCESS

    def command(self, children: int, log_level: str = "WARNING") -> list[str]:
        """What starts its worker: prefork, with the events that Flower shows."""
        return [
            *(sys.executable, "-m", "celery", "-A", self.app, "worker", "-E"),
            *("-c", str(children), "-l", log_level),
            "--without-mingle",  # a second of waiting for other workers, which would even out all
        ]


OURS = Contender("ours", "worker", QUEUE, GRANT_ACCESS)
BARE = Contender("bare Celery task", "benchmarks.baselines.bare")
NOOP = Contender("Celery task that does nothing", "benchmarks.baselines.noop")
PLAN = Contender("the plan, on Django", "benchmarks.baselines.django_plan")


def until(condition: Callable[[], bool], what: str) -> None:
    """Come back when it holds.

    Raises:
        BenchmarkError: It did not in ten minutes.
    """
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise BenchmarkError(f"waited {_PATIENCE:.0f} s for {what}")
        time.sleep(_LOOK_EVERY)


@dataclass(frozen=True, slots=True)
class Database:
    """A database with all tables.

    Attributes:
        url: In SQLAlchemy's form.
        interviews: The ids of its interviews, in no order, as producers have them.
    """

    url: str
    interviews: list[str]

    def reset(self) -> None:
        """Empty the tables that jobs write to, and have no writing back of pages due."""
        with self._connected() as connection:
            names = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
                " AND (tablename LIKE 'grant_access_%%' AND tablename NOT LIKE '%%alembic%%'"
                " OR tablename = %s)",
                [GRANTS],
            ).fetchall()
            for (name,) in names:  # one by one: a worker looks at some of them on its own account
                table = sql.Identifier(name)
                connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(table))
            connection.execute("CHECKPOINT")

    def expect(self, rows: int) -> None:
        """See that so many grants stand.

        Raises:
            BenchmarkError: There are more or fewer.
        """
        if self.rows() != rows:
            raise BenchmarkError(f"expected {rows:,} rows, got {self.rows():,}")

    def rows(self) -> int:
        """How many grants stand."""
        with self._connected() as connection:
            counted = connection.execute(f"SELECT count(*) FROM {GRANTS}").fetchone()  # noqa: S608 - a constant
        return int(counted[0]) if counted else 0

    def fill(self, rows: int) -> int:
        """Add grants of users of their own, about as many as asked for, over all interviews.

        Returns:
            How many were added.
        """
        each = min(_GRANTS_EACH, len(self.interviews))
        if rows < each:
            return 0
        with self._connected() as connection:
            # The foreign key holds by construction; its check would double the time.
            connection.execute("SET session_replication_role = replica")
            connection.execute(
                f"INSERT INTO {GRANTS} (user_id, interview_id)"  # noqa: S608 - a constant
                " SELECT md5(users.number::text || %s), ids.id"
                " FROM generate_series(1, %s) AS users (number)"
                " CROSS JOIN generate_series(0, %s - 1) AS grants (number)"
                " JOIN unnest(%s::uuid[]) WITH ORDINALITY AS ids (id, number)"
                " ON ids.number = 1 + (users.number * %s + grants.number) %% %s",
                [uuid4().hex, rows // each, each, self.interviews, each, len(self.interviews)],
            )
            connection.execute(f"VACUUM ANALYZE {GRANTS}")
            connection.execute("CHECKPOINT")
        return rows // each * each

    def _connected(self) -> psycopg.Connection[Any]:
        return psycopg.connect(plain_url(self.url), autocommit=True)


@dataclass
class Crew:
    """A contender with a running worker, a queue and a database.

    Attributes:
        contender: Who it is.
        database: Where its rows go.
        redis: Where its queue and its results are.
        service: Its worker.
        created: The sum of the counts that its jobs gave, since the last reset.
    """

    contender: Contender
    database: Database
    redis: Redis
    service: Service
    broker: str
    waiting_room: str
    waiting_redis: Redis
    created: int = 0
    _client: InterviewAccessClient = field(init=False)
    _celery: Celery = field(init=False)

    def __post_init__(self) -> None:
        """Connect the ways to enqueue."""
        self._client = InterviewAccessClient(self.broker)
        self._celery = celery_producer(self.broker)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self._celery.close()
        self.redis.close()
        self.waiting_redis.close()

    def enqueue(self, job: GrantJob) -> None:
        """Enqueue one job as its users would."""
        if self.contender.is_ours:
            self._client.enqueue(job.user_id, job.interview_ids, job_id=job.job_id)
        else:
            send(self._celery, self.contender, job)

    def enqueue_many(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue many of our jobs."""
        self._client.enqueue_many(jobs)

    def put_by(self, jobs: Sequence[GrantJob]) -> None:
        """Enqueue jobs where no worker sees them, by the fastest way that its users have."""
        if self.contender.is_ours:
            client = InterviewAccessClient(self.waiting_room)
            client.enqueue_many(jobs)
            client.close()
        else:
            # Without results: its subscriptions to them would outlive it, and be served.
            with Celery(broker=self.waiting_room, set_as_current=False) as producer:
                for job in jobs:
                    send(producer, self.contender, job)
        # What else was stored with the messages goes ahead of them.
        queue = self.contender.queue.encode()
        keys = [key for key in self.waiting_redis.scan_iter(count=1_000) if key != queue]
        with self.waiting_redis.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.move(key, self._number)
            pipeline.execute()

    def release(self) -> None:
        """Give the worker all messages that were put by, at once."""
        self.waiting_redis.move(self.contender.queue, self._number)

    def hold_back(self) -> None:
        """Keep the messages that were put by beside the queue, for `release_first`."""
        self.waiting_redis.rename(self.contender.queue, _HELD_BACK)
        self.waiting_redis.move(_HELD_BACK, self._number)

    def release_first(self, count: int = 1) -> None:
        """Give the worker the first of the messages that are held back, as many as there are."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for _ in range(count):
                pipeline.lmove(_HELD_BACK, self.contender.queue, "RIGHT", "LEFT")
            pipeline.execute()

    def drain(self, jobs: Sequence[GrantJob], *, failed: bool = False) -> float:
        """Seconds from the moment that all of the jobs stand in the queue to the last result.

        Args:
            jobs: What is enqueued.
            failed: Whether all of them must fail for an unknown ID, instead of succeeding.
        """
        self.put_by(jobs)
        return self._drain([job.job_id for job in jobs], failed=failed)

    def drain_twice(self, jobs: Sequence[GrantJob]) -> tuple[float, float]:
        """Measure as `drain` does, and once more with copies of the same messages.

        The results are deleted in between, so that the second ones can be awaited.

        Raises:
            BenchmarkError: if the jobs count other rows the second time.
        """
        job_ids = [job.job_id for job in jobs]
        self.put_by(jobs)
        self.waiting_redis.copy(self.contender.queue, _COPIES)
        first = self._drain(job_ids)
        created, self.created = self.created, 0
        self.delete_results(job_ids)
        self.waiting_redis.rename(_COPIES, self.contender.queue)
        second = self._drain(job_ids)
        if self.created != created:
            raise BenchmarkError(f"expected {created:,} rows once more, got {self.created:,}")
        return first, second

    def _drain(self, job_ids: Sequence[str], *, failed: bool = False) -> float:
        started = time.perf_counter()
        self.release()
        self.collect(job_ids, failed=failed)
        return time.perf_counter() - started

    def time_one(self, job: GrantJob) -> float:
        """Seconds from the enqueuing of a job to its result."""
        return self._timed(job.job_id, lambda: self.enqueue(job))

    def time_cohort(self, user_ids: Sequence[str], interview_ids: Sequence[str]) -> float:
        """The same of one job for many users."""
        job_id = str(uuid4())
        return self._timed(
            job_id, lambda: self._client.enqueue_cohort(user_ids, interview_ids, job_id=job_id)
        )

    def _timed(self, job_id: str, enqueue: Callable[[], object]) -> float:
        key = result_key(job_id)
        with self.redis.pubsub() as channel:  # type: ignore[no-untyped-call] # redis-py's
            channel.subscribe(key)
            channel.get_message(timeout=_PATIENCE)  # that it listens
            started = time.perf_counter()
            enqueue()
            answer = self._heard(channel, job_id)
            seconds = time.perf_counter() - started
        self.created += answer
        return seconds

    def collect(self, job_ids: Sequence[str], *, failed: bool = False) -> None:
        """Wait for the results of all of the jobs; see `drain`."""
        left = deque(job_ids)
        read = _zero_of_failed if failed else _count

        def looked() -> bool:
            self._see_that_it_runs()
            while left:
                window = [left.popleft() for _ in range(min(_WINDOW, len(left)))]
                stored: Any = self.redis.mget([result_key(job_id) for job_id in window])
                counts = [read(raw) for raw in stored]
                self.created += sum(count for count in counts if count is not None)
                late = [one for one, count in zip(window, counts, strict=True) if count is None]
                left.extendleft(reversed(late))
                if late:
                    return False
            return True

        until(looked, f"{len(job_ids)} results of {self.contender.name}")

    def delete_results(self, job_ids: Sequence[str]) -> None:
        """Delete the stored results of the jobs."""
        self.redis.unlink(*(result_key(job_id) for job_id in job_ids))

    def stored_at(self, job_ids: Sequence[str]) -> list[float]:
        """When Redis took each result, in seconds since 1970, to half a millisecond."""
        with self.redis.pipeline(transaction=False) as pipeline:
            for job_id in job_ids:
                pipeline.pexpiretime(result_key(job_id))
            forgotten = pipeline.execute()
        return [(at + 0.5) / 1_000 - _RESULT_EXPIRES for at in forgotten]

    def settle(self, standing: int = 0) -> None:
        """Hold what was counted since the last reset against the rows; see that nothing is left.

        Args:
            standing: Rows that no job of it made.

        Raises:
            BenchmarkError: Something of it is not as it must be.
        """
        until(lambda: self._unfinished() == 0, f"the queue of {self.contender.name} to be empty")
        rows = self.database.rows() - standing
        if rows != self.created:
            raise BenchmarkError(
                f"{self.contender.name}: its jobs counted {self.created:,} rows, got {rows:,}"
            )
        letters = self.redis.xlen("interview-access:dead")
        if letters:
            raise BenchmarkError(f"{self.contender.name}: {letters} dead letters, expected none")

    def reset(self) -> None:
        """Have no grants and a count of 0; what this does not take back: job ids, results."""
        self.database.reset()
        self.created = 0

    def _unfinished(self) -> int:
        held = [b"unacked", *self.redis.scan_iter("interview-access:held:*", count=1_000)]
        queued: Any = self.redis.llen(self.contender.queue)
        return int(queued) + sum(int(self.redis.hlen(key.decode())) for key in held)

    def _see_that_it_runs(self) -> None:
        if not self.service.alive:
            raise BenchmarkError(f"{self.contender.name}: its worker has ended")

    def _heard(self, channel: PubSub, job_id: str) -> int:
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            message = channel.get_message(ignore_subscribe_messages=True, timeout=1.0)
            count = _count(message["data"]) if message else None
            if count is not None:
                return count
            self._see_that_it_runs()
        raise BenchmarkError(f"waited {_PATIENCE:.0f} s for the result of {job_id}")

    @property
    def _number(self) -> int:
        return int(self.redis.connection_pool.connection_kwargs["db"])


def celery_producer(broker: str) -> Celery:
    """A Celery app that sends."""
    return Celery(broker=broker, backend=broker, set_as_current=False)


def send(producer: Celery, contender: Contender, job: GrantJob) -> None:
    """Send one job as a Celery app does."""
    producer.send_task(
        contender.task,
        kwargs={"user_id": job.user_id, "interview_ids": job.interview_ids},
        task_id=job.job_id,
        queue=contender.queue,
    )


def _count(raw: bytes | None) -> int | None:
    """The count that a stored result gives; None where it is none yet."""
    if raw is None:
        return None
    stored = json.loads(raw)
    if stored["status"] == "SUCCESS":
        return int(stored["result"]["created_access_count"])
    if stored["status"] == "FAILURE":
        raise BenchmarkError(f"a job failed: {stored['result']}")
    return None


def _zero_of_failed(raw: bytes | None) -> int | None:
    """0 if a stored result is the failure of a job with an unknown ID; None while there is none."""
    if raw is None:
        return None
    stored = json.loads(raw)
    if stored["status"] == "SUCCESS":
        raise BenchmarkError(f"expected a failure, got {stored['result']}")
    if stored["status"] != "FAILURE":
        return None
    expected = InvalidInterviewIdException.__name__
    if stored["result"]["exc_type"] != expected:
        raise BenchmarkError(f"expected {expected}, got {stored['result']}")
    return 0


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers that stand already.

    Attributes:
        database_url: In SQLAlchemy's form, of a user who may create databases.
        broker_url: In Celery's; the databases 0 to 15 that are used must be empty, and are after.
    """

    database_url: str
    broker_url: str


class Bench:
    """The servers of a whole run, and how much of everything is asked for.

    Args:
        servers: Which run.
        folder: Takes the workers' logs.
        runs: Samples of each variant.
        scale: A factor on all sizes.
        quick: Whether parts leave out variants that take long or need more than our own venv.
    """

    def __init__(
        self,
        servers: LocalStack | Servers,
        folder: Path,
        *,
        runs: int,
        scale: float,
        quick: bool = False,
    ) -> None:
        self.runs = runs
        self.quick = quick
        self.servers = servers
        self._folder = folder
        self.scale = scale
        self._taken: set[int] = set()

    def size(self, full: int) -> int:
        """A size at this run's scale."""
        return max(1, round(full * self.scale))

    @contextmanager
    def database(self, interviews: int) -> Iterator[Database]:
        """A database with that many interviews, dropped at the end."""
        server = plain_url(self.servers.database_url)
        name = f"bench_{uuid4().hex}"
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        try:
            path, _, query = self.servers.database_url.partition("?")
            url = f"{path.rpartition('/')[0]}/{name}?{query}"
            migrate(url, report=lambda _: None)
            ids = sorted(load_samples(url, interviews))[:interviews]
            random.Random(interviews).shuffle(ids)  # noqa: S311 - no secret
            with psycopg.connect(plain_url(url), autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
            yield Database(url, ids)
        finally:
            with psycopg.connect(server, autocommit=True) as connection:
                connection.execute(
                    sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name))
                )

    def redis(self, number: int) -> Redis:
        """A connection to one of Redis's databases."""
        return Redis.from_url(self.redis_url(number))

    def redis_url(self, number: int) -> str:
        """The URL of one of Redis's databases, as redis-py takes it."""
        parts = urlsplit(self.servers.broker_url)
        if parts.scheme == "redis+socket":
            return f"unix://{parts.path}?db={number}"
        return self.broker(number)

    def broker(self, number: int) -> str:
        """The same as Celery takes it."""
        parts = urlsplit(self.servers.broker_url)
        if parts.scheme == "redis+socket":
            return f"{parts.scheme}://{parts.path}?virtual_host={number}"
        return parts._replace(path=f"/{number}").geturl()

    @contextmanager
    def queue(self) -> Iterator[tuple[int, int]]:
        """The numbers of two of Redis's databases, empty: for a queue, and for what waits by it.

        Raises:
            BenchmarkError: They are not empty: somebody else's, most likely.
        """
        first = next(number for number in range(0, 16, 2) if number not in self._taken)
        self._taken.add(first)
        try:
            for number in (first, first + 1):
                with self.redis(number) as redis:
                    keys: Any = redis.dbsize()
                if keys:
                    raise BenchmarkError(
                        f"Redis's database {number} has {keys} keys; expected an empty one: "
                        "benchmarks empty the ones that they use"
                    )
            yield first, first + 1
            for number in (first, first + 1):
                with self.redis(number) as redis:
                    redis.flushdb()
        finally:
            self._taken.remove(first)

    @contextmanager
    def service(
        self,
        contender: Contender,
        command: Sequence[str],
        number: int,
        database: Database,
        **settings: object,
    ) -> Iterator[Service]:
        """A contender's worker, not started yet; ended at the end."""
        service = Service(
            contender.name,
            command,
            log=self._folder / f"{uuid4().hex}.log",
            environment={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": database.url,
                "CELERY_BROKER_URL": self.broker(number),
                **{name: str(value) for name, value in settings.items()},
            },
            folder=ROOT,
        )
        try:
            yield service
        finally:
            service.stop()

    @contextmanager
    def crew(
        self, contender: Contender, database: Database, *, children: int = 2, **settings: object
    ) -> Iterator[Crew]:
        """A contender whose worker runs and has done its first jobs; the database is as before.

        Args:
            contender: Who.
            database: Where its rows go.
            children: Processes of its pool.
            settings: More of the worker's environment.
        """
        with (
            self.queue() as (number, waiting),
            self.service(
                contender, contender.command(children), number, database, **settings
            ) as service,
        ):
            service.start()
            crew = Crew(
                contender,
                database,
                self.redis(number),
                service,
                self.broker(number),
                self.broker(waiting),
                self.redis(waiting),
            )
            try:
                for _ in range(max(_WARM_UP_JOBS, 2 * children)):
                    crew.time_one(GrantJob(uuid4().hex, database.interviews[:1]))
                yield crew
            except BenchmarkError as error:
                raise BenchmarkError(f"{error}{service.log_tail()}") from error
            finally:
                crew.close()
