"""The long fuzzing run: `make fuzz`."""

from __future__ import annotations

import os
from pathlib import Path

from devstack.servers import LocalStack
from tests.faults import fuzzing
from tests.support.workers import site, worker

MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "200000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def test_many_messages_of_every_kind(stack: LocalStack, migrated_url: str, tmp_path: Path) -> None:
    """Two workers settle 200,000 messages of every kind, and do not end or leak memory."""
    with (
        site(stack, migrated_url, 12) as here,
        worker(here, tmp_path / "one.log", **fuzzing.SETTINGS) as one,
        worker(here, tmp_path / "other.log", **fuzzing.SETTINGS) as other,
    ):
        fuzzing.Run(here, [one, other], SEED).run(MESSAGES, report=print)
