"""Fixtures: a site without a worker for all tests of one file."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devstack.servers import LocalStack
from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.workers import Site, migrated_site


@pytest.fixture(scope="module")
def here(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site without a worker."""
    with migrated_site(stack, _migrated, 14) as here:
        load_samples(here.store.database_url, len(NAMED_SAMPLES))
        yield here
