"""Ablations: with one mechanism disabled a chaos run reports a violated invariant."""

from __future__ import annotations

import pytest

from tests.faults import chaos


@pytest.mark.parametrize("without", ["claims", "takeover", "ledger"])
def test_invariants_fail(without: str) -> None:
    """A run fails if claims are lost, if leases never expire, or without the ledger."""
    with pytest.raises(AssertionError, match=r"never finished|is lost|counted|SUCCESS|FAILURE"):
        chaos.run(seed=5, faults=40, jobs=200, without=without, report=lambda _: None)
