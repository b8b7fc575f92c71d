"""Retention: pruning of old jobs, and what is kept of them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from storage.dtos import (
    FiguresDTO,
    FinishedJobDTO,
    OutcomeDTO,
    PruneCountsDTO,
    PrunedJobDTO,
    RejectedIdsDTO,
)
from storage.interface import Storage
from tests.storage.transactions import DIGEST, a_request, finish, finished, ledger_entry
from tests.support.stores import Background, PostgresStore, Store

NOW = timedelta()
LONG = timedelta(days=30)


def prune(storage: Storage, older_than: timedelta = NOW, limit: int = 100) -> PruneCountsDTO:
    """Prune one batch of jobs in a transaction."""
    with storage.transaction() as transaction:
        return transaction.prune_jobs(older_than, limit).counts


def prune_cancellations(storage: Storage, older_than: timedelta = NOW) -> PruneCountsDTO:
    """Prune one batch of cancellation requests in a transaction."""
    with storage.transaction() as transaction:
        return transaction.prune_cancellations(older_than, 100)


def cancel(storage: Storage, job_id: str) -> None:
    """Request a cancellation in a transaction."""
    with storage.transaction() as transaction:
        transaction.request_cancellation(job_id)


def pruned(storage: Storage, *job_ids: str) -> dict[str, PrunedJobDTO]:
    """Return the tombstones of these jobs."""
    with storage.transaction() as transaction:
        return dict(transaction.find_jobs(job_ids).pruned)


def with_outcome(job_id: str, outcome: OutcomeDTO) -> FinishedJobDTO:
    """Return a job with this outcome."""
    return FinishedJobDTO(ledger_entry(job_id), outcome)


class TestPruneJobs:
    """``prune_jobs``."""

    def test_a_tombstone_replaces_a_job(self, store: Store) -> None:
        """A pruned job is not finished any more, and its request and count are kept."""
        finish(store.storage, finished("a", 7))
        assert prune(store.storage) == PruneCountsDTO(jobs=1)
        assert store.storage.get_finished_job("a") is None
        assert store.storage.get_pruned_job("a") == PrunedJobDTO(DIGEST[:8], created=7)
        assert pruned(store.storage, "a", "A", "b") == {"a": PrunedJobDTO(DIGEST[:8], created=7)}

    @pytest.mark.parametrize("digest", ["0" * 64, "7" + "f" * 63, "8" + "0" * 63, "f" * 64])
    def test_every_digest_is_kept(self, store: Store, digest: str) -> None:
        """The first digits of a digest are kept, whatever its sign as an integer."""
        finish(store.storage, finished("a", 0, digest))
        prune(store.storage)
        assert pruned(store.storage, "a")["a"].digest_prefix == digest[:8]

    def test_a_result_without_a_count_is_kept(self, store: Store) -> None:
        """The result of a job that creates no grants is kept as it is."""
        result = {"success": True, "interview_attempt_id": "0" * 36}
        finish(store.storage, with_outcome("a", OutcomeDTO("succeeded", result)))
        prune(store.storage)
        assert pruned(store.storage, "a") == {"a": PrunedJobDTO(DIGEST[:8], result=result)}

    def test_the_class_of_an_error_is_kept(self, store: Store) -> None:
        """Of an error its class is kept, not its text."""
        error = {"type": "InvalidInterviewIdException", "sentence": "secret", "details": {}}
        finish(store.storage, with_outcome("a", OutcomeDTO("failed", error=error)))
        prune(store.storage)
        assert pruned(store.storage, "a") == {
            "a": PrunedJobDTO(DIGEST[:8], error_type="InvalidInterviewIdException")
        }

    def test_what_belongs_to_a_job_is_deleted(self, store: Store) -> None:
        """Rejected IDs, counts by user, the cancellation and the outbox request go with a job."""
        rejected = OutcomeDTO(
            "failed",
            error={"type": "E", "sentence": "s", "details": {}},
            rejected=RejectedIdsDTO(("x",), ()),
        )
        cohort = OutcomeDTO(
            "succeeded", {}, figures=FiguresDTO(1, 0, 0, 1), created_by_user={"ann": 1}
        )
        finish(store.storage, with_outcome("a", rejected), with_outcome("b", cohort))
        cancel(store.storage, "a")
        cancel(store.storage, "unknown")
        for job_id in "b", "unfinished":
            store.add_request(a_request(job_id))
        expected = PruneCountsDTO(2, rejections=1, cohorts=1, cancellations=1, requests=1)
        assert prune(store.storage) == expected
        assert not store.storage.is_cancelled("a")
        assert store.storage.is_cancelled("unknown")
        assert store.storage.get_request("b") is None
        assert store.storage.get_request("unfinished") is not None

    def test_younger_jobs_stay(self, store: Store) -> None:
        """A job that finished within the retention stays."""
        finish(store.storage, finished("a", 1))
        assert prune(store.storage, LONG) == PruneCountsDTO()
        assert store.storage.get_finished_job("a") == finished("a", 1)

    def test_batches_continue_at_the_last_job(self, store: Store) -> None:
        """Batches of a limited size cover all jobs, also those of one transaction."""
        finish(store.storage, *(finished(f"{number:02}", 1) for number in range(25)))
        sizes, last = [], None
        while True:
            with store.storage.transaction() as transaction:
                batch = transaction.prune_jobs(NOW, 10, since=last)
            sizes.append(batch.counts.jobs)
            last = batch.last
            if last is None:
                break
        assert sizes == [10, 10, 5]

    def test_jobs_of_one_time_are_pruned(self, postgres: PostgresStore) -> None:
        """Many jobs that finished at the same time take several batches; locked ones end a run."""
        postgres.execute(
            "INSERT INTO grant_access_job (job_id, task, state, request_digest, finished_at)"
            " SELECT 'job ' || number, 'task', 'succeeded', repeat('d', 64), '2020-01-01'"
            " FROM generate_series(1, 25) AS number"
        )
        moment = datetime(2020, 1, 1, tzinfo=UTC)
        with postgres.another() as other, other.transaction() as redelivery:
            redelivery.lock_jobs(["job 1"], wait=True)
            batches = []
            for _ in range(4):
                with postgres.storage.transaction() as transaction:
                    batches.append(transaction.prune_jobs(NOW, 10, since=moment))
        assert sum(one.counts.jobs for one in batches) == 24
        assert [one.last for one in batches] == [moment, moment, None, None]

    def test_nothing_is_kept_of_a_failed_transaction(self, store: Store) -> None:
        """A job is finished again if the transaction that prunes it fails."""
        finish(store.storage, finished("a", 1))

        def fail() -> None:
            with store.storage.transaction() as transaction:
                transaction.prune_jobs(NOW, 10)
                raise RuntimeError

        with pytest.raises(RuntimeError):
            fail()
        assert store.storage.get_finished_job("a") == finished("a", 1)
        assert pruned(store.storage, "a") == {}

    def test_a_locked_job_is_skipped(self, postgres: PostgresStore) -> None:
        """A job that a redelivery has locked stays until that has ended; others are pruned."""
        finish(postgres.storage, finished("a", 1), finished("b", 2))
        with postgres.another() as other, other.transaction() as redelivery:
            assert redelivery.lock_jobs(["a"], wait=True) == {"a"}
            assert prune(postgres.storage) == PruneCountsDTO(jobs=1)
            assert redelivery.find_jobs(["a", "b"]).finished == {"a": finished("a", 1)}
        assert prune(postgres.storage) == PruneCountsDTO(jobs=1)

    def test_a_redelivery_waits_for_the_batch_that_prunes_its_job(
        self, postgres: PostgresStore
    ) -> None:
        """A redelivery during the batch finds the tombstone, never neither row."""
        finish(postgres.storage, finished("a", 1))

        def redeliver() -> tuple[set[str], set[str]]:
            with postgres.another() as other, other.transaction() as transaction:
                transaction.lock_jobs(["a"], wait=True)
                found = transaction.find_jobs(["a"])
                return {*found.finished}, {*found.pruned}

        with postgres.storage.transaction() as transaction:
            transaction.prune_jobs(NOW, 10)
            redelivery = Background(redeliver)
            postgres.until_waiting(redelivery)
        assert redelivery.result() == (set(), {"a"})

    def test_a_locked_outbox_request_is_left_to_its_relay(self, postgres: PostgresStore) -> None:
        """A request that a relay has locked is not waited for; the relay deletes it."""
        finish(postgres.storage, finished("a", 1))
        postgres.add_request(a_request("a"))
        with postgres.another() as other, other.transaction() as relay:
            assert len(relay.lock_due_requests(10)) == 1
            assert prune(postgres.storage) == PruneCountsDTO(jobs=1)
            assert relay.delete_finished_requests(["a"]) == {"a"}

    def test_only_one_transaction_prunes(self, postgres: PostgresStore) -> None:
        """The lock of pruning is free again at the end of its transaction."""
        with postgres.another() as other, other.transaction() as first:
            assert first.lock_pruning()
            with postgres.storage.transaction() as transaction:
                assert not transaction.lock_pruning()
        with postgres.storage.transaction() as transaction:
            assert transaction.lock_pruning()


class TestPruneCancellations:
    """``prune_cancellations``."""

    def test_a_job_that_never_came_stays_cancelled(self, store: Store) -> None:
        """The request leaves a tombstone, for every request under its ID."""
        cancel(store.storage, "a")
        assert prune_cancellations(store.storage) == PruneCountsDTO(cancellations=1)
        assert not store.storage.is_cancelled("a")
        tombstone = PrunedJobDTO(None, error_type="JobCancelledException")
        assert pruned(store.storage, "a") == {"a": tombstone}

    def test_a_finished_job_keeps_its_outcome(self, store: Store) -> None:
        """The request of a job in the ledger leaves no tombstone."""
        finish(store.storage, finished("a", 1))
        cancel(store.storage, "a")
        assert prune_cancellations(store.storage) == PruneCountsDTO(cancellations=1)
        assert pruned(store.storage, "a") == {}
        assert store.storage.get_finished_job("a") == finished("a", 1)

    def test_a_pruned_job_keeps_its_tombstone(self, store: Store) -> None:
        """A cancellation of a pruned job does not change what is kept of it."""
        finish(store.storage, finished("a", 1))
        prune(store.storage)
        cancel(store.storage, "a")
        prune_cancellations(store.storage)
        assert pruned(store.storage, "a") == {"a": PrunedJobDTO(DIGEST[:8], created=1)}

    def test_younger_requests_stay(self, store: Store) -> None:
        """A request within the retention stays."""
        cancel(store.storage, "a")
        assert prune_cancellations(store.storage, LONG) == PruneCountsDTO()
        assert store.storage.is_cancelled("a")


class TestCountPrunable:
    """``count_prunable``."""

    def test_it_counts_what_pruning_deletes(self, store: Store) -> None:
        """The counts are those of pruning, and nothing changes."""
        finish(store.storage, finished("a", 1), finished("b", 1))
        for job_id in "a", "unknown":
            cancel(store.storage, job_id)
        store.add_request(a_request("b"))
        with store.storage.transaction() as transaction:
            counted = transaction.count_prunable(NOW)
            assert transaction.count_prunable(LONG) == PruneCountsDTO()
        assert counted == PruneCountsDTO(jobs=2, cancellations=2, requests=1)
        assert prune(store.storage) + prune_cancellations(store.storage) == counted


def test_a_relay_deletes_the_request_of_a_pruned_job(store: Store) -> None:
    """To the outbox a pruned job has finished."""
    finish(store.storage, finished("a", 1))
    prune(store.storage)
    store.add_request(a_request("a"))
    with store.storage.transaction() as transaction:
        assert transaction.delete_finished_requests(["a", "b"]) == {"a"}


def test_a_month_is_pruned_in_seconds(postgres: PostgresStore) -> None:
    """The older half of a month of jobs is pruned by age, in batches."""
    postgres.execute(
        "INSERT INTO grant_access_job (job_id, task, state, request_digest, created, finished_at)"
        " SELECT 'job ' || number, 'task', 'succeeded', encode(sha256(number::text::bytea), 'hex'),"
        " number, clock_timestamp() - number * interval '2.16 minutes'"
        " FROM generate_series(1, 20000) AS number"
    )
    began, last, counts = datetime.now(UTC), None, PruneCountsDTO()
    while True:
        with postgres.storage.transaction() as transaction:
            batch = transaction.prune_jobs(timedelta(days=15), 1_000, since=last)
        counts, last = counts + batch.counts, batch.last
        if last is None:
            break
    assert counts == PruneCountsDTO(jobs=10_001)
    assert (datetime.now(UTC) - began).total_seconds() < 20
    kept = "SELECT sum(created) FROM {}"
    total = sum(range(20_001))
    assert total == sum(
        postgres.value(kept.format(table))
        for table in ("grant_access_job", "grant_access_tombstone")
    )
