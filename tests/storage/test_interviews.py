"""Interviews and interview attempts."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

from storage.errors import StorageError
from tests.storage.transactions import an_attempt, failing_transaction
from tests.support.stores import Background, Store, an_interview


class TestGetInterviewDetails:
    """``get_interview_details``."""

    def test_interviews_have_their_configuration(self, store: Store) -> None:
        """An interview is returned completely, with its configuration."""
        interviews = [
            an_interview(
                title="Τίτλος 🦄",
                description="Several\nlines",
                duration=timedelta(days=400, seconds=1, microseconds=1),
                is_default_access_allowed=True,
                should_end_interview_after_duration=False,
            ),
            an_interview(duration=timedelta(0)),
        ]
        for interview in interviews:
            store.add_interview(interview)
        with store.storage.transaction() as transaction:
            found = transaction.get_interview_details([one.id for one in interviews])
        assert sorted(found, key=str) == sorted(interviews, key=str)

    def test_interview_without_configuration_has_the_defaults(self, store: Store) -> None:
        """Without configuration there is no default access, and attempts end by duration."""
        interview = an_interview()
        store.add_interview(interview, configured=False)
        with store.storage.transaction() as transaction:
            (found,) = transaction.get_interview_details([interview.id])
        assert found == interview
        assert not found.is_default_access_allowed
        assert found.should_end_interview_after_duration

    def test_only_requested_interviews_are_returned(self, store: Store) -> None:
        """IDs without an interview, and other interviews, are left out."""
        one, _ = store.add_interviews(2)
        with store.storage.transaction() as transaction:
            found = transaction.get_interview_details([one, str(uuid4())])
            assert [interview.id for interview in found] == [one]
            assert list(transaction.get_interview_details([])) == []

    def test_delete_waits_for_the_transaction(self, store: Store) -> None:
        """Deleting a returned interview blocks until the transaction ends."""
        (interview_id,) = store.add_interviews(1)
        with store.storage.transaction() as transaction:
            assert transaction.get_interview_details([interview_id])
            delete = Background(lambda: store.delete_interview(interview_id))
            store.until_waiting(delete)
            assert not delete.over
        assert delete.result()


class TestCreateInterviewAttempt:
    """``create_interview_attempt``."""

    def test_attempts_are_stored_unchanged(self, store: Store) -> None:
        """Attempts are stored to the microsecond, also several of one user."""
        (interview_id,) = store.add_interviews(1)
        attempts = [an_attempt(interview_id), an_attempt(interview_id)]
        with store.storage.transaction() as transaction:
            transaction.create_interview_attempt([])
            transaction.create_interview_attempt(attempts)
        assert sorted(store.attempts(), key=str) == sorted(attempts, key=str)

    def test_missing_interview_is_a_foreign_key_violation(self, store: Store) -> None:
        """If an interview does not exist, no attempt is stored, and the error is transient."""
        (interview_id,) = store.add_interviews(1)
        attempts = [an_attempt(interview_id), an_attempt(str(uuid4()))]
        with failing_transaction(StorageError, store.storage, sqlstate="23503") as transaction:
            transaction.create_interview_attempt(attempts)
        assert list(store.attempts()) == []
