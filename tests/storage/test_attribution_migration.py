"""Migration 0011: the column of the granting job, beside the platform's service."""

from __future__ import annotations

import re

import pytest
from sqlalchemy import make_url

from storage.errors import StorageError
from storage.schema import Difference, SchemaMismatchError, check_schema
from tests.storage.migrations import GRANTS, add_grants, add_interviews, migrated, migrating
from tests.support.database import role
from tests.support.platform import CHECKOUT, Database, DjangoService

MAY_STAY = "running workers may stay: they can use the new schema"
ADDED = f"added the column created_by_job of {GRANTS}"


def without_column(database: Database) -> None:
    """Revert a database to revision 0010."""
    database.execute(f"ALTER TABLE {GRANTS} DROP COLUMN created_by_job")
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0010'")


def file_of_grants(database: Database) -> int:
    """Return the number of the table's file, which a rewrite changes."""
    number: int = database.value(
        f"SELECT relfilenode FROM pg_class WHERE oid = '{GRANTS}'::regclass"  # noqa: S608 - a constant
    )
    return number


def test_the_column_is_added_while_grants_are_written(migrated_url: str) -> None:
    """It waits for a gap between writers without blocking them, and rewrites no row."""
    database = Database(migrated_url)
    without_column(database)
    one, two = add_interviews(database, 2)
    add_grants(database, ("ann", one))
    before = file_of_grants(database)
    insert = f"INSERT INTO {GRANTS} (user_id, interview_id) VALUES ('bob', %s)"  # noqa: S608 - a constant
    with database.connect() as service, migrating(database.url) as reported:
        service.execute("BEGIN")
        service.execute(insert.encode(), [one])
        database.wait_for(
            "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            " AND query LIKE '%ADD COLUMN%' AND datname = current_database())"
        )
        database.execute(insert, two)
        assert reported == [MAY_STAY]
        service.execute("COMMIT")
    assert reported == [MAY_STAY, ADDED]
    assert file_of_grants(database) == before
    jobs = database.execute(f"SELECT DISTINCT created_by_job AS job FROM {GRANTS}")  # noqa: S608 - a constant
    assert jobs == [{"job": None}]
    assert check_schema(database.url) is None


def test_a_column_of_the_service_is_adopted(migrated_url: str) -> None:
    """A column that the service has added, as docs/audit.md shows, is adopted."""
    database = Database(migrated_url)
    without_column(database)
    page = (CHECKOUT / "docs" / "audit.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    database.execute(statement)
    adopted = f"adopted the column created_by_job of {GRANTS}"
    assert migrated(database.url) == [MAY_STAY, adopted]
    assert check_schema(database.url) is None


def test_a_role_that_does_not_own_the_grants_learns_the_statement(migrated_url: str) -> None:
    """The refusal has the statement for the owner, after which the role migrates."""
    database = Database(migrated_url)
    without_column(database)
    privileges = "CREATE ON SCHEMA public", "SELECT ON ALL TABLES IN SCHEMA public"
    with role(migrated_url, *privileges) as url:
        name = make_url(url).username
        for row in database.execute(
            "SELECT tablename FROM pg_tables WHERE tablename LIKE 'grant_access_%'"
        ):
            database.execute(f"ALTER TABLE {row['tablename']} OWNER TO {name}")
        with pytest.raises(StorageError, match="lacks ownership of") as refused:
            migrated(url)
        _, statement = str(refused.value).split(", or run as that role ")
        database.execute(statement)
        assert migrated(url)[-1] == f"adopted the column created_by_job of {GRANTS}"
        database.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER")


def test_an_unsuitable_column_stops_the_migration(migrated_url: str) -> None:
    """A column of this name and another type is reported, and nothing is changed."""
    database = Database(migrated_url)
    without_column(database)
    database.execute(f"ALTER TABLE {GRANTS} ADD created_by_job uuid")
    with pytest.raises(SchemaMismatchError) as caught:
        migrated(database.url)
    expected = "character varying(255) or a wider string"
    assert caught.value.differences == (Difference(GRANTS, "created_by_job", "uuid", expected),)


def test_a_missing_column_stops_a_worker(migrated_url: str) -> None:
    """A worker does not start if the column was dropped after the migration."""
    database = Database(migrated_url)
    database.execute(f"ALTER TABLE {GRANTS} DROP COLUMN created_by_job")
    assert f"{GRANTS}.created_by_job: found no such column" in str(check_schema(database.url))


def test_django_ignores_the_column(database: Database, service: DjangoService) -> None:
    """The service's models need no migration; rows that it writes or changes keep their job."""
    migrated(database.url)
    one, two = add_interviews(database, 2)
    database.execute(
        f"INSERT INTO {GRANTS} (user_id, interview_id, created_by_job) VALUES ('ann', %s, 'job')",  # noqa: S608 - a constant
        one,
    )
    service.manage("makemigrations", "--check", "--dry-run")
    service.manage("migrate", "--verbosity", "0")
    service.run_python(
        f"UserInterviewAccess.objects.create(user_id='bob', interview_id='{one}')\n"
        "UserInterviewAccess.objects.bulk_create([UserInterviewAccess("
        f"user_id=user, interview_id='{two}') for user in ('ann', 'bob')])\n"
        f"grant = UserInterviewAccess.objects.get(user_id='ann', interview_id='{one}')\n"
        "grant.save()"
    )
    rows = database.execute(
        f"SELECT user_id, created_by_job AS job FROM {GRANTS} ORDER BY id"  # noqa: S608 - a constant
    )
    assert [(row["user_id"], row["job"]) for row in rows] == [
        ("ann", "job"),
        ("bob", None),
        ("ann", None),
        ("bob", None),
    ]
