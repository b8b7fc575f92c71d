"""The servers of a run, and the databases, queues and deployments on them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from interview_access.contracts import GrantJob
from psycopg import sql
from redis import Redis

from benchmarks.baselines import plain_url
from benchmarks.contenders import Contender
from benchmarks.database import Database
from benchmarks.deployment import Deployment
from benchmarks.measuring import BenchmarkError
from devstack.servers import LocalStack
from devstack.service import Service
from storage.samples import load_samples
from storage.schema import migrate

ROOT = Path(__file__).parent.parent
_WARM_UP_JOBS = 8  # enough that each of two pool processes has executed one


@dataclass(frozen=True, slots=True)
class Servers:
    """Existing servers.

    Attributes:
        database_url: URL in SQLAlchemy's form, of a user who may create databases.
        broker_url: URL in Celery's form; its databases 0 to 15 must be empty, and are afterwards.
    """

    database_url: str
    broker_url: str


class Bench:
    """The servers and the sizes of a whole run.

    Args:
        servers: The servers.
        folder: For the workers' logs.
        runs: Number of samples of each variant.
        scale: A factor on all sizes.
        quick: Whether parts omit variants that take long or need other packages.
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
        """Scale a size."""
        return max(1, round(full * self.scale))

    @contextmanager
    def database(self, interviews: int) -> Iterator[Database]:
        """A database with so many interviews, which is dropped at the end."""
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
        """Return a client of a Redis database."""
        return Redis.from_url(self.redis_url(number))

    def redis_url(self, number: int) -> str:
        """Return the URL of a Redis database in redis-py's form."""
        parts = urlsplit(self.servers.broker_url)
        if parts.scheme == "redis+socket":
            return f"unix://{parts.path}?db={number}"
        return self.broker(number)

    def broker(self, number: int) -> str:
        """Return the URL of a Redis database in Celery's form."""
        parts = urlsplit(self.servers.broker_url)
        if parts.scheme == "redis+socket":
            return f"{parts.scheme}://{parts.path}?virtual_host={number}"
        return parts._replace(path=f"/{number}").geturl()

    @contextmanager
    def queue(self) -> Iterator[tuple[int, int]]:
        """The numbers of two empty Redis databases: for a queue, and for staged messages.

        Raises:
            BenchmarkError: if they are not empty.
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
        """A contender's worker, which the caller starts; it is stopped at the end."""
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
    def deploy(
        self, contender: Contender, database: Database, *, processes: int = 2, **settings: object
    ) -> Iterator[Deployment]:
        """A contender with a running worker that has executed some jobs.

        Args:
            contender: The contender.
            database: The database of its grants.
            processes: Number of processes of its pool.
            settings: Further environment variables of the worker.
        """
        with (
            self.queue() as (number, waiting),
            self.service(
                contender, contender.command(processes), number, database, **settings
            ) as service,
        ):
            service.start()
            deployment = Deployment(
                contender,
                database,
                self.redis(number),
                service,
                self.broker(number),
                self.broker(waiting),
                self.redis(waiting),
            )
            try:
                for _ in range(max(_WARM_UP_JOBS, 2 * processes)):
                    deployment.time_one(GrantJob(uuid4().hex, database.interviews[:1]))
                yield deployment
            except BenchmarkError as error:
                raise BenchmarkError(f"{error}{service.log_tail()}") from error
            finally:
                deployment.close()
