"""A site without a worker, and a client of its queue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from tests.support.workers import Site, migrated_site


@pytest.fixture(scope="module")
def shared_site(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site without a worker."""
    with migrated_site(stack, _migrated, 11) as one:
        yield one


@pytest.fixture
def client(here: Site) -> Iterator[InterviewAccessClient]:
    """A client of the site's queue."""
    with InterviewAccessClient(here.broker) as client:
        yield client
