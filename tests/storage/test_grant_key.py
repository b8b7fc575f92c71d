"""The unique key on grants, added to a table in use."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import psycopg
import pytest

from storage.schema import DatabaseUnavailableError, DuplicateGrantsError, check_schema, migrate
from tests.storage.migrations import (
    BUILD_WAITS,
    GRANTS,
    KEY,
    add_grants,
    add_interviews,
    grants,
    migrated,
    migrating,
    old_snapshot,
)
from tests.support.platform import CHECKOUT, PATIENCE_SECONDS, Database, DjangoService

REFUSAL = "interview_access_refuse_duplicate"


@pytest.fixture
def keyless(migrated_url: str) -> Database:
    """A database at the revision before the key's, with all tables."""
    database = Database(migrated_url)
    database.execute(f"ALTER TABLE {GRANTS} DROP CONSTRAINT {KEY}")
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0001'")
    return database


@pytest.mark.parametrize(
    "statement",
    [
        f"ALTER TABLE {GRANTS} ADD CONSTRAINT mine UNIQUE (user_id, interview_id)",
        f"ALTER TABLE {GRANTS} ADD CONSTRAINT mine UNIQUE (interview_id, user_id)",
        f"CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id)",
        f"CREATE UNIQUE INDEX mine ON {GRANTS} (interview_id DESC, user_id text_pattern_ops)",
        f"CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id) INCLUDE (id)",
    ],
)
def test_equal_key_is_adopted(keyless: Database, statement: str) -> None:
    """An equal unique key of any name, constraint or index, is adopted unchanged."""
    keyless.execute(statement)
    before = keyless.catalog()[GRANTS]
    assert "adopted the unique key mine" in migrated(keyless.url)
    assert keyless.catalog()[GRANTS] == before
    assert check_schema(keyless.url) is None


def test_key_of_the_service_is_adopted_beside_the_index_of_the_worker(keyless: Database) -> None:
    """An index that the worker left is not made a constraint if the service has a key."""
    keyless.execute(f"CREATE UNIQUE INDEX {KEY} ON {GRANTS} (user_id, interview_id)")
    keyless.execute(f"ALTER TABLE {GRANTS} ADD CONSTRAINT yours UNIQUE (user_id, interview_id)")
    reported = migrated(keyless.url)
    assert "adopted the unique key yours" in reported
    assert reported[-1].endswith(f"run DROP INDEX CONCURRENTLY public.{KEY}")
    keyless.execute(reported[-1].partition("run ")[2])
    assert migrated(keyless.url) == ["nothing to do: the schema is at revision 0011"]


@pytest.mark.parametrize(
    "statement",
    [
        f"CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id) WHERE user_id <> ''",
        f"CREATE UNIQUE INDEX mine ON {GRANTS} (lower(user_id), interview_id)",
        f"CREATE INDEX mine ON {GRANTS} (user_id, interview_id)",
    ],
)
def test_other_index_is_not_adopted(keyless: Database, statement: str) -> None:
    """An index that is partial, on an expression or not unique does not replace the key."""
    keyless.execute(statement)
    assert f"added the unique key {KEY}" in migrated(keyless.url)


@pytest.mark.parametrize("dry_run", [True, False])
def test_redundant_key_is_reported(migrated_url: str, dry_run: bool) -> None:
    """If the service adds an equal key later, the statement that drops one is reported.

    It drops the worker's key, since the migrations of the service refer to the other by name.
    """
    database = Database(migrated_url)
    database.execute(f'ALTER TABLE {GRANTS} ADD CONSTRAINT "Mine" UNIQUE (interview_id, user_id)')
    reported: list[str] = []
    migrate(database.url, dry_run=dry_run, report=reported.append)
    statement = f"ALTER TABLE public.{GRANTS} DROP CONSTRAINT {KEY}"
    assert reported == [
        "nothing to do: the schema is at revision 0011",
        (
            f"the unique key {KEY} is redundant: Mine is equal, and every insert maintains both; "
            f"unless a migration of the service names it, run {statement}"
        ),
    ]
    database.execute(statement)
    assert migrated(database.url) == reported[:1]
    assert check_schema(database.url) is None


def test_writers_are_not_blocked(
    database: Database, service: DjangoService, record_property: Callable[[str, object], None]
) -> None:
    """A Django process that writes grants, including duplicates, is blocked for a moment only.

    The build is delayed until the process has written 300 grants during it. Afterwards there is no
    duplicate.
    """
    rows = 200_000
    (interview, *_) = add_interviews(database, 1)
    database.execute(
        f"INSERT INTO {GRANTS} (user_id, interview_id) "  # noqa: S608 - a constant
        "SELECT 'user-' || n %% %s, %s FROM generate_series(1, %s) AS n",
        rows - 500,
        interview,
        rows,
    )
    with service.writing() as figures:
        with old_snapshot(database) as release_snapshot, migrating(database.url) as reported:
            database.wait_for(BUILD_WAITS)
            last = database.value("SELECT last_value FROM interview_userinterviewaccess_id_seq")
            database.wait_for(
                f"SELECT last_value > {last} + 300 FROM interview_userinterviewaccess_id_seq"  # noqa: S608 - a number of our own
            )
            release_snapshot()
        found = figures()

    for name, figure in found.items():
        record_property(name, figure)
    print(f"Django's longest waits: {found}")  # noqa: T201 - a figure for operators
    assert f"added the unique key {KEY}" in reported
    assert found["refused"] > 0
    assert found["longest_write"] < 1.0
    assert found["longest_read"] < 1.0
    assert database.value(
        f"SELECT count(*) = count(DISTINCT (user_id, interview_id)) FROM {GRANTS}"  # noqa: S608 - a constant
    )


@pytest.mark.usefixtures("service")
def test_frequent_duplicates_fail_one_round_only(database: Database) -> None:
    """After a duplicate has failed one round, a trigger rejects duplicates in the next.

    The trigger is dropped afterwards.
    """
    (interview,) = add_interviews(database, 1)
    add_grants(database, ("ann", interview))
    before = database.catalog()
    refusals: list[str | None] = []

    def write_duplicate(sentence: str) -> None:
        if sentence.startswith("building"):
            try:
                add_grants(database, ("ann", interview))
            except psycopg.errors.UniqueViolation as error:
                refusals.append(error.diag.constraint_name)

    migrate(database.url, report=write_duplicate)

    assert refusals == [KEY]
    assert grants(database) == [(1, "ann", interview)]
    assert set(database.catalog()[GRANTS]) - set(before[GRANTS]) == {
        'column created_by_job character varying(255) f  "C"',
        f"constraint {KEY} UNIQUE (user_id, interview_id)",
        f"index CREATE UNIQUE INDEX {KEY} ON {GRANTS} USING btree (user_id, interview_id) t",
    }
    assert database.execute("SELECT FROM pg_proc WHERE proname = %s", REFUSAL) == []


@pytest.mark.usefixtures("service")
def test_migration_ends_after_five_rounds(database: Database) -> None:
    """If duplicates arrive in every round, it ends with their number and leaves no index.

    They arrive by replication, which bypasses triggers. The next run succeeds.
    """
    (interview,) = add_interviews(database, 1)
    add_grants(database, ("ann", interview))
    before = database.catalog()
    rounds: list[str] = []

    def replicate_duplicate(sentence: str) -> None:
        if sentence.startswith("building"):
            rounds.append(sentence)
            with database.connect() as connection:
                connection.execute("SET session_replication_role = replica")
                connection.execute(
                    f"INSERT INTO {GRANTS} (user_id, interview_id) VALUES ('ann', %s), ('ann', %s)",  # noqa: S608 - a constant
                    [interview, interview],
                )

    with pytest.raises(DuplicateGrantsError, match="2 duplicate grants of 1 pair") as caught:
        migrate(database.url, report=replicate_duplicate)

    assert caught.value.duplicates == 2
    assert len(rounds) == 5
    assert database.catalog()[GRANTS] == before[GRANTS]
    assert check_schema(database.url) is not None
    assert f"added the unique key {KEY}" in migrated(database.url)
    assert grants(database) == [(1, "ann", interview)]


@pytest.mark.usefixtures("service")
def test_killed_run_is_continued(database: Database) -> None:
    """A run killed during the build leaves an unfinished index, which the next run replaces."""
    (interview,) = add_interviews(database, 1)
    add_grants(database, ("ann", interview), ("ann", interview))
    code = "import sys; from storage.schema import migrate; migrate(sys.argv[1], report=print)"
    with old_snapshot(database):
        process = subprocess.Popen([sys.executable, "-c", code, database.url], cwd=CHECKOUT)
        try:
            database.wait_for(BUILD_WAITS)
        finally:
            process.kill()
            process.wait()
        # The server detects a dead client late, so its session is terminated here.
        database.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_progress_create_index "
            "WHERE datname = current_database()"
        )
    assert (
        database.value("SELECT indisvalid FROM pg_index WHERE indexrelid = %s::regclass", KEY)
        is False
    )

    assert f"added the unique key {KEY}" in migrated(database.url)
    assert check_schema(database.url) is None
    assert grants(database) == [(1, "ann", interview)]


def test_lost_connection_is_reported(database: Database) -> None:
    """A connection lost during the build is reported as unavailable; the next run succeeds."""

    def cut() -> None:
        database.wait_for(BUILD_WAITS)
        database.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_progress_create_index "
            "WHERE datname = current_database()"
        )

    with old_snapshot(database):
        cutting = threading.Thread(target=cut)
        cutting.start()
        with pytest.raises(DatabaseUnavailableError, match="terminating connection"):
            migrated(database.url)
        cutting.join(PATIENCE_SECONDS)
    assert f"added the unique key {KEY}" in migrated(database.url)


def test_concurrent_runs_take_turns(database: Database) -> None:
    """A second run waits for the first, reports so, and has nothing to do."""
    second: list[str] = []
    is_waiting = threading.Event()

    def report(sentence: str) -> None:
        second.append(sentence)
        is_waiting.set()

    with old_snapshot(database) as release_snapshot, migrating(database.url):
        database.wait_for(BUILD_WAITS)
        other = threading.Thread(target=migrate, args=[database.url], kwargs={"report": report})
        other.start()
        assert is_waiting.wait(PATIENCE_SECONDS)
        release_snapshot()
    other.join(PATIENCE_SECONDS)
    assert second == [
        "waiting: another migrate is running on this database",
        "nothing to do: the schema is at revision 0011",
    ]


@pytest.mark.usefixtures("service")
def test_referenced_duplicates_are_kept(database: Database) -> None:
    """A duplicate that another table references is kept, and the error names that table."""
    (interview,) = add_interviews(database, 1)
    add_grants(database, ("ann", interview), ("ann", interview))
    database.execute(
        f"CREATE TABLE certificate (grant_id bigint REFERENCES {GRANTS} "
        "DEFERRABLE INITIALLY DEFERRED)"
    )
    database.execute("INSERT INTO certificate VALUES (2)")

    with pytest.raises(DuplicateGrantsError, match='referenced from table "certificate"'):
        migrated(database.url)
    assert len(grants(database)) == 2
    assert database.indexes_of_grants().isdisjoint({KEY})
