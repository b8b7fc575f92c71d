"""The ledger: finished jobs, conflicts and cancellation requests."""

from __future__ import annotations

from datetime import UTC, datetime

from storage.dtos import (
    FiguresDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    JobDTO,
    OutcomeDTO,
    RejectedIdsDTO,
)
from storage.errors import LedgerConflictError, LedgerError, StorageError
from tests.storage.transactions import (
    DIGEST,
    OTHER_DIGEST,
    failing_transaction,
    finish,
    finished,
    ledger_entry,
)
from tests.support.stores import Background, PostgresStore, Store


class TestFindJobs:
    """``find_jobs``."""

    def test_unknown_jobs_are_not_found(self, store: Store) -> None:
        """Jobs that were neither recorded nor cancelled are not found."""
        with store.storage.transaction() as transaction:
            assert transaction.find_jobs(["a", "b"]) == FoundJobsDTO({}, frozenset())
            assert transaction.find_jobs([]) == FoundJobsDTO({}, frozenset())

    def test_finished_jobs_are_found(self, store: Store) -> None:
        """Finished jobs are found with their requests and outcomes."""
        finish(store.storage, finished("a", 1), finished("b", 2, OTHER_DIGEST), finished("c", 3))
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(["a", "new", "b"])
        assert found.finished == {"a": finished("a", 1), "b": finished("b", 2, OTHER_DIGEST)}

    def test_cancellation_requests_are_found(self, store: Store) -> None:
        """Cancellation requests are found, whether their jobs have finished or not."""
        finish(store.storage, finished("a", 1), finished("b", 2))
        for job_id in "b", "c", "d":
            with store.storage.transaction() as transaction:
                transaction.request_cancellation(job_id)
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(["a", "b", "c", "C"])
        assert found == FoundJobsDTO(
            {"a": finished("a", 1), "b": finished("b", 2)}, frozenset({"b", "c"})
        )

    def test_concurrently_committed_job_is_found(self, postgres: PostgresStore) -> None:
        """A job recorded after this transaction began is found."""
        with postgres.storage.transaction() as transaction:
            assert transaction.find_jobs(["a"]) == FoundJobsDTO({}, frozenset())
            with postgres.another() as other:
                finish(other, finished("a", 1))
            assert transaction.find_jobs(["a"]).finished == {"a": finished("a", 1)}

    def test_similar_job_ids_are_different(self, store: Store) -> None:
        """Job IDs that resemble each other, or a statement, identify different jobs."""
        job_ids = ["a,b", "a", "b", "A", "á", "a\u0301", '"a"', "{a}", "a\\", "'", "NULL"]
        job_ids.append("🦄" * 255)
        jobs = [finished(job_id, number) for number, job_id in enumerate(job_ids)]
        finish(store.storage, *jobs)
        with store.storage.transaction() as transaction:
            found = transaction.find_jobs(job_ids)
        assert found.finished == dict(zip(job_ids, jobs, strict=True))


class TestRecordJobs:
    """``record_jobs`` and ``get_finished_job``."""

    def test_unknown_job_has_no_row(self, store: Store) -> None:
        """A job that has not finished has no ledger row."""
        assert store.storage.get_finished_job("a") is None

    def test_success_is_stored_completely(self, store: Store) -> None:
        """A success is stored with its request, result, figures and time."""
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

    def test_failure_is_stored_completely(self, store: Store) -> None:
        """A failure is stored with its error and without figures, also without a user."""
        error = {"type": "T", "sentence": "Says “no” \\ 🦄", "details": {"total": 1, "x": [None]}}
        job = FinishedJobDTO(JobDTO("a", "task", None, DIGEST), OutcomeDTO("failed", error=error))
        finish(store.storage, job)
        assert store.storage.get_finished_job("a") == job

    def test_rejected_ids_are_stored_unchanged(self, store: Store) -> None:
        """All rejected IDs are stored unchanged, also those that no other column type can hold."""
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

    def test_recorded_job_is_a_conflict(self, store: Store) -> None:
        """If the ledger has one of the jobs, none is recorded, and the first outcome remains."""
        finish(store.storage, finished("a", 1))
        with failing_transaction(LedgerConflictError, store.storage) as transaction:
            transaction.record_jobs([finished("b"), finished("a", 2)])
        assert store.storage.get_finished_job("a") == finished("a", 1)
        assert store.storage.get_finished_job("b") is None

    def test_recording_twice_in_one_transaction_is_a_conflict(self, store: Store) -> None:
        """Recording a job twice in one transaction raises, and nothing is stored."""
        with failing_transaction(LedgerConflictError, store.storage) as transaction:
            transaction.record_jobs([finished("a", 1)])
            transaction.record_jobs([finished("a", 2)])
        assert store.storage.get_finished_job("a") is None

    def test_conflict_with_a_transaction_that_commits(self, store: Store) -> None:
        """``record_jobs`` blocks on a transaction with the same job, and raises if it commits."""

        def second() -> None:
            with failing_transaction(LedgerConflictError, store.storage) as transaction:
                transaction.record_jobs([finished("a", 2), finished("b", 2)])

        with store.storage.transaction() as first:
            first.record_jobs([finished("a", 1)])
            other = Background(second)
            store.until_waiting(other)
            assert not other.over
        other.result()
        assert store.storage.get_finished_job("a") == finished("a", 1)
        assert store.storage.get_finished_job("b") is None

    def test_no_conflict_with_a_transaction_that_rolls_back(self, store: Store) -> None:
        """``record_jobs`` blocks on a transaction with the job; after a rollback it succeeds."""

        def second() -> None:
            finish(store.storage, finished("a", 2, OTHER_DIGEST))

        with failing_transaction(KeyError, store.storage) as first:
            first.record_jobs([finished("a")])
            other = Background(second)
            store.until_waiting(other)
            assert not other.over
            raise KeyError
        other.result()
        assert store.storage.get_finished_job("a") == finished("a", 2, OTHER_DIGEST)

    def test_suppressed_row_is_an_error(self, postgres: PostgresStore) -> None:
        """If a trigger suppresses a row, nothing of the transaction is stored."""
        postgres.execute(
            "CREATE FUNCTION suppress_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " RETURN CASE WHEN NEW.job_id = 'a' THEN NULL ELSE NEW END; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER suppress_row BEFORE INSERT ON grant_access_job"
            " FOR EACH ROW EXECUTE FUNCTION suppress_row()"
        )
        with failing_transaction(LedgerError, postgres.storage) as transaction:
            transaction.record_jobs([finished("a"), finished("b")])
        assert postgres.storage.get_finished_job("b") is None


class TestCancellation:
    """``request_cancellation``, ``find_cancelled_jobs`` and ``is_cancelled``."""

    def test_requested_cancellations_are_found(self, store: Store) -> None:
        """Only requested cancellations are found; a second request has no effect."""
        for job_id in "b", "a", "b":
            with store.storage.transaction() as transaction:
                transaction.request_cancellation(job_id)
        with store.storage.transaction() as transaction:
            assert transaction.find_cancelled_jobs(["a", "B", "c"]) == {"a"}
            assert transaction.find_cancelled_jobs([]) == frozenset()
        assert store.storage.is_cancelled("b")
        assert not store.storage.is_cancelled("c")

    def test_concurrent_cancellation_is_found(self, postgres: PostgresStore) -> None:
        """A cancellation committed after this transaction began is found."""
        with postgres.storage.transaction() as transaction:
            assert transaction.find_cancelled_jobs(["a"]) == frozenset()
            with postgres.another() as other, other.transaction() as canceller:
                canceller.request_cancellation("a")
            assert transaction.find_cancelled_jobs(["a"]) == {"a"}

    def test_rolled_back_cancellation_is_not_found(self, store: Store) -> None:
        """A cancellation in a transaction that raised is not found."""
        with failing_transaction(StorageError, store.storage) as transaction:
            transaction.request_cancellation("a")
            raise StorageError("the block raises")
        assert not store.storage.is_cancelled("a")


class TestMeasureLedger:
    """``measure_ledger``."""

    def test_an_empty_ledger(self, store: Store) -> None:
        """It has no oldest row."""
        store.clear()
        assert store.storage.measure_ledger().oldest_at is None

    def test_the_oldest_row(self, store: Store) -> None:
        """It is the first job that finished."""
        finish(store.storage, finished("a", 1))
        finish(store.storage, finished("b", 2))
        first = store.storage.get_finished_job("a")
        assert first is not None
        assert store.storage.measure_ledger().oldest_at == first.finished_at

    def test_the_estimate_after_an_analysis(self, postgres: PostgresStore) -> None:
        """PostgreSQL's estimate is the number of rows, and the size is that on disk."""
        finish(postgres.storage, *(finished(f"job-{number}", 1) for number in range(20)))
        postgres.execute("ANALYZE grant_access_job")
        totals = postgres.storage.measure_ledger()
        assert totals.rows == 20
        assert totals.size > 8_192
