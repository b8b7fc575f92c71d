"""The obligations of storage/interface.py, each with a test of its own that every store must pass.

Two transactions meet like this: the test's own thread holds the first one open, another thread
begins the second, and the first is ended when the second waits for it (or is over: a store may
run them side by side).
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from storage.dtos import (
    AccessRequestDTO,
    FiguresDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    JobDTO,
    OutcomeDTO,
    RejectedIdsDTO,
    RequestedGrantsDTO,
    UserInterviewAccessDTO,
)
from storage.errors import JobBusyError, LedgerConflictError, LedgerError, StorageError
from storage.interface import Storage, Transaction
from storage.postgres import DatabaseLimits, PostgresStorage
from storage.postgres.notifications import SLEEP_LOCK
from storage.postgres.outbox import LOCK_DUE_REQUESTS
from tests.support.database import connected, role
from tests.support.stores import (
    CHUNK_SIZE,
    PATIENCE_SECONDS,
    Background,
    PostgresStore,
    Store,
    an_interview,
    until,
)

DIGEST, OTHER_DIGEST = "d" * 64, "e" * 64

LETTERS = [
    "bad,user",
    '"bad"',
    "'; DROP TABLE grant_access_job; --",
    "back\\slash",
    "{bad,user}",
    "NULL",
    " blank ",
    "line\nbreak",
    "tab\t",
    "%s %(x)s :name $1",
    "Zoë",
    "Zoe\u0308",
    "日本語",
    "🦄" * 36,
    "\U0010ffff",
]
"""User ids that a careless statement would take for something else."""


def ledger_entry(job_id: str, digest: str = DIGEST) -> JobDTO:
    """A job as the ledger identifies it."""
    return JobDTO(job_id, "interview_access.grant_access", "ann", digest)


def finished(job_id: str, created: int = 0, digest: str = DIGEST) -> FinishedJobDTO:
    """A job and its answer, a success."""
    outcome = OutcomeDTO(
        "succeeded",
        result={"success": True, "created_access_count": created},
        figures=FiguresDTO(created + 5, 2, 3, created),
    )
    return FinishedJobDTO(ledger_entry(job_id, digest), outcome)


def a_request(job_id: str) -> AccessRequestDTO:
    """A request as a service makes it, now."""
    return AccessRequestDTO(job_id, "ann", ("one", "two"), datetime.now(UTC))


def finish(storage: Storage, *jobs: FinishedJobDTO) -> None:
    """Record finished jobs in one transaction."""
    with storage.transaction() as transaction:
        transaction.record_jobs(jobs)


def make_grants(storage: Storage, user_id: str, *interview_ids: str) -> int:
    """Grant in one transaction; the rows that were added."""
    with storage.transaction() as transaction:
        order = RequestedGrantsDTO(user_id, interview_ids)
        (created,) = transaction.bulk_create_user_access([order])
        return created


def lock(storage: Storage, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:
    """The jobs that a transaction of its own could lock."""
    with storage.transaction() as transaction:
        return transaction.lock_jobs(job_ids, wait=wait)


def is_locked_by(storage: Storage, job_id: str) -> bool:
    """Whether the storage can lock the job now."""
    try:
        return lock(storage, [job_id], wait=True) == {job_id}
    except JobBusyError:
        return False


def an_attempt(interview_id: str) -> InterviewAttemptDTO:
    """An attempt that has a scheduled end."""
    start = datetime(2024, 2, 29, 23, 30, 0, 123456, tzinfo=UTC)
    return InterviewAttemptDTO(
        id=str(uuid4()),
        interview_id=interview_id,
        user_id="ann",
        start_datetime=start,
        scheduled_end_datetime=start + timedelta(minutes=45),
    )


@contextmanager
def ends_with(
    kind: type[Exception], storage: Storage, *, sqlstate: str | None = None
) -> Iterator[Transaction]:
    """A transaction that must end with an error of this kind, and of this code where given."""
    with pytest.raises(kind) as caught, storage.transaction() as transaction:
        yield transaction
    if sqlstate is not None:
        assert isinstance(caught.value, StorageError)
        assert caught.value.sqlstate == sqlstate


class TestLockJobs:
    """lock_jobs."""

    def test_with_wait_all_are_returned(self, store: Store) -> None:
        """With wait, all of the ids are returned."""
        assert lock(store.storage, ["b", "a", "c"], wait=True) == {"a", "b", "c"}

    def test_without_wait_all_that_are_free_are_returned(self, store: Store) -> None:
        """Without wait, ids that nobody holds are all returned."""
        assert lock(store.storage, ["b", "a", "c"], wait=False) == {"a", "b", "c"}

    def test_with_wait_the_holder_is_waited_for(self, store: Store) -> None:
        """With wait, the ids are returned only after the transaction that holds one has ended."""
        ends: list[str] = []

        def second() -> None:
            assert lock(store.storage, ["a", "b"], wait=True) == {"a", "b"}
            ends.append("second")

        with store.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(second)
            store.until_waiting(other)
            ends.append("first")
        other.result()
        assert ends == ["first", "second"]

    def test_without_wait_only_those_it_got_are_returned(self, store: Store) -> None:
        """Without wait, an id that another transaction holds is not returned, the others are."""
        with store.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(lambda: lock(store.storage, ["a", "b"], wait=False))
            store.until_waiting(other)
            side_by_side = other.over
        assert other.result() == ({"a"} if side_by_side else {"a", "b"})

    def test_locks_end_with_a_transaction_that_raises(self, store: Store) -> None:
        """A transaction that raised holds no job any more."""
        with ends_with(KeyError, store.storage) as transaction:
            transaction.lock_jobs(["a"], wait=True)
            raise KeyError
        assert lock(store.storage, ["a"], wait=False) == {"a"}


class TestFindJobs:
    """find_jobs."""

    def test_unknown_jobs_are_not_found(self, store: Store) -> None:
        """Of jobs that were neither recorded nor cancelled nothing is found."""
        with store.storage.transaction() as transaction:
            assert transaction.find_jobs(["a", "b"]) == FoundJobsDTO({}, frozenset())
            assert transaction.find_jobs([]) == FoundJobsDTO({}, frozenset())

    def test_finished_jobs_are_found_as_first_recorded(self, store: Store) -> None:
        """The finished ones among the IDs are found, with their requests and answers."""
        finish(store.storage, finished("a", 1), finished("b", 2, OTHER_DIGEST), finished("c", 3))
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(["a", "new", "b"])
        assert found.finished == {"a": finished("a", 1), "b": finished("b", 2, OTHER_DIGEST)}

    def test_cancelled_jobs_are_found_finished_or_not(self, store: Store) -> None:
        """Jobs to be cancelled are found, whether they have finished or not, and no other."""
        finish(store.storage, finished("a", 1), finished("b", 2))
        for job_id in "b", "c", "d":
            with store.storage.transaction() as transaction:
                transaction.request_cancellation(job_id)
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(["a", "b", "c", "C"])
        assert found == FoundJobsDTO(
            {"a": finished("a", 1), "b": finished("b", 2)}, frozenset({"b", "c"})
        )

    def test_what_others_committed_meanwhile_is_found(self, postgres: PostgresStore) -> None:
        """A job that was recorded after this transaction began is found by it."""
        with postgres.storage.transaction() as transaction:
            assert transaction.find_jobs(["a"]) == FoundJobsDTO({}, frozenset())
            with postgres.another() as other:
                finish(other, finished("a", 1))
            assert transaction.find_jobs(["a"]).finished == {"a": finished("a", 1)}

    def test_job_ids_are_taken_to_the_letter(self, store: Store) -> None:
        """Job ids that look like one another, or like a statement, are different jobs."""
        job_ids = ["a,b", "a", "b", "A", "á", "a\u0301", '"a"', "{a}", "a\\", "'", "NULL"]
        job_ids.append("🦄" * 255)
        jobs = [finished(job_id, number) for number, job_id in enumerate(job_ids)]
        finish(store.storage, *jobs)
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(job_ids)
        assert found.finished == dict(zip(job_ids, jobs, strict=True))


class TestRecordJobs:
    """record_jobs and get_finished_job."""

    def test_unknown_job_has_no_row(self, store: Store) -> None:
        """A job that never finished has no row in the ledger."""
        assert store.storage.get_finished_job("a") is None

    def test_row_tells_all_of_a_success(self, store: Store) -> None:
        """A success is kept with its request, its result, its figures and its time."""
        before = datetime.now(UTC)
        job = FinishedJobDTO(
            JobDTO("a", "task", "ann", DIGEST),
            OutcomeDTO(
                "succeeded", result={"success": True, "n": 1}, figures=FiguresDTO(10, 1, 2, 7)
            ),
        )
        finish(store.storage, job)
        row = store.storage.get_finished_job("a")
        assert row == job
        assert row is not None
        assert row.finished_at is not None
        assert before <= row.finished_at <= datetime.now(UTC)

    def test_row_tells_all_of_a_failure(self, store: Store) -> None:
        """A failure is kept with its error, without figures, also where it has no user."""
        error = {"type": "T", "sentence": "Says “no” \\ 🦄", "details": {"total": 1, "x": [None]}}
        job = FinishedJobDTO(JobDTO("a", "task", None, DIGEST), OutcomeDTO("failed", error=error))
        finish(store.storage, job)
        assert store.storage.get_finished_job("a") == job

    def test_row_tells_all_that_was_rejected(self, store: Store) -> None:
        """All rejected ids come back to the letter, also what no other column could hold."""
        rejected = RejectedIdsDTO(("one", "ONE"), ("NUL\0", "\ud800", "ä", "x" * 5000))
        error = {"type": "X", "sentence": "No.", "details": {}}
        outcome = OutcomeDTO("failed", error=error, rejected=rejected)
        finish(store.storage, FinishedJobDTO(ledger_entry("a"), outcome), finished("b"))
        row = store.storage.get_finished_job("a")
        assert row
        assert row.outcome.rejected == rejected
        other = store.storage.get_finished_job("b")
        assert other
        assert other.outcome.rejected is None

    def test_job_that_was_recorded_before_is_refused(self, store: Store) -> None:
        """Where the ledger has one of the jobs, all are refused, and the first answer stays."""
        finish(store.storage, finished("a", 1))
        with ends_with(LedgerConflictError, store.storage) as transaction:
            transaction.record_jobs([finished("b"), finished("a", 2)])
        assert store.storage.get_finished_job("a") == finished("a", 1)
        assert store.storage.get_finished_job("b") is None

    def test_job_that_was_recorded_in_this_transaction_is_refused(self, store: Store) -> None:
        """Recording a job twice in one transaction raises, and nothing of it is kept."""
        with ends_with(LedgerConflictError, store.storage) as transaction:
            transaction.record_jobs([finished("a", 1)])
            transaction.record_jobs([finished("a", 2)])
        assert store.storage.get_finished_job("a") is None

    def test_open_transaction_that_commits_is_heeded(self, store: Store) -> None:
        """A transaction that has recorded the job is waited for; where it commits, it was first."""

        def second() -> None:
            with ends_with(LedgerConflictError, store.storage) as transaction:
                transaction.record_jobs([finished("a", 2), finished("b", 2)])

        with store.storage.transaction() as first:
            first.record_jobs([finished("a", 1)])
            other = Background(second)
            store.until_waiting(other)
            assert not other.over
        other.result()
        assert store.storage.get_finished_job("a") == finished("a", 1)
        assert store.storage.get_finished_job("b") is None

    def test_open_transaction_that_fails_is_heeded(self, store: Store) -> None:
        """A transaction that has recorded the job is waited for; where it fails, the job is new."""

        def second() -> None:
            finish(store.storage, finished("a", 2, OTHER_DIGEST))

        with ends_with(KeyError, store.storage) as first:
            first.record_jobs([finished("a")])
            other = Background(second)
            store.until_waiting(other)
            assert not other.over
            raise KeyError
        other.result()
        assert store.storage.get_finished_job("a") == finished("a", 2, OTHER_DIGEST)

    def test_ledger_that_keeps_rows_out_is_an_error(self, postgres: PostgresStore) -> None:
        """Where a trigger swallows a job's row, nothing of the transaction is kept."""
        postgres.execute(
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RETURN CASE WHEN NEW.job_id = 'a' THEN NULL ELSE NEW END; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER swallow BEFORE INSERT ON grant_access_job"
            " FOR EACH ROW EXECUTE FUNCTION swallow()"
        )
        with ends_with(LedgerError, postgres.storage) as transaction:
            transaction.record_jobs([finished("a"), finished("b")])
        assert postgres.storage.get_finished_job("b") is None


class TestCancellation:
    """request_cancellation, find_cancelled_jobs, is_cancelled."""

    def test_jobs_to_be_cancelled_are_found(self, store: Store) -> None:
        """Those among the ids that were asked for are found, each once, and no other."""
        for job_id in "b", "a", "b":
            with store.storage.transaction() as transaction:
                transaction.request_cancellation(job_id)
        with store.storage.transaction() as transaction:
            assert transaction.find_cancelled_jobs(["a", "B", "c"]) == {"a"}
            assert transaction.find_cancelled_jobs([]) == frozenset()
        assert store.storage.is_cancelled("b")
        assert not store.storage.is_cancelled("c")

    def test_what_others_asked_for_meanwhile_is_seen(self, postgres: PostgresStore) -> None:
        """A cancellation that is kept after this transaction began is found by it."""
        with postgres.storage.transaction() as transaction:
            assert transaction.find_cancelled_jobs(["a"]) == frozenset()
            with postgres.another() as other, other.transaction() as canceller:
                canceller.request_cancellation("a")
            assert transaction.find_cancelled_jobs(["a"]) == {"a"}

    def test_one_that_is_not_kept_is_not_found(self, store: Store) -> None:
        """A cancellation of a transaction that raises is none."""
        with ends_with(StorageError, store.storage) as transaction:
            transaction.request_cancellation("a")
            raise StorageError("the block's own")
        assert not store.storage.is_cancelled("a")


class TestRequests:
    """The requests that services make in the database."""

    def test_due_ones_are_taken_the_oldest_first(self, store: Store) -> None:
        """New requests are due, in the order in which they came, and no more than asked for."""
        requests = [a_request(job_id) for job_id in ("b", "a", "c")]
        for request in requests:
            store.add_request(request)
        with store.storage.transaction() as transaction:
            assert list(transaction.lock_due_requests(2)) == requests[:2]
        assert store.storage.get_request("c") == requests[2]
        assert store.storage.get_request("d") is None

    def test_never_sent_ones_come_first(self, store: Store) -> None:
        """Those that were sent, however long they have been due, come after those that were not."""
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

    def test_a_page_is_bounded_by_size(self, store: Store) -> None:
        """Requests are taken up to a size together, and one alone of any size."""
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
    def test_one_that_is_too_large_is_not_read(
        self, store: Store, user_id: str, ids: tuple[str, ...]
    ) -> None:
        """A request whose IDs would take up too much memory comes without, between the others."""
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
    def test_any_date_is_read_as_one_of_the_last_hundred_years(
        self, store: Store, year: int
    ) -> None:
        """Whatever a service wrote as the time of its request, the request is read."""
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
    def test_any_row_is_read(self, postgres: PostgresStore, values: str) -> None:
        """A row that no message can be made of keeps no other from being taken."""
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

    def test_due_ones_are_found_by_an_index(self, postgres: PostgresStore) -> None:
        """Of many that are due, no more are read and none are sorted than are taken."""
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

    def test_what_another_transaction_has_taken_is_left_to_it(
        self, postgres: PostgresStore
    ) -> None:
        """A request is taken by one transaction at a time, and nobody waits for it."""
        postgres.add_request(a_request("a"))
        postgres.add_request(a_request("b"))
        with postgres.storage.transaction() as one:
            assert [request.job_id for request in one.lock_due_requests(1)] == ["a"]
            with postgres.another() as storage, storage.transaction() as other:
                assert [request.job_id for request in other.lock_due_requests(9)] == ["b"]
        with postgres.storage.transaction() as one:
            assert len(one.lock_due_requests(9)) == 2

    def test_later_means_not_now(self, store: Store) -> None:
        """One that is to be looked at later is not due, until all are made due."""
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

    @pytest.mark.parametrize(("age", "least", "most"), [(0, 0.9, 1.1), (20, 19, 25), (900, 59, 61)])
    def test_how_much_later_grows_with_age(
        self, postgres: PostgresStore, age: int, least: float, most: float
    ) -> None:
        """It is looked at again in as long as it stands already, but 1 to 60 s."""
        requested_at = datetime.now(UTC) - timedelta(seconds=age)
        postgres.add_request(replace(a_request("a"), requested_at=requested_at))
        with postgres.storage.transaction() as transaction:
            transaction.reschedule_requests(["a"], sent=True)
        wait = postgres.value(
            "SELECT extract(epoch FROM look_at - sent_at) FROM grant_access_request"
        )
        assert least <= wait <= most

    def test_answered_ones_are_forgotten(self, store: Store) -> None:
        """Of those named, the requests go whose job has an answer, and no other."""
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
    def test_an_id_that_no_worker_takes_is_refused(
        self, postgres: PostgresStore, job_id: str
    ) -> None:
        """The service's own transaction hears of a job id that is none."""
        with pytest.raises(DBAPIError):
            postgres.add_request(a_request(job_id))


class TestWaitForRequests:
    """A relay waits for the requests that services make."""

    def test_there_may_be_requests_at_first(self, store: Store) -> None:
        """The first wait ends at once: what was added before was reported to nobody."""
        assert store.storage.wait_for_requests(60) is True

    def test_a_wait_without_requests_ends_in_time(self, store: Store) -> None:
        """Where nothing is added, waits report nothing."""
        fall_asleep(store.storage)
        assert store.storage.wait_for_requests(0.01) is False

    def test_a_request_ends_a_wait(self, store: Store) -> None:
        """A wait ends when a request is added."""
        fall_asleep(store.storage)
        waiting = Background(lambda: store.storage.wait_for_requests(60))
        store.add_request(a_request("a"))
        assert waiting.result() is True
        assert store.storage.has_due_requests()

    def test_a_request_between_two_waits_is_reported(self, store: Store) -> None:
        """A request is reported to the next wait if there is none now, also after a query."""
        fall_asleep(store.storage)
        store.add_request(a_request("a"))
        assert store.storage.has_due_requests()
        assert store.storage.wait_for_requests(60) is True

    def test_another_event_ends_a_wait(self, store: Store) -> None:
        """A wait ends when the file that it is given is readable."""
        fall_asleep(store.storage)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            waiting = Background(lambda: store.storage.wait_for_requests(60, ours))
            theirs.send(b"x")
            assert waiting.result() is False

    def test_a_request_is_due_until_it_is_sent(self, store: Store) -> None:
        """A request that was sent just now is not due."""
        assert not store.storage.has_due_requests()
        store.add_request(a_request("a"))
        assert store.storage.has_due_requests()
        with store.storage.transaction() as transaction:
            transaction.lock_due_requests(1)
            transaction.reschedule_requests(["a"], sent=True)
        assert not store.storage.has_due_requests()

    def test_all_relays_are_woken(self, postgres: PostgresStore) -> None:
        """A request ends the waits of all workers."""
        fall_asleep(postgres.storage)
        with postgres.another() as other:
            fall_asleep(other)
            postgres.add_request(a_request("a"))
            assert postgres.storage.wait_for_requests(60) is True
            assert other.wait_for_requests(60) is True

    def test_one_added_before_the_relay_sleeps_keeps_it_awake(
        self, postgres: PostgresStore
    ) -> None:
        """No wait is long while a transaction is open that has added a request unnotified."""
        storage = postgres.storage
        assert storage.wait_for_requests(0) is True
        with connected(postgres.database_url) as service:
            service.exec_driver_sql(
                "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
            )
            until(lambda: postgres.value(_SLEEPERS) == 1 or not storage.wait_for_requests(0))
            assert [storage.wait_for_requests(60) for _ in range(2)] == [True, True]
            assert not storage.has_due_requests()
            service.commit()
        assert storage.wait_for_requests(60) is True
        assert storage.has_due_requests()

    def test_a_lock_that_a_service_keeps_stops_no_relay(self, postgres: PostgresStore) -> None:
        """A session that keeps the lock of the trigger, by whatever defect, has relays poll."""
        with connected(postgres.database_url) as service:
            service.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": SLEEP_LOCK})
            assert [postgres.storage.wait_for_requests(60) for _ in range(5)] == [True] * 5

    def test_one_rolled_back_is_not_reported(self, postgres: PostgresStore) -> None:
        """A request whose transaction is rolled back ends no wait."""
        fall_asleep(postgres.storage)
        with connected(postgres.database_url) as service:
            service.exec_driver_sql(
                "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
            )
        assert postgres.storage.wait_for_requests(0.01) is False

    def test_services_notify_only_while_a_relay_sleeps(self, postgres: PostgresStore) -> None:
        """Commits that notify wait for each other, so those of a busy time do not."""
        url = make_url(postgres.database_url).set(drivername="postgresql")
        with psycopg.connect(url.render_as_string(False), autocommit=True) as listener:
            listener.execute("LISTEN grant_access_request")
            postgres.add_request(a_request("a"))
            fall_asleep(postgres.storage)
            postgres.add_request(a_request("b"))
            assert postgres.storage.wait_for_requests(60) is True
            postgres.add_request(a_request("c"))
            assert len(list(listener.notifies(timeout=0))) == 1

    def test_a_lost_connection_is_an_error_once(self, postgres: PostgresStore) -> None:
        """A wait whose connection is ended raises; the next one is on another connection."""
        fall_asleep(postgres.storage)
        waiting = Background(lambda: postgres.storage.wait_for_requests(60))
        postgres.execute(_SLEEPERS.replace("count(*)", "pg_terminate_backend(pid)"))
        with pytest.raises(StorageError):
            waiting.result()
        assert postgres.storage.wait_for_requests(60) is True

    def test_without_the_trigger_no_wait_is_possible(self, postgres: PostgresStore) -> None:
        """Where an operator has disabled the trigger, a wait ends at once and says so."""
        alter = "ALTER TABLE grant_access_request {} TRIGGER grant_access_request_notify"
        postgres.execute(alter.format("DISABLE"))
        try:
            assert postgres.storage.wait_for_requests(60) is None
        finally:
            postgres.execute(alter.format("ENABLE"))


_SLEEPERS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def fall_asleep(storage: Storage) -> None:
    """Wait until a wait finds that no request can have been added."""
    until(lambda: storage.wait_for_requests(0) is False)


class TestFindUnknownInterviews:
    """find_unknown_interviews."""

    def test_ids_that_no_interview_has_are_returned(self, store: Store) -> None:
        """Exactly the ids that no interview has are returned."""
        known = store.add_interviews(2)
        unknown = {str(uuid4()), str(uuid4())}
        with store.storage.transaction() as transaction:
            assert transaction.find_unknown_interviews([*known, *unknown]) == unknown
            assert transaction.find_unknown_interviews(known) == frozenset()
            assert transaction.find_unknown_interviews([]) == frozenset()

    @pytest.mark.parametrize("granted", range(3))
    @pytest.mark.parametrize("bulk_threshold", [1_000, 1])
    def test_what_a_user_has_access_to_is_known(self, store: Store, granted: int) -> None:
        """The same ids are unknown whatever the user, or another one, has been granted."""
        known, unknown = store.add_interviews(2), str(uuid4())
        make_grants(store.storage, "ann", *known[:granted], *store.add_interviews(2))
        for user_id in ("ann", "bob"):
            with store.storage.transaction() as transaction:
                found = transaction.find_unknown_interviews([*known, unknown], granted_to=user_id)
                assert found == {unknown}
                none = transaction.find_unknown_interviews(known, granted_to=user_id)
                assert none == frozenset()

    def test_what_a_user_is_to_be_granted_stands_until_the_end(self, store: Store) -> None:
        """A delete of an interview that the user has no access to yet waits for the end."""
        granted, new = store.add_interviews(2)
        make_grants(store.storage, "ann", granted)
        with store.storage.transaction() as transaction:
            transaction.find_unknown_interviews([granted, new], granted_to="ann")
            delete = Background(lambda: store.delete_interview(new))
            store.until_waiting(delete)
            assert not delete.over
        assert delete.result()

    def test_known_interviews_stand_until_the_end(self, store: Store) -> None:
        """A delete of an interview that was found waits for the end of the transaction."""
        interview_id, other_id = store.add_interviews(2)
        with store.storage.transaction() as transaction:
            assert transaction.find_unknown_interviews([interview_id]) == frozenset()
            delete = Background(lambda: store.delete_interview(interview_id))
            store.until_waiting(delete)
            assert not delete.over
            assert transaction.find_unknown_interviews([interview_id]) == frozenset()
        assert delete.result()
        with store.storage.transaction() as transaction:
            assert transaction.find_unknown_interviews([interview_id, other_id]) == {interview_id}


class TestGetInterviewDetails:
    """get_interview_details."""

    def test_interviews_have_their_configuration(self, store: Store) -> None:
        """An interview is returned whole, with its configuration."""
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
        """Without configuration there is no access by default, and it ends after its duration."""
        interview = an_interview()
        store.add_interview(interview, configured=False)
        with store.storage.transaction() as transaction:
            (found,) = transaction.get_interview_details([interview.id])
        assert found == interview
        assert not found.is_default_access_allowed
        assert found.should_end_interview_after_duration

    def test_only_interviews_of_these_ids_are_returned(self, store: Store) -> None:
        """Ids that no interview has are left out, and so are interviews not asked for."""
        one, _ = store.add_interviews(2)
        with store.storage.transaction() as transaction:
            found = transaction.get_interview_details([one, str(uuid4())])
            assert [interview.id for interview in found] == [one]
            assert list(transaction.get_interview_details([])) == []

    def test_interviews_stand_until_the_end(self, store: Store) -> None:
        """A delete of an interview that was read waits for the end of the transaction."""
        (interview_id,) = store.add_interviews(1)
        with store.storage.transaction() as transaction:
            assert transaction.get_interview_details([interview_id])
            delete = Background(lambda: store.delete_interview(interview_id))
            store.until_waiting(delete)
            assert not delete.over
        assert delete.result()


class TestGetExistingUserAccess:
    """get_existing_user_access."""

    def test_all_grants_of_these_users_are_returned(self, store: Store) -> None:
        """The grants of the users asked for are returned, all of them and no others."""
        one, two = store.add_interviews(2)
        make_grants(store.storage, "ann", one, two)
        make_grants(store.storage, "bob", two)
        make_grants(store.storage, "eve", one)
        with store.storage.transaction() as transaction:
            grants = transaction.get_existing_user_access(["ann", "bob", "nobody"])
            assert sorted((grant.user_id, grant.interview_id) for grant in grants) == [
                ("ann", one),
                ("ann", two),
                ("bob", two),
            ]
            assert list(transaction.get_existing_user_access([])) == []


class TestBulkCreateUserAccess:
    """bulk_create_user_access; on PostgreSQL also by the statements for many grants."""

    @pytest.fixture(params=[1_000, 1], ids=["few", "many"])
    def bulk_threshold(self, request: pytest.FixtureRequest) -> int:
        """Create grants by the statements for few and for many."""
        threshold: int = request.param
        return threshold

    def test_missing_grants_are_made_and_counted(self, store: Store) -> None:
        """Each missing grant of each order is made, over several chunks, and counted for it."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [
                    RequestedGrantsDTO("ann", tuple(reversed(ids))),
                    RequestedGrantsDTO("bob", tuple(ids[:2])),
                ]
            )
        assert counts == [len(ids), 2]
        assert store.granted("ann") == ids
        assert store.granted("bob") == ids[:2]

    def test_standing_grants_are_neither_touched_nor_counted(self, store: Store) -> None:
        """A grant that stands is left as it is and counted for nobody."""
        ids = store.add_interviews(5)
        make_grants(store.storage, "ann", ids[1], ids[3])
        assert make_grants(store.storage, "ann", *ids) == 3
        assert store.granted("ann") == ids

    def test_grant_that_another_transaction_made_meanwhile_is_not_counted(
        self, store: Store
    ) -> None:
        """A grant that another transaction makes after this one began is counted by one of them."""
        ids = store.add_interviews(3)
        with store.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(["ann"])) == []
            other = Background(lambda: make_grants(store.storage, "ann", *ids[:2]))
            store.until_waiting(other)
            side_by_side = other.over
            order = RequestedGrantsDTO("ann", tuple(ids))
            counts = transaction.bulk_create_user_access([order])
        assert (counts, other.result()) == (([1], 2) if side_by_side else ([3], 0))
        assert store.granted("ann") == ids

    def test_open_transaction_with_the_same_grant_is_waited_for(self, store: Store) -> None:
        """Whether another's uncommitted grant counts is known, and told, when its fate is."""
        (interview_id,) = store.add_interviews(1)
        with ends_with(KeyError, store.storage) as first:
            order = RequestedGrantsDTO("ann", (interview_id,))
            assert first.bulk_create_user_access([order]) == [1]
            other = Background(lambda: make_grants(store.storage, "ann", interview_id))
            store.until_waiting(other)
            assert not other.over
            raise KeyError
        assert other.result() == 1
        assert store.granted("ann") == [interview_id]

    @pytest.mark.parametrize("standing", [0, 3, 1_200], ids=["none", "some", "all"])
    @pytest.mark.parametrize("kept", [True, False])
    def test_many_grants_are_counted_beside_an_open_transaction(
        self, store: Store, standing: int, kept: bool
    ) -> None:
        """Of 1,200 grants none, some or all stand, and one is another's, whatever becomes of it."""
        ids = store.add_interviews(1_201)
        if standing:
            make_grants(store.storage, "ann", *ids[:standing])
        fate: AbstractContextManager[object] = nullcontext() if kept else pytest.raises(KeyError)
        with fate, store.storage.transaction() as first:
            order = RequestedGrantsDTO("ann", (ids[-1],))
            assert first.bulk_create_user_access([order]) == [1]
            other = Background(lambda: make_grants(store.storage, "ann", *ids))
            store.until_waiting(other)
            assert not other.over
            if not kept:
                raise KeyError
        assert other.result() == 1_201 - standing - kept
        assert store.granted("ann") == ids

    def test_shared_grant_counts_for_the_first_order(self, store: Store) -> None:
        """A grant that several orders ask for is counted for the first of them in the sequence."""
        ids = store.add_interviews(4)
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [
                    RequestedGrantsDTO("ann", (ids[3], ids[1])),
                    RequestedGrantsDTO("ann", tuple(ids)),
                    RequestedGrantsDTO("ann", (ids[0],)),
                    RequestedGrantsDTO("bob", (ids[0],)),
                ]
            )
        assert counts == [2, 2, 0, 1]

    @pytest.mark.parametrize("interviews", [1, 2, CHUNK_SIZE, CHUNK_SIZE + 1])
    def test_users_who_want_the_same_are_each_counted(self, store: Store, interviews: int) -> None:
        """Of users who want the same interviews each is counted, whatever stands of it."""
        ids = store.add_interviews(interviews)
        make_grants(store.storage, "bob", ids[-1])
        make_grants(store.storage, "cyd", *ids)
        users = ["dan", "bob", "ann", "cyd", "eve"]
        told: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [RequestedGrantsDTO(user_id, tuple(ids)) for user_id in users],
                lambda done, total: told.append((done, total)),
            )
        assert counts == [interviews, interviews - 1, interviews, 0, interviews]
        assert [store.granted(user_id) for user_id in users] == [ids] * len(users)
        assert told == sorted(set(told))
        assert told[-1] == (len(users) * interviews, len(users) * interviews)

    @pytest.mark.parametrize("kept", [True, False])
    def test_users_who_want_the_same_beside_an_open_transaction(
        self, store: Store, kept: bool
    ) -> None:
        """One of these grants is another transaction's, whatever becomes of it."""
        ids = store.add_interviews(2)
        fate: AbstractContextManager[object] = nullcontext() if kept else pytest.raises(KeyError)

        def grant_all() -> list[int]:
            with store.storage.transaction() as transaction:
                orders = [RequestedGrantsDTO(user_id, tuple(ids)) for user_id in ("ann", "bob")]
                return list(transaction.bulk_create_user_access(orders))

        with fate, store.storage.transaction() as first:
            first.bulk_create_user_access([RequestedGrantsDTO("bob", (ids[0],))])
            other = Background(grant_all)
            store.until_waiting(other)
            if not kept:
                raise KeyError
        assert other.result() == [2, 2 - kept]

    def test_every_order_has_a_count(self, store: Store) -> None:
        """Orders that add nothing, and orders of nothing, are counted as 0."""
        (interview_id,) = store.add_interviews(1)
        make_grants(store.storage, "ann", interview_id)
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", (interview_id,)), RequestedGrantsDTO("ann", ())]
            )
            assert counts == [0, 0]
            assert transaction.bulk_create_user_access([]) == []

    @pytest.mark.parametrize("position", range(2 * CHUNK_SIZE + 1))
    def test_missing_interview_fails_the_whole_as_transient(
        self, store: Store, position: int
    ) -> None:
        """An interview that does not exist, in whichever chunk, fails as transient: no row."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        assert store.delete_interview(ids[position])
        orders = [
            RequestedGrantsDTO("bob", (ids[position - 1],)),
            RequestedGrantsDTO("ann", tuple(ids)),
        ]
        with ends_with(StorageError, store.storage, sqlstate="23503") as transaction:
            transaction.bulk_create_user_access(orders)
        assert store.granted("ann") == []
        assert store.granted("bob") == []

    @pytest.mark.parametrize("user_id", LETTERS)
    def test_user_ids_are_taken_to_the_letter(self, store: Store, user_id: str) -> None:
        """A user id with any characters names that user and nobody else."""
        one, two = store.add_interviews(2)
        bystanders = ["bad", "user", "blank", "Zoe", "line", "tab", *set(LETTERS) - {user_id}]
        assert make_grants(store.storage, user_id, one, two) == 2
        assert make_grants(store.storage, user_id, one, two) == 0
        assert store.granted(user_id) == [one, two]
        with store.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(bystanders)) == []

    def test_user_ids_side_by_side_stay_apart(self, store: Store) -> None:
        """Orders of users whose ids look alike are each counted and granted for themselves."""
        (interview_id,) = store.add_interviews(1)
        orders = [RequestedGrantsDTO(user_id, (interview_id,)) for user_id in LETTERS]
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(orders)
            grants = transaction.get_existing_user_access(LETTERS)
        assert counts == [1] * len(LETTERS)
        assert len(grants) == len(LETTERS)
        assert set(grants) == {UserInterviewAccessDTO(user, interview_id) for user in LETTERS}

    def test_progress_rises_to_its_total(self, store: Store) -> None:
        """on_chunk is called after each chunk, rising, the last time with both numbers equal."""
        ids = store.add_interviews(2 * CHUNK_SIZE)
        make_grants(store.storage, "ann", ids[0])
        told: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", (*ids,)), RequestedGrantsDTO("bob", (ids[0],))],
                lambda done, total: told.append((done, total)),
            )
        total = 2 * CHUNK_SIZE + 1
        assert told == [(CHUNK_SIZE, total), (2 * CHUNK_SIZE, total), (total, total)]

    def test_no_progress_is_told_without_grants(self, store: Store) -> None:
        """on_chunk is not called where no order asks for a grant."""
        told: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", ())], lambda done, total: told.append((done, total))
            )
        assert told == []

    def test_progress_that_raises_keeps_nothing(self, store: Store) -> None:
        """An on_chunk that raises, at the last chunk too, leaves no row behind."""
        ids = store.add_interviews(2 * CHUNK_SIZE)

        def stop_at_the_end(done: int, total: int) -> None:
            if done == total:
                raise KeyError

        with ends_with(KeyError, store.storage) as transaction:
            order = RequestedGrantsDTO("ann", tuple(ids))
            transaction.bulk_create_user_access([order], stop_at_the_end)
        assert store.granted("ann") == []


class TestCreateInterviewAttempt:
    """create_interview_attempt."""

    def test_attempts_are_added(self, store: Store) -> None:
        """The attempts stand as they were given, to the microsecond, one user's several too."""
        (interview_id,) = store.add_interviews(1)
        attempts = [an_attempt(interview_id), an_attempt(interview_id)]
        with store.storage.transaction() as transaction:
            transaction.create_interview_attempt([])
            transaction.create_interview_attempt(attempts)
        assert sorted(store.attempts(), key=str) == sorted(attempts, key=str)

    def test_missing_interview_fails_as_transient(self, store: Store) -> None:
        """An interview that does not exist fails the whole as transient, adding nothing."""
        (interview_id,) = store.add_interviews(1)
        attempts = [an_attempt(interview_id), an_attempt(str(uuid4()))]
        with ends_with(StorageError, store.storage, sqlstate="23503") as transaction:
            transaction.create_interview_attempt(attempts)
        assert list(store.attempts()) == []


class TestTransaction:
    """transaction."""

    def test_all_of_it_is_kept_at_its_end(self, store: Store) -> None:
        """Grants, attempts and jobs of one transaction all stand after it."""
        (interview_id,) = store.add_interviews(1)
        attempt = an_attempt(interview_id)
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            transaction.create_interview_attempt([attempt])
            transaction.record_jobs([finished("a", 1)])
        assert store.granted("ann") == [interview_id]
        assert list(store.attempts()) == [attempt]
        assert store.storage.get_finished_job("a") == finished("a", 1)

    def test_nothing_of_it_is_seen_before_its_end(self, store: Store) -> None:
        """Nobody sees a grant or a job of a transaction that is still open."""
        (interview_id,) = store.add_interviews(1)

        def seen() -> tuple[list[str], FinishedJobDTO | None]:
            return store.granted("ann"), store.storage.get_finished_job("a")

        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            transaction.record_jobs([finished("a", 1)])
            reader = Background(seen)
            store.until_waiting(reader)
            side_by_side = reader.over
        assert reader.result() == (
            ([], None) if side_by_side else ([interview_id], finished("a", 1))
        )

    def test_block_that_raises_keeps_nothing(self, store: Store) -> None:
        """What the block raises leaves it as it is, and nothing of the transaction stands."""
        (interview_id,) = store.add_interviews(1)
        with ends_with(KeyError, store.storage) as one:
            one.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
            one.create_interview_attempt([an_attempt(interview_id)])
            one.record_jobs([finished("a", 1)])
            raise KeyError("the block's own")
        assert store.granted("ann") == []
        assert list(store.attempts()) == []
        assert store.storage.get_finished_job("a") is None

    def test_store_goes_on_after_a_failure(self, store: Store) -> None:
        """After a transaction that failed the next one works."""
        (interview_id,) = store.add_interviews(1)
        with pytest.raises(StorageError):
            make_grants(store.storage, "ann", str(uuid4()))
        assert make_grants(store.storage, "ann", interview_id) == 1

    def test_granted_interview_cannot_be_deleted(self, store: Store) -> None:
        """The platform cannot delete an interview that somebody has access to."""
        (interview_id,) = store.add_interviews(1)
        make_grants(store.storage, "ann", interview_id)
        assert not store.delete_interview(interview_id)
        assert store.granted("ann") == [interview_id]


TERMINATE = (
    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'interview-access-worker'"
)


class TestPostgres:
    """What only PostgreSQL can show: its locks side by side, and its errors."""

    def test_lock_without_wait_does_not_wait(self, postgres: PostgresStore) -> None:
        """Without wait, the answer comes while another transaction holds a job."""
        with postgres.storage.transaction() as first:
            first.lock_jobs(["b"], wait=True)
            other = Background(lambda: lock(postgres.storage, ["a", "b"], wait=False))
            assert other.result() == {"a"}

    def test_read_committed_sees_what_was_made_meanwhile(self, postgres: PostgresStore) -> None:
        """A grant that another transaction committed after this one began counts as standing."""
        ids = postgres.add_interviews(2)
        with postgres.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(["ann"])) == []
            other = Background(lambda: make_grants(postgres.storage, "ann", ids[0]))
            assert other.result() == 1
            order = RequestedGrantsDTO("ann", tuple(ids))
            assert transaction.bulk_create_user_access([order]) == [1]

    def test_commit_is_durable_whatever_the_server_prefers(self, postgres: PostgresStore) -> None:
        """A transaction commits synchronously where the database's default is not to."""
        postgres.configure("synchronous_commit", "off")
        postgres.execute("CREATE TABLE seen (synchronous_commit text)")
        postgres.execute(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO seen VALUES (current_setting('synchronous_commit')); RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER look AFTER INSERT ON grant_access_job"
            " FOR EACH STATEMENT EXECUTE FUNCTION look()"
        )
        with postgres.another() as storage:
            finish(storage, finished("a"))
        assert postgres.value("SELECT synchronous_commit FROM seen") == "on"

    @pytest.mark.parametrize(
        ("waits", "lock_timeout"), [(None, "20000"), (True, "20000"), (False, "1000")]
    )
    def test_bounds_hold_whatever_comes_first(
        self, postgres: PostgresStore, waits: bool | None, lock_timeout: str
    ) -> None:
        """A transaction has its bounds in time from its first statement on, whichever that is."""
        postgres.execute("CREATE TABLE seen (name text, setting text)")
        postgres.execute(
            "CREATE FUNCTION look() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " INSERT INTO seen SELECT name, setting FROM pg_settings; RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER look AFTER INSERT ON grant_access_job"
            " FOR EACH STATEMENT EXECUTE FUNCTION look()"
        )
        with postgres.storage.transaction() as transaction:
            if waits is not None:
                transaction.lock_jobs(["a"], wait=waits)
            transaction.record_jobs([finished("a")])
        assert {
            name: postgres.value("SELECT setting FROM seen WHERE name = :name", name=name)
            for name in (
                *("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"),
                "client_connection_check_interval",
            )
        } == {
            "lock_timeout": lock_timeout,
            "statement_timeout": "120000",
            "idle_in_transaction_session_timeout": "60000",
            "client_connection_check_interval": "1000",
        }

    def test_statements_on_many_grants_are_planned_for_those(self, postgres: PostgresStore) -> None:
        """However often many ids come, no plan is used that was made for arrays of any length."""
        ids = postgres.add_interviews(1_200)
        for turn in range(12):
            with postgres.storage.transaction() as transaction:
                transaction.find_unknown_interviews(ids, granted_to="ann")
                order = RequestedGrantsDTO("ann", tuple(ids[: 1_000 + turn]))
                transaction.bulk_create_user_access([order])
                plans = transaction._connection.exec_driver_sql(
                    "SELECT statement FROM pg_prepared_statements"
                    " WHERE generic_plans > 0 AND statement LIKE '%%uuid[]%%'"
                    " AND statement NOT LIKE '%%pg_prepared%%'"
                )
                assert plans.scalars().all() == []

    def test_table_that_keeps_rows_out(self, postgres: PostgresStore) -> None:
        """Where a trigger swallows some of many rows, those are counted that were made."""
        ids = postgres.add_interviews(1_000)
        postgres.execute(
            "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RETURN CASE WHEN NEW.interview_id = '{ids[0]}' THEN NULL ELSE NEW END; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER swallow BEFORE INSERT ON interview_userinterviewaccess"
            " FOR EACH ROW EXECUTE FUNCTION swallow()"
        )
        assert make_grants(postgres.storage, "ann", *ids) == 999
        assert postgres.granted("ann") == ids[1:]

    def test_lock_timeout(self, postgres: PostgresStore) -> None:
        """A wait for a lock ends at its limit, as transient."""
        with (
            postgres.another(limits=DatabaseLimits(lock=0.05)) as hasty,
            postgres.storage.transaction() as holder,
        ):
            holder.record_jobs([finished("a", 1)])
            with ends_with(StorageError, hasty, sqlstate="55P03") as transaction:
                transaction.record_jobs([finished("a", 1)])

    def test_duplicate_ends_an_unresponsive_holder(self, postgres: PostgresStore) -> None:
        """A duplicate ends the transaction of a worker that has stopped, and gets the lock."""
        (interview_id,) = postgres.add_interviews(1)
        limits = DatabaseLimits(busy=0.05, unresponsive=0)
        with (
            postgres.another(limits=limits) as duplicate,
            ends_with(StorageError, postgres.storage, sqlstate="57P01") as stopped,
        ):
            stopped.lock_jobs(["a"], wait=True)
            stopped.record_jobs([finished("a")])
            assert lock(duplicate, ["a", "b"], wait=True) == {"a", "b"}
            stopped.bulk_create_user_access([RequestedGrantsDTO("ann", (interview_id,))])
        assert postgres.granted("ann") == []

    def test_duplicate_ends_nothing_before_the_limit(self, postgres: PostgresStore) -> None:
        """A holder that is between two statements for a moment goes on; the duplicate is busy."""
        limits = DatabaseLimits(busy=0.05, unresponsive=PATIENCE_SECONDS)
        with postgres.another(limits=limits) as duplicate:
            with postgres.storage.transaction() as holder:
                holder.lock_jobs(["a"], wait=True)
                with pytest.raises(JobBusyError):
                    lock(duplicate, ["a"], wait=True)
                holder.record_jobs([finished("a")])
            assert lock(duplicate, ["a"], wait=True) == {"a"}

    def test_duplicate_never_ends_a_running_statement(self, postgres: PostgresStore) -> None:
        """A holder whose statement is running goes on, however long it takes."""
        limits = DatabaseLimits(busy=0.05, unresponsive=0, statement=PATIENCE_SECONDS)

        def hold() -> None:
            with ends_with(LedgerConflictError, postgres.storage) as holder:
                holder.lock_jobs(["a"], wait=True)
                holder.record_jobs([finished("a")])

        with (
            postgres.another(limits=limits) as duplicate,
            postgres.another() as other,
        ):
            with other.transaction() as blocking:
                blocking.record_jobs([finished("a")])
                holder = Background(hold)
                postgres.until_waiting(holder)
                with pytest.raises(JobBusyError):
                    lock(duplicate, ["a"], wait=True)
            holder.result()

    def test_lock_of_another_role_does_not_stop_a_job(self, postgres: PostgresStore) -> None:
        """A session that is no worker's holds the lock: the ledger's key alone decides."""
        limits = DatabaseLimits(busy=0.05, unresponsive=0)
        with (
            role(postgres.database_url, "pg_read_all_stats") as url,
            postgres.storage.transaction() as holder,
        ):
            holder.lock_jobs(["a"], wait=True)
            storage = PostgresStorage(url, limits=limits)
            assert lock(storage, ["a"], wait=True) == {"a"}
            storage.close()

    def test_duplicate_ends_a_holder_that_receives_nothing(self, postgres: PostgresStore) -> None:
        """A worker that stopped while rows are sent to it is ended once the statement is overdue.

        No timeout of the server ends that statement: it blocks in sending.
        """
        limits = DatabaseLimits(busy=0.05, statement=1)
        url = make_url(postgres.database_url).set(drivername="postgresql")
        with (
            psycopg.connect(url.render_as_string(hide_password=False)) as holder,
            postgres.another(limits=limits) as duplicate,
        ):
            holder.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended('grant_access_job:a', 0))"
            )
            holder.pgconn.send_query(b"SELECT repeat('x', 1000) FROM generate_series(1, 100000)")
            waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'"
            until(lambda: postgres.value(waiting) == 1)
            until(lambda: is_locked_by(duplicate, "a"))
            holder.close()

    def test_statement_timeout(self, postgres: PostgresStore) -> None:
        """A statement ends at its limit, as transient."""
        with (
            postgres.another(limits=DatabaseLimits(statement=0.05)) as hasty,
            postgres.storage.transaction() as holder,
        ):
            holder.lock_jobs(["a"], wait=True)
            with ends_with(StorageError, hasty, sqlstate="57014") as transaction:
                transaction.lock_jobs(["a"], wait=True)

    def test_idle_timeout(self, postgres: PostgresStore) -> None:
        """A transaction that said nothing for too long is ended by the server, as transient."""
        with (
            postgres.another(limits=DatabaseLimits(idle=0.05)) as frozen,
            ends_with(StorageError, frozen, sqlstate="25P03") as transaction,
        ):
            transaction.lock_jobs(["a"], wait=True)
            assert lock(postgres.storage, ["a"], wait=True)
            transaction.lock_jobs(["b"], wait=True)

    def test_terminated_backend(self, postgres: PostgresStore) -> None:
        """A connection that an operator ends is trouble that passes, and the next one works."""
        with ends_with(StorageError, postgres.storage, sqlstate="57P01") as transaction:
            transaction.lock_jobs(["a"], wait=True)
            postgres.value(TERMINATE)
            transaction.lock_jobs(["b"], wait=True)
        assert lock(postgres.storage, ["a"], wait=False) == {"a"}

    def test_connection_lost_inside_commit(self, postgres: PostgresStore) -> None:
        """Where it is not known whether a transaction was kept, that is transient."""
        postgres.execute(
            "CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$"
        )
        postgres.execute(
            "CREATE CONSTRAINT TRIGGER die AFTER INSERT ON grant_access_job"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION die()"
        )
        reached_the_end = False
        with ends_with(StorageError, postgres.storage, sqlstate="57P01") as transaction:
            transaction.record_jobs([finished("a")])
            reached_the_end = True
        assert reached_the_end
        assert postgres.storage.get_finished_job("a") is None

    def test_deadlock(self, postgres: PostgresStore) -> None:
        """A deadlock that others cause is trouble that passes, for one of the two."""
        postgres.configure("deadlock_timeout", "20ms")

        def second() -> None:
            with storage.transaction() as transaction:
                transaction.record_jobs([finished("b")])
                transaction.record_jobs([finished("a")])

        with postgres.another() as storage:
            errors = []
            try:
                with storage.transaction() as first:
                    first.record_jobs([finished("a")])
                    other = Background(second)
                    postgres.until_waiting(other)
                    first.record_jobs([finished("b")])
            except StorageError as error:
                errors.append(error)
            try:
                other.result()
            except StorageError as error:
                errors.append(error)
        (deadlock,) = errors
        assert not deadlock.is_outage
        assert deadlock.sqlstate == "40P01"

    def test_unreachable_server(self) -> None:
        """A server that cannot be reached is trouble that passes, told without the password."""
        url = "postgresql+psycopg://ann:geheim@/interviews?host=/nonexistent"
        with pytest.raises(StorageError) as caught:
            lock(PostgresStorage(url), ["a"], wait=True)
        assert caught.value.sqlstate is None
        assert isinstance(caught.value.__cause__, DBAPIError)
        assert "geheim" not in repr(caught.value)

    def test_missing_table(self, postgres: PostgresStore) -> None:
        """A database without our tables is trouble that does not pass by itself."""
        postgres.execute("DROP TABLE grant_access_job")
        with pytest.raises(StorageError) as caught:
            finish(postgres.storage, finished("a"))
        assert caught.value.is_outage
        assert caught.value.sqlstate == "42P01"
        assert "grant_access_job" in str(caught.value)

    def test_missing_interview_is_not_named(self, postgres: PostgresStore) -> None:
        """The error of a refused row says which rule, and not whose row it was."""
        missing = str(uuid4())
        with pytest.raises(StorageError) as caught:
            make_grants(postgres.storage, "ann-of-the-row", missing)
        assert "interview_userinterviewaccess" in str(caught.value)
        assert missing not in repr(caught.value)
        assert "ann-of-the-row" not in repr(caught.value)

    def test_parameters_stay_out_of_the_chain_of_errors(self, postgres: PostgresStore) -> None:
        """The driver's error that is chained, and so logged, shows no statement's parameters."""
        postgres.execute("ALTER TABLE grant_access_job DROP COLUMN created")
        with pytest.raises(StorageError) as caught:
            finish(postgres.storage, finished("job-of-the-row"))
        assert "job-of-the-row" not in str(caught.value.__cause__)

    def test_collision_of_other_keys_is_not_swallowed(self, postgres: PostgresStore) -> None:
        """A grant whose row number is taken, and the next, fails and is not counted as granted."""
        one, two = postgres.add_interviews(2)
        postgres.execute(
            "INSERT INTO interview_userinterviewaccess (id, user_id, interview_id)"
            " OVERRIDING SYSTEM VALUE VALUES"
            " (1, 'bob', CAST(:id AS uuid)), (2, 'eve', CAST(:id AS uuid))",
            id=one,
        )
        with pytest.raises(StorageError) as caught:
            make_grants(postgres.storage, "ann", two)
        assert caught.value.sqlstate == "23505"
        assert postgres.granted("ann") == []
