"""The audit columns of the ledger, and the lists of finished jobs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from interview_access.contracts import ORIGIN_LENGTHS
from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql

from devstack.servers import LocalStack
from storage.dtos import (
    ACTOR_LENGTH,
    REASON_LENGTH,
    WORKER_LENGTH,
    AuditDTO,
    FinishedJobDTO,
    FinishedJobFilterDTO,
    OutcomeDTO,
)
from storage.interface import Storage
from storage.postgres.audit import selected_jobs
from tests.storage.transactions import create_grants, finish, finished, ledger_entry
from tests.support.database import connected, database
from tests.support.stores import Store, a_cohort, a_job

NOW = datetime.now(UTC)
ALL = 1_000


def a_finished(
    job_id: str, user_id: str | None = "ann", *, actor: str | None = None, state: str = "succeeded"
) -> FinishedJobDTO:
    """Return a finished job without figures."""
    error = None if state == "succeeded" else {"type": "T", "sentence": "No.", "details": {}}
    entry = replace(ledger_entry(job_id), user_id=user_id, audit=AuditDTO(actor=actor))
    return FinishedJobDTO(entry, OutcomeDTO(state, error=error))


def listed(storage: Storage, limit: int = ALL, **wanted: Any) -> list[str]:
    """Return the IDs of the jobs that a filter selects."""
    jobs = storage.list_finished_jobs(FinishedJobFilterDTO(**wanted), limit)
    return [one.job.job_id for one in jobs]


class TestAudit:
    """What the ledger keeps beside a job's request and outcome."""

    def test_all_values_are_stored(self, store: Store) -> None:
        """Times, attempts, worker, actor and reason are stored, at their largest lengths."""
        audit = AuditDTO(
            requested_at=NOW - timedelta(days=1),
            enqueued_at=NOW - timedelta(hours=1, microseconds=1),
            started_at=NOW,
            attempts=3,
            worker="w" * WORKER_LENGTH,
            actor="🦄" * ACTOR_LENGTH,
            reason="é" * REASON_LENGTH,
        )
        finish(store.storage, FinishedJobDTO(replace(ledger_entry("a"), audit=audit), OK))
        stored = store.storage.get_finished_job("a")
        assert stored
        assert stored.job.audit == audit

    @pytest.mark.parametrize("year", [1, 9999])
    def test_times_of_any_year_are_stored(self, store: Store, year: int) -> None:
        """The first and the last year that a producer can name are stored."""
        audit = AuditDTO(enqueued_at=datetime(year, 6, 1, tzinfo=UTC))
        finish(store.storage, FinishedJobDTO(replace(ledger_entry("a"), audit=audit), OK))
        stored = store.storage.get_finished_job("a")
        assert stored
        assert stored.job.audit == audit

    def test_a_job_without_an_origin_has_none(self, store: Store) -> None:
        """A job of which nothing is known has no value."""
        finish(store.storage, finished("a"))
        stored = store.storage.get_finished_job("a")
        assert stored
        assert stored.job.audit == AuditDTO()

    def test_lengths_are_those_of_the_contract(self) -> None:
        """The columns hold every actor and reason that a worker keeps."""
        assert ORIGIN_LENGTHS == {"actor": ACTOR_LENGTH, "reason": REASON_LENGTH}


OK = OutcomeDTO("succeeded", result={})


class TestListFinishedJobs:
    """``list_finished_jobs``."""

    def test_newest_first(self, store: Store) -> None:
        """The newest jobs are listed first, up to the limit, with their outcomes."""
        for number in range(4):
            finish(store.storage, finished(f"{number}", number))
        assert listed(store.storage) == ["3", "2", "1", "0"]
        assert store.storage.list_finished_jobs(FinishedJobFilterDTO(), 2) == [
            finished("3", 3),
            finished("2", 2),
        ]

    def test_by_user(self, store: Store) -> None:
        """The jobs for exactly this user are selected, whatever came of them."""
        jobs = a_finished("a"), a_finished("b", "Ann"), a_finished("c", None), a_finished("d")
        for one in jobs:
            finish(store.storage, one)
        assert listed(store.storage, user_id="ann") == ["d", "a"]
        assert listed(store.storage, user_id="") == []

    def test_by_user_of_a_cohort(self, store: Store) -> None:
        """The jobs of cohorts that created grants of exactly this user are selected, each once."""
        one, two, three = store.add_interviews(3)
        create_grants(store.storage, "django", one)
        for job in (
            a_job("alone", "ann", [one]),
            a_cohort("first", ["bob", "ann"], [one, two, three]),
            a_cohort("nothing new", ["ann"], [one, two]),
            a_cohort("others", ["bob", "Ann"], [one]),
        ):
            store.grant(job)
        assert listed(store.storage, user_id="ann") == ["first", "alone"]
        assert listed(store.storage, 1, user_id="ann") == ["first"]
        assert listed(store.storage, user_id="Ann") == ["others"]
        assert listed(store.storage, user_id="django") == []

    def test_by_user_and_interview(self, store: Store) -> None:
        """The job that created this one grant is selected, and none that granted either alone."""
        one, two = store.add_interviews(2)
        for job in (
            a_job("alone", "ann", [one]),
            a_cohort("cohort", ["ann", "bob"], [one, two]),
        ):
            store.grant(job)
        assert listed(store.storage, user_id="ann", interview_id=one) == ["alone"]
        assert listed(store.storage, user_id="ann", interview_id=two) == ["cohort"]
        assert listed(store.storage, user_id="cyd", interview_id=two) == []

    def test_by_actor(self, store: Store) -> None:
        """The jobs of exactly this actor are selected."""
        for job_id, actor in ("a", "hr"), ("b", "HR"), ("c", None), ("d", "hr"):
            finish(store.storage, a_finished(job_id, actor=actor))
        assert listed(store.storage, actor="hr") == ["d", "a"]
        assert listed(store.storage, actor="h%") == []

    def test_by_interview(self, store: Store) -> None:
        """The finished jobs that created grants of exactly this interview are selected once."""
        one, two = store.add_interviews(2)
        create_grants(store.storage, "django", one)
        store.grant(a_cohort("a", ["ann", "bob"], [one]), a_job("b", "cyd", [one, two]))
        store.grant(a_job("nothing new", "ann", [one]), a_job("c", "dan", [two]))
        assert sorted(listed(store.storage, interview_id=one)) == ["a", "b"]
        assert listed(store.storage, interview_id=one, user_id="cyd") == ["b"]
        assert listed(store.storage, interview_id=str(uuid4())) == []

    @pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "expired"])
    def test_by_state(self, store: Store, state: str) -> None:
        """The jobs in exactly this state are selected."""
        for one in "succeeded", "failed", "cancelled", "expired":
            finish(store.storage, a_finished(one, state=one))
        assert listed(store.storage, state=state) == [state]

    def test_by_time(self, store: Store) -> None:
        """A period includes its beginning and not its end."""
        for job_id in "abc":
            finish(store.storage, a_finished(job_id))
        middle = store.storage.get_finished_job("b")
        assert middle
        assert listed(store.storage, since=middle.finished_at) == ["c", "b"]
        assert listed(store.storage, until=middle.finished_at) == ["a"]
        assert listed(store.storage, since=middle.finished_at, until=middle.finished_at) == []

    def test_filters_combine(self, store: Store) -> None:
        """A job is listed if all filters select it."""
        for at, (user, actor, state) in enumerate(
            [("ann", "hr", "failed"), ("ann", "hr", "succeeded"), ("bob", "hr", "failed")]
        ):
            finish(store.storage, a_finished(f"{at}", user, actor=actor, state=state))
        (interview_id,) = store.add_interviews(1)
        store.grant(a_cohort("cohort", ["ann"], [interview_id]))
        assert listed(store.storage, user_id="ann", actor="hr", state="failed") == ["0"]
        assert listed(store.storage, user_id="ann", state="succeeded") == ["cohort", "1"]
        assert listed(store.storage, user_id="ann", actor="hr", since=NOW) == ["1", "0"]
        assert listed(store.storage, actor="hr", state="failed", since=NOW) == ["2", "0"]


FILL = """
    INSERT INTO grant_access_job
        (job_id, task, state, user_id, request_digest, actor, finished_at)
    SELECT number::text, 'task', CASE WHEN mod(number, 50) = 0 THEN 'failed' ELSE 'succeeded' END,
           'user ' || mod(number, 1000), '',
           CASE WHEN mod(number, 20) = 0 THEN 'actor ' || mod(number, 7) END,
           now() - number * interval '1 minute'
    FROM generate_series(1, 20000) AS number;
    INSERT INTO interview_interview (id, title, duration)
    SELECT lpad(number::text, 32, '0')::uuid, '', '1 hour' FROM generate_series(0, 99) AS number;
    INSERT INTO interview_userinterviewaccess (user_id, interview_id, created_by_job)
    SELECT 'user ' || number, lpad(mod(number, 100)::text, 32, '0')::uuid, number::text
    FROM generate_series(1, 20000) AS number
"""


@pytest.fixture(scope="module")
def filled(stack: LocalStack, _migrated: str) -> Iterator[Connection]:
    """A database with 20,000 finished jobs, each of which created a grant."""
    with (
        database(stack.database_url, template=_migrated) as url,
        connected(url, autocommit=True) as connection,
    ):
        connection.exec_driver_sql(FILL)
        connection.exec_driver_sql("VACUUM ANALYZE")
        yield connection


@pytest.mark.parametrize(
    ("wanted", "index", "condition"),
    [
        ({"user_id": "user 7"}, "user", "user_id)::text = 'user 7'"),
        ({"user_id": "user 7"}, "pkey", "(job_id)::text = ANY ("),
        ({"user_id": "user 7", "since": timedelta(days=9)}, "pkey", "(job_id)::text = ANY ("),
        ({"user_id": "user 7", "interview_id": str(UUID(int=7))}, "pkey", ") AND (interview_id = "),
        ({"interview_id": str(UUID(int=7))}, "pkey", "interview_id = '00000000-"),
        ({"actor": "actor 3"}, "actor", "actor)::text = 'actor 3'"),
        ({"state": "failed"}, "state", "state)::text = 'failed'"),
        ({"state": "expired"}, "state", "state)::text = 'expired'"),
        ({"since": timedelta(hours=1)}, "finished_at", "finished_at >= "),
        ({"until": timedelta(days=13)}, "finished_at", "finished_at < "),
        ({"state": "succeeded"}, "finished_at", ""),
        ({}, "finished_at", ""),
        ({"user_id": "user 7", "state": "failed"}, "user", "user_id)::text = 'user 7'"),
        ({"actor": "actor 3", "since": timedelta(days=9)}, "actor", "finished_at >= "),
    ],
    ids=str,
)
def test_lists_are_read_from_an_index(
    filled: Connection, wanted: dict[str, Any], index: str, condition: str
) -> None:
    """Each filter is an index condition, or the order of an index that reads the newest jobs."""
    given: dict[str, Any] = {
        name: NOW - value if isinstance(value, timedelta) else value
        for name, value in wanted.items()
    }
    statement = selected_jobs(FinishedJobFilterDTO(**given), 100).compile(
        dialect=postgresql.dialect(),  # type: ignore[no-untyped-call] # SQLAlchemy's
        compile_kwargs={"literal_binds": True},
    )
    lines = filled.exec_driver_sql(f"EXPLAIN {statement}".replace("%", "%%")).scalars()
    plan = "\n".join(lines)
    assert f"grant_access_job_{index}" in plan, plan
    assert "Seq Scan" not in plan, plan
    conditions = [line for line in plan.splitlines() if "Index Cond" in line]
    assert any(condition in line for line in conditions) or not condition, plan
