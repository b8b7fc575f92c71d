"""Migrations on PostgreSQL, beside a Django service that shares the tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import NullPool, create_engine, insert, select

from storage import models
from storage.schema import (
    Difference,
    SchemaMismatchError,
    check_schema,
    current_revision,
    expected_revision,
    migrate,
)
from tests.storage.migrations import (
    GRANTS,
    KEY,
    WORKER_TABLES,
    add_grants,
    add_interviews,
    grants,
    migrated,
    migrating,
)
from tests.support.platform import CHECKOUT, Database, DjangoService

UNSENT = "grant_access_request_unsent_idx"


NOTIFIER = "grant_access_request_notify"


TASK_COLUMNS = ["task", "user_ids", "eta", "expires_at", "digest", "headers"]


TASK_CHECK = "grant_access_request_task_check"


def task_steps(verb: str) -> list[str]:
    """Return the steps of migration 0007, which all add or all adopt."""
    return [
        f"{verb} the columns {', '.join(TASK_COLUMNS)} of grant_access_request",
        f"{verb} the constraint {TASK_CHECK}",
    ]


REQUESTED_AT = "grant_access_cancellation_requested_at_idx"


GRANTING_JOB = "created_by_job"
AUDIT_COLUMNS = [
    *("requested_at", "enqueued_at", "started_at", "attempts", "worker", "actor", "reason"),
]
AUDIT_INDEXES = [f"grant_access_job_{name}_idx" for name in ("user", "actor", "state")]


def audit_steps(verb: str) -> list[str]:
    """Return the steps of migration 0010, which all add or all adopt."""
    return [
        f"{verb} the columns {', '.join(AUDIT_COLUMNS)} of grant_access_job",
        *(f"{verb} the index {name}" for name in AUDIT_INDEXES),
    ]


def attribution_step(verb: str) -> str:
    """Return the step of migration 0011."""
    return f"{verb} the column {GRANTING_JOB} of {GRANTS}"


def later_steps(tasks: str, tables: str, indexes: str, columns: str) -> list[str]:
    """Return the steps of the migrations from 0007 on, by the verb of each kind of step."""
    return [
        *task_steps(tasks),
        f"{tables} table grant_access_tombstone",
        f"{indexes} the index {REQUESTED_AT}",
        f"{columns} the column oldest_compatible of grant_access_alembic_version",
        *audit_steps(columns),
        attribution_step(columns),
    ]


STOP_OLDER = "stop the workers of revisions before 0005 first: they are older than release 0.1.0"
MAY_STAY = "running workers may stay, but start on the new schema only after their upgrade"
"""What a migration from a revision before 0005, or from 0005 to 0008, reports first."""


def test_empty_database_gets_all_tables(database: Database) -> None:
    """An empty database gets every table, key and index of the models."""
    reported = migrated(database.url)

    engine = create_engine(database.url, poolclass=NullPool)
    with engine.connect() as connection:
        options = {
            "compare_type": True,
            "include_name": lambda name, kind, _: kind != "table" or name in models.METADATA.tables,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, models.METADATA) == []
    assert [sentence for sentence in reported if sentence.startswith("created")] == [
        f"created table {table}"
        for table in (
            "interview_interview",
            "interview_interviewconfig",
            "interview_interviewattempt",
            GRANTS,
            *WORKER_TABLES,
        )
    ]
    assert f"added the unique key {KEY}" in reported


def test_created_tables_equal_those_of_django(database: Database) -> None:
    """The tables equal Django's in every definition but the unique key and the granting job."""
    database.execute("CREATE SCHEMA django")
    DjangoService(database, schema="django").manage("migrate", "--verbosity", "0")
    migrated(database.url)

    created, djangos = database.catalog(), database.catalog("django")
    djangos.pop("django_migrations")
    extra = {
        table: [definition for definition in created[table] if definition not in djangos[table]]
        for table in djangos
    }
    missing = {
        table: [definition for definition in djangos[table] if definition not in created[table]]
        for table in djangos
    }
    assert not any(missing.values()), missing
    assert {table: found for table, found in extra.items() if found} == {
        GRANTS: [
            f'column {GRANTING_JOB} character varying(255) f  "C"',
            f"constraint {KEY} UNIQUE (user_id, interview_id)",
            f"index CREATE UNIQUE INDEX {KEY} ON {GRANTS} USING btree (user_id, interview_id) t",
        ]
    }


def test_django_adopts_created_tables(database: Database) -> None:
    """Django's `migrate --fake-initial` adopts the tables; each side reads the other's rows."""
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


def test_revisions_match_their_file_names(database: Database) -> None:
    """The revisions in the file names are Alembic's, in one line of succession."""
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
    """A second run changes nothing and reports so."""
    migrated(database.url)
    before = database.catalog()

    assert migrated(database.url) == ["nothing to do: the schema is at revision 0011"]
    assert database.catalog() == before


def test_django_tables_are_adopted(database: Database, service: DjangoService) -> None:
    """Every row but the later duplicates, every index and every constraint stays.

    Django continues to work, and a duplicate that it writes afterwards is rejected.
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

    reported = migrated(database.url)

    assert (
        "removed 3 duplicate grants of 2 pairs of user and interview (the lowest ID of each stays)"
        in reported
    )
    assert f"adopted table {GRANTS}" in reported
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
    assert set(after) - set(before) == {*WORKER_TABLES, "grant_access_alembic_version"}

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


@pytest.mark.parametrize("is_valid", [True, False])
def test_unfinished_index_is_rebuilt(database: Database, is_valid: bool) -> None:
    """An unfinished index of requests is rebuilt, a finished one is kept."""
    migrated(database.url)
    before = database.catalog()
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0004'")
    database.execute(
        "UPDATE pg_index SET indisvalid = %s WHERE indexrelid = %s::regclass", is_valid, UNSENT
    )
    step = "adopted" if is_valid else "added"
    assert migrated(database.url) == [
        STOP_OLDER,
        f"{step} the index {UNSENT}",
        f"added the trigger {NOTIFIER}",
        *later_steps("adopted", "adopted", "adopted", "adopted"),
    ]
    assert database.catalog() == before


def test_trigger_is_added_without_blocking_writers(database: Database) -> None:
    """The trigger is added when no transaction writes requests, without blocking writers."""
    migrated(database.url)
    before = database.catalog()
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0005'")
    database.execute(f"DROP TRIGGER {NOTIFIER} ON grant_access_request")
    insert = "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
    with database.connect() as service, migrating(database.url) as reported:
        service.execute("BEGIN")
        service.execute(insert.encode())
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%CREATE OR REPLACE TRIGGER%' AND datname = current_database())"
        )
        database.execute(insert)
        assert reported == [MAY_STAY]
        service.execute("COMMIT")
    assert reported == [
        MAY_STAY,
        f"added the trigger {NOTIFIER}",
        *later_steps("adopted", "adopted", "adopted", "adopted"),
    ]
    assert database.catalog() == before


def without_tasks(database: Database) -> None:
    """Revert a database to revision 0006."""
    drops = ", ".join(f"DROP COLUMN {name}" for name in TASK_COLUMNS)
    database.execute(
        f"ALTER TABLE grant_access_request DROP CONSTRAINT {TASK_CHECK}, {drops},"
        " ALTER COLUMN user_id SET NOT NULL"
    )
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0006'")


def test_columns_are_added_while_requests_are_written(database: Database) -> None:
    """The columns are added without blocking writers, and older requests keep their meaning."""
    migrated(database.url)
    complete = set(database.catalog()["grant_access_request"])
    without_tasks(database)
    insert = "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
    with database.connect() as service, migrating(database.url) as reported:
        service.execute("BEGIN")
        service.execute(insert.encode())
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%ADD COLUMN%' AND datname = current_database())"
        )
        database.execute(insert)
        assert reported == [MAY_STAY]
        service.execute("COMMIT")
    assert reported == [MAY_STAY, *later_steps("added", "adopted", "adopted", "adopted")]
    assert set(database.catalog()["grant_access_request"]) == complete
    database.execute(insert)
    rows = database.execute("SELECT task, user_ids FROM grant_access_request")
    assert rows == [{"task": "interview_access.grant_access", "user_ids": None}] * 3


def test_interrupted_constraint_is_validated(database: Database) -> None:
    """A constraint whose validation was interrupted is validated."""
    migrated(database.url)
    before = database.catalog()
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0006'")
    database.execute("UPDATE pg_constraint SET convalidated = false WHERE conname = %s", TASK_CHECK)
    assert migrated(database.url) == [
        MAY_STAY,
        *later_steps("adopted", "adopted", "adopted", "adopted"),
    ]
    assert database.catalog() == before


def test_columns_of_the_service_are_adopted(database: Database) -> None:
    """A table that the service has created with some of the columns gets what it lacks."""
    migrated(database.url)
    complete = set(database.catalog()["grant_access_request"])
    without_tasks(database)
    database.execute("DROP TABLE grant_access_alembic_version")
    for column in "task text NOT NULL", "user_ids text[]", "eta timestamptz":
        database.execute(f"ALTER TABLE grant_access_request ADD {column}")

    announced = dry_run(database)

    assert announced[-11:-8] == [
        "would add the columns expires_at, digest, headers of grant_access_request",
        "would adopt the columns task, user_ids, eta of grant_access_request",
        f"would add the constraint {TASK_CHECK}",
    ]
    assert announced == [in_conditional(step) for step in migrated(database.url)]
    assert set(database.catalog()["grant_access_request"]) == complete


def test_unsuitable_columns_stop_the_migration(database: Database) -> None:
    """A column of another type is reported before anything is changed."""
    migrated(database.url)
    without_tasks(database)
    database.execute("ALTER TABLE grant_access_request ADD eta date")
    before = database.catalog()
    with pytest.raises(SchemaMismatchError) as caught:
        migrated(database.url)
    assert caught.value.differences == (
        Difference("grant_access_request", "eta", "date", "timestamp with time zone"),
    )
    assert database.catalog() == before


def test_audit_columns_are_added_while_jobs_are_recorded(database: Database) -> None:
    """The columns and indexes of the ledger are added beside writers, and older rows stay."""
    migrated(database.url)
    complete = set(database.catalog()["grant_access_job"])
    drops = ", ".join(f"DROP COLUMN {name}" for name in AUDIT_COLUMNS)
    database.execute(f"ALTER TABLE grant_access_job {drops}")
    for index in "grant_access_job_user_idx", "grant_access_job_state_idx":
        database.execute(f"DROP INDEX {index}")
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0009'")
    insert = (
        "INSERT INTO grant_access_job (job_id, task, state, request_digest)"
        " VALUES (gen_random_uuid()::text, 'task', 'succeeded', '')"
    )
    can_stay = "running workers may stay: they can use the new schema"
    filenode = "SELECT pg_relation_filenode('grant_access_job') AS node"
    before = database.execute(filenode)
    with database.connect() as worker, migrating(database.url) as reported:
        worker.execute("BEGIN")
        worker.execute(insert.encode())
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%ADD COLUMN%' AND datname = current_database())"
        )
        database.execute(insert)
        assert reported == [can_stay]
        worker.execute("COMMIT")
    assert reported == [can_stay, *audit_steps("added"), attribution_step("adopted")]
    assert set(database.catalog()["grant_access_job"]) == complete
    assert database.execute(filenode) == before, "the table was rewritten"
    rows = database.execute("SELECT attempts, actor FROM grant_access_job")
    assert rows == [{"attempts": None, "actor": None}] * 2


def test_older_revision_is_upgraded(database: Database) -> None:
    """A database at an older revision gets what is missing; existing tables stay unchanged."""
    migrated(database.url)
    for table in WORKER_TABLES[1:]:
        database.execute(f"DROP TABLE {table}")
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0002'")
    before = database.catalog()

    assert migrated(database.url) == [
        STOP_OLDER,
        *(f"created table {table}" for table in WORKER_TABLES[1:-1]),
        f"added the index {UNSENT}",
        f"added the trigger {NOTIFIER}",
        *later_steps("added", "created", "added", "adopted"),
    ]

    after = database.catalog()
    assert {table: after[table] for table in before} == before
    assert migrated(database.url) == ["nothing to do: the schema is at revision 0011"]


@pytest.mark.usefixtures("service")
def test_dry_run_changes_nothing(database: Database) -> None:
    """A dry run reports the steps and the number of duplicates, and changes nothing."""
    (interview,) = add_interviews(database, 1)
    add_grants(database, *[("ann", interview)] * 3)
    before = database.catalog()

    assert dry_run(database) == [
        "would adopt table interview_interview",
        "would adopt table interview_interviewconfig",
        "would adopt table interview_interviewattempt",
        f"would adopt table {GRANTS}",
        f"would create table {WORKER_TABLES[0]}",
        (
            "would remove 2 duplicate grants of 1 pair of user and interview "
            "(the lowest ID of each would stay)"
        ),
        f"would add the unique key {KEY}",
        *(f"would create table {table}" for table in WORKER_TABLES[1:-1]),
        f"would add the index {UNSENT}",
        f"would add the trigger {NOTIFIER}",
        *later_steps("would add", "would create", "would add", "would add"),
    ]
    assert database.catalog() == before
    assert len(grants(database)) == 3


def test_dry_run_lists_every_step_of_an_empty_database(database: Database) -> None:
    """On an empty database a dry run announces the steps that the migration then reports."""
    announced = dry_run(database)
    done = [step for step in migrated(database.url) if not step.startswith("building")]

    assert announced == [in_conditional(step) for step in done]
    assert f"would add the index {UNSENT}" in announced
    later = later_steps("would add", "would create", "would add", "would add")
    assert announced[-11:] == [f"would add the trigger {NOTIFIER}", *later]


@pytest.mark.parametrize("has_index", [True, False])
def test_dry_run_lists_only_later_revisions(database: Database, has_index: bool) -> None:
    """At revision 0004 a dry run lists the steps of 0005 and later revisions only."""
    migrated(database.url)
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0004'")
    if not has_index:
        database.execute(f"DROP INDEX {UNSENT}")
    before = database.catalog()

    announced = dry_run(database)

    assert announced == [
        STOP_OLDER,
        f"would {'adopt' if has_index else 'add'} the index {UNSENT}",
        f"would add the trigger {NOTIFIER}",
        *later_steps("would adopt", "would adopt", "would adopt", "would adopt"),
    ]
    assert database.catalog() == before
    assert announced == [in_conditional(step) for step in migrated(database.url)]


def dry_run(database: Database) -> list[str]:
    """Return the steps that a dry run reports."""
    reported: list[str] = []
    migrate(database.url, dry_run=True, report=reported.append)
    return reported


def in_conditional(step: str) -> str:
    """Return a reported step as a dry run announces it."""
    if step == STOP_OLDER:
        return step
    verb, _, rest = step.partition(" ")
    infinitives = {"created": "create", "added": "add", "adopted": "adopt"}
    return f"would {infinitives[verb]} {rest}"


@pytest.mark.usefixtures("service")
def test_differences_stop_the_migration(database: Database) -> None:
    """Every difference is reported with what was found and expected, and nothing is changed."""
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
def test_compatible_differences_are_adopted(database: Database) -> None:
    """Other types, sequences, columns and keys that do not disturb the worker stay unchanged."""
    for statement in (
        "ALTER TABLE interview_interview ADD company_id bigint NOT NULL",
        "ALTER TABLE interview_interview ALTER title TYPE varchar(100)",
        "ALTER TABLE interview_interview ALTER description TYPE varchar(500)",
        "ALTER TABLE interview_interview ALTER description SET NOT NULL",
        "ALTER TABLE interview_interviewattempt ALTER user_id TYPE varchar(64)",
        "ALTER TABLE interview_interviewattempt ADD score integer",
        f"ALTER TABLE {GRANTS} ALTER user_id TYPE text",
        f"ALTER TABLE {GRANTS} ALTER id DROP IDENTITY",
        "CREATE SEQUENCE old_style",
        f"ALTER TABLE {GRANTS} ALTER id SET DEFAULT nextval('old_style')",
        f"ALTER TABLE {GRANTS} ADD granted_at timestamptz NOT NULL DEFAULT now()",
        "ALTER TABLE interview_interviewconfig ALTER id TYPE integer",
        f"CREATE UNIQUE INDEX one_each ON {GRANTS} (interview_id, user_id)",
    ):
        database.execute(statement)
    before = database.catalog()

    assert "adopted the unique key one_each" in migrated(database.url)
    after = database.catalog()
    after[GRANTS].remove(f'column {GRANTING_JOB} character varying(255) f  "C"')
    assert {table: after[table] for table in before} == before
    assert check_schema(database.url) is None


def test_ledger_orders_job_ids_by_their_bytes(database: Database) -> None:
    """Job IDs are ordered by their bytes in any locale, since locks are taken in this order."""
    migrated(database.url)
    engine = create_engine(database.url, poolclass=NullPool)
    with engine.begin() as connection:
        for job_id in ("b", "A", "a", "É"):
            job = {"task": "t", "state": "success", "request_digest": "0" * 64}
            connection.execute(insert(models.jobs).values(job_id=job_id, **job))
        ordered = select(models.jobs.c.job_id).order_by(models.jobs.c.job_id)
        assert connection.scalars(ordered).all() == ["A", "a", "b", "É"]
