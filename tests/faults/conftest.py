"""Servers of each test's own, which it may break; and a site on those that all tests share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from devstack.servers import LocalStack
from storage.schema import migrate
from tests.faults.books import Books
from tests.support.database import database
from tests.support.workers import Site, site
from worker.broker import claims

NUMBER = 10
"""Of the Redis database."""


@pytest.fixture(scope="session")
def _migrated_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("migrated") / "data"
    with LocalStack(data, durable=False) as stack:
        migrate(stack.database_url, report=lambda _: None)
    return data


@pytest.fixture
def servers(tmp_path: Path, _migrated_data: Path) -> Iterator[LocalStack]:
    """PostgreSQL with all tables and an empty Valkey, as safe as in production."""
    with LocalStack(Path(shutil.copytree(_migrated_data, tmp_path / "data"))) as stack:
        yield stack


@pytest.fixture
def results(tmp_path: Path, _migrated_data: Path) -> Iterator[LocalStack]:
    """More servers, for results that go to another Redis than the queue's."""
    data = shutil.copytree(_migrated_data, tmp_path / "results")
    with LocalStack(Path(data), durable=False) as stack:
        yield stack


@pytest.fixture
def books(servers: LocalStack) -> Iterator[Books]:
    """The books of a site on these servers."""
    with site(servers, servers.database_url, 0) as here:
        yield Books(here)


@pytest.fixture(scope="module")
def shared_site(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for all tests of one file."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, NUMBER) as one,
    ):
        yield one


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The same, with no job and no dead letter."""
    shared_site.redis.delete(claims.DEAD)
    shared_site.store.clear()
    return shared_site


@pytest.fixture
def ids(here: Site) -> list[str]:
    """Ten interviews."""
    return here.store.add_interviews(10)
