"""Attribution: which job created each grant, on PostgreSQL and on the reference model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import timedelta
from uuid import uuid4

import pytest

from storage.dtos import GrantOriginDTO, RequestedGrantsDTO
from storage.interface import Storage
from storage.postgres import PostgresStorage
from tasks.erasure import erase_jobs
from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tests.storage.transactions import create_grants, failing_transaction
from tests.support.stores import (
    CHUNK_SIZE,
    Background,
    PostgresStore,
    Store,
    a_cohort,
    a_job,
    all_at_once,
    created,
    postgres_store,
)

OLD = timedelta(0)


@pytest.fixture(params=[1_000, 1], ids=["few", "many"])
def bulk_threshold(request: pytest.FixtureRequest) -> int:
    """Create grants by the statements for few and for many."""
    threshold: int = request.param
    return threshold


def granting_job(store: Store, user_id: str, interview_id: str) -> str | None:
    """Return the job of an existing grant."""
    origin = store.storage.find_grant_origin(user_id, interview_id)
    assert origin == GrantOriginDTO(True, True, origin.job_id)
    return origin.job_id


def attributed(store: Store, users: Sequence[str]) -> Counter[str | None]:
    """Count the users' grants by job."""
    return Counter(
        granting_job(store, user_id, interview_id)
        for user_id in users
        for interview_id in store.granted(user_id)
    )


class TestFindGrantOrigin:
    """``find_grant_origin``."""

    def test_a_grant_names_its_job(self, store: Store) -> None:
        """Each grant of a job of several chunks names the job."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        store.grant(a_job("first", "ann", ids))
        assert attributed(store, ["ann"]) == {"first": len(ids)}

    def test_no_grant_and_no_interview(self, store: Store) -> None:
        """A missing grant and a missing interview are told apart."""
        (interview_id,) = store.add_interviews(1)
        find = store.storage.find_grant_origin
        assert find("ann", interview_id) == GrantOriginDTO(True, False)
        assert find("ann", str(uuid4())) == GrantOriginDTO(False, False)

    def test_a_grant_without_a_job_names_none(self, store: Store) -> None:
        """A grant that no job requested names none, and a later job does not take it."""
        one, two = store.add_interviews(2)
        create_grants(store.storage, "ann", one)
        (result,) = store.grant(a_job("later", "ann", [one, two]))
        assert created(result) == 1
        assert granting_job(store, "ann", one) is None
        assert granting_job(store, "ann", two) == "later"

    def test_existing_grants_keep_their_job(self, store: Store) -> None:
        """A job that requests existing grants again is attributed the new ones only."""
        ids = store.add_interviews(6)
        store.grant(a_job("first", "ann", ids[1:4]))
        store.grant(a_job("second", "ann", ids))
        store.grant(a_job("third", "ann", ids))
        assert attributed(store, ["ann"]) == {"first": 3, "second": 3}

    def test_a_repeated_job_changes_nothing(self, store: Store) -> None:
        """A delivery of a finished job, alone and in a batch, leaves the attribution."""
        ids = store.add_interviews(3)
        store.grant(a_job("first", "ann", ids))
        store.grant(a_job("first", "ann", ids), a_job("second", "bob", ids))
        store.grant(a_job("first", "ann", ids))
        assert attributed(store, ["ann", "bob"]) == {"first": 3, "second": 3}

    def test_shared_grants_name_the_job_that_counts_them(self, store: Store) -> None:
        """Of jobs of one batch that request one grant, it names the one that counts it."""
        ids = store.add_interviews(4)
        jobs = [
            a_job("a", "ann", [ids[3], ids[1]]),
            a_job("b", "ann", ids),
            a_job("c", "ann", [ids[0]]),
            a_job("d", "bob", ids[:2]),
        ]
        results = store.grant(*jobs)
        assert [*map(created, results)] == [2, 2, 0, 2]
        assert attributed(store, ["ann", "bob"]) == {"a": 2, "b": 2, "d": 2}
        assert granting_job(store, "ann", ids[1]) == "a"
        assert granting_job(store, "ann", ids[0]) == "b"

    def test_small_jobs_of_equal_interviews(self, store: Store) -> None:
        """A batch of jobs for the same interviews, one statement, is attributed by user."""
        ids = store.add_interviews(2)
        users = ["dan", "bob", "ann", "cyd"]
        store.grant(*(a_job(f"job of {user}", user, ids) for user in users))
        for user in users:
            assert attributed(store, [user]) == {f"job of {user}": 2}

    def test_a_cohort_names_its_job(self, store: Store) -> None:
        """Each grant of a cohort job that did not exist names the job."""
        ids = store.add_interviews(CHUNK_SIZE + 1)
        store.grant(a_job("before", "bob", ids[:1]))
        (result,) = store.grant(a_cohort("cohort", ["cyd", "ann", "bob"], ids))
        found = attributed(store, ["ann", "bob", "cyd"])
        assert found == {"before": 1, "cohort": created(result)}

    def test_a_rejected_job_is_attributed_nothing(self, store: Store) -> None:
        """A job of a batch that fails for an unknown interview has no grants."""
        ids = store.add_interviews(2)
        store.grant(a_job("bad", "ann", [*ids, str(uuid4())]), a_job("good", "ann", ids))
        assert attributed(store, ["ann"]) == {"good": 2}

    def test_a_rolled_back_job_is_attributed_nothing(self, store: Store) -> None:
        """After a rollback, the job that then creates the grant is named."""
        (interview_id,) = store.add_interviews(1)
        requested = RequestedGrantsDTO("ann", (interview_id,), "failed")
        with failing_transaction(KeyError, store.storage) as transaction:
            transaction.bulk_create_user_access([requested])
            raise KeyError
        assert store.storage.find_grant_origin("ann", interview_id) == GrantOriginDTO(True, False)
        store.grant(a_job("second", "ann", [interview_id]))
        assert granting_job(store, "ann", interview_id) == "second"

    @pytest.mark.parametrize("existing", [0, 2], ids=["none", "some"])
    def test_a_grant_created_meanwhile_keeps_its_job(self, store: Store, existing: int) -> None:
        """A grant that another transaction commits while the job inserts it names the other job."""
        ids = store.add_interviews(2 * CHUNK_SIZE)
        if existing:
            store.grant(a_job("before", "ann", ids[:existing]))
        with store.storage.transaction() as first:
            first.bulk_create_user_access([RequestedGrantsDTO("ann", (ids[-1],), "first")])
            second = Background(lambda: store.grant(a_job("second", "ann", ids)))
            store.until_waiting(second)
            assert not second.over
        (result,) = second.result()
        expected = {"before": existing, "first": 1, "second": created(result)}
        assert attributed(store, ["ann"]) == +Counter(expected)
        assert created(result) == len(ids) - existing - 1

    def test_pruning_keeps_the_job(self, store: Store) -> None:
        """A grant whose job was pruned names it, and its tombstone is found by that ID."""
        ids = store.add_interviews(2)
        store.grant(a_job("old", "ann", ids))
        with store.storage.transaction() as transaction:
            assert transaction.prune_jobs(OLD, 10).counts.jobs == 1
        assert attributed(store, ["ann"]) == {"old": 2}
        pruned = store.storage.get_pruned_job("old")
        assert pruned is not None
        assert pruned.created == 2

    def test_erasure_keeps_the_job(self, store: Store) -> None:
        """Erasing the user from the ledger leaves the platform's grant, which names its job."""
        ids = store.add_interviews(2)
        store.grant(a_job("one", "ann", ids))
        assert [page.job_ids for page in erase_jobs(store.storage, "ann", dry_run=False)]
        assert attributed(store, ["ann"]) == {"one": 2}
        finished = store.storage.get_finished_job("one")
        assert finished is not None
        assert finished.job.user_id != "ann"

    @pytest.mark.parametrize(
        "job_id", ["x" * 255, "%s %(x)s :name", "{a,b}", "NULL", "🦄", "'\"\\"]
    )
    def test_any_job_id_is_kept(self, store: Store, job_id: str) -> None:
        """A job ID of any printable characters is kept as it is."""
        ids = store.add_interviews(CHUNK_SIZE)
        store.grant(a_job(job_id, "ann", ids), a_job("other", "bob", ids))
        assert attributed(store, ["ann"]) == {job_id: len(ids)}


class TestOnPostgres:
    """What other writers and the server do."""

    @pytest.fixture
    def postgres(self, migrated_url: str, bulk_threshold: int) -> Iterator[PostgresStore]:
        """A store with a separate database, which the test may change."""
        with postgres_store(migrated_url, bulk_threshold=bulk_threshold) as store:
            yield store

    @pytest.fixture
    def other(self, postgres: PostgresStore, bulk_threshold: int) -> Iterator[Storage]:
        """A second worker's storage, which divides jobs into other chunks."""
        with closing(
            PostgresStorage(postgres.database_url, chunk_size=7, bulk_threshold=bulk_threshold)
        ) as storage:
            yield storage

    def test_a_deleted_grant_names_the_job_that_creates_it_again(
        self, postgres: PostgresStore
    ) -> None:
        """A grant that the platform deleted names the later job, the others the earlier one."""
        one, two = postgres.add_interviews(2)
        postgres.grant(a_job("first", "ann", [one, two]))
        postgres.execute(
            "DELETE FROM interview_userinterviewaccess WHERE interview_id = CAST(:id AS uuid)",
            id=one,
        )
        postgres.grant(a_job("second", "ann", [one, two]))
        assert granting_job(postgres, "ann", one) == "second"
        assert granting_job(postgres, "ann", two) == "first"

    def test_racing_workers_are_attributed_what_they_count(
        self, postgres: PostgresStore, other: Storage
    ) -> None:
        """Of workers that race for overlapping grants, each job has as many as it counted.

        The jobs are single ones, batches and cohorts.
        """
        ids = postgres.add_interviews(60)
        users = ["ann", "bob", "cyd"]
        counts: Counter[str | None] = Counter()
        lock = threading.Lock()

        def work(number: int, storage: Storage) -> None:
            for turn in range(12):
                name = f"{number}-{turn}"
                first = (7 * turn + 3 * number) % 40
                some = ids[first : first + 20]
                batches: list[list[GrantAccessJob]] = [
                    [a_job(f"{name}-one", users[turn % 3], some)],
                    [
                        a_job(f"{name}-{user}", user, some[: 5 + index])
                        for index, user in enumerate(users)
                    ],
                    [a_cohort(f"{name}-cohort", users, some[5:])],
                ]
                for jobs in batches:
                    results = GrantAccessInteractor(storage).grant_access(jobs)
                    with lock:
                        for job, result in zip(jobs, results, strict=True):
                            counts[job.entry.job_id] += created(result)

        all_at_once(
            [
                lambda: work(1, postgres.storage),
                lambda: work(2, other),
            ]
        )
        assert sum(counts.values()) == postgres.rows() > 0
        assert attributed(postgres, users) == +counts

    def test_rows_beside_suppressed_ones_name_the_job(self, postgres: PostgresStore) -> None:
        """If a trigger suppresses a row, the rows that the job counts name it."""
        ids = postgres.add_interviews(CHUNK_SIZE)
        postgres.execute(
            "CREATE FUNCTION suppress_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RETURN CASE WHEN NEW.interview_id = '{ids[0]}' THEN NULL ELSE NEW END; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER suppress_row BEFORE INSERT ON interview_userinterviewaccess"
            " FOR EACH ROW EXECUTE FUNCTION suppress_row()"
        )
        (result,) = postgres.grant(a_job("one", "ann", ids))
        assert attributed(postgres, ["ann"]) == {"one": created(result)} == {"one": len(ids) - 1}
