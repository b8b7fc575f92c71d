"""A site for the tests of one file, and what each begins with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.database import database
from tests.workers import Site, site
from worker import claims
from worker.local_stack import LocalStack

NUMBER = 10


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site for all tests of this file; each brings its workers."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, NUMBER) as one,
    ):
        yield one


@pytest.fixture(autouse=True)
def _afresh(here: Site) -> None:
    here.redis.delete(claims.DEAD)
    here.store.clear()


@pytest.fixture
def ids(here: Site) -> list[str]:
    """Ten interviews."""
    return here.store.add_interviews(10)
