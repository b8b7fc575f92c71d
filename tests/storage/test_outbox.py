"""The outbox: due requests, rescheduling, and waits for new requests."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib import import_module
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from storage.dtos import OutboxTotalsDTO
from storage.errors import StorageError
from storage.interface import MAX_HEADERS_BYTES, Storage
from storage.postgres import DatabaseLimits, PostgresStorage
from storage.postgres.notifications import LISTENING_LOCK
from storage.postgres.outbox import LOCK_DUE_REQUESTS
from tests.storage.transactions import a_cohort_request, a_request, finish, finished
from tests.support.database import connected
from tests.support.stores import Background, PostgresStore, Store, until


@pytest.fixture(scope="module")
def postgres_url(_stores_url: str) -> str:
    """One database for all tests of this file, which change its schema for a moment at most."""
    return _stores_url


class TestRequests:
    """``lock_due_requests``, ``reschedule_requests`` and ``delete_finished_requests``."""

    def test_oldest_due_requests_come_first(self, store: Store) -> None:
        """New requests are due, in the order of their insertion, up to the limit."""
        requests = [a_request(job_id) for job_id in ("b", "a", "c")]
        for request in requests:
            store.add_request(request)
        with store.storage.transaction() as transaction:
            assert list(transaction.lock_due_requests(2)) == requests[:2]
        assert store.storage.get_request("c") == requests[2]
        assert store.storage.get_request("d") is None

    def test_requests_are_counted(self, store: Store) -> None:
        """Unsent requests are counted with the time of the oldest, and sent ones apart."""
        assert store.storage.count_requests() == OutboxTotalsDTO(0, None, 0)
        now = datetime.now(UTC)
        times = {"a": now - timedelta(hours=1), "b": now - timedelta(hours=3), "c": now}
        for job_id, moment in times.items():
            store.add_request(replace(a_request(job_id), requested_at=moment))
        with store.storage.transaction() as transaction:
            transaction.lock_due_requests(9)
            transaction.reschedule_requests(["b"], sent=True)
        assert store.storage.count_requests() == OutboxTotalsDTO(2, times["a"], 1)

    def test_an_old_request_is_clamped_when_it_is_counted(self, store: Store) -> None:
        """The time of the oldest request is clamped to a hundred years before now."""
        ancient = datetime(1, 1, 1, tzinfo=UTC)
        store.add_request(replace(a_request("a"), requested_at=ancient))
        oldest = store.storage.count_requests().oldest_unsent_at
        assert oldest
        assert datetime.now(UTC) - oldest < timedelta(days=36_600)

    def test_unsent_requests_are_listed_in_pages(self, store: Store) -> None:
        """Job IDs of unsent requests are listed in the order of their bytes after a given one."""
        for job_id in "b", "a", "B", "~", " ", "sent":
            store.add_request(a_request(job_id))
        with store.storage.transaction() as transaction:
            transaction.lock_due_requests(9)
            transaction.reschedule_requests(["sent"], sent=True)
        assert list(store.storage.list_unsent_requests("", 3)) == [" ", "B", "a"]
        assert list(store.storage.list_unsent_requests("a", 3)) == ["b", "~"]
        assert list(store.storage.list_unsent_requests("~", 3)) == []

    def test_requests_have_their_task_and_options(self, store: Store) -> None:
        """A request is returned with its task, users, ETA, expiry and headers."""
        attempt = replace(
            a_request("b"),
            task="interview_access.create_interview_attempt",
            interview_ids=("one",),
        )
        requests = [a_cohort_request("a"), attempt]
        for request in requests:
            store.add_request(request)
        with store.storage.transaction() as transaction:
            assert list(transaction.lock_due_requests(9)) == requests
        assert [store.storage.get_request(one.job_id) for one in requests] == requests

    @pytest.mark.parametrize("year", [1, 1900, 9999])
    def test_eta_and_expiry_are_clamped(self, store: Store, year: int) -> None:
        """An ETA or an expiry is clamped to a hundred years before and after now."""
        written = datetime(year, 1, 1, tzinfo=UTC)
        store.add_request(replace(a_cohort_request("a"), eta=written, expires_at=written))
        with store.storage.transaction() as transaction:
            (request,) = transaction.lock_due_requests(9)
            transaction.reschedule_requests(["a"], sent=True)
        for found in request.eta, request.expires_at:
            assert found
            assert abs(found - datetime.now(UTC)) < timedelta(days=36_600)

    def test_users_count_in_a_page(self, store: Store) -> None:
        """The users of cohorts count in the size of a page and of a request."""
        many = tuple(f"user-{n}" for n in range(200))
        for job_id in "a", "b", "c":
            store.add_request(replace(a_cohort_request(job_id), user_ids=many))
        with store.storage.transaction() as transaction:
            assert len(transaction.lock_due_requests(9, page_bytes=32_000)) == 2
        large = replace(a_cohort_request("d"), user_ids=("",) * 500_001)
        store.add_request(large)
        with store.storage.transaction() as transaction:
            *_, last = transaction.lock_due_requests(9)
        assert last == replace(
            large, user_id="", user_ids=None, interview_ids=(), is_too_large=True
        )

    @pytest.mark.parametrize(
        ("headers", "expected"),
        [
            ({}, {}),
            ({"a": "Zoë"}, {"a": "Zoë"}),
            ({"a": 1, "b": "x", "c": {"d": "e"}}, {"a": None, "b": "x", "c": None}),
            ({"a": "x" * MAX_HEADERS_BYTES}, None),
            ([1], None),
            ("text", None),
            (None, None),
        ],
        ids=["empty", "string", "other values", "large", "list", "string alone", "null"],
    )
    def test_unusable_headers_are_returned_empty(
        self, store: Store, headers: object, expected: object
    ) -> None:
        """Headers are returned as an object of strings, or empty if they are none or too large."""
        store.add_request(replace(a_request("a"), headers=json.dumps(headers)))
        with store.storage.transaction() as transaction:
            (request,) = transaction.lock_due_requests(9)
        assert (json.loads(request.headers) if request.headers else None) == expected
        assert request.headers is not None

    def test_headers_of_many_digits_are_not_read(self, postgres: PostgresStore) -> None:
        """Numbers in headers, which may have 131,072 digits in a few bytes, are not read."""
        postgres.execute(
            "INSERT INTO grant_access_request (job_id, user_id, interview_ids, headers)"
            " SELECT 'a', 'ann', '{}', jsonb_object_agg(n, CAST('1e131071' AS numeric))"
            " FROM generate_series(1, 300) AS n"
        )
        with postgres.storage.transaction() as transaction:
            (request,) = transaction.lock_due_requests(9)
        assert set(json.loads(request.headers or "").values()) == {None}

    def test_large_headers_are_not_decompressed(self, postgres: PostgresStore) -> None:
        """Headers are refused by their stored size: decompressing a page of them takes minutes."""
        insert = "INSERT INTO grant_access_request (job_id, user_id, interview_ids, headers) SELECT"
        postgres.execute(
            f"{insert} 'a', 'ann', '{{}}', jsonb_build_object('x', repeat('x', 100000000))"
        )
        postgres.execute(
            f"{insert} 'a' || n, user_id, interview_ids, headers"
            " FROM grant_access_request, generate_series(1, 19) AS n"
        )
        storage = PostgresStorage(postgres.database_url, limits=DatabaseLimits(statement=1))
        with storage.transaction() as transaction:
            assert [one.headers for one in transaction.lock_due_requests(99)] == [""] * 20
        storage.close()

    def test_unsent_requests_come_first(self, store: Store) -> None:
        """Sent requests come after unsent ones, however long they have been due."""
        for job_id in "a", "b", "c":
            store.add_request(a_request(job_id))
        with store.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=True)
        store.storage.schedule_all_requests_now()
        store.add_request(a_request("d"))
        for limit, expected in (2, 2), (4, 4):
            with store.storage.transaction() as transaction:
                taken = [request.job_id for request in transaction.lock_due_requests(limit)]
            assert len(taken) == expected
            assert "a" not in taken[:3]

    def test_page_is_limited_in_size(self, store: Store) -> None:
        """A page is limited in size; its first request may exceed the limit."""
        for job_id in "a", "b", "c":
            ids = tuple(str(uuid4()) for _ in range(40))
            store.add_request(replace(a_request(job_id), interview_ids=ids))
        with store.storage.transaction() as transaction:
            assert len(transaction.lock_due_requests(9, page_bytes=1)) == 1
            assert len(transaction.lock_due_requests(9, page_bytes=9_000)) == 2
            assert len(transaction.lock_due_requests(9, page_bytes=40_000)) == 3

    @pytest.mark.parametrize(
        ("user_id", "ids"),
        [
            ("ann", ("",) * 500_001),
            ("ann", ("x" * 11_000_000,) * 3),
            ("x" * 33_000_000, ()),
        ],
    )
    def test_too_large_request_is_returned_without_ids(
        self, store: Store, user_id: str, ids: tuple[str, ...]
    ) -> None:
        """A request whose IDs would take too much memory is returned without them."""
        first, last = a_request("a"), a_request("c")
        store.add_request(first)
        store.add_request(last)
        large = replace(a_request("b"), user_id=user_id, interview_ids=ids)
        store.add_request(large)
        with store.storage.transaction() as transaction:
            taken = {one.job_id: one for one in transaction.lock_due_requests(9)}
        empty = replace(large, user_id="", interview_ids=(), is_too_large=True)
        assert taken == {"a": first, "b": empty, "c": last}

    @pytest.mark.parametrize("year", [1, 1900, 9999])
    def test_dates_are_clamped_to_the_last_hundred_years(self, store: Store, year: int) -> None:
        """Whatever date a service wrote, the request has a date in the last 100 years."""
        written = datetime(year, 1, 1, tzinfo=UTC)
        store.add_request(replace(a_request("a"), requested_at=written))
        with store.storage.transaction() as transaction:
            (request,) = transaction.lock_due_requests(9)
            transaction.reschedule_requests(["a"], sent=True)
        age = datetime.now(UTC) - request.requested_at
        assert timedelta(minutes=-1) < age < timedelta(days=36_600)

    @pytest.mark.parametrize(
        "values",
        [
            "'b', 'ann', '{}', 'infinity', NULL, now()",
            "'b', 'ann', '{}', '-infinity', NULL, '-infinity'",
            "'b', 'ann', '{}', '4713-01-01 BC', '4713-01-01 BC', '4713-01-01 BC'",
            "'b', 'ann', '{}', '294276-01-01', 'infinity', now()",
            "'b', 'ann', '{{a,b},{c,NULL}}', now(), NULL, now()",
            "'b', 'ann', '[-5:-4]={a,b}', now(), '-infinity', now()",
            "'b', '', ARRAY[NULL], now(), NULL, now()",
            "'b', repeat('x', 100000), ARRAY['{', E'\\\\', '\"', ''], now(), NULL, now()",
        ],
    )
    def test_any_row_can_be_read(self, postgres: PostgresStore, values: str) -> None:
        """A row with unusable values does not prevent other requests from being returned."""
        postgres.execute(
            "INSERT INTO grant_access_request"  # noqa: S608 - values of the above
            " (job_id, user_id, interview_ids, requested_at, sent_at, look_at)"
            f" VALUES ({values})"
        )
        postgres.add_request(a_request("a"))
        with postgres.storage.transaction() as transaction:
            taken = [request.job_id for request in transaction.lock_due_requests(9)]
            assert sorted(taken) == ["a", "b"]
            transaction.reschedule_requests(taken, sent=False)
        with postgres.storage.transaction() as transaction:
            assert transaction.lock_due_requests(9) == []
        assert postgres.storage.get_request("b")

    def test_due_requests_are_found_by_an_index(self, postgres: PostgresStore) -> None:
        """No more due requests are read than are returned, and none are sorted."""
        postgres.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids, sent_at)"
            " SELECT 'ann', '{}', CASE WHEN n % 2 = 0 THEN now() END"
            " FROM generate_series(1, 20000) AS n"
        )
        postgres.execute("ANALYZE grant_access_request")
        with postgres.storage.transaction() as transaction:
            transaction.lock_jobs(["a"], wait=False)  # for the settings
            plan = transaction._connection.exec_driver_sql(
                f"EXPLAIN (ANALYZE, FORMAT JSON) {LOCK_DUE_REQUESTS}",
                {"limit": 10, "page_bytes": 1_000_000, "request_bytes": 1_000_000},
            ).scalar_one()

        def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
            yield node
            for child in node.get("Plans", []):
                yield from nodes(child)

        scans = [
            node
            for node in nodes(plan[0]["Plan"])
            if node.get("Relation Name") == "grant_access_request"
        ]
        assert scans
        assert all(node["Actual Rows"] * node["Actual Loops"] <= 10 for node in scans)

    def test_locked_requests_are_skipped(self, postgres: PostgresStore) -> None:
        """A request that another transaction has locked is skipped without blocking."""
        postgres.add_request(a_request("a"))
        postgres.add_request(a_request("b"))
        with postgres.storage.transaction() as one:
            assert [request.job_id for request in one.lock_due_requests(1)] == ["a"]
            with postgres.another() as storage, storage.transaction() as other:
                assert [request.job_id for request in other.lock_due_requests(9)] == ["b"]
        with postgres.storage.transaction() as one:
            assert len(one.lock_due_requests(9)) == 2

    def test_rescheduled_request_is_not_due(self, store: Store) -> None:
        """A rescheduled request is not due, until all requests are scheduled for now."""
        for job_id in "a", "b":
            store.add_request(a_request(job_id))
        with store.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=True)
            transaction.reschedule_requests(["b"], sent=False)
            assert transaction.lock_due_requests(9) == []
        store.storage.schedule_all_requests_now()
        with store.storage.transaction() as transaction:
            taken = {request.job_id: request for request in transaction.lock_due_requests(9)}
        assert taken["a"].sent_at is not None
        assert taken["b"].sent_at is None

    def test_due_requests_keep_their_order_if_all_are_scheduled_now(self, store: Store) -> None:
        """Scheduling all requests for now keeps the order of those that are due already."""
        for job_id in "c", "a", "b":
            store.add_request(a_request(job_id))
        with store.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=False)
        store.storage.schedule_all_requests_now()
        with store.storage.transaction() as transaction:
            due = [request.job_id for request in transaction.lock_due_requests(9)]
        assert due == ["c", "b", "a"]

    @pytest.mark.parametrize(("age", "least", "most"), [(0, 0.9, 1.1), (20, 19, 25), (900, 59, 61)])
    def test_delay_grows_with_age(
        self, postgres: PostgresStore, age: int, least: float, most: float
    ) -> None:
        """A request is rescheduled by its age, but by at least 1 s and at most 60 s."""
        requested_at = datetime.now(UTC) - timedelta(seconds=age)
        postgres.add_request(replace(a_request("a"), requested_at=requested_at))
        with postgres.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=True)
        wait = postgres.value(
            "SELECT extract(epoch FROM look_at - sent_at) FROM grant_access_request"
        )
        assert least <= wait <= most

    @pytest.mark.parametrize(
        ("sent", "hours", "least", "most"),
        [(True, 2, 3590, 3610), (True, -2, 0.9, 1.1), (False, 2, 0.9, 1.1)],
        ids=["sent", "past", "unsent"],
    )
    def test_sent_request_is_due_after_half_the_time_to_its_eta(
        self, postgres: PostgresStore, sent: bool, hours: int, least: float, most: float
    ) -> None:
        """A request that waits in Redis for its ETA is due after half the time; others as usual."""
        eta = datetime.now(UTC) + timedelta(hours=hours)
        postgres.add_request(replace(a_request("a"), eta=eta))
        with postgres.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=sent)
        wait = postgres.value(
            "SELECT extract(epoch FROM look_at - clock_timestamp()) FROM grant_access_request"
        )
        assert least - 0.5 <= wait <= most

    @pytest.mark.parametrize(
        ("task", "user_id", "user_ids", "interview_ids"),
        [
            ("grant_access", None, None, "{}"),
            ("grant_access", "ann", "{bob}", "{}"),
            ("grant_cohort_access", "ann", "{bob}", "{}"),
            ("grant_cohort_access", None, None, "{}"),
            ("create_interview_attempt", None, None, "{a}"),
            ("create_interview_attempt", "ann", None, "{}"),
            ("create_interview_attempt", "ann", None, "{a,b}"),
            ("create_interview_attempt", "ann", "{bob}", "{a}"),
            ("another", "ann", None, "{}"),
        ],
    )
    def test_request_without_the_arguments_of_its_task_is_rejected(
        self,
        postgres: PostgresStore,
        task: str,
        user_id: str | None,
        user_ids: str | None,
        interview_ids: str,
    ) -> None:
        """A request that lacks an argument of its task, or has another, fails in the service."""
        with pytest.raises(DBAPIError, match="grant_access_request_task_check"):
            postgres.execute(
                "INSERT INTO grant_access_request (task, user_id, user_ids, interview_ids) VALUES"
                " (:task, :user_id, CAST(:user_ids AS text[]), CAST(:interview_ids AS text[]))",
                task=f"interview_access.{task}",
                user_id=user_id,
                user_ids=user_ids,
                interview_ids=interview_ids,
            )

    def test_requests_of_finished_jobs_are_deleted(self, store: Store) -> None:
        """Of the given requests, those whose job has finished are deleted, and no other."""
        for job_id in "a", "b", "c":
            store.add_request(a_request(job_id))
        finish(store.storage, finished("a"), finished("c"), finished("d"))
        with store.storage.transaction() as transaction:
            assert transaction.delete_finished_requests(["a", "b", "d"]) == {"a"}
            assert transaction.delete_finished_requests([]) == frozenset()
        assert store.storage.get_request("a") is None
        assert store.storage.get_request("b")
        assert store.storage.get_request("c")

    @pytest.mark.parametrize("job_id", ["", "x" * 256, "line\nbreak", "Zoë", "\x7f"])
    def test_invalid_job_id_is_rejected(self, postgres: PostgresStore, job_id: str) -> None:
        """An invalid job ID fails the service's own transaction."""
        with pytest.raises(DBAPIError):
            postgres.add_request(a_request(job_id))


class TestWaitForRequests:
    """``wait_for_requests``, ``has_due_requests`` and the notifications of PostgreSQL."""

    def test_first_wait_returns_at_once(self, store: Store) -> None:
        """The first wait returns True at once, since earlier requests were not notified."""
        assert store.storage.wait_for_requests(60) is True

    def test_wait_times_out(self, store: Store) -> None:
        """Without a new request a wait ends after its time and returns False."""
        stop_polling(store.storage)
        assert store.storage.wait_for_requests(0.01) is False

    def test_a_request_ends_a_wait(self, store: Store) -> None:
        """A new request ends a wait."""
        stop_polling(store.storage)
        waiting = Background(lambda: store.storage.wait_for_requests(60))
        store.add_request(a_request("a"))
        assert waiting.result() is True
        assert store.storage.has_due_requests()

    def test_a_request_between_two_waits_is_reported(self, store: Store) -> None:
        """A request added between two waits ends the next one, also after a query."""
        stop_polling(store.storage)
        store.add_request(a_request("a"))
        assert store.storage.has_due_requests()
        assert store.storage.wait_for_requests(60) is True

    def test_wakeup_ends_a_wait(self, store: Store) -> None:
        """A wait ends when the ``wakeup`` file becomes readable."""
        stop_polling(store.storage)
        wakeup, other_end = socket.socketpair()
        with wakeup, other_end:
            waiting = Background(lambda: store.storage.wait_for_requests(60, wakeup))
            other_end.send(b"x")
            assert waiting.result() is False

    def test_a_request_is_due_until_it_is_sent(self, store: Store) -> None:
        """A request that was just sent is not due."""
        assert not store.storage.has_due_requests()
        store.add_request(a_request("a"))
        assert store.storage.has_due_requests()
        with store.storage.transaction() as transaction:
            transaction.lock_due_requests(1)
            transaction.reschedule_requests(["a"], sent=True)
        assert not store.storage.has_due_requests()

    def test_all_relays_are_notified(self, postgres: PostgresStore) -> None:
        """A request ends the waits of all workers."""
        stop_polling(postgres.storage)
        with postgres.another() as other:
            stop_polling(other)
            postgres.add_request(a_request("a"))
            assert postgres.storage.wait_for_requests(60) is True
            assert other.wait_for_requests(60) is True

    def test_unnotified_request_keeps_the_relay_polling(self, postgres: PostgresStore) -> None:
        """While a transaction with an unnotified request is open, the relay polls."""
        storage = postgres.storage
        assert storage.wait_for_requests(0) is True
        with connected(postgres.database_url) as service:
            service.exec_driver_sql(
                "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
            )
            until(lambda: postgres.value(_LISTENERS) == 1 or not storage.wait_for_requests(0))
            assert [storage.wait_for_requests(60) for _ in range(2)] == [True, True]
            assert not storage.has_due_requests()
            service.commit()
        assert storage.wait_for_requests(60) is True
        assert storage.has_due_requests()

    def test_relay_polls_while_a_service_holds_the_lock(self, postgres: PostgresStore) -> None:
        """If a session keeps the trigger's lock by a defect, the relay polls."""
        with connected(postgres.database_url) as service:
            service.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LISTENING_LOCK})
            assert [postgres.storage.wait_for_requests(60) for _ in range(5)] == [True] * 5

    def test_trigger_and_relays_use_the_same_lock(self) -> None:
        """The trigger of migration 0006 tests the lock that relays hold."""
        revision = import_module("storage.migrations.versions.0006_request_notification")
        assert revision._LOCK == LISTENING_LOCK

    def test_rolled_back_request_does_not_end_a_wait(self, postgres: PostgresStore) -> None:
        """A request whose transaction is rolled back does not end a wait."""
        stop_polling(postgres.storage)
        with connected(postgres.database_url) as service:
            service.exec_driver_sql(
                "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
            )
        assert postgres.storage.wait_for_requests(0.01) is False

    def test_services_notify_only_a_relay_that_does_not_poll(self, postgres: PostgresStore) -> None:
        """Services notify only a relay that does not poll: commits that notify are serialized."""
        url = make_url(postgres.database_url).set(drivername="postgresql")
        with psycopg.connect(url.render_as_string(False), autocommit=True) as listener:
            listener.execute("LISTEN grant_access_request")
            postgres.add_request(a_request("a"))
            stop_polling(postgres.storage)
            postgres.add_request(a_request("b"))
            assert postgres.storage.wait_for_requests(60) is True
            postgres.add_request(a_request("c"))
            assert len(list(listener.notifies(timeout=0))) == 1

    def test_a_lost_connection_is_an_error_once(self, postgres: PostgresStore) -> None:
        """A wait whose connection is lost raises; the next one uses another connection."""
        stop_polling(postgres.storage)
        waiting = Background(lambda: postgres.storage.wait_for_requests(60))
        postgres.execute(_LISTENERS.replace("count(*)", "pg_terminate_backend(pid)"))
        with pytest.raises(StorageError):
            waiting.result()
        assert postgres.storage.wait_for_requests(60) is True

    def test_without_the_trigger_no_wait_is_possible(self, postgres: PostgresStore) -> None:
        """If the trigger is disabled, a wait returns None at once."""
        alter = "ALTER TABLE grant_access_request {} TRIGGER grant_access_request_notify"
        postgres.execute(alter.format("DISABLE"))
        try:
            assert postgres.storage.wait_for_requests(60) is None
        finally:
            postgres.execute(alter.format("ENABLE"))


_LISTENERS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def stop_polling(storage: Storage) -> None:
    """Wait until the storage reports that no request can have been added."""
    until(lambda: storage.wait_for_requests(0) is False)
