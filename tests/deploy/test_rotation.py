"""Passwords that change while workers run: by the steps of docs/operations.md, and without them."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError
from redis.retry import Retry
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES
from tests.deploy.servers import Servers, deployed, password_of
from tests.faults.workers import PATIENT, success
from tests.support.database import connected
from tests.support.stores import Background, until
from tests.support.workers import ROOT, started, worker_service

PAGE = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
ROLE, NEXT_ROLE = "interview_access_worker", "interview_access_worker_b"
OLD, NEW = "old-password", "new-password"


def blocks(heading: str, language: str) -> list[str]:
    """Return the blocks of the page in one language under one heading."""
    under = PAGE.partition(f"\n### {heading}\n")[2].partition("\n##")[0]
    found: list[str] = re.findall(
        rf"^ *```{language}\n(.*?)^ *```$", under, re.DOTALL | re.MULTILINE
    )
    return found


@pytest.fixture(scope="module")
def servers(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Servers with the files of deploy/ applied, that ask workers for passwords."""
    rules = stack.data / "postgres/pg_hba.conf"
    former = rules.read_text(encoding="ascii")
    with deployed(stack, tmp_path_factory.mktemp("rotation")) as servers:
        rules.write_text(f"local all {ROLE},{NEXT_ROLE} scram-sha-256\n{former}", encoding="ascii")
        execute(servers, "SELECT pg_reload_conf()")
        yield servers
        rules.write_text(former, encoding="ascii")
        execute(servers, "SELECT pg_reload_conf()", f"DROP ROLE IF EXISTS {NEXT_ROLE}")


@pytest.fixture(autouse=True)
def _old_passwords(servers: Servers) -> None:
    """Give role and user their old passwords."""
    execute(servers, f"ALTER ROLE {ROLE} LOGIN PASSWORD '{OLD}'")
    redis_cli(servers, f"ACL SETUSER worker resetpass >{OLD}")


def execute(servers: Servers, *statements: str) -> None:
    """Execute statements as the superuser."""
    with connected(servers.database_url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(text(statement))


def redis_cli(servers: Servers, commands: str) -> None:
    """Send lines to Redis as its administrator."""
    send: Any = servers.admin.execute_command
    for line in commands.splitlines():
        send(*line.split())


def cut_connections(servers: Servers) -> None:
    """Close the connections of workers to both servers."""
    cut_connections_to_postgresql(servers)
    servers.admin.client_kill_filter(user="worker")


def cut_connections_to_postgresql(servers: Servers) -> None:
    """Close the connections of workers to PostgreSQL."""
    with connected(servers.database_url, autocommit=True) as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE usename IN (:role, :next_role)"
            ),
            {"role": ROLE, "next_role": NEXT_ROLE},
        )


def environment(servers: Servers, password: str, role: str = ROLE) -> dict[str, str]:
    """Return the environment of a worker with a role and a password of both servers."""
    url = make_url(servers.database_url).set(username=role, password=password)
    redis = servers.redis("worker").replace(password_of("worker"), password)
    return {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": url.render_as_string(hide_password=False),
        "CELERY_BROKER_URL": redis,
        **{name: str(value) for name, value in PATIENT.items()},
    }


class Load:
    """A producer that sends jobs within a block.

    Attributes:
        sent: The IDs of its jobs.
    """

    def __init__(self, servers: Servers) -> None:
        """Send nothing yet; see :meth:`sending`."""
        self.sent: list[str] = []
        self._servers = servers
        self._is_over = False

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Send jobs within the block; fails if one is refused."""
        thread = Background(self._send)
        try:
            yield
        finally:
            self._is_over = True
            thread.result()

    def until_next(self) -> None:
        """Wait until another job is sent, and has its result."""
        number = len(self.sent)
        until(lambda: len(self.sent) > number)
        self.wait(self.sent[number : number + 1])

    def wait(self, job_ids: Sequence[str]) -> None:
        """Wait until jobs have succeeded, each with the grants of its own user."""
        with closing(self._client()) as client:
            for job_id in job_ids:
                assert client.wait(job_id, timeout=60) == success(len(NAMED_SAMPLES))

    def _client(self) -> InterviewAccessClient:
        return InterviewAccessClient(self._servers.redis("producer"))

    def _send(self) -> None:
        with closing(self._client()) as client:
            while not self._is_over:
                self.sent.append(client.enqueue(str(uuid4()), NAMED_SAMPLES))
                time.sleep(0.01)  # a hundred jobs a second at most


@pytest.fixture
def load(servers: Servers) -> Load:
    """A producer."""
    return Load(servers)


def test_the_steps_of_the_page(servers: Servers, load: Load, tmp_path: Path) -> None:
    """New credentials, a rolling restart, the end of the old ones: under load no job fails."""
    new_role, end_of_role = blocks("The password of PostgreSQL", "sql")
    new_password, end_of_password = blocks("The password of Redis", "redis")
    old = worker_service(tmp_path / "old.log", environment(servers, OLD), name="old@here")
    new = worker_service(
        tmp_path / "new.log", environment(servers, NEW, NEXT_ROLE), name="new@here"
    )
    with load.sending(), ExitStack() as leaving:
        with started(old):
            load.until_next()
            execute(servers, new_role)
            redis_cli(servers, new_password)
            cut_connections(servers)
            load.until_next()
            leaving.enter_context(started(new))
        execute(servers, end_of_role)
        redis_cli(servers, end_of_password)
        cut_connections(servers)
        load.until_next()
        load.wait(load.sent)
    former = environment(servers, OLD)
    with pytest.raises(OperationalError), connected(former["DATABASE_URL"]):
        pass
    with (
        Redis.from_url(former["CELERY_BROKER_URL"], retry=Retry(NoBackoff(), 0)) as redis,
        pytest.raises(AuthenticationError),
    ):
        redis.ping()


def test_passwords_that_changed_before_the_restart(
    servers: Servers, load: Load, tmp_path: Path
) -> None:
    """Open connections stay. Without them the worker waits, and its successor executes the jobs."""
    log = tmp_path / "old.log"
    with load.sending():
        # Its one pool process has connected once a job is done.
        with started(worker_service(log, environment(servers, OLD), processes=1)) as old:
            load.until_next()
            execute(servers, f"ALTER ROLE {ROLE} PASSWORD '{NEW}'")
            load.until_next()
            cut_connections_to_postgresql(servers)
            until(lambda: b"circuit open" in log.read_bytes())
            # A worker may open a connection to Redis at any time, so nothing is expected of it now.
            redis_cli(servers, f"ACL SETUSER worker resetpass >{NEW}")
            servers.admin.client_kill_filter(user="worker")
            until(lambda: b"Cannot connect to redis" in log.read_bytes())
            assert old.alive
        with started(worker_service(tmp_path / "new.log", environment(servers, NEW))):
            load.until_next()
            load.wait(load.sent)


def test_a_password_file_is_read_at_each_connection(
    servers: Servers, load: Load, tmp_path: Path
) -> None:
    """After a new password has been written to the file, the worker connects, without a restart."""
    file, log = tmp_path / "passwords", tmp_path / "worker.log"

    def write(password: str) -> None:
        file.touch(mode=0o600)
        file.write_text(f"*:*:*:{ROLE}:{password}\n", encoding="ascii")

    write(OLD)
    url = make_url(servers.database_url).set(username=ROLE)
    url = url.update_query_dict({"passfile": str(file)})
    variables = environment(servers, OLD) | {"DATABASE_URL": url.render_as_string()}
    with load.sending(), started(worker_service(log, variables)) as service:
        load.until_next()
        execute(servers, f"ALTER ROLE {ROLE} PASSWORD '{NEW}'")
        cut_connections_to_postgresql(servers)
        until(lambda: b"circuit open" in log.read_bytes())
        write(NEW)
        load.until_next()
        load.wait(load.sent)
        assert service.alive
