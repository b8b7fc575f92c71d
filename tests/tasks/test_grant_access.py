"""The use case of granting access, on the reference model and on PostgreSQL."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from uuid import UUID, uuid4

import pytest
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    InvalidInterviewIdException,
)
from sqlalchemy import text

from storage.dtos import FiguresDTO, FinishedJobDTO, JobDTO, OutcomeDTO, RequestedGrantsDTO
from storage.errors import JobBusyError, StorageError, is_outage
from storage.postgres import DatabaseLimits, PostgresStorage
from tasks.grant_access import GrantAccessInteractor
from tasks.ledger import JobResult, RejectedJob, settle
from tasks.outcomes import result_of
from tests.support.database import connected, role
from tests.support.stores import (
    CHUNK_SIZE,
    Background,
    PostgresStore,
    Store,
    a_cohort,
    a_job,
    created,
    statements_counted,
)

NO_UUID = "a1b2c3d4-e5f6-7g8h-9i0j-k1l2m3n4o5p6"


def error_of(result: JobResult) -> InterviewAccessError:
    """Return the error of a failed job."""
    assert result.outcome
    with pytest.raises(InterviewAccessError) as caught:
        result_of(result.outcome)
    return caught.value


def figures_of(store: Store, job_id: str) -> FiguresDTO | None:
    """Return the figures in a job's ledger row."""
    finished = store.storage.get_finished_job(job_id)
    assert finished
    assert finished.finished_at
    return finished.outcome.figures


class TestSingleJob:
    """One job of one user."""

    def test_missing_grants_are_created(self, store: Store) -> None:
        """A job creates the requested grants and counts them."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        assert created(*store.grant(a_job("a", "ann", ids))) == len(ids)
        assert store.granted("ann") == ids

    def test_existing_grants_are_not_counted(self, store: Store) -> None:
        """A job counts only the grants that it created."""
        ids = store.add_interviews(5)
        store.grant(a_job("a", "ann", ids[:2]))
        assert created(*store.grant(a_job("b", "ann", ids))) == 3
        assert figures_of(store, "b") == FiguresDTO(5, 0, 2, 3)

    def test_repeated_ids_count_once(self, store: Store) -> None:
        """A duplicate ID, in any spelling, counts as repeated and is granted once."""
        (one,) = store.add_interviews(1)
        spellings = [one, one.upper(), one.replace("-", ""), UUID(one), one]
        assert created(*store.grant(a_job("a", "ann", spellings))) == 1
        assert figures_of(store, "a") == FiguresDTO(5, 4, 0, 1)

    def test_an_empty_list_is_a_success(self, store: Store) -> None:
        """A job without IDs succeeds with 0 and is recorded in the ledger."""
        assert created(*store.grant(a_job("a", "ann", []))) == 0
        assert figures_of(store, "a") == FiguresDTO(0, 0, 0, 0)

    def test_unknown_and_malformed_ids_fail_the_job(self, store: Store) -> None:
        """One invalid ID fails the whole job; the error names each with its reason."""
        (one,), unknown = store.add_interviews(1), str(uuid4())
        error = error_of(*store.grant(a_job("a", "ann", [one, unknown, NO_UUID, unknown.upper()])))
        assert isinstance(error, InvalidInterviewIdException)
        assert f"'{NO_UUID}' is not a UUID" in error.sentence
        assert f"'{unknown}' is not the ID of an interview" in error.sentence
        assert error.details["total"] == 2
        assert store.granted("ann") == []

    def test_at_most_twenty_ids_are_named(self, store: Store) -> None:
        """An error names twenty of many invalid IDs and their total."""
        error = error_of(*store.grant(a_job("a", "ann", [str(uuid4()) for _ in range(30)])))
        assert len(error.details["interview_ids"]) == 20
        assert error.details["total"] == 30
        assert "and 10 more" in error.sentence

    def test_invalid_request_fails_and_is_recorded(self, store: Store) -> None:
        """An invalid request fails with a validation error and is recorded in the ledger."""
        error = error_of(*store.grant(a_job("a", "ann", [NO_UUID, None])))
        assert isinstance(error, InvalidGrantRequestException)
        assert error.details["problems"] == [
            {"argument": "interview_ids[1]", "expected": "a UUID as a string", "got": "null"}
        ]
        assert figures_of(store, "a") is None

    def test_too_many_ids_fail_the_job(self, store: Store) -> None:
        """More IDs than the limit, duplicates included, fail the job; the error names the limit."""
        (one,) = store.add_interviews(1)
        error = error_of(*store.grant(a_job("a", "ann", [one] * 4, max_interview_ids=3)))
        assert isinstance(error, InvalidGrantRequestException)
        assert "at most 3 IDs (GRANT_MAX_INTERVIEW_IDS), got a list of 4" in error.sentence
        assert created(*store.grant(a_job("b", "ann", [one] * 3, max_interview_ids=3))) == 1


class TestCohort:
    """One job of several users."""

    def test_every_user_is_granted_every_interview(self, store: Store) -> None:
        """Each user gets each interview, over several chunks, with a count in the ledger."""
        ids = store.add_interviews(CHUNK_SIZE + 1)
        store.grant(a_job("before", "bob", ids[:2]))
        (result,) = store.grant(a_cohort("a", ["bob", "ann"], ids))
        assert created(result) == 2 * len(ids) - 2
        assert store.granted("ann") == store.granted("bob") == ids
        finished = store.storage.get_finished_job("a")
        assert finished
        assert finished.outcome.created_by_user == {"bob": len(ids) - 2, "ann": len(ids)}
        assert finished.job.user_id is None

    def test_repeated_users_and_interviews_count_once(self, store: Store) -> None:
        """Duplicate users and interviews count as repeated; the figures count grants."""
        one, two = store.add_interviews(2)
        store.grant(a_job("before", "ann", [one]))
        store.grant(a_cohort("a", ["ann", "bob", "ann"], [one, two, one.upper()]))
        assert figures_of(store, "a") == FiguresDTO(9, 5, 1, 3)

    @pytest.mark.parametrize(("users", "interviews"), [(0, 1), (1, 0), (0, 0)])
    def test_an_empty_list_is_a_success(self, store: Store, users: int, interviews: int) -> None:
        """A job without users or without interviews succeeds with 0."""
        ids = store.add_interviews(1)[:interviews]
        users_given = ["ann"][:users]
        assert created(*store.grant(a_cohort("a", users_given, ids))) == 0
        assert figures_of(store, "a") == FiguresDTO(0, 0, 0, 0)

    def test_one_unknown_interview_fails_the_job(self, store: Store) -> None:
        """One unknown interview fails the job for all users."""
        (one,), unknown = store.add_interviews(1), str(uuid4())
        error = error_of(*store.grant(a_cohort("a", ["ann", "bob"], [one, unknown])))
        assert isinstance(error, InvalidInterviewIdException)
        assert store.granted("ann") == store.granted("bob") == []

    @pytest.mark.parametrize(
        ("user_ids", "interviews", "problem"),
        [
            ("ann", 1, "user_ids: expected a list of user IDs, got the string 'ann'"),
            (["ann", 7, ""], 1, "user_ids[1]: expected a string of 1 to 36 characters"),
            (["ann"] * 7, 0, "user_ids: expected at most 6 IDs (GRANT_MAX_INTERVIEW_IDS)"),
            (
                ["ann", "bob"],
                4,
                "interview_ids: expected at most 3 IDs for 2 users (GRANT_MAX_INTERVIEW_IDS is 6)",
            ),
        ],
    )
    def test_validation_error_names_the_problem(
        self, store: Store, user_ids: object, interviews: int, problem: str
    ) -> None:
        """An invalid list, an invalid user and too many grants are named in the error."""
        ids = store.add_interviews(interviews)
        error = error_of(*store.grant(a_cohort("a", user_ids, ids, max_interview_ids=6)))
        assert isinstance(error, InvalidGrantRequestException)
        assert problem in error.sentence

    def test_repeated_cohort_has_its_first_count(self, store: Store) -> None:
        """Order and duplicates of users do not change a request; another user does."""
        ids = store.add_interviews(2)
        store.grant(a_cohort("a", ["ann", "bob"], ids))
        (again,) = store.grant(a_cohort("a", ["bob", "ann", "bob"], ids[::-1]))
        assert created(again) == 4
        assert again.repeated
        assert not again.refusal
        (other,) = store.grant(a_cohort("a", ["ann"], ids))
        assert other.refusal

    def test_shared_grant_counts_for_the_earlier_job(self, store: Store) -> None:
        """A grant that several jobs of a batch request counts for the first of them."""
        one, two = store.add_interviews(2)
        results = store.grant(
            a_job("a", "ann", [one]),
            a_cohort("b", ["bob", "ann"], [one, two]),
            a_cohort("c", ["ann", "cyd"], [two]),
        )
        assert [created(result) for result in results] == [1, 3, 1]


class TestRepeatedJob:
    """A job ID that is executed again."""

    def test_success_is_repeated(self, store: Store) -> None:
        """An equal request has its first count, in any order and spelling of its IDs."""
        ids = store.add_interviews(3)
        store.grant(a_job("a", "ann", ids))
        (again,) = store.grant(a_job("a", "ann", [one.upper() for one in reversed(ids)]))
        assert created(again) == 3
        assert again.repeated
        assert not again.refusal

    def test_failure_is_repeated(self, store: Store) -> None:
        """A failed job fails with its first error, also if the cause is gone."""
        (one,) = store.add_interviews(1)
        assert store.delete_interview(one)
        first = error_of(*store.grant(a_job("a", "ann", [one])))
        store.add_interviews(1)
        assert error_of(*store.grant(a_job("a", "ann", [one]))).args == first.args

    def test_validation_error_is_repeated(self, store: Store) -> None:
        """An invalid request has its first error; another invalid request is refused."""
        first = error_of(*store.grant(a_job("a", None, [[1]])))
        (again,) = store.grant(a_job("a", None, [[1]]))
        assert error_of(again).args == first.args
        assert not again.refusal
        (other,) = store.grant(a_job("a", None, [[2]]))
        assert other.refusal

    @pytest.mark.parametrize("first_ids", [0, 1], ids=["empty", "granted"])
    def test_reused_job_id_is_refused(self, store: Store, first_ids: int) -> None:
        """If another request has used the job ID, the first outcome remains; nothing is granted."""
        one, two = store.add_interviews(2)
        store.grant(a_job("a", "ann", [one][:first_ids]))
        (refused,) = store.grant(a_job("a", "ann", [two]))
        assert refused.refusal
        assert "'a'" in refused.refusal.sentence
        assert created(refused) == first_ids
        assert store.granted("ann") == [one][:first_ids]

    def test_request_of_another_user_is_refused(self, store: Store) -> None:
        """The same interviews for another user are another request."""
        (one,) = store.add_interviews(1)
        store.grant(a_job("a", "ann", [one]))
        (refused,) = store.grant(a_job("a", "bob", [one]))
        assert refused.refusal
        assert store.granted("bob") == []

    def test_concurrently_recorded_job_takes_effect_once(self, postgres: PostgresStore) -> None:
        """Without a lock the ledger's primary key decides which of two transactions takes effect.

        The lock is held by another role, which does not block a job.
        """
        one, two = postgres.add_interviews(2)
        limits = DatabaseLimits(busy=0.05)
        with (
            role(postgres.database_url) as url,
            closing(PostgresStorage(url)) as other,
            other.transaction() as holder,
            postgres.another(limits=limits) as storage,
        ):
            holder.lock_jobs(["a"], wait=True)
            job = a_job("a", "ann", [one, two])
            with postgres.storage.transaction() as first:
                first.bulk_create_user_access([RequestedGrantsDTO("ann", (one,))])
                first.record_jobs([FinishedJobDTO(job.entry, OutcomeDTO("succeeded", {"n": 1}))])
                second = Background(lambda: GrantAccessInteractor(storage).grant_access([job]))
                postgres.until_waiting(second)
            (result,) = second.result()
        assert result.repeated
        assert result.outcome == OutcomeDTO("succeeded", {"n": 1})
        assert postgres.granted("ann") == [one]


class TestBatch:
    """Several jobs in one transaction."""

    def test_earlier_job_creates_a_shared_grant(self, store: Store) -> None:
        """Of two jobs that request the same grant the earlier one counts it."""
        one, two, three = store.add_interviews(3)
        results = store.grant(a_job("z", "ann", [one, two]), a_job("a", "ann", [two, three]))
        assert [created(result) for result in results] == [2, 1]
        assert store.granted("ann") == [one, two, three]

    def test_equal_job_ids_take_effect_once(self, store: Store) -> None:
        """A job that is in a batch twice is executed once and has one outcome."""
        ids = store.add_interviews(2)
        first, again = store.grant(a_job("a", "ann", ids), a_job("a", "ann", ids[::-1]))
        assert created(first) == created(again) == 2
        assert (first.repeated, again.repeated) == (False, True)

    def test_second_request_of_a_job_id_is_refused(self, store: Store) -> None:
        """Of two requests with one job ID in a batch the first is executed, the second refused."""
        one, two = store.add_interviews(2)
        first, second = store.grant(a_job("a", "ann", [one]), a_job("a", "bob", [two]))
        assert created(first) == created(second) == 1
        assert second.refusal
        assert not first.refusal
        assert store.granted("bob") == []

    def test_failing_jobs_do_not_affect_others(self, store: Store) -> None:
        """Jobs with unknown, malformed, invalid or reused IDs do not affect the others."""
        one, two = store.add_interviews(2)
        store.grant(a_job("used", "ann", []))
        results = store.grant(
            a_job("unknown", "ann", [one, str(uuid4())]),
            a_job("good", "ann", [one]),
            a_job("malformed", "ann", [two, NO_UUID]),
            a_job("unreadable", "ann", 7),
            a_job("used", "ann", [two]),
            a_job("also-good", "bob", [one, two]),
        )
        assert created(results[1]) == 1
        assert created(results[5]) == 2
        assert results[4].refusal
        assert isinstance(error_of(results[0]), InvalidInterviewIdException)
        assert isinstance(error_of(results[2]), InvalidInterviewIdException)
        assert isinstance(error_of(results[3]), InvalidGrantRequestException)
        assert store.granted("ann") == [one]

    def test_empty_batch_has_no_results(self, store: Store) -> None:
        """An empty batch has no results."""
        assert store.grant() == []


@contextmanager
def locked(postgres: PostgresStore, table: str) -> Iterator[None]:
    """Lock a table exclusively, as VACUUM FULL does."""
    with connected(postgres.database_url) as connection:
        connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield


class TestPostgres:
    """Failures and locks of PostgreSQL."""

    def test_empty_list_does_not_access_the_platform_tables(self, postgres: PostgresStore) -> None:
        """A job without IDs succeeds without the tables of interviews and grants."""
        postgres.execute("ALTER TABLE interview_interview RENAME TO elsewhere")
        postgres.execute("ALTER TABLE interview_userinterviewaccess RENAME TO elsewhere_too")
        assert created(*postgres.grant(a_job("a", "ann", []))) == 0

    def test_failure_in_the_last_chunk_rolls_back(self, postgres: PostgresStore) -> None:
        """If the last chunk of a job fails, no grant and no ledger row remain."""
        ids = postgres.add_interviews(3 * CHUNK_SIZE)
        postgres.raise_for_grants(f"NEW.interview_id = '{ids[-1]}'", "53100")
        (result,) = postgres.grant(a_job("a", "ann", ids))
        assert isinstance(result.error, StorageError)
        assert result.error.sqlstate == "53100"
        assert postgres.rows() == 0
        assert postgres.storage.get_finished_job("a") is None

    @pytest.mark.parametrize("sqlstate", ["40001", "23503", "XX000"])
    def test_failed_batch_is_settled_one_by_one(
        self, postgres: PostgresStore, sqlstate: str
    ) -> None:
        """A job that the database rejects does not fail the other jobs of its batch."""
        ids = postgres.add_interviews(2)
        postgres.raise_for_grants("NEW.user_id = 'bob'", sqlstate)
        jobs = [a_job(user, user, ids) for user in ("ann", "bob", "cy")]
        ann, bob, cy = postgres.grant(*jobs)
        assert created(ann) == created(cy) == 2
        assert isinstance(bob.error, StorageError)
        assert bob.error.sqlstate == sqlstate
        assert postgres.rows() == 4

    def test_busy_job_does_not_delay_others(self, postgres: PostgresStore) -> None:
        """The batch blocks on a busy job after the other jobs are settled."""
        ids = postgres.add_interviews(2)
        with postgres.storage.transaction() as holder:
            holder.lock_jobs(["busy"], wait=True)
            batch = Background(
                lambda: postgres.grant(a_job("busy", "ann", ids), a_job("free", "bob", ids))
            )
            postgres.until_waiting(batch)
            assert not batch.over
            assert postgres.rows() == 2
        assert [created(result) for result in batch.result()] == [2, 2]

    def test_busy_job_does_not_fail_others(self, postgres: PostgresStore) -> None:
        """If a batch fails, every job whose lock is free is executed, in any position."""
        ids = postgres.add_interviews(2)
        postgres.raise_for_grants("NEW.user_id = 'bad'", "23503")
        users = ["busy", "before", "bad", "busy-too", "after"]
        with postgres.another() as elsewhere, elsewhere.transaction() as holder:
            holder.lock_jobs(["busy", "busy-too"], wait=True)
            with statements_counted() as statements:
                results = postgres.grant(*(a_job(user, user, ids) for user in users))
        busy, before, bad, busy_too, after = results
        assert isinstance(busy.error, JobBusyError)
        assert isinstance(busy_too.error, JobBusyError)
        assert isinstance(bad.error, StorageError)
        assert bad.error.sqlstate == "23503"
        assert created(before) == created(after) == 2
        assert sum("pg_advisory_xact_lock(key)" in statement for statement in statements) == 1

    def test_one_job_of_a_batch_waits_for_a_locked_table(self, postgres: PostgresStore) -> None:
        """After one job has waited for the full lock timeout, the other jobs wait briefly."""
        ids = postgres.add_interviews(1)
        limits = DatabaseLimits(lock=2, batch_lock=0.05)
        jobs = [a_job(f"job-{number}", "ann", ids) for number in range(10)]
        with locked(postgres, "grant_access_job"), postgres.another(limits=limits) as storage:
            began = time.monotonic()
            results = GrantAccessInteractor(storage).grant_access(jobs)
            assert time.monotonic() - began < 3 * limits.lock
        assert {getattr(result.error, "sqlstate", None) for result in results} == {"55P03"}

    def test_jobs_beyond_the_time_of_a_batch_are_not_attempted(
        self, postgres: PostgresStore
    ) -> None:
        """Settling one by one ends at its time limit; the remaining jobs fail by an outage."""
        failure = InvalidGrantRequestException("wrong", {})
        entries = [JobDTO(job_id, "task", "ann", "0" * 64) for job_id in "abc"]
        jobs = [RejectedJob(entry, failure) for entry in entries]
        limits = DatabaseLimits(lock=0.5, batch_lock=0.05)
        with locked(postgres, "grant_access_job"), postgres.another(limits=limits) as storage:
            results = settle(storage, jobs, lambda _, __: {}, individual_seconds=0.3)
        first, *others = [result.error for result in results]
        assert isinstance(first, StorageError)
        assert first.sqlstate == "55P03"
        for error in others:
            assert is_outage(error)
            assert "not attempted" in str(error)

    def test_number_of_statements_is_constant(self, postgres: PostgresStore) -> None:
        """Fifty jobs take no more statements than one."""
        ids = postgres.add_interviews(2)
        counts = []
        with postgres.another(chunk_size=1000) as storage:
            for number in (1, 50):
                jobs = [a_job(f"{number}-{at}", f"user-{at}", ids) for at in range(number)]
                with statements_counted() as statements:
                    GrantAccessInteractor(storage).grant_access(jobs)
                counts.append(len(statements))
        assert counts[0] == counts[1] <= 10
