"""Repeated upgrades and rollbacks under load; `make chaos` runs them."""

from __future__ import annotations

from pathlib import Path

from tests.faults.test_upgrade import INTERVIEWS, fleet
from tests.faults.upgrades import Fleet, drain, load, replace, start, until_working, verify
from tests.support.workers import Site

__all__ = ["fleet"]  # a fixture

CYCLES = 4


def test_repeated_upgrades_and_rollbacks(fleet: Fleet, idle: Site, tmp_path: Path) -> None:
    """Each job succeeds once while workers of two releases replace each other again and again."""
    ids = idle.store.add_interviews(INTERVIEWS)
    old = fleet.worker("old-1"), fleet.worker("old-2")
    new = fleet.worker("new-1", fleet.later), fleet.worker("new-2", fleet.later)
    with load(idle, ids) as sent:
        start(*old)
        until_working(*old)
        fleet.migrate(fleet.later)
        for _ in range(CYCLES):
            replace(old, new)
            replace(new, old)
    verify(idle, tmp_path, sent)
    drain(*old)
