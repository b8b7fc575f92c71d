"""Fixtures for pytest, which finds this plugin by its entry point.

The modules of the test kit are imported by the fixtures that need them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from interview_access.testing import (
        AsyncFakeClient,
        AsyncInlineClient,
        FakeClient,
        InlineClient,
    )


@pytest.fixture
def interview_access_client() -> FakeClient:
    """A blocking client that keeps what was enqueued."""
    from interview_access.testing import FakeClient  # noqa: PLC0415 - costs time only if it is used

    return FakeClient()


@pytest.fixture
def interview_access_async_client() -> AsyncFakeClient:
    """An asyncio client that keeps what was enqueued."""
    from interview_access.testing import AsyncFakeClient  # noqa: PLC0415 - likewise

    return AsyncFakeClient()


@pytest.fixture
def interview_access_inline_client() -> InlineClient:
    """A blocking client that executes jobs in memory; add_interviews adds the interviews."""
    from interview_access.testing import InlineClient  # noqa: PLC0415 - likewise

    return InlineClient()


@pytest.fixture
def interview_access_async_inline_client() -> AsyncInlineClient:
    """An asyncio client that executes jobs in memory; add_interviews adds the interviews."""
    from interview_access.testing import AsyncInlineClient  # noqa: PLC0415 - likewise

    return AsyncInlineClient()


@pytest.fixture
def interview_access_captured() -> Iterator[FakeClient]:
    """A client that receives, while the test runs, the calls of every client of the process."""
    from interview_access.testing import capture_enqueued  # noqa: PLC0415 - likewise

    with capture_enqueued() as client:
        yield client
