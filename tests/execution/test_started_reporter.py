"""The started reporter: work that takes long is reported once, short work never."""

from __future__ import annotations

from queue import Empty, SimpleQueue

import pytest

from tasks.started_reporter import StartedReporter
from tests.support.stores import until


def test_long_work_is_reported_once() -> None:
    """Long work is reported while it runs, and only once."""
    reports: SimpleQueue[str] = SimpleQueue()
    with StartedReporter().reporting(lambda: reports.put("first")):
        assert reports.get(timeout=10) == "first"
        with pytest.raises(Empty):
            reports.get(timeout=1)


def test_short_work_is_not_reported() -> None:
    """Short work is not reported, also not with the next work."""
    reports: SimpleQueue[str] = SimpleQueue()
    reporter = StartedReporter()
    for _ in range(1_000):
        with reporter.reporting(lambda: reports.put("soon")):
            pass
    with reporter.reporting(lambda: reports.put("late")):
        assert reports.get(timeout=10) == "late"
    assert reports.empty()


def test_failed_work_is_not_reported() -> None:
    """The error of failed work propagates, and the work is not reported later."""
    reports: SimpleQueue[str] = SimpleQueue()
    reporter = StartedReporter()
    with pytest.raises(KeyError), reporter.reporting(lambda: reports.put("failed")):
        raise KeyError
    with reporter.reporting(lambda: reports.put("next")):
        assert reports.get(timeout=10) == "next"
    assert reports.empty()


def test_work_after_an_idle_time_is_reported() -> None:
    """Work that begins while the reporter's thread is idle is reported."""
    reports: SimpleQueue[str] = SimpleQueue()
    reporter = StartedReporter()
    until(lambda: reporter._is_idle)
    with reporter.reporting(lambda: reports.put("late")):
        assert reports.get(timeout=10) == "late"
