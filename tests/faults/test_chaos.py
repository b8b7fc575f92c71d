"""A short chaos run; `make chaos` runs 1,000 faults."""

from __future__ import annotations

from tests.faults import chaos


def test_invariants_hold_whatever_fails() -> None:
    """The invariants hold after faults of random kinds at random stages."""
    lines: list[str] = []
    chaos.run(seed=2, faults=10, jobs=40, report=lines.append)
    assert lines[-1].startswith("the invariants hold")
