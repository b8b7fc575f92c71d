"""The use case of grants, on the reference model and on PostgreSQL."""

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
from tasks.ledger import JobResult, RejectedJob, result_of, settle
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


def error_of(outcome: JobResult) -> InterviewAccessError:
    """The error that a job's answer holds."""
    assert outcome.outcome
    with pytest.raises(InterviewAccessError) as caught:
        result_of(outcome.outcome)
    return caught.value


def figures_of(store: Store, job_id: str) -> FiguresDTO | None:
    """The figures in the job's row of the ledger."""
    finished = store.storage.get_finished_job(job_id)
    assert finished
    assert finished.finished_at
    return finished.outcome.figures


class TestOneJob:
    """A sequence of one."""

    def test_missing_grants_are_made(self, store: Store) -> None:
        """A job grants what it asks for and counts it."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        assert created(*store.grant(a_job("a", "ann", ids))) == len(ids)
        assert store.granted("ann") == ids

    def test_standing_grants_are_not_counted(self, store: Store) -> None:
        """A job counts only what it added to what stood."""
        ids = store.add_interviews(5)
        store.grant(a_job("a", "ann", ids[:2]))
        assert created(*store.grant(a_job("b", "ann", ids))) == 3
        assert figures_of(store, "b") == FiguresDTO(5, 0, 2, 3)

    def test_repeated_ids_count_once(self, store: Store) -> None:
        """An id given again, in whatever spelling, is repeated and granted once."""
        (one,) = store.add_interviews(1)
        spellings = [one, one.upper(), one.replace("-", ""), UUID(one), one]
        assert created(*store.grant(a_job("a", "ann", spellings))) == 1
        assert figures_of(store, "a") == FiguresDTO(5, 4, 0, 1)

    def test_an_empty_list_is_a_success(self, store: Store) -> None:
        """A job of no ids succeeds with 0 and stands in the ledger."""
        assert created(*store.grant(a_job("a", "ann", []))) == 0
        assert figures_of(store, "a") == FiguresDTO(0, 0, 0, 0)

    def test_unknown_and_malformed_ids_fail_the_job(self, store: Store) -> None:
        """One wrong id fails the whole job, naming each with its reason, nothing granted."""
        (one,), unknown = store.add_interviews(1), str(uuid4())
        error = error_of(*store.grant(a_job("a", "ann", [one, unknown, NO_UUID, unknown.upper()])))
        assert isinstance(error, InvalidInterviewIdException)
        assert f"'{NO_UUID}' is not a UUID" in error.sentence
        assert f"'{unknown}' is no interview's id" in error.sentence
        assert error.details["total"] == 2
        assert store.granted("ann") == []

    def test_at_most_twenty_ids_are_named(self, store: Store) -> None:
        """An error names twenty of many wrong ids and tells how many there are."""
        error = error_of(*store.grant(a_job("a", "ann", [str(uuid4()) for _ in range(30)])))
        assert len(error.details["interview_ids"]) == 20
        assert error.details["total"] == 30
        assert "and 10 more" in error.sentence

    def test_what_cannot_be_read_is_answered_and_kept(self, store: Store) -> None:
        """A request that cannot be read fails with a ledger row, before its ids are looked at."""
        error = error_of(*store.grant(a_job("a", "ann", [NO_UUID, None])))
        assert isinstance(error, InvalidGrantRequestException)
        assert error.details["problems"] == [
            {"argument": "interview_ids[1]", "expected": "a UUID as a string", "got": "null"}
        ]
        assert figures_of(store, "a") is None

    def test_too_many_ids_are_refused(self, store: Store) -> None:
        """More ids than the limit, as given, fail the job and name the limit."""
        (one,) = store.add_interviews(1)
        error = error_of(*store.grant(a_job("a", "ann", [one] * 4, max_interview_ids=3)))
        assert isinstance(error, InvalidGrantRequestException)
        assert "at most 3 ids (GRANT_MAX_INTERVIEW_IDS), got a list of 4" in error.sentence
        assert created(*store.grant(a_job("b", "ann", [one] * 3, max_interview_ids=3))) == 1


class TestCohort:
    """A job for several users."""

    def test_every_user_is_granted_every_interview(self, store: Store) -> None:
        """Each user is granted each interview, over several chunks, and counted in the ledger."""
        ids = store.add_interviews(CHUNK_SIZE + 1)
        store.grant(a_job("before", "bob", ids[:2]))
        (outcome,) = store.grant(a_cohort("a", ["bob", "ann"], ids))
        assert created(outcome) == 2 * len(ids) - 2
        assert store.granted("ann") == store.granted("bob") == ids
        finished = store.storage.get_finished_job("a")
        assert finished
        assert finished.outcome.created_by_user == {"bob": len(ids) - 2, "ann": len(ids)}
        assert finished.job.user_id is None

    def test_repeated_users_and_interviews_count_once(self, store: Store) -> None:
        """What is given again, on either side, is repeated; the figures are those of grants."""
        one, two = store.add_interviews(2)
        store.grant(a_job("before", "ann", [one]))
        store.grant(a_cohort("a", ["ann", "bob", "ann"], [one, two, one.upper()]))
        assert figures_of(store, "a") == FiguresDTO(9, 5, 1, 3)

    @pytest.mark.parametrize(("users", "interviews"), [(0, 1), (1, 0), (0, 0)])
    def test_an_empty_list_is_a_success(self, store: Store, users: int, interviews: int) -> None:
        """Without users or without interviews it succeeds with 0."""
        ids = store.add_interviews(1)[:interviews]
        users_given = ["ann"][:users]
        assert created(*store.grant(a_cohort("a", users_given, ids))) == 0
        assert figures_of(store, "a") == FiguresDTO(0, 0, 0, 0)

    def test_one_unknown_interview_fails_the_job(self, store: Store) -> None:
        """It is all or nothing for all users."""
        (one,), unknown = store.add_interviews(1), str(uuid4())
        error = error_of(*store.grant(a_cohort("a", ["ann", "bob"], [one, unknown])))
        assert isinstance(error, InvalidInterviewIdException)
        assert store.granted("ann") == store.granted("bob") == []

    @pytest.mark.parametrize(
        ("user_ids", "interviews", "told"),
        [
            ("ann", 1, "user_ids: expected a list of user ids, got the string 'ann'"),
            (["ann", 7, ""], 1, "user_ids[1]: expected a string of 1 to 36 characters"),
            (["ann"] * 7, 0, "user_ids: expected at most 6 ids (GRANT_MAX_INTERVIEW_IDS)"),
            (
                ["ann", "bob"],
                4,
                "interview_ids: expected at most 3 ids for 2 users (GRANT_MAX_INTERVIEW_IDS is 6)",
            ),
        ],
    )
    def test_what_cannot_be_read_is_told(
        self, store: Store, user_ids: object, interviews: int, told: str
    ) -> None:
        """A wrong list, a wrong user, and more grants in all than the limit are each named."""
        ids = store.add_interviews(interviews)
        error = error_of(*store.grant(a_cohort("a", user_ids, ids, max_interview_ids=6)))
        assert isinstance(error, InvalidGrantRequestException)
        assert told in error.sentence

    def test_the_same_cohort_again_has_its_first_count(self, store: Store) -> None:
        """Order and repetition of the users make no other request; another user does."""
        ids = store.add_interviews(2)
        store.grant(a_cohort("a", ["ann", "bob"], ids))
        (again,) = store.grant(a_cohort("a", ["bob", "ann", "bob"], ids[::-1]))
        assert created(again) == 4
        assert again.repeated
        assert not again.refusal
        (other,) = store.grant(a_cohort("a", ["ann"], ids))
        assert other.refusal

    def test_beside_other_jobs_each_counts_its_own(self, store: Store) -> None:
        """Cohorts and single jobs in one sequence: a shared grant counts for the earlier."""
        one, two = store.add_interviews(2)
        outcomes = store.grant(
            a_job("a", "ann", [one]),
            a_cohort("b", ["bob", "ann"], [one, two]),
            a_cohort("c", ["ann", "cyd"], [two]),
        )
        assert [created(outcome) for outcome in outcomes] == [1, 3, 1]


class TestTheSameJobAgain:
    """The ledger's part."""

    def test_a_success_is_repeated(self, store: Store) -> None:
        """The same request under one id has its first count, in any order and spelling."""
        ids = store.add_interviews(3)
        store.grant(a_job("a", "ann", ids))
        (again,) = store.grant(a_job("a", "ann", [one.upper() for one in reversed(ids)]))
        assert created(again) == 3
        assert again.repeated
        assert not again.refusal

    def test_a_failure_is_repeated(self, store: Store) -> None:
        """A job that failed for cause fails so again, also when the cause has gone."""
        (one,) = store.add_interviews(1)
        assert store.delete_interview(one)
        first = error_of(*store.grant(a_job("a", "ann", [one])))
        store.add_interviews(1)
        assert error_of(*store.grant(a_job("a", "ann", [one]))).args == first.args

    def test_an_unreadable_request_is_repeated(self, store: Store) -> None:
        """So does a request that could not be read, and another such request is refused."""
        first = error_of(*store.grant(a_job("a", None, [[1]])))
        (again,) = store.grant(a_job("a", None, [[1]]))
        assert error_of(again).args == first.args
        assert not again.refusal
        (other,) = store.grant(a_job("a", None, [[2]]))
        assert other.refusal

    @pytest.mark.parametrize("first_ids", [0, 1], ids=["empty", "granted"])
    def test_another_request_is_refused(self, store: Store, first_ids: int) -> None:
        """An id that was used for another request: the first answer stays, nothing is done."""
        one, two = store.add_interviews(2)
        store.grant(a_job("a", "ann", [one][:first_ids]))
        (refused,) = store.grant(a_job("a", "ann", [two]))
        assert refused.refusal
        assert "'a'" in refused.refusal.sentence
        assert created(refused) == first_ids
        assert store.granted("ann") == [one][:first_ids]

    def test_another_user_makes_another_request(self, store: Store) -> None:
        """The same ids for another user are another request."""
        (one,) = store.add_interviews(1)
        store.grant(a_job("a", "ann", [one]))
        (refused,) = store.grant(a_job("a", "bob", [one]))
        assert refused.refusal
        assert store.granted("bob") == []

    def test_job_that_another_transaction_records_meanwhile(self, postgres: PostgresStore) -> None:
        """Where no lock keeps two transactions apart, the ledger's key decides; one takes effect.

        The lock is another role's, which does not stop a job.
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
            (outcome,) = second.result()
        assert outcome.repeated
        assert outcome.outcome == OutcomeDTO("succeeded", {"n": 1})
        assert postgres.granted("ann") == [one]


class TestManyJobs:
    """A sequence of many, in one transaction."""

    def test_the_earlier_job_created_a_shared_grant(self, store: Store) -> None:
        """Of two jobs that ask for one grant the earlier in the sequence counts it."""
        one, two, three = store.add_interviews(3)
        outcomes = store.grant(a_job("z", "ann", [one, two]), a_job("a", "ann", [two, three]))
        assert [created(outcome) for outcome in outcomes] == [2, 1]
        assert store.granted("ann") == [one, two, three]

    def test_one_id_twice_has_one_effect(self, store: Store) -> None:
        """A job that stands twice in a sequence is done once and has one answer."""
        ids = store.add_interviews(2)
        first, again = store.grant(a_job("a", "ann", ids), a_job("a", "ann", ids[::-1]))
        assert created(first) == created(again) == 2
        assert (first.repeated, again.repeated) == (False, True)

    def test_one_id_with_two_requests(self, store: Store) -> None:
        """Of two requests under one id in a sequence the first is done, the second refused."""
        one, two = store.add_interviews(2)
        first, second = store.grant(a_job("a", "ann", [one]), a_job("a", "bob", [two]))
        assert created(first) == created(second) == 1
        assert second.refusal
        assert not first.refusal
        assert store.granted("bob") == []

    def test_failing_neighbours_touch_nobody(self, store: Store) -> None:
        """Unknown, malformed, unreadable and reused neighbours leave the others as they are."""
        one, two = store.add_interviews(2)
        store.grant(a_job("used", "ann", []))
        outcomes = store.grant(
            a_job("unknown", "ann", [one, str(uuid4())]),
            a_job("good", "ann", [one]),
            a_job("malformed", "ann", [two, NO_UUID]),
            a_job("unreadable", "ann", 7),
            a_job("used", "ann", [two]),
            a_job("also-good", "bob", [one, two]),
        )
        assert created(outcomes[1]) == 1
        assert created(outcomes[5]) == 2
        assert outcomes[4].refusal
        assert isinstance(error_of(outcomes[0]), InvalidInterviewIdException)
        assert isinstance(error_of(outcomes[2]), InvalidInterviewIdException)
        assert isinstance(error_of(outcomes[3]), InvalidGrantRequestException)
        assert store.granted("ann") == [one]

    def test_no_job_is_a_sequence_too(self, store: Store) -> None:
        """An empty sequence has no outcomes."""
        assert store.grant() == []


@contextmanager
def locked(postgres: PostgresStore, table: str) -> Iterator[None]:
    """Lock a table away from every other session, as VACUUM FULL does."""
    with connected(postgres.database_url) as connection:
        connection.execute(text(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE"))
        yield


class TestPostgres:
    """What only a database can do to jobs."""

    def test_an_empty_list_asks_nothing_of_the_interview_tables(
        self, postgres: PostgresStore
    ) -> None:
        """A job of no ids succeeds where the tables of interviews and grants are gone."""
        postgres.execute("ALTER TABLE interview_interview RENAME TO elsewhere")
        postgres.execute("ALTER TABLE interview_userinterviewaccess RENAME TO elsewhere_too")
        assert created(*postgres.grant(a_job("a", "ann", []))) == 0

    def test_a_failure_in_the_last_chunk_leaves_nothing(self, postgres: PostgresStore) -> None:
        """A job whose last chunk fails leaves no grant and no row of the ledger."""
        ids = postgres.add_interviews(3 * CHUNK_SIZE)
        postgres.raise_for_grants(f"NEW.interview_id = '{ids[-1]}'", "53100")
        (outcome,) = postgres.grant(a_job("a", "ann", ids))
        assert isinstance(outcome.error, StorageError)
        assert outcome.error.sqlstate == "53100"
        assert postgres.rows() == 0
        assert postgres.storage.get_finished_job("a") is None

    @pytest.mark.parametrize("sqlstate", ["40001", "23503", "XX000"])
    def test_where_the_whole_fails_jobs_are_done_one_by_one(
        self, postgres: PostgresStore, sqlstate: str
    ) -> None:
        """A job that the database refuses does not fail its neighbours."""
        ids = postgres.add_interviews(2)
        postgres.raise_for_grants("NEW.user_id = 'bob'", sqlstate)
        jobs = [a_job(user, user, ids) for user in ("ann", "bob", "cy")]
        ann, bob, cy = postgres.grant(*jobs)
        assert created(ann) == created(cy) == 2
        assert isinstance(bob.error, StorageError)
        assert bob.error.sqlstate == sqlstate
        assert postgres.rows() == 4

    def test_a_busy_job_holds_no_neighbour_up(self, postgres: PostgresStore) -> None:
        """A job that another transaction is at is waited for after the others are done."""
        ids = postgres.add_interviews(2)
        with postgres.storage.transaction() as holder:
            holder.lock_jobs(["busy"], wait=True)
            batch = Background(
                lambda: postgres.grant(a_job("busy", "ann", ids), a_job("free", "bob", ids))
            )
            postgres.until_waiting(batch)
            assert not batch.over
            assert postgres.rows() == 2
        assert [created(outcome) for outcome in batch.result()] == [2, 2]

    def test_a_busy_job_does_not_fail_the_jobs_after_it(self, postgres: PostgresStore) -> None:
        """Where the whole fails, every job whose own lock is free is done, wherever it comes."""
        ids = postgres.add_interviews(2)
        postgres.raise_for_grants("NEW.user_id = 'bad'", "23503")
        users = ["busy", "before", "bad", "busy-too", "after"]
        with postgres.another() as elsewhere, elsewhere.transaction() as holder:
            holder.lock_jobs(["busy", "busy-too"], wait=True)
            with statements_counted() as statements:
                outcomes = postgres.grant(*(a_job(user, user, ids) for user in users))
        busy, before, bad, busy_too, after = outcomes
        assert isinstance(busy.error, JobBusyError)
        assert isinstance(busy_too.error, JobBusyError)
        assert isinstance(bad.error, StorageError)
        assert bad.error.sqlstate == "23503"
        assert created(before) == created(after) == 2
        assert sum("pg_advisory_xact_lock(key)" in statement for statement in statements) == 1

    def test_one_job_of_a_batch_waits_for_a_locked_table(self, postgres: PostgresStore) -> None:
        """After one wait for a lock as long as a lone job's, the other jobs wait briefly."""
        ids = postgres.add_interviews(1)
        limits = DatabaseLimits(lock=2, batch_lock=0.05)
        jobs = [a_job(f"job-{number}", "ann", ids) for number in range(10)]
        with locked(postgres, "grant_access_job"), postgres.another(limits=limits) as storage:
            began = time.monotonic()
            outcomes = GrantAccessInteractor(storage).grant_access(jobs)
            assert time.monotonic() - began < 3 * limits.lock
        assert {getattr(outcome.error, "sqlstate", None) for outcome in outcomes} == {"55P03"}

    def test_jobs_beyond_the_time_of_a_batch_are_not_attempted(
        self, postgres: PostgresStore
    ) -> None:
        """Settling one by one ends after its time; the jobs that are left fail by an outage."""
        fault = InvalidGrantRequestException("wrong", {})
        entries = [JobDTO(job_id, "task", "ann", "0" * 64) for job_id in "abc"]
        jobs = [RejectedJob(entry, fault) for entry in entries]
        limits = DatabaseLimits(lock=0.5, batch_lock=0.05)
        with locked(postgres, "grant_access_job"), postgres.another(limits=limits) as storage:
            outcomes = settle(storage, jobs, lambda _, __: {}, individual_seconds=0.3)
        first, *others = [outcome.error for outcome in outcomes]
        assert isinstance(first, StorageError)
        assert first.sqlstate == "55P03"
        for error in others:
            assert is_outage(error)
            assert "not attempted" in str(error)

    def test_statements_do_not_grow_with_jobs(self, postgres: PostgresStore) -> None:
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
