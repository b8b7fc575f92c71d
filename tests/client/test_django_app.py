"""The Django app: its tables, its migration operation, its checks and its admin pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from devstack.servers import LocalStack
from storage.schema import check_schema, migrate
from tests.storage.migrations import GRANTS, KEY, add_grants, add_interviews, migrated
from tests.support.database import database as temporary_database
from tests.support.django_projects import DjangoProject
from tests.support.platform import Database
from tests.support.stores import Background

MODELS = """
import uuid
from django.db import models

class Interview(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    title = models.CharField(max_length=100)
    description = models.TextField(blank=True, db_default="")
    duration = models.DurationField()

class InterviewConfig(models.Model):
    interview = models.OneToOneField(Interview, models.CASCADE)
    is_default_access_allowed = models.BooleanField(db_default=False)
    should_end_interview_after_duration = models.BooleanField(db_default=False)

class InterviewAttempt(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4)
    interview = models.ForeignKey(Interview, models.CASCADE)
    user_id = models.CharField(max_length=64)
    start_datetime = models.DateTimeField()
    end_datetime = models.DateTimeField(null=True)
    scheduled_end_datetime = models.DateTimeField(null=True)

class UserInterviewAccess(models.Model):
    id = models.AutoField(primary_key=True)
    interview = models.ForeignKey(Interview, models.CASCADE)
    user_id = models.CharField(max_length=64)
"""
CONSTRAINT = 'models.UniqueConstraint(fields=["user_id", "interview"], name="one_grant")'
MIGRATION = f"""
from django.db import migrations, models
from interview_access.django.operations import AddGrantKey

class Migration(migrations.Migration):
    dependencies = [("interview", "0001_initial")]
    operations = [AddGrantKey("userinterviewaccess", {CONSTRAINT})]
"""
TABLES = ("grant_access_job", "grant_access_request")


@pytest.fixture(scope="module")
def template(stack: LocalStack) -> Iterator[Database]:
    """A database for the module's template."""
    with temporary_database(stack.database_url) as url:
        yield Database(url)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, template: Database) -> DjangoProject:
    """A project whose second migration adds the key. The template has the first, without the app."""
    project = DjangoProject.create(tmp_path_factory.mktemp("project"))
    project.append(
        "service/settings.py", 'INSTALLED_APPS += ["interview", "interview_access.django"]\n'
    )
    project.write("interview/models.py", MODELS)
    project.succeed("python manage.py makemigrations interview", template)
    for app in "admin", "interview":
        project.succeed(f"python manage.py migrate {app} --verbosity 0", template)
    meta = f"    class Meta:\n        constraints = [{CONSTRAINT}]\n"
    project.append("interview/models.py", meta)
    project.write("interview/migrations/0002_key.py", MIGRATION)
    return project


@pytest.fixture
def database(stack: LocalStack, template: Database, project: DjangoProject) -> Iterator[Database]:  # noqa: ARG001 - the project has filled the template
    """A database with the tables of the service, and without the key."""
    with temporary_database(stack.database_url, template=make_url(template.url).database) as url:
        yield Database(url)


def unique_keys(database: Database) -> list[str]:
    """The definitions of the unique constraints and indexes of the grants but the primary key."""
    return [
        definition
        for definition in database.catalog()[GRANTS]
        if "UNIQUE" in definition and "pkey" not in definition
    ]


def key(name: str, columns: str = "user_id, interview_id") -> list[str]:
    """The definitions of a unique constraint with its index."""
    return [
        f"constraint {name} UNIQUE ({columns})",
        f"index CREATE UNIQUE INDEX {name} ON {GRANTS} USING btree ({columns}) t",
    ]


class TestOperation:
    """``AddGrantKey`` in every order of steps."""

    def test_django_first(self, project: DjangoProject, database: Database) -> None:
        """The key that Django adds is adopted by the worker's migration."""
        project.succeed("python manage.py migrate --verbosity 0", database)
        assert "adopted the unique key one_grant" in migrated(database.url)
        assert unique_keys(database) == key("one_grant")
        assert check_schema(database.url) is None
        found = project.succeed("python manage.py makemigrations --check --dry-run", database)
        assert found == "No changes detected\n"

    def test_worker_first(self, project: DjangoProject, database: Database) -> None:
        """The worker's key is renamed, and renamed back by the reverse migration."""
        (interview,) = add_interviews(database, 1)
        add_grants(database, ("ann", interview), ("ann", interview))
        migrated(database.url)
        project.succeed("python manage.py migrate --verbosity 0", database)
        assert unique_keys(database) == key("one_grant")
        assert check_schema(database.url) is None
        project.succeed("python manage.py migrate interview 0001 --verbosity 0", database)
        assert unique_keys(database) == key(KEY)
        project.succeed("python manage.py migrate --verbosity 0", database)
        assert unique_keys(database) == key("one_grant")

    def test_reverse_migration_drops_the_key_without_worker(
        self, project: DjangoProject, database: Database
    ) -> None:
        """Where the worker's migration did not run, the reverse migration drops the key."""
        project.succeed("python manage.py migrate --verbosity 0", database)
        project.succeed("python manage.py migrate interview 0001 --verbosity 0", database)
        assert unique_keys(database) == []

    @pytest.mark.parametrize(
        ("statement", "columns"),
        [
            (f"CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id)", None),
            (f"CREATE UNIQUE INDEX one_grant ON {GRANTS} (interview_id, user_id)", "reverse"),
            (f"ALTER TABLE {GRANTS} ADD CONSTRAINT mine UNIQUE (interview_id, user_id)", "reverse"),
            (f"ALTER TABLE {GRANTS} ADD CONSTRAINT one_grant UNIQUE (user_id, interview_id)", None),
        ],
    )
    def test_equal_key_is_adopted(
        self, project: DjangoProject, database: Database, statement: str, columns: str | None
    ) -> None:
        """An equal index or constraint of any name becomes the constraint of the model."""
        database.execute(statement)
        project.succeed("python manage.py migrate interview --verbosity 0", database)
        assert unique_keys(database) == key(
            "one_grant", "interview_id, user_id" if columns else "user_id, interview_id"
        )

    def test_unique_together_is_adopted(self, project: DjangoProject, database: Database) -> None:
        """The constraint that ``unique_together`` made is adopted."""
        project.run_python(
            "from django.db import connection\n"
            "from interview.models import UserInterviewAccess\n"
            "with connection.schema_editor() as editor:\n"
            "    pair = {('user_id', 'interview')}\n"
            "    editor.alter_unique_together(UserInterviewAccess, set(), pair)\n"
            "from django.core.management import call_command\n"
            "call_command('migrate', 'interview', verbosity=0)",
            database,
        )
        assert unique_keys(database) == key("one_grant")

    def test_rename_does_not_wait_for_writers(
        self, project: DjangoProject, database: Database
    ) -> None:
        """A constraint is adopted while a transaction that writes grants is open."""
        (interview,) = add_interviews(database, 1)
        migrated(database.url)
        with database.connect() as writer:
            writer.execute("BEGIN")
            writer.execute(
                f"INSERT INTO {GRANTS} (user_id, interview_id) VALUES ('ann', %s)",  # noqa: S608 - a constant
                [interview],
            )
            project.succeed("python manage.py migrate interview --verbosity 0", database)
            writer.execute("COMMIT")
        assert unique_keys(database) == key("one_grant")

    def test_waiting_operation_does_not_block_writers(
        self, project: DjangoProject, database: Database
    ) -> None:
        """While the operation waits for a writer to make an index a constraint, others write."""
        (interview,) = add_interviews(database, 1)
        database.execute(f"CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id)")
        with database.connect() as writer:
            writer.execute("BEGIN")
            writer.execute(f"DELETE FROM {GRANTS}")  # noqa: S608 - a constant
            migrating = Background(
                lambda: project.succeed("python manage.py migrate interview", database)
            )
            database.wait_for(
                "EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND query LIKE '%USING INDEX%' AND datname = current_database())"
            )
            add_grants(database, ("ann", interview))
            assert not migrating.over
            writer.execute("COMMIT")
        assert "Applying interview.0002_key... OK" in migrating.result()
        assert unique_keys(database) == key("one_grant")

    @pytest.mark.parametrize(
        ("given", "got"),
        [
            ('fields=["user_id", "interview"], name="k", condition=models.Q(id=1)', "condition="),
            ('fields=["user_id"], name="k"', "user_id of interview_userinterviewaccess"),
        ],
    )
    def test_other_constraint_is_refused(
        self, project: DjangoProject, database: Database, given: str, got: str
    ) -> None:
        """A constraint that cannot be the key is refused with what was expected."""
        (printed,) = project.run_python(
            "from django.db import connection, models\n"
            "from django.apps import apps\n"
            "from interview_access.django.operations import AddGrantKey\n"
            "try:\n"
            f"    key = AddGrantKey('userinterviewaccess', models.UniqueConstraint({given}))\n"
            "    with connection.schema_editor() as editor:\n"
            "        state = type('State', (), {'apps': apps})\n"
            "        key.database_forwards('interview', editor, state, state)\n"
            "except ValueError as error:\n"
            "    print(error)",
            database,
        )
        assert printed.startswith("AddGrantKey: expected ")
        assert got in printed
