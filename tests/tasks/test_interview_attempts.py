"""The use case of interview attempts, on the reference model and on PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from interview_access.errors import InvalidGrantRequestException, InvalidInterviewIdException

from tasks.celery_tasks import interview_attempt_job
from tasks.interview_attempts import InterviewAttemptInteractor
from tasks.ledger import JobResult
from tasks.outcomes import result_of
from tests.support.stores import Store, an_interview


def create_attempt(store: Store, job_id: str, user_id: object, interview_id: object) -> JobResult:
    """Execute one job that creates an attempt."""
    job = interview_attempt_job(job_id, (), {"user_id": user_id, "interview_id": interview_id})
    (result,) = InterviewAttemptInteractor(store.storage).create_interview_attempt([job])
    return result


@pytest.mark.parametrize(
    ("configured", "ends"), [(True, True), (True, False), (False, True)], ids=str
)
def test_an_attempt_starts_now(store: Store, configured: bool, ends: bool) -> None:
    """An attempt starts now, in UTC, and ends after the duration unless configured otherwise."""
    interview = an_interview(
        duration=timedelta(minutes=90), should_end_interview_after_duration=ends
    )
    store.add_interview(interview, configured=configured)
    before = datetime.now(UTC)
    result = create_attempt(store, "a", "ann", interview.id.upper())
    assert result.outcome
    (attempt,) = store.attempts()
    assert result_of(result.outcome) == {"success": True, "interview_attempt_id": attempt.id}
    assert (attempt.user_id, attempt.interview_id) == ("ann", interview.id)
    assert before <= attempt.start_datetime <= datetime.now(UTC)
    assert attempt.end_datetime is None
    expected = attempt.start_datetime + timedelta(minutes=90) if ends else None
    assert attempt.scheduled_end_datetime == expected


def test_repeated_job_creates_one_attempt(store: Store) -> None:
    """A job that is delivered again has its first outcome and creates no second attempt."""
    (interview_id,) = store.add_interviews(1)
    first, again = (create_attempt(store, "a", "ann", interview_id) for _ in range(2))
    assert first.outcome == again.outcome
    assert len(store.attempts()) == 1


def test_reused_job_id_is_refused(store: Store) -> None:
    """A job ID that another user's attempt has used is refused and creates no attempt."""
    (interview_id,) = store.add_interviews(1)
    create_attempt(store, "a", "ann", interview_id)
    assert create_attempt(store, "a", "bob", interview_id).refusal
    assert [attempt.user_id for attempt in store.attempts()] == ["ann"]


@pytest.mark.parametrize(
    ("interview_id", "error"),
    [
        (str(uuid4()), InvalidInterviewIdException),
        ("no-uuid", InvalidInterviewIdException),
        (None, InvalidGrantRequestException),
    ],
    ids=["unknown", "malformed", "null"],
)
def test_invalid_interview_fails_the_job(
    store: Store, interview_id: object, error: type[Exception]
) -> None:
    """An interview ID that is unknown, malformed or no string fails the job."""
    result = create_attempt(store, "a", "ann", interview_id)
    assert result.outcome
    with pytest.raises(error):
        result_of(result.outcome)
    assert store.attempts() == []
