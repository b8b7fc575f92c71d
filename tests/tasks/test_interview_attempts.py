"""The use case of attempts, on the reference model and on PostgreSQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from interview_access.errors import InvalidGrantRequestException, InvalidInterviewIdException

from tasks.celery_tasks import interview_attempt_job
from tasks.interview_attempts import InterviewAttemptInteractor
from tasks.ledger import JobResult, result_of
from tests.support.stores import Store, an_interview


def start(store: Store, job_id: str, user_id: object, interview_id: object) -> JobResult:
    """Have one attempt started."""
    job = interview_attempt_job(job_id, (), {"user_id": user_id, "interview_id": interview_id})
    (outcome,) = InterviewAttemptInteractor(store.storage).create_interview_attempt([job])
    return outcome


@pytest.mark.parametrize(
    ("configured", "ends"), [(True, True), (True, False), (False, True)], ids=str
)
def test_an_attempt_starts_now(store: Store, configured: bool, ends: bool) -> None:
    """It starts now, in UTC, and ends a duration later where its interview says so or nothing."""
    interview = an_interview(
        duration=timedelta(minutes=90), should_end_interview_after_duration=ends
    )
    store.add_interview(interview, configured=configured)
    before = datetime.now(UTC)
    outcome = start(store, "a", "ann", interview.id.upper())
    assert outcome.outcome
    (attempt,) = store.attempts()
    assert result_of(outcome.outcome) == {"success": True, "interview_attempt_id": attempt.id}
    assert (attempt.user_id, attempt.interview_id) == ("ann", interview.id)
    assert before <= attempt.start_datetime <= datetime.now(UTC)
    assert attempt.end_datetime is None
    expected = attempt.start_datetime + timedelta(minutes=90) if ends else None
    assert attempt.scheduled_end_datetime == expected


def test_a_job_again_makes_no_second_attempt(store: Store) -> None:
    """A message delivered again has the attempt that the first made."""
    (interview_id,) = store.add_interviews(1)
    first, again = (start(store, "a", "ann", interview_id) for _ in range(2))
    assert first.outcome == again.outcome
    assert len(store.attempts()) == 1


def test_another_user_under_the_same_id_is_refused(store: Store) -> None:
    """A job id that was used for another attempt makes none."""
    (interview_id,) = store.add_interviews(1)
    start(store, "a", "ann", interview_id)
    assert start(store, "a", "bob", interview_id).refusal
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
def test_a_wrong_interview_makes_no_attempt(
    store: Store, interview_id: object, error: type[Exception]
) -> None:
    """An interview that is unknown, malformed or no string fails the job."""
    outcome = start(store, "a", "ann", interview_id)
    assert outcome.outcome
    with pytest.raises(error):
        result_of(outcome.outcome)
    assert store.attempts() == []
