"""Settings of a database session: what a transaction depends on and what it leaves behind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from storage.dtos import AccessRequestDTO, InterviewAttemptDTO, RequestedGrantsDTO
from tests.storage.transactions import finish, finished
from tests.support.stores import PostgresStore, an_interview

NOON = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)


SETTINGS = [
    ("DateStyle", "German"),
    ("DateStyle", "SQL, DMY"),
    ("IntervalStyle", "iso_8601"),
    ("IntervalStyle", "sql_standard"),
    ("IntervalStyle", "postgres_verbose"),
    ("TimeZone", "Asia/Kolkata"),
    ("client_encoding", "LATIN1"),
    ("client_encoding", "SQL_ASCII"),
    ("default_transaction_isolation", "serializable"),
    ("default_transaction_read_only", "on"),
    ("standard_conforming_strings", "off"),
    ("array_nulls", "off"),
    ("extra_float_digits", "-15"),
    ("transaction_timeout", "250ms"),
    ("statement_timeout", "250ms"),
    ("lock_timeout", "250ms"),
    ("idle_in_transaction_session_timeout", "250ms"),
    ("row_security", "off"),
    ("track_activities", "off"),
]
"""Settings that a server, a database or a role may have as defaults."""


class TestSettings:
    """Independence of the defaults of server, database and role."""

    @pytest.mark.parametrize(("setting", "value"), SETTINGS)
    def test_database_defaults_have_no_effect(
        self, postgres: PostgresStore, setting: str, value: str
    ) -> None:
        """A default of the database changes neither what is stored nor what is read."""
        interview = an_interview(
            title="Zoë 日本語 \\' %s", duration=timedelta(days=-1, hours=40, microseconds=7)
        )
        postgres.add_interview(interview)
        postgres.configure(setting, value)
        request = AccessRequestDTO("r", "Zoë 日本語", ("NULL", None, "\\"), NOON)
        postgres.add_request(request)
        with postgres.another() as storage:
            with storage.transaction() as transaction:
                transaction.lock_jobs(["日本語"], wait=True)
                transaction.query("SELECT pg_sleep(0.3)")  # longer than the timeouts above
                assert transaction.get_interview_details([interview.id]) == [interview]
                transaction.create_interview_attempt(
                    [InterviewAttemptDTO(str(uuid4()), interview.id, "Zoë", NOON, None, NOON)]
                )
                requested = RequestedGrantsDTO("Zoë 日本語", (interview.id,))
                assert transaction.bulk_create_user_access([requested]) == [1]
                transaction.record_jobs([finished("a")])
                assert transaction.lock_due_requests(10) == [request]
            again = storage.get_finished_job("a")
        assert again == finished("a")
        assert again.finished_at
        assert abs(datetime.now(UTC) - again.finished_at) < timedelta(minutes=5)
        (attempt,) = postgres.attempts()
        assert attempt.start_datetime == attempt.scheduled_end_datetime == NOON
        assert postgres.granted("Zoë 日本語") == [interview.id]

    def test_transaction_leaves_no_setting_and_no_lock(self, postgres: PostgresStore) -> None:
        """After a transaction its session has no additional setting and no lock.

        A pooler may give the session to another service next.
        """
        finish(postgres.storage, finished("a"))
        with postgres.storage._engine.connect() as connection:
            settings = (
                "SELECT name, setting FROM pg_settings"
                " WHERE source = 'session' AND NOT starts_with(name, 'transaction')"
            )
            assert connection.exec_driver_sql(settings).all() == []
            locks = "SELECT * FROM pg_locks WHERE locktype = 'advisory'"
            assert connection.exec_driver_sql(locks).all() == []
