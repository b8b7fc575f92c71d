"""How jobs that were claimed at once are shared out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import pytest

from worker.coalescing import divided


@dataclass
class Claimed:
    """What `divided` looks at of a request; it may be past its time at the second look."""

    receipt: str
    looks: Iterator[bool]
    task: Any

    @property
    def is_plain(self) -> bool:
        """As it is at this look."""
        return next(self.looks)

    @property
    def receipts(self) -> tuple[str]:
        """Of its one message."""
        return (self.receipt,)


def claimed(count: int, *looks: bool) -> list[Any]:
    """Requests for tasks in turn."""
    tasks = [SimpleNamespace(name="grant"), SimpleNamespace(name="attempt")]
    return [Claimed(str(number), cycle(looks), tasks[number % 2]) for number in range(count)]


@pytest.mark.parametrize("looks", [(True,), (False,), (True, False), (False, True)])
@pytest.mark.parametrize("children", [1, 2, 5])
def test_each_job_is_in_one_piece(looks: tuple[bool, ...], children: int) -> None:
    """Whatever a job is at a second look, it is in just one piece, and pieces are few."""
    requests = claimed(7, *looks)
    pieces = divided(requests, children, lambda _: None)
    receipts = sorted(receipt for piece in pieces for receipt in piece.receipts)
    assert receipts == sorted(request.receipt for request in requests)
