"""Fixtures: real servers with the roles and users of deploy/, and a worker that runs under them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devstack.servers import LocalStack
from tests.deploy.servers import WORKER, Servers, deployed
from tests.support.workers import started, worker_service


@pytest.fixture(scope="module")
def servers(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """PostgreSQL and Redis with the files of deploy/ applied, and a worker under its own role."""
    folder = tmp_path_factory.mktemp("deploy")
    with deployed(stack, folder) as servers:
        environment = servers.environment("worker", "worker")
        with started(worker_service(folder / "worker.log", environment, name=WORKER)):
            assert servers.admin.acl_log() == []
            yield servers
