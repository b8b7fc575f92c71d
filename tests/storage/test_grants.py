"""Grants: unknown interviews, existing grants, and creation of missing grants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from uuid import uuid4

import pytest

from storage.dtos import RequestedGrantsDTO, UserInterviewAccessDTO
from storage.errors import StorageError
from tests.storage.transactions import create_grants, failing_transaction
from tests.support.stores import CHUNK_SIZE, Background, PostgresStore, Store

UNUSUAL_USER_IDS = [
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
"""User IDs that a careless statement would misinterpret."""


class TestFindUnknownInterviews:
    """``find_unknown_interviews``."""

    def test_unknown_ids_are_returned(self, store: Store) -> None:
        """Exactly the IDs that no interview has are returned."""
        known = store.add_interviews(2)
        unknown = {str(uuid4()), str(uuid4())}
        with store.storage.transaction() as transaction:
            assert transaction.find_unknown_interviews([*known, *unknown]) == unknown
            assert transaction.find_unknown_interviews(known) == frozenset()
            assert transaction.find_unknown_interviews([]) == frozenset()

    @pytest.mark.parametrize("granted", range(3))
    @pytest.mark.parametrize("bulk_threshold", [1_000, 1])
    def test_existing_grants_do_not_change_the_result(self, store: Store, granted: int) -> None:
        """The same IDs are unknown whatever the user, or another one, has access to."""
        known, unknown = store.add_interviews(2), str(uuid4())
        create_grants(store.storage, "ann", *known[:granted], *store.add_interviews(2))
        for user_id in ("ann", "bob"):
            with store.storage.transaction() as transaction:
                found = transaction.find_unknown_interviews([*known, unknown], granted_to=user_id)
                assert found == {unknown}
                none = transaction.find_unknown_interviews(known, granted_to=user_id)
                assert none == frozenset()

    def test_delete_of_an_ungranted_interview_waits(self, store: Store) -> None:
        """Deleting an interview that the user has no access to yet blocks until the end."""
        granted, new = store.add_interviews(2)
        create_grants(store.storage, "ann", granted)
        with store.storage.transaction() as transaction:
            transaction.find_unknown_interviews([granted, new], granted_to="ann")
            delete = Background(lambda: store.delete_interview(new))
            store.until_waiting(delete)
            assert not delete.over
        assert delete.result()

    def test_delete_of_a_known_interview_waits(self, store: Store) -> None:
        """Deleting an interview that was found blocks until the transaction ends."""
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


class TestGetExistingUserAccess:
    """``get_existing_user_access``."""

    def test_all_grants_of_these_users_are_returned(self, store: Store) -> None:
        """All grants of the given users are returned, and no others."""
        one, two = store.add_interviews(2)
        create_grants(store.storage, "ann", one, two)
        create_grants(store.storage, "bob", two)
        create_grants(store.storage, "eve", one)
        with store.storage.transaction() as transaction:
            grants = transaction.get_existing_user_access(["ann", "bob", "nobody"])
            assert sorted((grant.user_id, grant.interview_id) for grant in grants) == [
                ("ann", one),
                ("ann", two),
                ("bob", two),
            ]
            assert list(transaction.get_existing_user_access([])) == []


class TestBulkCreateUserAccess:
    """``bulk_create_user_access``, with the statements for few and for many grants."""

    @pytest.fixture(params=[1_000, 1], ids=["few", "many"])
    def bulk_threshold(self, request: pytest.FixtureRequest) -> int:
        """Create grants by the statements for few and for many."""
        threshold: int = request.param
        return threshold

    def test_missing_grants_are_created_and_counted(self, store: Store) -> None:
        """Missing grants are created over several chunks and counted for each request."""
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

    def test_existing_grants_are_neither_changed_nor_counted(self, store: Store) -> None:
        """An existing grant is neither changed nor counted."""
        ids = store.add_interviews(5)
        create_grants(store.storage, "ann", ids[1], ids[3])
        assert create_grants(store.storage, "ann", *ids) == 3
        assert store.granted("ann") == ids

    def test_concurrently_created_grant_is_counted_once(self, store: Store) -> None:
        """A grant that a concurrent transaction creates is counted by one of the two."""
        ids = store.add_interviews(3)
        with store.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(["ann"])) == []
            other = Background(lambda: create_grants(store.storage, "ann", *ids[:2]))
            store.until_waiting(other)
            is_concurrent = other.over
            requested = RequestedGrantsDTO("ann", tuple(ids))
            counts = transaction.bulk_create_user_access([requested])
        assert (counts, other.result()) == (([1], 2) if is_concurrent else ([3], 0))
        assert store.granted("ann") == ids

    def test_open_transaction_with_the_same_grant_blocks(self, store: Store) -> None:
        """An uncommitted grant blocks; after a rollback it is created and counted."""
        (interview_id,) = store.add_interviews(1)
        with failing_transaction(KeyError, store.storage) as first:
            requested = RequestedGrantsDTO("ann", (interview_id,))
            assert first.bulk_create_user_access([requested]) == [1]
            other = Background(lambda: create_grants(store.storage, "ann", interview_id))
            store.until_waiting(other)
            assert not other.over
            raise KeyError
        assert other.result() == 1
        assert store.granted("ann") == [interview_id]

    @pytest.mark.parametrize("existing", [0, 3, 30], ids=["none", "some", "all"])
    @pytest.mark.parametrize("commits", [True, False])
    def test_many_grants_are_counted_beside_an_open_transaction(
        self, store: Store, existing: int, commits: bool
    ) -> None:
        """Grants of which none, some or all exist are counted beside an uncommitted grant."""
        ids = store.add_interviews(31)
        if existing:
            create_grants(store.storage, "ann", *ids[:existing])
        end: AbstractContextManager[object] = nullcontext() if commits else pytest.raises(KeyError)
        with end, store.storage.transaction() as first:
            requested = RequestedGrantsDTO("ann", (ids[-1],))
            assert first.bulk_create_user_access([requested]) == [1]
            other = Background(lambda: create_grants(store.storage, "ann", *ids))
            store.until_waiting(other)
            assert not other.over
            if not commits:
                raise KeyError
        assert other.result() == 31 - existing - commits
        assert store.granted("ann") == ids

    def test_shared_grant_counts_for_the_first_request(self, store: Store) -> None:
        """A grant that is requested more than once counts for its first request."""
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
    def test_cross_product_is_counted_by_user(self, store: Store, interviews: int) -> None:
        """If all users are granted the same interviews, each user has a count."""
        ids = store.add_interviews(interviews)
        create_grants(store.storage, "bob", ids[-1])
        create_grants(store.storage, "cyd", *ids)
        users = ["dan", "bob", "ann", "cyd", "eve"]
        progress: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [RequestedGrantsDTO(user_id, tuple(ids)) for user_id in users],
                lambda done, total: progress.append((done, total)),
            )
        assert counts == [interviews, interviews - 1, interviews, 0, interviews]
        assert [store.granted(user_id) for user_id in users] == [ids] * len(users)
        assert progress == sorted(set(progress))
        assert progress[-1] == (len(users) * interviews, len(users) * interviews)

    @pytest.mark.parametrize("commits", [True, False])
    def test_cross_product_beside_an_open_transaction(self, store: Store, commits: bool) -> None:
        """One grant of a cross product is also in a transaction that commits or rolls back."""
        ids = store.add_interviews(2)
        end: AbstractContextManager[object] = nullcontext() if commits else pytest.raises(KeyError)

        def grant_all() -> list[int]:
            with store.storage.transaction() as transaction:
                requested = [RequestedGrantsDTO(user_id, tuple(ids)) for user_id in ("ann", "bob")]
                return list(transaction.bulk_create_user_access(requested))

        with end, store.storage.transaction() as first:
            first.bulk_create_user_access([RequestedGrantsDTO("bob", (ids[0],))])
            other = Background(grant_all)
            store.until_waiting(other)
            if not commits:
                raise KeyError
        assert other.result() == [2, 2 - commits]

    def test_every_request_has_a_count(self, store: Store) -> None:
        """Requests that add nothing, and empty ones, have the count 0."""
        (interview_id,) = store.add_interviews(1)
        create_grants(store.storage, "ann", interview_id)
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", (interview_id,)), RequestedGrantsDTO("ann", ())]
            )
            assert counts == [0, 0]
            assert transaction.bulk_create_user_access([]) == []

    @pytest.mark.parametrize("position", range(2 * CHUNK_SIZE + 1))
    def test_missing_interview_is_a_foreign_key_violation(
        self, store: Store, position: int
    ) -> None:
        """If an interview does not exist, in whichever chunk, no row is added; it is transient."""
        ids = store.add_interviews(2 * CHUNK_SIZE + 1)
        assert store.delete_interview(ids[position])
        requested = [
            RequestedGrantsDTO("bob", (ids[position - 1],)),
            RequestedGrantsDTO("ann", tuple(ids)),
        ]
        with failing_transaction(StorageError, store.storage, sqlstate="23503") as transaction:
            transaction.bulk_create_user_access(requested)
        assert store.granted("ann") == []
        assert store.granted("bob") == []

    @pytest.mark.parametrize("user_id", UNUSUAL_USER_IDS)
    def test_any_user_id_identifies_one_user(self, store: Store, user_id: str) -> None:
        """A user ID of any characters identifies that user and no other."""
        one, two = store.add_interviews(2)
        bystanders = [
            "bad",
            "user",
            "blank",
            "Zoe",
            "line",
            "tab",
            *set(UNUSUAL_USER_IDS) - {user_id},
        ]
        assert create_grants(store.storage, user_id, one, two) == 2
        assert create_grants(store.storage, user_id, one, two) == 0
        assert store.granted(user_id) == [one, two]
        with store.storage.transaction() as transaction:
            assert list(transaction.get_existing_user_access(bystanders)) == []

    def test_similar_user_ids_in_one_call_are_different(self, store: Store) -> None:
        """Users with similar IDs in one call are granted and counted separately."""
        (interview_id,) = store.add_interviews(1)
        requested = [RequestedGrantsDTO(user_id, (interview_id,)) for user_id in UNUSUAL_USER_IDS]
        with store.storage.transaction() as transaction:
            counts = transaction.bulk_create_user_access(requested)
            grants = transaction.get_existing_user_access(UNUSUAL_USER_IDS)
        assert counts == [1] * len(UNUSUAL_USER_IDS)
        assert len(grants) == len(UNUSUAL_USER_IDS)
        assert set(grants) == {
            UserInterviewAccessDTO(user, interview_id) for user in UNUSUAL_USER_IDS
        }

    def test_progress_increases_to_the_total(self, store: Store) -> None:
        """``on_chunk`` gets increasing numbers after each chunk, at last the total."""
        ids = store.add_interviews(2 * CHUNK_SIZE)
        create_grants(store.storage, "ann", ids[0])
        progress: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", (*ids,)), RequestedGrantsDTO("bob", (ids[0],))],
                lambda done, total: progress.append((done, total)),
            )
        total = 2 * CHUNK_SIZE + 1
        assert progress == [(CHUNK_SIZE, total), (2 * CHUNK_SIZE, total), (total, total)]

    def test_no_progress_without_grants(self, store: Store) -> None:
        """``on_chunk`` is not called if no grant is requested."""
        progress: list[tuple[int, int]] = []
        with store.storage.transaction() as transaction:
            transaction.bulk_create_user_access(
                [RequestedGrantsDTO("ann", ())], lambda done, total: progress.append((done, total))
            )
        assert progress == []

    def test_exception_in_progress_rolls_back(self, store: Store) -> None:
        """If ``on_chunk`` raises, also after the last chunk, no row is kept."""
        ids = store.add_interviews(2 * CHUNK_SIZE)

        def stop_at_the_end(done: int, total: int) -> None:
            if done == total:
                raise KeyError

        with failing_transaction(KeyError, store.storage) as transaction:
            requested = RequestedGrantsDTO("ann", tuple(ids))
            transaction.bulk_create_user_access([requested], stop_at_the_end)
        assert store.granted("ann") == []


class TestGrantStatements:
    """The statements of PostgreSQL."""

    def test_large_arrays_get_custom_plans(self, postgres: PostgresStore) -> None:
        """Statements on many IDs never use a generic plan, however often they are executed."""
        ids = postgres.add_interviews(1_200)
        for turn in range(12):
            with postgres.storage.transaction() as transaction:
                transaction.find_unknown_interviews(ids, granted_to="ann")
                requested = RequestedGrantsDTO("ann", tuple(ids[: 1_000 + turn]))
                transaction.bulk_create_user_access([requested])
                plans = transaction._connection.exec_driver_sql(
                    "SELECT statement FROM pg_prepared_statements"
                    " WHERE generic_plans > 0 AND statement LIKE '%%uuid[]%%'"
                    " AND statement NOT LIKE '%%pg_prepared%%'"
                )
                assert plans.scalars().all() == []

    def test_suppressed_rows_are_not_counted(self, postgres: PostgresStore) -> None:
        """If a trigger suppresses some of many rows, only the inserted rows are counted."""
        ids = postgres.add_interviews(1_000)
        postgres.execute(
            "CREATE FUNCTION suppress_row() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RETURN CASE WHEN NEW.interview_id = '{ids[0]}' THEN NULL ELSE NEW END; END $$"
        )
        postgres.execute(
            "CREATE TRIGGER suppress_row BEFORE INSERT ON interview_userinterviewaccess"
            " FOR EACH ROW EXECUTE FUNCTION suppress_row()"
        )
        assert create_grants(postgres.storage, "ann", *ids) == 999
        assert postgres.granted("ann") == ids[1:]

    def test_collision_of_the_primary_key_is_an_error(self, postgres: PostgresStore) -> None:
        """A collision of the primary key fails; it does not count as an existing grant."""
        one, two = postgres.add_interviews(2)
        postgres.execute(
            "INSERT INTO interview_userinterviewaccess (id, user_id, interview_id)"
            " OVERRIDING SYSTEM VALUE VALUES"
            " (1, 'bob', CAST(:id AS uuid)), (2, 'eve', CAST(:id AS uuid))",
            id=one,
        )
        with pytest.raises(StorageError) as caught:
            create_grants(postgres.storage, "ann", two)
        assert caught.value.sqlstate == "23505"
        assert postgres.granted("ann") == []

    def test_error_of_a_rejected_row_omits_ids(self, postgres: PostgresStore) -> None:
        """The error of a rejected row names the constraint, but neither user nor interview."""
        missing = str(uuid4())
        with pytest.raises(StorageError) as caught:
            create_grants(postgres.storage, "ann-of-the-row", missing)
        assert "interview_userinterviewaccess" in str(caught.value)
        assert missing not in repr(caught.value)
        assert "ann-of-the-row" not in repr(caught.value)
