"""deploy/postgresql/roles.sql: each role can do its work, and nothing else."""

from __future__ import annotations

import re
from contextlib import closing

import pytest
from interview_access.outbox import enqueue_in_sqlalchemy
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from storage.postgres import PostgresStorage
from storage.samples import NAMED_SAMPLES
from storage.schema import check_schema
from tests.deploy.servers import ROLES, Servers
from tests.support.commands import run_module
from tests.support.database import connected
from tests.support.stores import until

TABLES = (
    *("interview_interview", "interview_interviewconfig", "interview_interviewattempt"),
    *("interview_userinterviewaccess", "grant_access_job", "grant_access_request"),
    *("grant_access_cancellation", "grant_access_rejection", "grant_access_cohort"),
    *("grant_access_tombstone", "grant_access_alembic_version"),
)


def test_the_file_has_no_password() -> None:
    """No statement sets a password."""
    assert not re.search(
        r"^[^-\n]*PASSWORD", ROLES.read_text(encoding="utf-8"), re.IGNORECASE | re.MULTILINE
    )


def test_the_worker_has_the_privileges_that_it_needs(servers: Servers) -> None:
    """The worker's check at its start finds no missing privilege."""
    assert check_schema(servers.database("worker")) is None


def test_the_worker_reads_its_metrics(servers: Servers) -> None:
    """The worker's role may read all that a scrape reads."""
    with closing(PostgresStorage(servers.database("worker"))) as storage:
        assert storage.measure_ledger().size > 0
        assert storage.count_requests().unsent == 0


def test_a_job_is_requested_in_a_transaction(servers: Servers) -> None:
    """The producer's role suffices for the outbox helper and for RETURNING; the job is executed."""
    with connected(servers.database("producer")) as connection:
        job_id = enqueue_in_sqlalchemy(connection, "outbox", [NAMED_SAMPLES[0]])
        enqueue_in_sqlalchemy(connection, "outbox", [NAMED_SAMPLES[0]], job_id=job_id)  # once more
        returned = connection.execute(
            text(
                "INSERT INTO grant_access_request (user_id, interview_ids)"
                " VALUES ('outbox', '{}') RETURNING job_id"
            )
        ).scalar_one()
        connection.commit()
    storage = PostgresStorage(servers.database("operator"))
    until(lambda: all(storage.get_finished_job(one) for one in (job_id, returned)))
    storage.close()


@pytest.mark.parametrize("table", TABLES)
def test_the_operator_reads_every_table(servers: Servers, table: str) -> None:
    """The operator's role reads the table."""
    with connected(servers.database("operator")) as connection:
        connection.execute(text(f"SELECT * FROM {table}"))  # noqa: S608 - a constant


CHANGES = tuple(
    statement
    for table in TABLES
    for statement in (
        f"INSERT INTO {table} DEFAULT VALUES",
        f"DELETE FROM {table}",  # noqa: S608 - a constant
        f"TRUNCATE {table}",
        f"DROP TABLE {table}",
        f"ALTER TABLE {table} ADD COLUMN x int",
        f"CREATE INDEX ON {table} ((1))",
    )
)
UPDATES = (
    "UPDATE interview_interview SET title = 'x'",
    "UPDATE interview_interview SET description = 'x'",
    "UPDATE interview_interview SET duration = '1 hour'",
    "UPDATE interview_interviewconfig SET is_default_access_allowed = true",
    "UPDATE interview_interviewattempt SET user_id = 'x'",
    "UPDATE interview_userinterviewaccess SET user_id = 'x'",
    "UPDATE grant_access_job SET state = 'failed'",
    "UPDATE grant_access_request SET user_id = 'x'",
    "UPDATE grant_access_alembic_version SET version_num = 'x'",
)
ADMINISTRATION = (
    *("CREATE TABLE x ()", "CREATE FUNCTION x() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    *("CREATE ROLE x", "CREATE SCHEMA x", "CREATE DATABASE x", "CREATE EXTENSION dblink"),
    *("ALTER ROLE interview_access_owner PASSWORD 'x'", "SET ROLE interview_access_owner"),
    *("GRANT interview_access_owner TO CURRENT_USER", "ALTER SYSTEM SET fsync = off"),
    *("SELECT pg_read_file('/etc/hosts')", "COPY (SELECT 1) TO PROGRAM 'true'"),
)

WORKERS_OWN = (
    "INSERT INTO interview_interviewattempt DEFAULT VALUES",
    "INSERT INTO interview_userinterviewaccess DEFAULT VALUES",
    "INSERT INTO grant_access_job DEFAULT VALUES",
    "INSERT INTO grant_access_cancellation DEFAULT VALUES",
    "INSERT INTO grant_access_rejection DEFAULT VALUES",
    "INSERT INTO grant_access_cohort DEFAULT VALUES",
    "DELETE FROM grant_access_request",
)
FORBIDDEN = {
    "worker": (*(one for one in CHANGES if one not in WORKERS_OWN), *UPDATES, *ADMINISTRATION),
    "operator": (*CHANGES, *UPDATES, *ADMINISTRATION),
    "producer": (
        *(one for one in CHANGES if one != "INSERT INTO grant_access_request DEFAULT VALUES"),
        *UPDATES,
        *ADMINISTRATION,
        *(f"SELECT * FROM {table}" for table in TABLES),  # noqa: S608 - constants
        "SELECT user_id FROM grant_access_request",
        "SELECT user_ids, interview_ids, headers FROM grant_access_request",
        "INSERT INTO grant_access_request (job_id, sent_at) VALUES ('x', now())",
        "INSERT INTO grant_access_request (job_id, look_at) VALUES ('x', now())",
        "UPDATE grant_access_request SET sent_at = now()",
    ),
}


@pytest.mark.parametrize("role", FORBIDDEN)
def test_a_role_is_denied_what_its_work_does_not_need(servers: Servers, role: str) -> None:
    """PostgreSQL refuses each of these statements for a missing privilege."""
    permitted = []
    with connected(servers.database(role), autocommit=True) as connection:
        for statement in FORBIDDEN[role]:
            try:
                connection.exec_driver_sql(statement)
                permitted.append(statement)
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != "42501":
                    permitted.append(f"{statement}: {error.orig}")
    assert permitted == []


@pytest.mark.parametrize(
    ("role", "command", "table", "privilege"),
    [
        ("producer", "status", "grant_access_job", "SELECT"),
        ("operator", "cancel", "grant_access_cancellation", "INSERT"),
    ],
)
def test_a_command_without_a_privilege_names_the_grant(
    servers: Servers, role: str, command: str, table: str, privilege: str
) -> None:
    """The command ends with one sentence that has the GRANT statement, and no traceback."""
    environment = servers.environment(role, "operator")
    done = run_module(environment, "worker.cli", command, "denied")
    assert (done.returncode, done.stdout) == (3, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("The job's state cannot be read: the role interview_access_")
    assert f"GRANT {privilege} ON TABLE public.{table} TO interview_access_{role}" in sentence


def test_the_worker_locks_interviews(servers: Servers) -> None:
    """UPDATE of the column ID, which the row lock requires, suffices for it."""
    with connected(servers.database("worker")) as connection:
        lock = "SELECT id FROM interview_interview FOR KEY SHARE"
        assert len(connection.execute(text(lock)).all()) == len(NAMED_SAMPLES)
