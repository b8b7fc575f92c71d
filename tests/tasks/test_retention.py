"""Late deliveries of pruned jobs, on PostgreSQL and on the reference model."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import islice

import pytest
from interview_access.contracts import CREATE_INTERVIEW_ATTEMPT
from interview_access.errors import (
    InterviewAccessError,
    InvalidInterviewIdException,
    JobCancelledException,
    JobFailedError,
    JobIdReusedException,
)

from storage.dtos import PruneCountsDTO
from storage.interface import Storage
from tasks.celery_tasks import interview_attempt_job
from tasks.grant_access import GrantAccessInteractor
from tasks.interview_attempts import InterviewAttemptInteractor
from tasks.ledger import Cancellation, JobResult, cancel
from tasks.outcomes import result_of, status_of_pruned
from tasks.retention import PrunedBatch, prune
from tests.support.stores import PostgresStore, Store, a_cohort, a_job, all_at_once, created

NOW = timedelta()
DAY = timedelta(days=1)


def prune_all(storage: Storage) -> None:
    """Prune every job and every cancellation, whatever its age."""
    with storage.transaction() as transaction:
        transaction.prune_jobs(NOW, 1_000)
        transaction.prune_cancellations(NOW, 1_000)


def error_of(result: JobResult) -> InterviewAccessError:
    """Return the error that the poller reads."""
    assert result.outcome
    with pytest.raises(InterviewAccessError) as caught:
        result_of(result.outcome)
    return caught.value


class TestLateDelivery:
    """A copy of a message that is delivered after its job was pruned."""

    def test_it_creates_nothing_and_has_the_first_count(self, store: Store) -> None:
        """The poller reads the first count, although the grants were revoked meanwhile."""
        ids = store.add_interviews(3)
        job = a_job("a", "ann", ids)
        assert created(*store.grant(job)) == 3
        prune_all(store.storage)
        late = a_job("late", "ann", ids)
        assert created(*store.grant(late)) == 0  # the grants still exist

        (result,) = store.grant(job)

        assert created(result) == 3
        assert result.repeated
        assert result.refusal is None

    def test_revoked_grants_are_not_created_again(self, postgres: PostgresStore) -> None:
        """The platform deletes the grants after the job; a late copy does not create them."""
        job = a_job("a", "ann", postgres.add_interviews(3))
        postgres.grant(job)
        postgres.execute("DELETE FROM interview_userinterviewaccess")
        prune_all(postgres.storage)
        assert created(*postgres.grant(job)) == 3
        assert postgres.granted("ann") == []

    def test_it_is_settled_beside_new_jobs(self, store: Store) -> None:
        """In a batch, new jobs are executed and pruned ones are not."""
        ids = store.add_interviews(2)
        old, cohort = a_job("a", "ann", ids), a_cohort("b", ["bob", "cid"], ids)
        store.grant(old, cohort)
        prune_all(store.storage)
        results = store.grant(old, a_job("c", "dan", ids), cohort)
        assert [created(one) for one in results] == [2, 2, 4]
        assert [one.repeated for one in results] == [True, False, True]

    def test_another_request_is_refused(self, store: Store) -> None:
        """The ID of a pruned job belongs to its request for ever."""
        one, other = store.add_interviews(2)
        store.grant(a_job("a", "ann", [one]))
        prune_all(store.storage)
        (result,) = store.grant(a_job("a", "ann", [one, other]))
        assert isinstance(result.refusal, JobIdReusedException)
        assert created(result) == 1
        assert store.granted("ann") == [one]

    def test_a_failed_job_stays_failed(self, store: Store) -> None:
        """A job that failed fails again, although it could succeed now; the error names why."""
        unknown = "00000000-0000-4000-8000-000000000000"
        job = a_job("a", "ann", [unknown])
        store.grant(job)
        prune_all(store.storage)
        error = error_of(*store.grant(job))
        assert isinstance(error, JobFailedError)
        assert error.details["exc_type"] == InvalidInterviewIdException.__name__
        assert error.sentence == (
            "Job 'a' failed before, with InvalidInterviewIdException; its details were deleted at "
            "the end of their retention. If it is still needed, send the request under a new job "
            "ID."
        )

    def test_an_attempt_is_not_created_again(self, store: Store) -> None:
        """The late copy of an attempt job has the ID of the first attempt."""
        (interview_id,) = store.add_interviews(1)
        arguments = {"interview_id": interview_id, "user_id": "ann"}
        job = interview_attempt_job("a", (), arguments)
        interactor = InterviewAttemptInteractor(store.storage)
        (first,) = interactor.create_interview_attempt([job])
        prune_all(store.storage)
        (late,) = interactor.create_interview_attempt([job])
        assert late.outcome
        assert first.outcome
        assert late.outcome.result == first.outcome.result
        assert len(store.attempts()) == 1
        assert job.entry.task == CREATE_INTERVIEW_ATTEMPT

    def test_a_job_cancelled_before_it_came_stays_cancelled(self, store: Store) -> None:
        """A message kept aside for longer than the retention of its cancellation stays so."""
        cancel(store.storage, "a", None)
        prune_all(store.storage)
        (result,) = store.grant(a_job("a", "ann", store.add_interviews(1)))
        assert isinstance(error_of(result), JobCancelledException)
        assert result.refusal is None
        assert store.granted("ann") == []

    def test_a_pruned_job_cannot_be_cancelled(self, store: Store) -> None:
        """A cancellation after the job was pruned leaves its outcome."""
        job = a_job("a", "ann", store.add_interviews(1))
        store.grant(job)
        prune_all(store.storage)
        found = cancel(store.storage, "a", job.entry)
        assert found == Cancellation(is_running=False, is_recorded=False)
        assert store.storage.get_finished_job("a") is None
        prune_all(store.storage)
        assert created(*store.grant(job)) == 1

    def test_its_status_has_the_outcome(self, store: Store) -> None:
        """The status of a pruned job has its state and its count."""
        store.grant(a_job("a", "ann", store.add_interviews(2)))
        prune_all(store.storage)
        pruned = store.storage.get_pruned_job("a")
        assert pruned
        status = status_of_pruned("a", pruned)
        assert (status.state, status.created) == ("succeeded", 2)
        assert status.result == {"success": True, "created_access_count": 2}

    def test_redeliveries_beside_pruning_are_exact(self, postgres: PostgresStore) -> None:
        """Copies that race with the pruning of their job create nothing and have its count."""
        ids = postgres.add_interviews(2)
        jobs = [a_job(f"job {number}", f"user {number}", ids) for number in range(30)]
        for job in jobs:
            postgres.grant(job)
        postgres.execute("DELETE FROM interview_userinterviewaccess")

        def redeliver() -> list[int]:
            with postgres.another() as storage:
                interactor = GrantAccessInteractor(storage)
                return [created(*interactor.grant_access([job])) for job in jobs]

        def prune_one_by_one() -> list[int]:
            pruned = 0
            with postgres.another() as storage:
                while pruned < len(jobs):
                    with storage.transaction() as transaction:
                        pruned += transaction.prune_jobs(NOW, 1).counts.jobs
            return [pruned]

        *counts, (pruned,) = all_at_once([redeliver, redeliver, prune_one_by_one])
        assert counts == [[2] * len(jobs)] * 2
        assert pruned == len(jobs)
        assert postgres.rows() == 0


class TestPrune:
    """``prune``."""

    @pytest.fixture
    def month(self, postgres: PostgresStore) -> PostgresStore:
        """A store with 4,000 jobs and 4,000 cancellations of a month."""
        postgres.execute(
            "INSERT INTO grant_access_job"
            " (job_id, task, state, request_digest, created, finished_at)"
            " SELECT 'job ' || number, 'task', 'succeeded', repeat('d', 64), 1,"
            " clock_timestamp() - number * interval '10.75 minutes'"
            " FROM generate_series(1, 4000) AS number"
        )
        postgres.execute(
            "INSERT INTO grant_access_cancellation SELECT 'cancelled ' || number,"
            " clock_timestamp() - number * interval '10.75 minutes'"
            " FROM generate_series(1, 4000) AS number"
        )
        return postgres

    def test_it_prunes_everything_of_the_age(self, month: PostgresStore) -> None:
        """A run deletes what is older, in several transactions, and nothing else."""
        batches = list(prune(month.storage, 15 * DAY))
        total = sum((one.counts for one in batches if one.counts), PruneCountsDTO())
        assert total == PruneCountsDTO(jobs=1991, cancellations=1991)
        assert len(batches) > 1
        assert list(total_of(prune(month.storage, 15 * DAY))) == [PruneCountsDTO()]
        assert month.value("SELECT count(*) FROM grant_access_job") == 2009

    def test_an_interrupted_run_is_continued(self, month: PostgresStore) -> None:
        """The next run prunes what an interrupted one left."""
        (first,) = islice(prune(month.storage, DAY), 1)
        assert first.counts
        total = sum(total_of(prune(month.storage, DAY)), first.counts)
        assert total == PruneCountsDTO(jobs=3867, cancellations=3867)

    def test_beside_another_run_it_deletes_nothing(self, month: PostgresStore) -> None:
        """While another transaction prunes, a step deletes nothing, and a later one does."""
        with month.another() as other, other.transaction() as transaction:
            assert transaction.lock_pruning()
            steps = prune(month.storage, DAY)
            assert next(steps).counts is None
        assert next(steps).counts

    def test_a_short_age_is_refused(self, postgres: PostgresStore) -> None:
        """A job that finished today might have a transaction that is still open."""
        with pytest.raises(ValueError, match="got 23:00:00, expected 1 day, 0:00:00 or more"):
            next(prune(postgres.storage, timedelta(hours=23)))


def total_of(steps: Iterator[PrunedBatch]) -> Iterator[PruneCountsDTO]:
    """Yield the counts of the steps."""
    for step in steps:
        assert step.counts is not None
        yield step.counts
