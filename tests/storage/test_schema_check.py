"""The check of server, schema and privileges at a worker's start."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import make_url, text

from devstack.servers import LocalStack
from storage.dtos import (
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    JobDTO,
    OutcomeDTO,
    PruneCountsDTO,
    RejectedIdsDTO,
    RequestedGrantsDTO,
)
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import DatabaseUnavailableError, SchemaMismatchError, check_schema
from storage.schema.privileges import NEEDED
from tests.storage.migrations import GRANTS, KEY, add_interviews, migrated
from tests.support.database import connected, role
from tests.support.database import database as temporary_database
from tests.support.platform import CHECKOUT, Database


@pytest.fixture(scope="module")
def shared(_stores_url: str) -> Database:
    """A database with all tables, for the tests that change neither tables nor settings."""
    return Database(_stores_url)


def test_check_reports_the_problem_and_the_remedy(database: Database) -> None:
    """The check returns None for a correct schema, else the problem and the remedy."""
    assert "run `interview-access migrate`" in str(check_schema(database.url))
    migrated(database.url)
    assert check_schema(database.url) is None

    database.execute(f"ALTER TABLE {GRANTS} DROP CONSTRAINT {KEY}")
    assert f"{GRANTS}(user_id, interview_id): found no unique key" in str(
        check_schema(database.url)
    )
    database.execute(
        "UPDATE grant_access_alembic_version SET version_num = 'later', oldest_compatible = 'later'"
    )
    assert "revision later, which this release does not know" in str(check_schema(database.url))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"username": "nobody"}, 'role "nobody" does not exist'),
        (
            {"query": {"host": "/nonexistent", "pool_mode": "public"}},
            "only options of libpq; unknown: pool_mode",
        ),
        (
            {"query": {"host": "/nonexistent", "sslmode": "perhaps"}},
            'invalid sslmode value: "perhaps"',
        ),
        (
            {"query": {"host": "/nonexistent", "connect_timeout": "soon"}},
            "connect_timeout to be a whole number",
        ),
    ],
)
def test_refused_connection_is_an_error_without_password(
    shared: Database, wrong: dict[str, Any], reason: str
) -> None:
    """A wrong URL is an error that names the problem, not an unavailable database."""
    url = make_url(shared.url).set(password="geheim", **wrong)  # noqa: S106 - made up
    with pytest.raises(StorageError) as caught:
        check_schema(url.render_as_string(hide_password=False))
    assert not isinstance(caught.value, DatabaseUnavailableError)
    assert reason in str(caught.value)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query": {"host": "/nonexistent"}},
        {"query": {}, "host": "127.0.0.1", "port": 1},
        {"query": {}, "host": "nowhere.invalid"},
    ],
)
def test_unreachable_server_is_an_error_without_password(
    shared: Database, wrong: dict[str, Any]
) -> None:
    """An unreachable server is an unavailable database; the error names its address."""
    url = make_url(shared.url).set(password="geheim", **wrong)  # noqa: S106 - made up
    with pytest.raises(DatabaseUnavailableError) as caught:
        check_schema(url.render_as_string(hide_password=False))
    assert str(url.query.get("host", url.host)) in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_connection_limit_is_unavailability(database: Database) -> None:
    """A database at its connection limit is unavailable, not refused."""
    migrated(database.url)
    name = make_url(database.url).database
    with role(database.url) as url:
        database.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        with pytest.raises(DatabaseUnavailableError, match="too many connections"):
            check_schema(url)


def test_locked_table_is_unavailability(database: Database) -> None:
    """A table locked by VACUUM FULL makes the database unavailable; the next check succeeds."""
    migrated(database.url)
    with connected(database.url) as connection:
        connection.execute(text("LOCK TABLE grant_access_alembic_version"))
        with pytest.raises(
            DatabaseUnavailableError, match="failed: canceling statement due to lock timeout"
        ):
            check_schema(database.url)
    assert check_schema(database.url) is None


WORKER = re.findall(
    r"^GRANT (.*) TO interview_access_worker;$",
    (CHECKOUT / "deploy/postgresql/roles.sql").read_text(encoding="utf-8"),
    re.MULTILINE,
)
"""The documented privileges of a worker's role."""


PRUNING = re.findall(
    r"^GRANT (.*) TO interview_access_worker;  -- to prune$",
    (CHECKOUT / "deploy/postgresql/roles.sql").read_text(encoding="utf-8"),
    re.MULTILINE,
)
"""The documented privileges that a role needs in addition to prune."""


COLUMNS_OF_WORKER = [
    f"{privilege} ON {table}"
    if privilege == "DELETE"
    else f"{privilege} ({', '.join(columns or ('id',))}) ON {table}"
    for table, privileges in NEEDED.items()
    for privilege, columns in privileges.items()
] + ["SELECT (version_num, oldest_compatible) ON grant_access_alembic_version"]
"""The same privileges by column, as far as PostgreSQL has such privileges."""


@pytest.mark.parametrize("grants", [WORKER, COLUMNS_OF_WORKER], ids=["tables", "columns"])
def test_documented_privileges_suffice(database: Database, grants: list[str]) -> None:
    """A role with the documented privileges can do everything that a worker does."""
    migrated(database.url)
    database.execute("ALTER TABLE grant_access_job ADD COLUMN later text")  # as a later release may
    (interview,) = add_interviews(database, 1)
    with role(database.url, *grants) as url:
        assert check_schema(url) is None
        storage = PostgresStorage(url)
        database.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
        )
        job = JobDTO("a", "t", None, "d" * 64)
        outcome = OutcomeDTO(
            "succeeded",
            result={},
            created_by_user={"ann": 1},
            rejected=RejectedIdsDTO(("x",), ("y",)),
        )
        with storage.transaction() as transaction:
            transaction.lock_jobs(["a"], wait=True)
            assert transaction.find_jobs(["a"]) == FoundJobsDTO({}, frozenset())
            transaction.request_cancellation("b")
            assert transaction.find_cancelled_jobs(["b"]) == {"b"}
            assert transaction.find_unknown_interviews([str(interview)]) == frozenset()
            assert len(transaction.get_interview_details([str(interview)])) == 1
            requested = RequestedGrantsDTO("ann", (str(interview),))
            assert transaction.bulk_create_user_access([requested]) == [1]
            transaction.get_existing_user_access(["ann"])
            start = datetime.now(UTC)
            attempt = InterviewAttemptDTO(str(uuid4()), str(interview), "ann", start)
            transaction.create_interview_attempt([attempt])
            transaction.record_jobs([FinishedJobDTO(job, outcome)])
            (request,) = transaction.lock_due_requests(1)
            transaction.reschedule_requests([request.job_id], sent=True)
            assert transaction.delete_finished_requests([request.job_id]) == frozenset()
        storage.schedule_all_requests_now()
        assert storage.get_finished_job("a") == FinishedJobDTO(job, outcome)
        storage.close()


@pytest.mark.parametrize(
    ("privilege", "table"),
    [
        (privilege, grant.split(" ON ")[1])
        for grant in WORKER
        for privilege in re.findall(r"[A-Z]+(?: \(.+?\))?", grant.split(" ON ")[0])
    ],
)
def test_missing_privilege_is_reported(shared: Database, privilege: str, table: str) -> None:
    """A missing privilege is reported with the GRANT statement."""
    with role(shared.url, *WORKER) as url:
        name = make_url(url).username
        shared.execute(f"REVOKE {privilege} ON {table} FROM {name}")
        # For the lock of an interview's row, one column is enough.
        is_row_lock = privilege == "UPDATE (id)"
        lacks = privilege if is_row_lock else privilege.partition(" (")[0]
        assert check_schema(url) == (
            f"the role {name} lacks {lacks} on public.{table}: "
            f"run GRANT {lacks} ON TABLE public.{table} TO {name}"
        )


def test_documented_privileges_suffice_to_prune(database: Database) -> None:
    """A role with the documented privileges can do everything that pruning does."""
    migrated(database.url)
    with role(database.url, *WORKER, *PRUNING) as url:
        assert check_schema(url, prunes=True) is None
        storage = PostgresStorage(url)
        with storage.transaction() as transaction:
            assert transaction.lock_pruning()
            finished = FinishedJobDTO(JobDTO("a", "t", None, "d" * 64), OutcomeDTO("succeeded", {}))
            transaction.record_jobs([finished])
            transaction.request_cancellation("b")
        for age in (timedelta(1), timedelta()):
            with storage.transaction() as transaction:
                counted = transaction.count_prunable(age)
                batch = transaction.prune_jobs(age, 9)
                cancellations = transaction.prune_cancellations(age, 9)
                assert batch.counts + cancellations == counted
        assert counted == PruneCountsDTO(jobs=1, cancellations=1)
        storage.close()


@pytest.mark.parametrize("grant", PRUNING)
def test_missing_privilege_to_prune_is_reported(shared: Database, grant: str) -> None:
    """A privilege that only pruning needs is reported only to a worker that prunes."""
    privilege, table = grant.split(" ON ")
    with role(shared.url, *WORKER, *PRUNING) as url:
        name = make_url(url).username
        shared.execute(f"REVOKE {grant} FROM {name}")
        sentence = (
            f"the role {name} lacks {privilege} on public.{table}: "
            f"run GRANT {privilege} ON TABLE public.{table} TO {name}"
        )
        assert check_schema(url) is None
        assert check_schema(url, prunes=True) == sentence


def test_column_privileges_suffice(shared: Database) -> None:
    """Privileges on the columns suffice."""
    with role(shared.url, *WORKER) as url:
        name = make_url(url).username
        shared.execute(f"REVOKE SELECT ON interview_interview FROM {name}")  # noqa: S608 - a constant
        for column in ("id", "title", "description", "duration"):
            assert "lacks SELECT on public.interview_interview" in str(check_schema(url))
            shared.execute(f"GRANT SELECT ({column}) ON interview_interview TO {name}")
        assert check_schema(url) is None


def test_missing_usage_is_reported(database: Database) -> None:
    """A schema on which the role lacks USAGE is reported with the GRANT statement."""
    migrated(database.url)
    database.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    with role(database.url, *WORKER) as url:
        name = make_url(url).username
        assert check_schema(url) == (
            f"the role {name} lacks USAGE on public: run GRANT USAGE ON SCHEMA public TO {name}"
        )


def test_missing_connect_is_reported(database: Database) -> None:
    """A database on which the role lacks CONNECT is reported with the GRANT statement."""
    name = make_url(database.url).database
    database.execute(f"REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")
    with role(database.url) as url, pytest.raises(StorageError) as refused:
        check_schema(url)
    user = make_url(url).username
    assert str(refused.value).endswith(f'run GRANT CONNECT ON DATABASE "{name}" TO "{user}"')


def test_missing_privilege_on_a_sequence_is_reported(database: Database) -> None:
    """A missing privilege on the sequence of a serial column is reported."""
    database.execute("CREATE SEQUENCE the_ids")
    migrated(database.url)
    database.execute(f"ALTER TABLE {GRANTS} ALTER id DROP IDENTITY")
    database.execute(f"ALTER TABLE {GRANTS} ALTER id SET DEFAULT nextval('the_ids')")
    with role(database.url, *WORKER) as url:
        name = make_url(url).username
        assert check_schema(url) == (
            f"the role {name} lacks USAGE on public.the_ids: "
            f"run GRANT USAGE ON SEQUENCE public.the_ids TO {name}"
        )
        database.execute(f"GRANT USAGE ON SEQUENCE the_ids TO {name}")
        assert check_schema(url) is None


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_encoding_other_than_utf8_is_rejected(stack: LocalStack, encoding: str) -> None:
    """A database that cannot hold every user ID is rejected before anything is changed."""
    options = f"ENCODING '{encoding}' LOCALE 'C'"
    with temporary_database(stack.database_url, options=options) as url:
        expected = f"got a database in the encoding {encoding}, expected UTF8"
        assert expected in str(check_schema(url))
        with pytest.raises(SchemaMismatchError, match=expected):
            migrated(url)
