"""Fixtures of the tests of Flower."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devstack.servers import LocalStack
from tests.flower.scene import Scene, scene


@pytest.fixture(scope="module")
def shown(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    """Flower and a job of each state."""
    with scene(stack, _migrated, 5, tmp_path_factory.mktemp("flower")) as shown:
        yield shown
