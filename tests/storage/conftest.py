"""Fixtures of the migration tests: an empty database, and the platform's service on it."""

from __future__ import annotations

import pytest

from tests.support.platform import Database, DjangoService


@pytest.fixture
def database(database_url: str) -> Database:
    """An empty database."""
    return Database(database_url)


@pytest.fixture
def service(database: Database) -> DjangoService:
    """The platform's service, with tables created by its own migrations."""
    django = DjangoService(database)
    django.manage("migrate", "--verbosity", "0")
    return django
