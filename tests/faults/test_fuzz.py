"""A short fuzzing run; `make fuzz` sends 200,000 messages."""

from __future__ import annotations

from pathlib import Path

from devstack.servers import LocalStack
from tests.faults import fuzzing
from tests.support.workers import site, worker


def test_messages_of_every_kind(stack: LocalStack, migrated_url: str, tmp_path: Path) -> None:
    """A worker settles 2,000 messages of every kind, and does not end or leak memory."""
    with (
        site(stack, migrated_url, 12) as here,
        worker(here, tmp_path / "worker.log", **fuzzing.SETTINGS) as service,
    ):
        fuzzing.Run(here, [service], seed=1).run(2_000)
