"""A long-running producer: 100,000 jobs from one process. ``make soak`` runs it."""

from __future__ import annotations

import pytest

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS
from tests.support.floods import flood
from tests.support.producing import THREADS

ROUNDS, EACH = 5, 2_500  # 20,000 jobs in a round
MEGABYTE = 1_000_000


@pytest.mark.parametrize("kind", CLIENTS)
def test_100_000_jobs_leave_memory_and_connections_flat(stack: LocalStack, kind: str) -> None:
    """After 100,000 jobs the process has the memory and connections that it had after 20,000."""
    marks = flood(stack, kind, rounds=ROUNDS, each=EACH)
    print(f"\n{kind}, {THREADS} threads or tasks, 20 IDs in a job")  # noqa: T201 - the figures are the result
    for mark in marks:
        print(  # noqa: T201 - the figures are the result
            f"{mark.sent:>7,} sent, {mark.rate:,.0f}/s, RSS {mark.rss / MEGABYTE:.1f} MB,"
            f" {mark.connections} connections, {mark.subscriptions} subscriptions"
        )
    assert marks[-1].sent == 100_000
    assert marks[-1].rss - marks[0].rss < 3 * MEGABYTE
    assert {mark.subscriptions for mark in marks} == {0}
    assert max(mark.connections for mark in marks) <= THREADS + 1
