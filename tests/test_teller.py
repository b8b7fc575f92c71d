"""Work that does not end soon is told of, once."""

from __future__ import annotations

from queue import Empty, SimpleQueue

import pytest

from tasks.teller import Teller


def test_what_goes_on_is_told_once() -> None:
    """Work is told of while it goes on, and not again however long it does."""
    told: SimpleQueue[str] = SimpleQueue()
    with Teller().told(lambda: told.put("first")):
        assert told.get(timeout=10) == "first"
        with pytest.raises(Empty):
            told.get(timeout=1)


def test_what_has_ended_is_not_told() -> None:
    """Of work that ended soon nothing is told, also while the next goes on, which is."""
    told: SimpleQueue[str] = SimpleQueue()
    teller = Teller()
    for _ in range(1_000):
        with teller.told(lambda: told.put("soon")):
            pass
    with teller.told(lambda: told.put("late")):
        assert told.get(timeout=10) == "late"
    assert told.empty()


def test_work_that_fails_is_not_told() -> None:
    """Its error passes, and nothing is told of it later."""
    told: SimpleQueue[str] = SimpleQueue()
    teller = Teller()
    with pytest.raises(KeyError), teller.told(lambda: told.put("failed")):
        raise KeyError
    with teller.told(lambda: told.put("next")):
        assert told.get(timeout=10) == "next"
    assert told.empty()
