"""The schema on real PostgreSQL, beside a real Django service that shares the tables.

Django runs as processes of its own, from tests/django_service, as the platform's service does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from psycopg import sql
from psycopg.rows import dict_row
from sqlalchemy import NullPool, create_engine, insert, make_url, select, text

from devstack.servers import LocalStack
from storage import models
from storage.dtos import (
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    JobDTO,
    OutcomeDTO,
    RejectedIdsDTO,
    RequestedGrantsDTO,
)
from storage.errors import StorageError
from storage.postgres import PostgresStorage
from storage.schema import (
    DatabaseUnavailableError,
    Difference,
    DuplicateGrantsError,
    SchemaMismatchError,
    check_schema,
    current_revision,
    expected_revision,
    migrate,
)
from storage.schema.privileges import NEEDED
from tests.support.database import connected, role
from tests.support.database import database as temporary_database

CHECKOUT = Path(__file__).parents[2]
SERVICE = CHECKOUT / "tests/django_service"
GRANTS = "interview_userinterviewaccess"
OURS = [
    "grant_access_job",
    "grant_access_request",
    "grant_access_cancellation",
    "grant_access_rejection",
    "grant_access_cohort",
]
UNSENT = "grant_access_request_unsent_idx"
NOTIFIER = "grant_access_request_notify"
KEY = "interview_userinterviewaccess_user_id_interview_id_key"
REFUSAL = "interview_access_refuse_duplicate"
PATIENCE_SECONDS = 30  # an end for every wait of a test; none takes it when all is well


class Database:
    """The test's database as an operator sees it: bare statements, none of our code."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = make_url(url)
        host = parsed.host or parsed.query.get("host")
        named = {
            "PGHOST": host,
            "PGPORT": parsed.port,
            "PGUSER": parsed.username,
            "PGPASSWORD": parsed.password,
            "PGDATABASE": parsed.database,
        }
        self.environment = {name: str(value) for name, value in named.items() if value is not None}

    def connect(self) -> psycopg.Connection[dict[str, Any]]:
        """A session of its own, in autocommit."""
        plain = make_url(self.url).set(drivername="postgresql")
        return psycopg.connect(
            plain.render_as_string(hide_password=False), autocommit=True, row_factory=dict_row
        )

    def execute(self, statement: str, *values: object) -> list[dict[str, Any]]:
        """Run one statement; its rows, where it has any."""
        with self.connect() as connection:
            cursor = connection.execute(sql.SQL(statement), values or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, *values: object) -> Any:
        """The one value of a statement."""
        (row,) = self.execute(statement, *values)
        (value,) = row.values()
        return value

    def wait_for(self, condition: str) -> None:
        """Come back when a condition, in SQL, is true."""
        query = sql.SQL("SELECT ({}) AS is_true").format(sql.SQL(condition))
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self.connect() as connection:
            while connection.execute(query).fetchall() != [{"is_true": True}]:
                assert time.monotonic() < deadline, f"never came true: {condition}"
                time.sleep(0.01)

    def catalog(self, schema: str = "public") -> dict[str, list[str]]:
        """Columns, indexes, constraints and triggers by table, each with its definition."""
        rows = self.execute(
            """
            SELECT c.relname AS name, array_agg(d.definition ORDER BY d.definition) AS definitions
            FROM pg_class c CROSS JOIN LATERAL (
                SELECT format('column %%s %%s %%s %%s %%s', attname,
                              format_type(atttypid, atttypmod), attnotnull, attidentity,
                              attcollation::regcollation) AS definition
                FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped
                UNION ALL SELECT format('index %%s %%s', pg_get_indexdef(indexrelid), indisvalid)
                FROM pg_index WHERE indrelid = c.oid
                UNION ALL SELECT format('constraint %%s %%s', conname, pg_get_constraintdef(oid))
                FROM pg_constraint WHERE conrelid = c.oid
                UNION ALL SELECT pg_get_triggerdef(oid)
                FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal
            ) AS d
            WHERE c.relkind = 'r' AND c.relnamespace = %s::regnamespace GROUP BY c.relname
            """,
            schema,
        )
        return {
            row["name"]: [text.replace(f"{schema}.", "") for text in row["definitions"]]
            for row in rows
        }

    def indexes_of_grants(self) -> set[str]:
        """Names of the grants' indexes, the unfinished ones included."""
        rows = self.execute(
            "SELECT indexrelid::regclass::text AS name FROM pg_index WHERE indrelid = %s::regclass",
            GRANTS,
        )
        return {row["name"] for row in rows}


class DjangoService:
    """The platform's service on the database, each call a process of its own."""

    def __init__(self, database: Database, schema: str = "public") -> None:
        self._environment = {
            **os.environ,
            **database.environment,
            "PGOPTIONS": f"-c search_path={schema}",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def manage(self, *arguments: str) -> str:
        """Run one command to its end; what it prints."""
        done = subprocess.run(
            [sys.executable, "manage.py", *arguments],
            cwd=SERVICE,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run_python(self, code: str) -> str:
        """Run code in the service, its models imported; what it prints."""
        return self.manage(
            "shell", "--verbosity", "0", "-c", f"from interview.models import *\n{code}"
        )

    @contextmanager
    def writing(self) -> Iterator[Callable[[], dict[str, Any]]]:
        """Have a process write and read grants meanwhile; call for its figures, which ends it."""
        process = subprocess.Popen(
            [sys.executable, "manage.py", "write_grants"],
            cwd=SERVICE,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

        def figures() -> dict[str, Any]:
            output, _ = process.communicate("", timeout=PATIENCE_SECONDS)
            assert process.returncode == 0
            found: dict[str, Any] = json.loads(output)
            return found

        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "writing\n"
            yield figures
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def database(database_url: str) -> Database:
    """An empty database."""
    return Database(database_url)


@pytest.fixture
def service(database: Database) -> DjangoService:
    """The platform's service, its tables made by its own migrations."""
    django = DjangoService(database)
    django.manage("migrate", "--verbosity", "0")
    return django


def migrated(url: str) -> list[str]:
    """Migrate; the sentences that it reported."""
    sentences: list[str] = []
    migrate(url, report=sentences.append)
    return sentences


def add_interviews(database: Database, count: int) -> list[UUID]:
    """Interviews, by a statement of the platform's."""
    ids = [uuid4() for _ in range(count)]
    database.execute(
        "INSERT INTO interview_interview (id, title, duration) "
        "SELECT id, 'An interview', interval '1 hour' FROM unnest(%s::uuid[]) AS id",
        ids,
    )
    return ids


def add_grants(database: Database, *pairs: tuple[str, UUID]) -> None:
    """Grants in this order, duplicates too."""
    database.execute(
        f"INSERT INTO {GRANTS} (user_id, interview_id) "  # noqa: S608 - a name of our own
        "SELECT * FROM unnest(%s::text[], %s::uuid[])",
        [user for user, _ in pairs],
        [interview for _, interview in pairs],
    )


def grants(database: Database) -> list[tuple[int, str, UUID]]:
    """Every grant, by id."""
    rows = database.execute(f"SELECT id, user_id, interview_id FROM {GRANTS} ORDER BY id")  # noqa: S608 - a name of our own
    return [(row["id"], row["user_id"], row["interview_id"]) for row in rows]


# One transaction's old snapshot holds a concurrent build up at its last step, for as long as a
# test likes.
BUILD_WAITS = (
    "EXISTS (SELECT FROM pg_stat_progress_create_index "
    "WHERE datname = current_database() AND phase = 'waiting for old snapshots')"
)


@contextmanager
def old_snapshot(database: Database) -> Iterator[Callable[[], object]]:
    """A transaction that sees the database as it is now, until the block or a call ends it."""
    with database.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield lambda: connection.execute("ROLLBACK")


@contextmanager
def migrating(url: str) -> Iterator[list[str]]:
    """A migration that runs beside the block and has ended well after it."""
    sentences: list[str] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            migrate(url, report=sentences.append)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test must see it
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sentences
    finally:
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not failures, failures


def test_empty_database_gets_what_the_models_say(database: Database) -> None:
    """On an empty database every table, key and index of the models is created."""
    sentences = migrated(database.url)

    engine = create_engine(database.url, poolclass=NullPool)
    with engine.connect() as connection:
        options = {
            "compare_type": True,
            "include_name": lambda name, kind, _: kind != "table" or name in models.METADATA.tables,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, models.METADATA) == []
    assert [sentence for sentence in sentences if "created" in sentence] == [
        f"created table {table}"
        for table in (
            "interview_interview",
            "interview_interviewconfig",
            "interview_interviewattempt",
            GRANTS,
            *OURS,
        )
    ]
    assert f"added the unique key {KEY}" in sentences


def test_created_tables_are_those_that_django_makes(database: Database) -> None:
    """Our tables equal Django's in every column, index and constraint, but for the unique key."""
    database.execute("CREATE SCHEMA django")
    DjangoService(database, schema="django").manage("migrate", "--verbosity", "0")
    migrated(database.url)

    ours, djangos = database.catalog(), database.catalog("django")
    djangos.pop("django_migrations")
    extra = {
        table: [definition for definition in ours[table] if definition not in djangos[table]]
        for table in djangos
    }
    missing = {
        table: [definition for definition in djangos[table] if definition not in ours[table]]
        for table in djangos
    }
    assert not any(missing.values()), missing
    assert {table: found for table, found in extra.items() if found} == {
        GRANTS: [
            f"constraint {KEY} UNIQUE (user_id, interview_id)",
            f"index CREATE UNIQUE INDEX {KEY} ON {GRANTS} USING btree (user_id, interview_id) t",
        ]
    }


def test_django_takes_over_a_database_that_we_made(database: Database) -> None:
    """Django's `migrate --fake-initial` finds our tables, and each side reads what both wrote."""
    migrated(database.url)
    service = DjangoService(database)
    assert "FAKED" in service.manage("migrate", "--fake-initial", "--no-color")

    written = service.run_python(
        "from datetime import timedelta, datetime, timezone\n"
        "interview = Interview.objects.create(title='Björk', duration=timedelta(minutes=90))\n"
        "InterviewConfig.objects.create(interview=interview,"
        " should_end_interview_after_duration=True)\n"
        "InterviewAttempt.objects.create(interview=interview, user_id='django',"
        " start_datetime=datetime(2026, 1, 2, 3, 4, 5, 678901, timezone.utc))\n"
        "UserInterviewAccess.objects.create(interview=interview, user_id='django')\n"
        "print(interview.id)"
    )
    interview_id = UUID(written.strip())
    start = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        interview = connection.execute(select(models.interviews)).one()
        assert (interview.id, interview.title) == (interview_id, "Björk")
        assert (interview.description, interview.duration) == (None, timedelta(minutes=90))
        config = connection.execute(select(models.interview_configs)).one()
        assert config.should_end_interview_after_duration is True
        assert config.is_default_access_allowed is False
        assert connection.scalar(select(models.interview_attempts.c.start_datetime)) == start
        connection.execute(
            insert(models.grants).values(interview_id=interview_id, user_id="worker")
        )
        connection.execute(
            insert(models.interview_attempts).values(
                id=uuid4(),
                interview_id=interview_id,
                user_id="worker",
                start_datetime=start,
                scheduled_end_datetime=start + timedelta(minutes=90),
            )
        )
    read = service.run_python(
        "users = UserInterviewAccess.objects.order_by('id').values_list('user_id', flat=True)\n"
        "print(list(users))\n"
        "attempt = InterviewAttempt.objects.get(user_id='worker')\n"
        "print(attempt.scheduled_end_datetime - attempt.start_datetime, attempt.end_datetime)"
    )
    assert read.splitlines() == ["['django', 'worker']", "1:30:00 None"]


def test_a_revision_has_its_name_in_its_files(database: Database) -> None:
    """The revisions known by the names of the files are Alembic's own, with one after another."""
    scripts = ScriptDirectory(str(CHECKOUT / "storage" / "migrations"))
    revisions = [script.revision for script in scripts.walk_revisions()]
    names = [path.name for path in CHECKOUT.glob("storage/migrations/versions/0*.py")]
    assert sorted(revisions) == sorted(name.partition("_")[0] for name in names)
    assert scripts.get_current_head() == expected_revision() == max(revisions)
    migrated(database.url)
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.connect() as connection:
        assert current_revision(connection) == expected_revision()


def test_second_run_changes_nothing(database: Database) -> None:
    """Run twice, nothing changes, and the second run says so."""
    migrated(database.url)
    before = database.catalog()

    assert migrated(database.url) == ["nothing to do: the schema is at revision 0006"]
    assert database.catalog() == before


def test_django_tables_are_adopted(database: Database, service: DjangoService) -> None:
    """Every row but the younger duplicates stays, and every index and constraint; Django goes on.

    A duplicate that Django writes afterwards is refused.
    """
    first, second, third = add_interviews(database, 3)
    add_grants(
        database,
        ("ann", first),
        ("bob", first),
        ("ann", first),
        ("ann", second),
        ("ann", first),
        ("bob", first),
        ("Ann", first),
        ("cid", third),
    )
    before = database.catalog()

    sentences = migrated(database.url)

    assert (
        "removed 3 duplicate grants of 2 pairs of user and interview (the lowest id of each stays)"
        in sentences
    )
    assert f"adopted table {GRANTS}" in sentences
    kept = [
        (1, "ann", first),
        (2, "bob", first),
        (4, "ann", second),
        (7, "Ann", first),
        (8, "cid", third),
    ]
    assert grants(database) == kept
    after = database.catalog()
    added = {table: set(after[table]) - set(before[table]) for table in before}
    assert {table: set(before[table]) - set(after[table]) for table in before} == {
        table: set() for table in before
    }
    assert {table for table, definitions in added.items() if definitions} == {GRANTS}
    assert set(after) - set(before) == {*OURS, "grant_access_alembic_version"}

    answers = service.run_python(
        "from django.db import IntegrityError\n"
        "print(list(UserInterviewAccess.objects.order_by('id').values_list('id', flat=True)))\n"
        f"UserInterviewAccess.objects.create(user_id='dan', interview_id='{first}')\n"
        "try:\n"
        f"    UserInterviewAccess.objects.create(user_id='ann', interview_id='{first}')\n"
        "except IntegrityError as error:\n"
        "    print(error.__cause__.diag.constraint_name)"
    )
    assert answers.splitlines() == ["[1, 2, 4, 7, 8]", KEY]
    assert len(grants(database)) == len(kept) + 1


def test_writers_are_never_locked_out(
    database: Database, service: DjangoService, record_property: Callable[[str, object], None]
) -> None:
    """A Django process that writes throughout, duplicates too, waits no longer than a moment.

    The build is held up until the process has written 300 grants during it, which it could not,
    were it locked out for the build. Afterwards no duplicate stands.
    """
    rows = 200_000
    (interview, *_) = add_interviews(database, 1)
    database.execute(
        f"INSERT INTO {GRANTS} (user_id, interview_id) "  # noqa: S608 - a name of our own
        "SELECT 'user-' || n %% %s, %s FROM generate_series(1, %s) AS n",
        rows - 500,
        interview,
        rows,
    )
    with service.writing() as figures:
        with old_snapshot(database) as let_go, migrating(database.url) as sentences:
            database.wait_for(BUILD_WAITS)
            last = database.value("SELECT last_value FROM interview_userinterviewaccess_id_seq")
            database.wait_for(
                f"SELECT last_value > {last} + 300 FROM interview_userinterviewaccess_id_seq"  # noqa: S608 - a number of our own
            )
            let_go()
        found = figures()

    for name, figure in found.items():
        record_property(name, figure)
    print(f"Django's longest waits: {found}")  # noqa: T201 - the figure that operators ask for
    assert f"added the unique key {KEY}" in sentences
    assert found["refused"] > 0
    assert found["longest_write"] < 1.0
    assert found["longest_read"] < 1.0
    assert database.value(
        f"SELECT count(*) = count(DISTINCT (user_id, interview_id)) FROM {GRANTS}"  # noqa: S608 - a name of our own
    )


@pytest.mark.usefixtures("service")
def test_busy_writer_of_duplicates_does_not_win(database: Database) -> None:
    """After a duplicate has spoilt one round, the next cannot be spoilt by a writer.

    What kept duplicates out meanwhile is gone afterwards.
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
        f"constraint {KEY} UNIQUE (user_id, interview_id)",
        f"index CREATE UNIQUE INDEX {KEY} ON {GRANTS} USING btree (user_id, interview_id) t",
    }
    assert database.execute("SELECT FROM pg_proc WHERE proname = %s", REFUSAL) == []


@pytest.mark.usefixtures("service")
def test_five_rounds_and_no_more(database: Database) -> None:
    """Where duplicates come in every round, it stops with their count and leaves no index behind.

    They come as replication brings them, past every trigger. The next run ends right.
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
                    f"INSERT INTO {GRANTS} (user_id, interview_id) VALUES ('ann', %s), ('ann', %s)",  # noqa: S608 - a name of our own
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
def test_killed_run_is_taken_up(database: Database) -> None:
    """A run killed while it builds leaves an unfinished index; the next run replaces it."""
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
        # The server notices a dead client late; here its session ends with it.
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


def test_lost_connection_is_told_as_one(database: Database) -> None:
    """A connection that is cut while the index is built is told as that; the next run goes on."""

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


def test_two_runs_at_once(database: Database) -> None:
    """A second run waits for the first, says so, and has nothing to do; nor do the two block."""
    second: list[str] = []
    is_waiting = threading.Event()

    def report(sentence: str) -> None:
        second.append(sentence)
        is_waiting.set()

    with old_snapshot(database) as let_go, migrating(database.url):
        database.wait_for(BUILD_WAITS)
        other = threading.Thread(target=migrate, args=[database.url], kwargs={"report": report})
        other.start()
        assert is_waiting.wait(PATIENCE_SECONDS)
        let_go()
    other.join(PATIENCE_SECONDS)
    assert second == [
        "waiting: another migrate is running on this database",
        "nothing to do: the schema is at revision 0006",
    ]


@pytest.mark.parametrize("is_valid", [True, False])
def test_an_index_of_an_interrupted_run_is_built_anew(database: Database, is_valid: bool) -> None:
    """An unfinished index of requests is replaced, a finished one is kept."""
    migrated(database.url)
    before = database.catalog()
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0004'")
    database.execute(
        "UPDATE pg_index SET indisvalid = %s WHERE indexrelid = %s::regclass", is_valid, UNSENT
    )
    told = "adopted" if is_valid else "added"
    assert migrated(database.url) == [
        f"{told} the index {UNSENT}",
        f"added the trigger {NOTIFIER}",
    ]
    assert database.catalog() == before


def test_the_trigger_waits_for_a_gap(database: Database) -> None:
    """The trigger is added when no transaction writes requests, and keeps none waiting until."""
    migrated(database.url)
    before = database.catalog()
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0005'")
    database.execute(f"DROP TRIGGER {NOTIFIER} ON grant_access_request")
    insert = "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
    with database.connect() as service, migrating(database.url) as sentences:
        service.execute("BEGIN")
        service.execute(insert.encode())
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%CREATE OR REPLACE TRIGGER%' AND datname = current_database())"
        )
        database.execute(insert)
        assert not sentences
        service.execute("COMMIT")
    assert sentences == [f"added the trigger {NOTIFIER}"]
    assert database.catalog() == before


def test_an_earlier_release_is_brought_up_to_date(database: Database) -> None:
    """A database at an older revision gets what it lacks, and what stands is left as it is."""
    migrated(database.url)
    for table in OURS[1:]:
        database.execute(f"DROP TABLE {table}")
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0002'")
    before = database.catalog()

    assert migrated(database.url) == [
        *(f"created table {table}" for table in OURS[1:]),
        f"added the index {UNSENT}",
        f"added the trigger {NOTIFIER}",
    ]

    after = database.catalog()
    assert {table: after[table] for table in before} == before
    assert migrated(database.url) == ["nothing to do: the schema is at revision 0006"]


@pytest.mark.usefixtures("service")
def test_dry_run_changes_nothing(database: Database) -> None:
    """A dry run says what would be done, how many duplicates stand, and changes nothing."""
    (interview,) = add_interviews(database, 1)
    add_grants(database, *[("ann", interview)] * 3)
    before = database.catalog()
    sentences: list[str] = []

    migrate(database.url, dry_run=True, report=sentences.append)

    assert sentences == [
        "would adopt table interview_interview",
        "would adopt table interview_interviewconfig",
        "would adopt table interview_interviewattempt",
        f"would adopt table {GRANTS}",
        *(f"would create table {table}" for table in OURS),
        (
            "would remove 2 duplicate grants of 1 pair of user and interview "
            "(the lowest id of each would stay)"
        ),
        f"would add the unique key {KEY}",
    ]
    assert database.catalog() == before
    assert len(grants(database)) == 3


@pytest.mark.usefixtures("service")
def test_misfit_stops_before_anything_is_changed(database: Database) -> None:
    """Every difference is named with what was found and expected, and nothing is changed."""
    for statement in (
        "DROP TABLE interview_interviewconfig",
        "CREATE VIEW interview_interviewconfig AS SELECT 1 AS id",
        "ALTER TABLE interview_interview ALTER duration TYPE integer USING 1",
        "ALTER TABLE interview_interviewattempt ALTER end_datetime SET NOT NULL",
        "ALTER TABLE interview_interviewattempt DROP COLUMN scheduled_end_datetime",
        "ALTER TABLE interview_interviewattempt ADD tenant integer NOT NULL",
        "ALTER TABLE interview_interviewattempt ADD UNIQUE (user_id)",
        f"ALTER TABLE {GRANTS} ALTER user_id TYPE varchar(35)",
        f"ALTER TABLE {GRANTS} ALTER interview_id DROP NOT NULL",
        f"ALTER TABLE {GRANTS} ALTER id DROP IDENTITY",
        f"ALTER TABLE {GRANTS} DROP CONSTRAINT {GRANTS}_pkey",
        (
            f"ALTER TABLE {GRANTS} DROP CONSTRAINT "
            "interview_userinterv_interview_id_473ac53f_fk_interview"
        ),
        f"ALTER TABLE {GRANTS} ADD CONSTRAINT late UNIQUE (user_id, interview_id) DEFERRABLE",
    ):
        database.execute(statement)
    before = database.catalog()

    with pytest.raises(SchemaMismatchError) as caught:
        migrated(database.url)

    attempts = "interview_interviewattempt"
    unfilled = "a default, or null allowed: the worker does not set this column"
    late = "a key that is not deferrable, as INSERT … ON CONFLICT requires"
    assert set(caught.value.differences) == {
        Difference("interview_interview", "duration", "integer", "interval"),
        Difference("interview_interviewconfig", None, "a view", "an ordinary table"),
        Difference(attempts, "end_datetime", "not null", "null allowed"),
        Difference(
            attempts, "scheduled_end_datetime", "no such column", "timestamp with time zone"
        ),
        Difference(attempts, "tenant", "integer not null without a default", unfilled),
        Difference(
            attempts,
            "(user_id)",
            "the unique key interview_interviewattempt_user_id_key",
            "no such key: two rows of the worker may have equal values",
        ),
        Difference(GRANTS, "(id)", "no primary key", "the primary key"),
        Difference(GRANTS, "id", "no default", "an identity or a sequence"),
        Difference(
            GRANTS, "(interview_id)", "no foreign key", "a foreign key to interview_interview(id)"
        ),
        Difference(GRANTS, "interview_id", "null allowed", "not null"),
        Difference(
            GRANTS,
            "user_id",
            "character varying(35)",
            "character varying(36) or a wider string",
        ),
        Difference(GRANTS, "(user_id, interview_id)", "the deferrable unique key late", late),
    }
    assert f"{GRANTS}.interview_id: found null allowed, expected not null" in str(caught.value)
    assert all(str(difference) in str(caught.value) for difference in caught.value.differences)
    assert database.catalog() == before


@pytest.mark.usefixtures("service")
def test_what_differs_and_serves_is_adopted_as_it_is(database: Database) -> None:
    """Wider strings, a sequence, columns more, a key of the platform's own: adopted, untouched."""
    for statement in (
        "ALTER TABLE interview_interview ADD company_id bigint NOT NULL",
        "ALTER TABLE interview_interviewattempt ALTER user_id TYPE varchar(64)",
        "ALTER TABLE interview_interviewattempt ADD score integer",
        f"ALTER TABLE {GRANTS} ALTER user_id TYPE text",
        f"ALTER TABLE {GRANTS} ALTER id DROP IDENTITY",
        "CREATE SEQUENCE old_style",
        f"ALTER TABLE {GRANTS} ALTER id SET DEFAULT nextval('old_style')",
        f"ALTER TABLE {GRANTS} ADD granted_at timestamptz NOT NULL DEFAULT now()",
        f"CREATE UNIQUE INDEX one_each ON {GRANTS} (interview_id, user_id)",
    ):
        database.execute(statement)
    before = database.catalog()

    assert "adopted the unique key one_each" in migrated(database.url)
    after = database.catalog()
    assert {table: after[table] for table in before} == before
    assert check_schema(database.url) is None


@pytest.mark.usefixtures("service")
def test_duplicates_that_others_refer_to_stay(database: Database) -> None:
    """A duplicate grant that a row of another table refers to is kept, and the error says so."""
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


def test_check_tells_what_to_do(database: Database) -> None:
    """The check at a worker's start is silent on a right schema, else says what is wrong."""
    assert "run `interview-access migrate`" in str(check_schema(database.url))
    migrated(database.url)
    assert check_schema(database.url) is None

    database.execute(f"ALTER TABLE {GRANTS} DROP CONSTRAINT {KEY}")
    assert f"{GRANTS}(user_id, interview_id): found no unique key" in str(
        check_schema(database.url)
    )
    database.execute("UPDATE grant_access_alembic_version SET version_num = 'later'")
    assert "revision later, which this release does not know" in str(check_schema(database.url))


def test_ledger_orders_job_ids_by_their_bytes(database: Database) -> None:
    """Job ids have one order whatever the database's language, since locks are taken in it."""
    migrated(database.url)
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        for job_id in ("b", "A", "a", "É"):
            job = {"task": "t", "state": "success", "request_digest": "0" * 64}
            connection.execute(insert(models.jobs).values(job_id=job_id, **job))
        ordered = select(models.jobs.c.job_id).order_by(models.jobs.c.job_id)
        assert connection.scalars(ordered).all() == ["A", "a", "b", "É"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"database": "nowhere"}, 'database "nowhere" does not exist'),
        ({"username": "nobody"}, 'role "nobody" does not exist'),
        (
            {"query": {"host": "/nonexistent", "schema": "public"}},
            "options of libpq only, without schema",
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
def test_refused_connection_is_told_without_its_password(
    database: Database, wrong: dict[str, Any], reason: str
) -> None:
    """What is wrong with the URL is one error that names it, and no server that may come back."""
    url = make_url(database.url).set(password="geheim", **wrong)  # noqa: S106 - made up
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
def test_unreachable_server_is_told_without_its_password(
    database: Database, wrong: dict[str, Any]
) -> None:
    """No server: an error of its own, which names the place."""
    url = make_url(database.url).set(password="geheim", **wrong)  # noqa: S106 - made up
    with pytest.raises(DatabaseUnavailableError) as caught:
        check_schema(url.render_as_string(hide_password=False))
    assert str(url.query.get("host", url.host)) in str(caught.value)
    assert "geheim" not in str(caught.value)


def test_full_server_is_one_that_cannot_be_reached(database: Database) -> None:
    """A database that accepts no more connections now may accept them later."""
    migrated(database.url)
    name = make_url(database.url).database
    with role(database.url) as url:
        database.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
        with pytest.raises(DatabaseUnavailableError, match="too many connections"):
            check_schema(url)


def test_locked_table_is_an_error_that_passes(database: Database) -> None:
    """A check that meets VACUUM FULL of a table says nothing about the database."""
    migrated(database.url)
    with connected(database.url) as connection:
        connection.execute(text("LOCK TABLE grant_access_alembic_version"))
        with pytest.raises(
            DatabaseUnavailableError, match="failed: canceling statement due to lock timeout"
        ):
            check_schema(database.url)
    assert check_schema(database.url) is None


WORKER = re.findall(
    r"^GRANT (.*) TO worker;$",
    (CHECKOUT / "docs" / "running.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
"""What a worker's role needs, and no more, as documented."""


COLUMNS_OF_WORKER = [
    f"{privilege} ON {table}"
    if privilege == "DELETE"
    else f"{privilege} ({', '.join(columns or ('id',))}) ON {table}"
    for table, privileges in NEEDED.items()
    for privilege, columns in privileges.items()
] + ["SELECT (version_num) ON grant_access_alembic_version"]
"""The same by columns, as far as PostgreSQL grants privileges on columns."""


@pytest.mark.parametrize("grants", [WORKER, COLUMNS_OF_WORKER], ids=["tables", "columns"])
def test_a_role_with_these_privileges_serves(database: Database, grants: list[str]) -> None:
    """A role with the privileges that are asked for does everything that a worker does."""
    migrated(database.url)
    database.execute("ALTER TABLE grant_access_job ADD COLUMN later text")  # as a next release may
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
            order = RequestedGrantsDTO("ann", (str(interview),))
            assert transaction.bulk_create_user_access([order]) == [1]
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
        for privilege in grant.split(" ON ")[0].split(", ")
    ],
)
def test_a_missing_privilege_is_named(database: Database, privilege: str, table: str) -> None:
    """A worker's role that lacks a privilege is told which, and how to give it."""
    migrated(database.url)
    with role(database.url, *WORKER) as url:
        name = make_url(url).username
        database.execute(f"REVOKE {privilege} ON {table} FROM {name}")
        assert check_schema(url) == (
            f"the role {name} lacks {privilege} on public.{table}: "
            f"run GRANT {privilege} ON TABLE public.{table} TO {name}"
        )


def test_privileges_on_columns_serve(database: Database) -> None:
    """A role may have a privilege for the columns alone."""
    migrated(database.url)
    with role(database.url, *WORKER) as url:
        name = make_url(url).username
        database.execute(f"REVOKE SELECT ON interview_interview FROM {name}")  # noqa: S608 - a name of ours
        for column in ("id", "title", "description", "duration"):
            assert "lacks SELECT on public.interview_interview" in str(check_schema(url))
            database.execute(f"GRANT SELECT ({column}) ON interview_interview TO {name}")
        assert check_schema(url) is None


def test_a_schema_that_the_role_may_not_use_is_named(database: Database) -> None:
    """Tables in a schema without USAGE are there, and said to be."""
    migrated(database.url)
    database.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    with role(database.url, *WORKER) as url:
        name = make_url(url).username
        assert check_schema(url) == (
            f"the role {name} lacks USAGE on public: run GRANT USAGE ON SCHEMA public TO {name}"
        )


def test_a_serial_column_needs_its_sequence(database: Database) -> None:
    """The sequence of a column that an older Django made is named, where it may not be used."""
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
def test_an_encoding_other_than_utf8_is_refused(stack: LocalStack, encoding: str) -> None:
    """A database that cannot hold every user ID is refused before anything is done in it."""
    options = f"ENCODING '{encoding}' LOCALE 'C'"
    with temporary_database(stack.database_url, options=options) as url:
        expected = f"got a database in the encoding {encoding}, expected UTF8"
        assert expected in str(check_schema(url))
        with pytest.raises(SchemaMismatchError, match=expected):
            migrated(url)
