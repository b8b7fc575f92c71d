"""The origin of a job, read from what a producer sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from storage.dtos import AccessRequestDTO, AuditDTO
from storage.memory import MemoryStorage
from tasks.audit import audit_of_attempt, read_time
from tasks.relay import relay
from tests.storage.transactions import a_request


def nothing(_: Sequence[str]) -> Sequence[str]:
    """Find no announcement."""
    return ()


def never(_: AccessRequestDTO) -> bool:
    """Refuse to send."""
    raise AssertionError("a request was sent")


def test_a_request_that_is_too_large_has_its_origin() -> None:
    """The failure of a request that is never enqueued has its time, actor and reason."""
    storage = MemoryStorage()
    request = a_request("a")
    headers = '{"actor": "hr", "reason": "a\\u0007"}'
    storage.add_request(replace(request, interview_ids=("x" * 33_000_000,), headers=headers))
    relay(storage, nothing, never)
    finished = storage.get_finished_job("a")
    assert finished
    assert finished.outcome.state == "failed"
    expected = AuditDTO(requested_at=request.requested_at, actor="hr", reason="a\\x07")
    assert finished.job.audit == expected


def test_a_long_node_name_is_cut() -> None:
    """A node name of any length and content is kept as far as it fits."""
    known = audit_of_attempt("a", {}, attempts=1, worker="\ud800" + "w" * 300)
    assert known.worker == ("\\ud800" + "w" * 300)[:255]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("2026-01-02T03:04:05+02:00", datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)),
        ("2026-01-02 03:04:05", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)),
        ("0001-01-01T00:00:00+23:00", None),
        ("9999-12-31T23:59:59-23:00", None),
        ("soon", None),
        ("", None),
        (1_767_000_000, None),
        (None, None),
        ({}, None),
    ],
)
def test_a_time_is_read_or_ignored(given: object, read: datetime | None) -> None:
    """A time in ISO 8601 is UTC unless it has a zone; any other value is not a time."""
    assert read_time(given) == read
