"""The chaos finds what is broken: with one ground of the promises gone an invariant fails."""

from __future__ import annotations

import pytest

from tests.faults import chaos


@pytest.mark.parametrize("without", ["claims", "takeover", "ledger"])
def test_invariants_fail(without: str) -> None:
    """Claims that Redis forgets, leases that never expire, no ledger: each is noticed."""
    with pytest.raises(AssertionError, match=r"never finished|is lost|counted|SUCCESS|FAILURE"):
        chaos.run(seed=5, faults=40, jobs=200, without=without, report=lambda _: None)
