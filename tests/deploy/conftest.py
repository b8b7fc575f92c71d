"""Fixtures: real servers with the roles and users of deploy/, and a worker that runs under them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.deploy.servers import WORKER, Servers, redis_with_users, roles_of
from tests.support.commands import run_module
from tests.support.database import database
from tests.support.workers import started, worker_service


@pytest.fixture(scope="module")
def servers(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """PostgreSQL and Redis with the files of deploy/ applied, and a worker under its own role."""
    folder = tmp_path_factory.mktemp("deploy")
    with (
        redis_with_users(folder) as port,
        database(stack.database_url) as url,
        roles_of(url) as apply,
    ):
        servers = Servers(url, port)
        migrated = run_module(servers.environment("owner", "worker"), "worker.cli", "migrate")
        assert migrated.returncode == 0, migrated.stderr
        apply()
        load_samples(url, len(NAMED_SAMPLES))
        environment = servers.environment("worker", "worker")
        with started(worker_service(folder / "worker.log", environment, name=WORKER)):
            assert servers.admin.acl_log() == []
            yield servers
        servers.admin.close()
