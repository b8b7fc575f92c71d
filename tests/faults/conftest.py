"""Fixtures: servers that one test may break, and a site that the tests of one file share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from devstack.servers import LocalStack
from storage.schema import migrate
from tests.faults.backups import Backup
from tests.faults.gates import Relays
from tests.faults.workers import relayed_worker
from tests.faults.workload import Workload
from tests.support.workers import Site, migrated_site, site
from worker.broker import claims

NUMBER = 10
"""Number of the shared site's Redis database."""


@pytest.fixture(scope="session")
def _migrated_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("migrated") / "data"
    with LocalStack(data, durable=False) as stack:
        migrate(stack.database_url, report=lambda _: None)
    return data


@pytest.fixture
def servers(tmp_path: Path, _migrated_data: Path) -> Iterator[LocalStack]:
    """PostgreSQL with all tables and an empty Redis, both as durable as in production."""
    with LocalStack(Path(shutil.copytree(_migrated_data, tmp_path / "data"))) as stack:
        yield stack


@pytest.fixture
def result_servers(tmp_path: Path, _migrated_data: Path) -> Iterator[LocalStack]:
    """A second stack, whose Redis stores results."""
    data = shutil.copytree(_migrated_data, tmp_path / "results")
    with LocalStack(Path(data), durable=False) as stack:
        yield stack


@pytest.fixture
def workload(servers: LocalStack) -> Iterator[Workload]:
    """Jobs for workers on these servers."""
    with site(servers, servers.database_url, 0) as here:
        yield Workload(here)


@pytest.fixture
def backup(servers: LocalStack, tmp_path: Path) -> Backup:
    """A backup of the servers, which is not taken yet."""
    return Backup(servers, tmp_path)


@pytest.fixture(scope="module")
def shared_site(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for all tests of one file."""
    with migrated_site(stack, _migrated, NUMBER) as one:
        yield one


@pytest.fixture(scope="module")
def relays(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relays]:
    """The relays of a worker that all tests of one file share."""
    with relayed_worker(shared_site, tmp_path_factory.mktemp("relayed")) as (relays, _):
        yield relays


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The shared site, without jobs and dead letters."""
    shared_site.redis.delete(claims.DEAD)
    shared_site.store.clear()
    return shared_site


@pytest.fixture
def ids(here: Site) -> list[str]:
    """The IDs of ten interviews."""
    return here.store.add_interviews(10)
