"""Fixtures: the real servers out of the wheels, and databases on them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import make_url

from devstack.servers import LocalStack
from storage.schema import migrate
from tests.support.database import database
from tests.support.stores import MemoryStore, PostgresStore, Store, postgres_store


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """PostgreSQL and Valkey of this process's own, for the whole run."""
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


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    """An empty store: the reference model and PostgreSQL in turn."""
    if request.param == "memory":
        yield MemoryStore()
        return
    with postgres_store(request.getfixturevalue("_stores_url")) as store:
        yield store


@pytest.fixture
def postgres(migrated_url: str) -> Iterator[PostgresStore]:
    """PostgreSQL with a database of the test's own, which it may bend."""
    with postgres_store(migrated_url) as store:
        yield store


@pytest.fixture(scope="module")
def _stores_url(stack: LocalStack, _migrated: str) -> Iterator[str]:
    with database(stack.database_url, template=_migrated) as url:
        yield url
