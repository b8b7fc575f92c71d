"""Fixtures: real servers from wheels, databases on them, stores and sites."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import uuid4

import pytest
from sqlalchemy import make_url

from devstack.servers import LocalStack
from storage.samples import load_samples
from storage.schema import migrate
from tests.support.database import database
from tests.support.stores import (
    BULK_THRESHOLD,
    MemoryStore,
    PostgresStore,
    Store,
    postgres_store,
)
from tests.support.workers import Site, site

SAMPLES = 30
"""Number of sample interviews."""
IDLE_NUMBER = 3
"""Number of the Redis database of ``idle``."""


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """PostgreSQL and Valkey for all tests of this process."""
    with LocalStack(tmp_path_factory.mktemp("stack"), durable=False) as stack:
        yield stack


@pytest.fixture
def database_url(stack: LocalStack) -> Iterator[str]:
    """The URL of a new, empty database."""
    with database(stack.database_url) as url:
        yield url


@pytest.fixture(scope="session")
def _migrated(stack: LocalStack) -> Iterator[str]:
    with database(stack.database_url) as url:
        migrate(url, report=lambda _: None)
        yield make_url(url).database or ""


@pytest.fixture
def migrated_url(stack: LocalStack, _migrated: str) -> Iterator[str]:
    """The URL of a new database with all tables and no rows."""
    with database(stack.database_url, template=_migrated) as url:
        yield url


@pytest.fixture
def bulk_threshold() -> int:
    """Number of grants from which PostgreSQL gets statements for many; tests override it."""
    return BULK_THRESHOLD


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest, bulk_threshold: int) -> Iterator[Store]:
    """An empty store: the reference model and PostgreSQL in turn."""
    if request.param == "memory":
        yield MemoryStore()
        return
    url = request.getfixturevalue("_stores_url")
    with postgres_store(url, bulk_threshold=bulk_threshold) as store:
        yield store


@pytest.fixture
def postgres_url(migrated_url: str) -> str:
    """The URL of the database of ``postgres``. A file that keeps its schema overrides it."""
    return migrated_url


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[PostgresStore]:
    """A PostgreSQL store without rows, on the database ``postgres_url``."""
    with postgres_store(postgres_url) as store:
        yield store


@pytest.fixture
def idle(stack: LocalStack, idle_url: str) -> Iterator[Site]:
    """A site without a worker, which has no rows and no keys at the start of each test."""
    with site(stack, idle_url, IDLE_NUMBER) as idle:
        yield idle


@pytest.fixture(scope="module")
def idle_url(_stores_url: str) -> str:
    """The URL of the database of ``idle``. A file whose tests change its tables overrides it."""
    return _stores_url


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """The IDs of sample interviews on the site ``here`` of the test's file, sorted."""
    return sorted(load_samples(here.store.database_url, SAMPLES))


@pytest.fixture
def user() -> str:
    """A user ID that no other test uses."""
    return str(uuid4())


@pytest.fixture(scope="module")
def _stores_url(stack: LocalStack, _migrated: str) -> Iterator[str]:
    with database(stack.database_url, template=_migrated) as url:
        yield url
