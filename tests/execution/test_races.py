"""Races on PostgreSQL: simultaneous jobs, deleted interviews, grants of other services."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import pytest
from interview_access.errors import InvalidInterviewIdException
from sqlalchemy import text

from tasks.grant_access import GrantAccessInteractor, GrantAccessJob
from tasks.ledger import JobResult
from tasks.outcomes import result_of
from tests.support.database import connected
from tests.support.stores import (
    DELETE_INTERVIEW,
    Background,
    PostgresStore,
    a_job,
    all_at_once,
    created,
    until,
)

AT_ONCE = 20


@pytest.fixture(scope="module")
def postgres_url(_stores_url: str) -> str:
    """One database for all tests of this file, which change rows only."""
    return _stores_url


def grant(store: PostgresStore, jobs: list[GrantAccessJob]) -> list[JobResult]:
    """Have jobs done by a worker of its own: another storage, other connections."""
    with store.another() as storage:
        return GrantAccessInteractor(storage).grant_access(jobs)


def shuffled(seed: int, ids: list[str], count: int) -> list[str]:
    """Sample IDs in an order that depends on the seed."""
    return random.Random(seed).sample(ids, count)  # noqa: S311 - no secret


@pytest.mark.parametrize("batch", [1, 5])
def test_racing_jobs_of_one_user_add_up(postgres: PostgresStore, batch: int) -> None:
    """Overlapping jobs in different orders succeed, and their counts add up to the rows."""
    ids = postgres.add_interviews(40)
    numbers = range(AT_ONCE)
    racing: list[Callable[[], list[JobResult]]] = [
        partial(
            grant,
            postgres,
            [a_job(f"{one}-{at}", "ann", shuffled(one * 100 + at, ids, 25)) for at in range(batch)],
        )
        for one in numbers
    ]
    outcomes = [outcome for done in all_at_once(racing) for outcome in done]
    assert len(outcomes) == AT_ONCE * batch
    assert sum(map(created, outcomes)) == postgres.rows() == len(postgres.granted("ann"))


def test_racing_batches_of_many_users_add_up(postgres: PostgresStore) -> None:
    """Batches with overlapping users and IDs in different orders add up to the rows."""
    ids = postgres.add_interviews(12)
    users = [f"user-{number}" for number in range(6)]

    def batch(one: int) -> list[GrantAccessJob]:
        in_order = shuffled(one, users, len(users))
        return [a_job(f"{one}-{user}", user, shuffled(one, ids, 8)) for user in in_order]

    racing = [partial(grant, postgres, batch(one)) for one in range(8)]
    outcomes = [outcome for done in all_at_once(racing) for outcome in done]
    assert sum(map(created, outcomes)) == postgres.rows()


def test_simultaneous_deliveries_of_one_job_count_once(postgres: PostgresStore) -> None:
    """Simultaneous deliveries of one job have one effect and one result."""
    ids = postgres.add_interviews(30)
    racing = [
        partial(grant, postgres, [a_job("a", "ann", shuffled(one, ids, 30))])
        for one in range(AT_ONCE)
    ]
    outcomes = [outcome for done in all_at_once(racing) for outcome in done]
    assert {created(outcome) for outcome in outcomes} == {30}
    assert sum(not outcome.repeated for outcome in outcomes) == 1
    assert postgres.rows() == 30


def test_simultaneous_requests_under_one_id_have_one_winner(postgres: PostgresStore) -> None:
    """Of racing requests under one ID one succeeds, and the others are refused."""
    ids = postgres.add_interviews(AT_ONCE)
    racing = [partial(grant, postgres, [a_job("a", "ann", [one])]) for one in ids]
    outcomes = [outcome for done in all_at_once(racing) for outcome in done]
    assert sum(outcome.refusal is None for outcome in outcomes) == 1
    assert {created(outcome) for outcome in outcomes} == {1}
    assert postgres.rows() == 1


def test_an_interview_deleted_first_fails_the_job_that_names_it(postgres: PostgresStore) -> None:
    """A job waits for a running delete, then fails and names the ID; its batch succeeds."""
    gone, stays = postgres.add_interviews(2)
    with connected(postgres.database_url) as platform:
        for statement in DELETE_INTERVIEW:
            platform.execute(statement, {"id": gone})
        batch = Background(
            lambda: postgres.grant(a_job("a", "ann", [gone, stays]), a_job("b", "bob", [stays]))
        )
        postgres.until_waiting(batch)
        assert not batch.over
        platform.commit()
    failed, neighbour = batch.result()
    assert failed.outcome
    with pytest.raises(InvalidInterviewIdException, match=gone):
        result_of(failed.outcome)
    assert created(neighbour) == 1
    assert postgres.granted("ann") == []


def test_an_interview_that_a_job_grants_cannot_be_deleted(postgres: PostgresStore) -> None:
    """A delete waits for the job that has locked the interview, and then fails."""
    (held,) = postgres.add_interviews(1)
    job = a_job("a", "ann", [held])
    with postgres.storage.transaction() as transaction:
        assert transaction.find_unknown_interviews([held]) == frozenset()
        delete = Background(lambda: postgres.delete_interview(held))
        postgres.until_waiting(delete)
        assert not delete.over
        grants = Background(lambda: grant(postgres, [job]))
        assert [created(outcome) for outcome in grants.result()] == [1]
    assert delete.result() is False
    assert postgres.granted("ann") == [held]


def test_cascading_deletes_leave_no_dangling_grant(
    postgres: PostgresStore,
) -> None:
    """A job that races Django's cascade fails or loses its grants with the interview."""
    ids = postgres.add_interviews(AT_ONCE)
    delete_grants = text(
        "DELETE FROM interview_userinterviewaccess WHERE interview_id = CAST(:id AS uuid)"
    )

    def cascade(interview_id: str) -> None:
        with connected(postgres.database_url) as platform:
            for statement in (delete_grants, *DELETE_INTERVIEW):
                platform.execute(statement, {"id": interview_id})
            platform.commit()

    def try_to_cascade(interview_id: str) -> None:
        def done() -> bool:
            try:
                cascade(interview_id)
            except Exception:  # noqa: BLE001 - a grant between the statements, or a deadlock
                return False
            return True

        until(done)

    racing: list[Callable[[], object]] = [partial(try_to_cascade, one) for one in ids[:5]]
    racing += [
        partial(grant, postgres, [a_job(str(one), f"user-{one}", shuffled(one, ids, AT_ONCE))])
        for one in range(5)
    ]
    all_at_once(racing)
    dangling = (
        "SELECT count(*) FROM interview_userinterviewaccess AS grants WHERE NOT EXISTS"
        " (SELECT FROM interview_interview WHERE id = grants.interview_id)"
    )
    assert postgres.value(dangling) == 0
    assert postgres.value("SELECT count(*) FROM interview_interview") == AT_ONCE - 5


def test_grants_that_others_write_meanwhile_are_not_counted(postgres: PostgresStore) -> None:
    """If the platform writes the same grants meanwhile, each row is counted by its writer."""
    ids = postgres.add_interviews(60)

    def write() -> int:
        written = 0
        with connected(postgres.database_url, autocommit=True) as platform:
            for interview_id in shuffled(1, ids, 60):
                written += platform.execute(
                    text(
                        "INSERT INTO interview_userinterviewaccess (user_id, interview_id)"
                        " VALUES ('ann', CAST(:id AS uuid)) ON CONFLICT DO NOTHING"
                    ),
                    {"id": interview_id},
                ).rowcount
        return written

    def grant_all() -> int:
        return sum(map(created, grant(postgres, [a_job("a", "ann", ids)])))

    written, counted = all_at_once([write, grant_all])
    assert written + counted == postgres.rows() == 60
    named = [postgres.storage.find_grant_origin("ann", one).job_id for one in ids]
    assert named.count("a") == counted
    assert named.count(None) == written
