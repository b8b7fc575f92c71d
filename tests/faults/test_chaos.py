"""A short run of the chaos; `make chaos` runs it for long."""

from __future__ import annotations

from tests.faults import chaos


def test_invariants_hold_whatever_fails() -> None:
    """After faults of random kinds at random stages every job is accounted for."""
    told: list[str] = []
    chaos.run(seed=2, faults=10, jobs=40, report=told.append)
    assert told[-1].startswith("the invariants hold")
