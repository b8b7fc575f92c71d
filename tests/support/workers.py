"""Sites: a queue and a database with a stock Celery producer; real workers on them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from celery import Celery
from redis import Redis
from sqlalchemy import text

from devstack.servers import LocalStack
from devstack.service import Service
from tests.support.database import connected, database
from tests.support.stores import Background, PostgresStore, postgres_store, until

ROOT = Path(__file__).parents[2]
QUEUE = "interview-access"
GRANT_ACCESS = "interview_access.grant_access"


class Site:
    """A queue and a database, used and read from outside of the worker.

    Attributes:
        store: The database.
        broker: The URL of the queue and the results.
        redis: A client of this Redis database.
        producer: A stock Celery app that sends messages.
    """

    def __init__(self, stack: LocalStack, store: PostgresStore, number: int) -> None:
        """Empty the Redis database with this number, and use it."""
        self.store = store
        self.broker = f"{stack.broker_url}?virtual_host={number}"
        self.redis = Redis(
            unix_socket_path=stack.broker_url.removeprefix("redis+socket://"), db=number
        )
        self.redis.flushdb()
        self.producer = Celery(broker=self.broker, backend=self.broker, set_as_current=False)

    def environment(self, **settings: object) -> dict[str, str]:
        """Return the environment of a worker or a command; only PATH is inherited."""
        return {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": self.store.database_url,
            "CELERY_BROKER_URL": self.broker,
            **{name: str(value) for name, value in settings.items()},
        }

    def send(
        self, /, *args: object, task: str = GRANT_ACCESS, job_id: str = "", **kwargs: Any
    ) -> str:
        """Send a message as any Celery app does, and return its job ID."""
        job_id = job_id or str(uuid4())
        self.producer.send_task(task, args=args, kwargs=kwargs, task_id=job_id, queue=QUEUE)
        return job_id

    def push(self, kwargs: object, *, job_id: str, embed: object = None, queue: str = QUEUE) -> str:
        """Push a message to a list as a bare Redis client does, and return its job ID."""
        nothing = {"callbacks": None, "errbacks": None, "chain": None}
        body = json.dumps([[], kwargs, nothing if embed is None else embed])
        envelope = {
            "body": body,
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "headers": {"lang": "sh", "task": GRANT_ACCESS, "id": job_id, "root_id": job_id},
            "properties": {
                "correlation_id": job_id,
                "delivery_mode": 2,
                "delivery_tag": str(uuid4()),
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
            },
        }
        self.redis.lpush(queue, json.dumps(envelope))
        return job_id

    def meta(self, job_id: str) -> dict[str, Any]:
        """Return the stored state and result, as a poller reads them."""
        stored: Any = self.redis.get(f"celery-task-meta-{job_id}")
        return dict(json.loads(stored)) if stored else {"status": "PENDING"}

    def until_state(self, job_id: str, *states: str) -> dict[str, Any]:
        """Wait until the job is in one of the states, and return its state and result."""
        until(lambda: self.meta(job_id)["status"] in states)
        return self.meta(job_id)

    def answer(self, job_id: str) -> dict[str, Any]:
        """Wait until the job has finished, and return its state and result."""
        return self.until_state(job_id, "SUCCESS", "FAILURE")

    def dead_letters(self) -> list[dict[str, str]]:
        """Return the dead letters."""
        entries: Any = self.redis.xrange("interview-access:dead")
        return [{key.decode(): value.decode() for key, value in one.items()} for _, one in entries]


@contextmanager
def site(stack: LocalStack, database_url: str, number: int) -> Iterator[Site]:
    """A site on a database with all tables."""
    with postgres_store(database_url) as store:
        here = Site(stack, store, number)
        yield here
        # Garbage-collected results unsubscribe, perhaps after the server has ended.
        here.producer.backend.result_consumer.subscribed_to.clear()
        here.redis.close()


@contextmanager
def migrated_site(stack: LocalStack, template: str, number: int) -> Iterator[Site]:
    """A site on a new database with all tables.

    Args:
        stack: The servers.
        template: Name of a database with all tables, to which nobody is connected.
        number: Number of the Redis database, which is emptied.
    """
    with (
        database(stack.database_url, template=template) as url,
        site(stack, url, number) as here,
    ):
        yield here


@contextmanager
def held_grant(here: Site, user_id: str, interview_id: str) -> Iterator[None]:
    """An uncommitted grant of another transaction: a job that creates it waits within the block."""
    with connected(here.store.database_url) as other:
        other.execute(
            text(
                "INSERT INTO interview_userinterviewaccess (user_id, interview_id)"
                " VALUES (:user_id, CAST(:interview_id AS uuid))"
            ),
            {"user_id": user_id, "interview_id": interview_id},
        )
        yield


@contextmanager
def ledger_missing(here: Site) -> Iterator[None]:
    """An outage of the ledger: its table is renamed within the block."""
    here.store.execute("ALTER TABLE grant_access_job RENAME TO grant_access_job_away")
    try:
        yield
    finally:
        here.store.execute("ALTER TABLE grant_access_job_away RENAME TO grant_access_job")


@contextmanager
def events(here: Site) -> Iterator[list[dict[str, Any]]]:
    """The events that the site's workers send within the block, as Flower receives them."""
    received: list[dict[str, Any]] = []
    with here.producer.connection_for_read() as connection:
        receiver = here.producer.events.Receiver(connection, handlers={"*": received.append})
        listener = Background(lambda: receiver.capture(limit=None, timeout=None, wakeup=True))
        try:
            until(lambda: bool(received))  # a worker's heartbeat: no later event is missed
            yield received
        finally:
            receiver.should_stop = True
            listener.result()


def worker_service(
    log: Path,
    environment: Mapping[str, str],
    *,
    app: str = "worker",
    processes: int = 2,
    name: str = "",
    prefix: Sequence[str] = (),
    options: Sequence[str] = (),
    folder: Path = ROOT,
) -> Service:
    """Return the service of a worker, which is not started yet.

    Args:
        log: The worker's log file.
        environment: The worker's complete environment.
        app: The module of its app.
        processes: Number of its pool processes.
        name: Its node name; chosen by Celery, unless given.
        prefix: A command that runs the worker's command.
        options: More options of Celery's command.
        folder: The folder of the release that the worker runs.
    """
    return Service(
        name or "worker",
        [
            *(*prefix, sys.executable, "-m", "celery", "-A", app, "worker", "-c", str(processes)),
            *("-l", "INFO", "--without-mingle"),  # mingling takes a second at each start
            *(("-n", name) if name else ()),
            *options,
        ],
        log=log,
        environment=environment,
        folder=folder,
    )


def is_ready(worker: Service) -> bool:
    """Whether the worker runs, and has logged that it is ready."""
    return worker.alive and b" ready." in worker.log.read_bytes()


@contextmanager
def started(service: Service) -> Iterator[Service]:
    """Start a worker, wait until it is ready, and stop it at the end of the block."""
    service.start()
    try:
        until(lambda: is_ready(service) or not service.alive)
        assert service.alive, service.log_tail()
        yield service
    finally:
        service.stop()


@contextmanager
def worker(here: Site, log: Path, **settings: object) -> Iterator[Service]:
    """A ready worker of two pool processes; the setting ``APP`` names its module."""
    app = str(settings.pop("APP", "worker"))
    with started(worker_service(log, here.environment(**settings), app=app)) as service:
        yield service


@contextmanager
def site_with_worker(
    stack: LocalStack, template: str, number: int, folder: Path, **settings: object
) -> Iterator[Site]:
    """A site with a database of its own and a worker.

    Args:
        stack: The servers.
        template: Name of the database that is copied.
        number: Number of the Redis database.
        folder: Where the worker logs.
        settings: Environment variables of the worker.
    """
    with (
        migrated_site(stack, template, number) as here,
        worker(here, folder / "worker.log", **settings),
    ):
        yield here
