"""Every block of docs/django.md, unchanged, on a project that startproject has created."""

from __future__ import annotations

import re
from collections.abc import Iterator
from uuid import UUID

import pytest
from sqlalchemy import make_url

from devstack.servers import LocalStack
from storage.schema import SchemaMismatchError, check_schema, migrate
from tests.storage.migrations import GRANTS, KEY, add_grants, grants, migrated
from tests.support.database import database as temporary_database
from tests.support.database import role
from tests.support.django_projects import DjangoProject
from tests.support.platform import Database
from tests.support.workers import ROOT, Site, site, worker

PAGE = (ROOT / "docs/django.md").read_text(encoding="utf-8")
NUMBER = 14  # of the Redis database


def blocks(heading: str, language: str = "python") -> list[str]:
    """Find the blocks in one language between this heading and the next."""
    _, _, under = PAGE.partition(f"# {heading}\n")
    under = re.split(r"^#{2,3} ", under, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", under, re.DOTALL | re.MULTILINE)
    assert found, f"no {language} under {heading}"
    return [re.sub(f"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


(SETTINGS,) = blocks("Steps")
(COMMANDS,) = blocks("Steps", "sh")
(MODELS,) = blocks("Columns")
(KEY_MIGRATION,) = blocks("The unique key")
ADDED = KEY_MIGRATION.partition("\n")[0].removeprefix("# ")
INITIAL_MODELS = MODELS.partition("\n    class Meta:")[0]
FILES = (
    "Enqueue in a transaction",
    "After the commit, without a shared database",
    "Signals",
    "Tests",
    "Databases and roles",
)
"""Headings whose first block is a file of the project."""


def write(project: DjangoProject, block: str) -> None:
    """Write a block to the file that its first line names."""
    name = block.partition("\n")[0].removeprefix("# ")
    project.write(name, block)


def add_interview(database: Database) -> UUID:
    """Insert an interview of the page's project. Returns its ID."""
    found: UUID = database.value(
        "INSERT INTO interview_interview (id, title, description, duration, company)"
        " VALUES (gen_random_uuid(), 'An interview', '', '1 hour', 'a') RETURNING id"
    )
    return found


def new_project(tmp_path_factory: pytest.TempPathFactory, models: str) -> DjangoProject:
    """A project whose app has these models and their first migration."""
    project = DjangoProject.create(tmp_path_factory.mktemp("project"))
    project.append("service/settings.py", f'INSTALLED_APPS += ["interview"]\n{SETTINGS}')
    project.write("interview/models.py", models)
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> DjangoProject:
    """The project of the page, before its key."""
    return new_project(tmp_path_factory, INITIAL_MODELS)


@pytest.fixture(scope="module")
def initial(stack: LocalStack, project: DjangoProject) -> Iterator[str]:
    """A template with the first migration of each app; the project then has the key."""
    with temporary_database(stack.database_url) as url:
        database = Database(url)
        project.migrate(database)
        database.execute("DROP TABLE grant_access_job, grant_access_request")
        database.execute("DELETE FROM django_migrations WHERE app = 'interview_access'")
        write(project, MODELS)
        proposed = project.succeed("python manage.py makemigrations --dry-run -v 3", database)
        assert "migrations.AddConstraint(" in proposed
        write(project, KEY_MIGRATION)
        for heading in FILES:
            write(project, blocks(heading)[0])
        yield str(make_url(url).database)


@pytest.fixture
def database(stack: LocalStack, initial: str) -> Iterator[Database]:
    """A database before step 4."""
    with temporary_database(stack.database_url, template=initial) as url:
        yield Database(url)


def test_steps(project: DjangoProject, database: Database) -> None:
    """The commands succeed in the page's order: one key, nothing left to migrate, no warning."""
    for command in COMMANDS.splitlines():
        project.succeed(command, database)
    assert {KEY, "one_grant_per_interview"} & database.indexes_of_grants() == {
        "one_grant_per_interview"
    }
    assert check_schema(database.url) is None


def test_steps_with_duplicates(project: DjangoProject, database: Database) -> None:
    """With duplicates only the other order succeeds, and the first command changes nothing."""
    interview = add_interview(database)
    add_grants(database, ("ann", interview), ("ann", interview))
    planned: list[str] = []
    migrate(database.url, dry_run=True, report=planned.append)
    assert any(step.startswith("would remove 1 duplicate grant") for step in planned)
    command = COMMANDS.splitlines()[0]
    done = project.run(command, database)
    assert done.returncode == 1
    assert "IntegrityError" in done.stderr
    migrated(database.url)
    project.succeed(command, database)
    assert grants(database) == [(1, "ann", interview)]


def test_plain_add_constraint(project: DjangoProject, database: Database) -> None:
    """AddConstraint after the worker's migration makes a second index.

    The check and the worker's migration warn of it, each with the statement that drops one.
    """
    migrated(database.url)
    project.write(ADDED, KEY_MIGRATION.replace("AddGrantKey(\n", "migrations.AddConstraint(\n"))
    project.succeed("python manage.py migrate", database)
    project.write(ADDED, KEY_MIGRATION)
    check = COMMANDS.splitlines()[-1]
    warned = project.run(check, database)
    assert warned.returncode == 1
    (_, redundant) = migrated(database.url)
    drop = redundant.partition(", run ")[2]
    assert "interview_access.W003" in warned.stderr
    assert re.findall("run (ALTER .*);$", warned.stderr, re.MULTILINE) == [
        f'ALTER TABLE {GRANTS} DROP CONSTRAINT "{KEY}"'
    ]
    database.execute(drop)
    project.succeed(check, database)
    assert KEY not in database.indexes_of_grants()
    assert check_schema(database.url) is None


DIFFERENCES = {
    "user_id = models.CharField(max_length=64, db_index=True)\n    start_datetime": (
        "user_id = models.UUIDField()\n    start_datetime"
    ),
    'db_default="unknown"': 'default="unknown"',
    (
        "interview = models.ForeignKey(Interview, on_delete=models.CASCADE)\n"
        "    user_id = models.CharField(max_length=64, db_index=True)\n    created_at"
    ): (
        "interview = models.ForeignKey(Interview, models.CASCADE, db_constraint=False)\n"
        "    user = models.ForeignKey('auth.User', models.CASCADE)\n    created_at"
    ),
}


FOREIGN_KEY_META = """
    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["user", "interview"], name="one_grant_per_interview")
        ]
"""


def test_columns_that_differ(stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Differences are reported as on the page, and its remedies keep every row and the key."""
    differing = INITIAL_MODELS
    for fitting, other in DIFFERENCES.items():
        assert differing.count(fitting) == 1
        differing = differing.replace(fitting, other)
    project = new_project(tmp_path_factory, f"{differing}\n{FOREIGN_KEY_META}")
    (expected,) = blocks("Columns", "text")
    migration, query = blocks("A foreign key to the user")
    with temporary_database(stack.database_url) as url:
        database = Database(url)
        project.migrate(database)
        with pytest.raises(SchemaMismatchError) as caught:
            migrate(url, dry_run=True, report=lambda _: None)
        assert sorted(map(str, caught.value.differences)) == sorted(expected.splitlines())

        interview = add_interview(database)
        database.execute(
            "INSERT INTO auth_user (id, username, password, first_name, last_name, email, is_staff,"
            " is_active, is_superuser, date_joined)"
            " VALUES (7, 'ann', '', '', '', '', false, true, false, now())"
        )
        database.execute(f"INSERT INTO {GRANTS} (user_id, interview_id) VALUES (7, %s)", interview)  # noqa: S608 - a constant
        write(project, migration)
        grant = MODELS.index("class UserInterviewAccess")
        fitting = MODELS[:grant] + MODELS[grant:].replace("max_length=64", "max_length=36")
        project.write("interview/models.py", fitting)
        proposed = project.succeed("python manage.py makemigrations --dry-run", database)
        assert "user_id on interviewattempt" in proposed
        assert "user_id on userinterviewaccess" not in proposed
        assert "constraint" not in proposed
        project.migrate(database)
        assert "adopted the unique key one_grant_per_interview" in migrated(url)
        assert check_schema(database.url) is None
        assert grants(database) == [(1, "7", interview)]
        printed = project.run_python(
            "from django.contrib.auth.models import User\n"
            "from interview.models import UserInterviewAccess\n"
            f"user = User.objects.get()\nprint({query.strip()})",
            database,
        )
        assert printed == ["True"]


@pytest.fixture(scope="module")
def here(
    stack: LocalStack,
    initial: str,
    project: DjangoProject,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """A site on the database of the project, with a worker."""
    with temporary_database(stack.database_url, template=initial) as url:
        migrated(url)
        project.succeed(COMMANDS.splitlines()[0], Database(url))
        with (
            site(stack, url, NUMBER) as here,
            worker(here, tmp_path_factory.mktemp("django") / "worker.log"),
        ):
            yield here


@pytest.fixture
def shared(here: Site) -> Database:
    """The database of the project and the worker."""
    return Database(here.store.database_url)


def test_request_in_a_transaction(here: Site, project: DjangoProject, shared: Database) -> None:
    """The request is committed with the transaction, and its outcome is read from the database."""
    _, read = blocks("Enqueue in a transaction")
    interview = add_interview(shared)
    printed = project.run_python(
        "from interview.invitations import invite\n"
        "from interview.models import Interview\n"
        "from interview_access.producer import InterviewAccessClient\n"
        f"job_id = invite('page-fay', [Interview.objects.get(pk='{interview}')])\n"
        "with InterviewAccessClient() as client:\n"
        "    client.wait(job_id, timeout=30)\n"
        f"{read}",
        shared,
        CELERY_BROKER_URL=here.broker,
    )
    assert printed == ["('succeeded', 1, None)"]


def test_request_after_the_commit(here: Site, project: DjangoProject, shared: Database) -> None:
    """The client enqueues the job after the commit."""
    (job_id,) = project.run_python(
        "from interview.remote_invitations import client, invite_remotely\n"
        "print(invite_remotely('page-gus', []))\n"
        "client.close()",
        shared,
        CELERY_BROKER_URL=here.broker,
    )
    assert here.answer(job_id)["status"] == "SUCCESS"


ADD_TWICE = """
from django.contrib import admin
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.test.utils import setup_test_environment
from interview.models import Interview, UserInterviewAccess

admin.site.register(UserInterviewAccess)
setup_test_environment()
client = Client(raise_request_exception=False)
client.force_login(User.objects.create_superuser("root"))
form = {
    "user_id": "eve", "interview": Interview.objects.all()[0].pk,
    "created_at_0": "2026-01-01", "created_at_1": "12:00",
}
url = "/admin/interview/userinterviewaccess/add/"
print(client.post(url, form).status_code)
refused = client.post(url, form)
print(refused.status_code)
print("User interview access with this User id and Interview already exists." in refused.text)
UserInterviewAccess._meta.constraints = []
UserInterviewAccess._meta.total_unique_constraints = []
print(client.post(url, form).status_code)
permissions = Permission.objects.filter(content_type__app_label="interview_access")
print(sorted(permissions.values_list("codename", flat=True)))
"""


def test_duplicate_in_the_admin(project: DjangoProject, shared: Database) -> None:
    """A duplicate is an error of the form with the declared key, and 500 without."""
    add_interview(shared)
    printed = project.run_python(ADD_TWICE, shared)
    permissions = "['view_finishedjob', 'view_outboxrequest']"
    assert printed == ["302", "200", "True", "500", permissions]


def test_get_or_create_and_bulk_create(project: DjangoProject, shared: Database) -> None:
    """Existing grants are returned by get_or_create, and ignored by bulk_create."""
    (block,) = blocks("Admin, forms, `get_or_create` and `bulk_create`")
    interview = add_interview(shared)
    add_grants(shared, ("gil", interview))
    printed = project.run_python(
        "from interview.models import Interview, UserInterviewAccess\n"
        f"interview = Interview.objects.get(pk='{interview}')\n{block}",
        shared,
    )
    assert printed == ["False", "2"]


CONNECT_AND_INVITE = """
from django.db.models import signals
from django.utils import timezone
from interview.finished_jobs import finished_since
from interview.invitations import invite
from interview.models import Interview, UserInterviewAccess
from interview_access.producer import InterviewAccessClient

fired = []
signals.post_save.connect(lambda **found: fired.append(found), weak=False)
began = timezone.now()
job_id = invite("page-hal", Interview.objects.filter(pk="INTERVIEW"))
with InterviewAccessClient() as client:
    client.wait(job_id, timeout=30)
found = finished_since(began).filter(job_id=job_id).exists()
print(len(fired), found, UserInterviewAccess.objects.filter(user_id="page-hal").count())
"""


def test_finished_jobs_instead_of_signals(
    here: Site, project: DjangoProject, shared: Database
) -> None:
    """The grants of a worker fire no signal; the page's query finds their job."""
    interview = add_interview(shared)
    code = CONNECT_AND_INVITE.replace("INTERVIEW", str(interview))
    assert project.run_python(code, shared, CELERY_BROKER_URL=here.broker) == ["0 True 1"]


WITHOUT_MIGRATIONS = """
from service.settings import *

MIGRATION_MODULES = {"interview": None, "interview_access": None}
"""


@pytest.mark.parametrize("settings", ["service.settings", "service.without_migrations"])
def test_tests_of_the_service(project: DjangoProject, database: Database, settings: str) -> None:
    """The page's test case passes in Django's own test database, also without migrations."""
    project.write("service/without_migrations.py", WITHOUT_MIGRATIONS)
    command = f"python manage.py test --settings {settings}"
    done = project.run(command, database, CELERY_BROKER_URL="redis://nowhere.invalid")
    assert done.returncode == 0, done.stderr
    assert "Ran 3 tests" in done.stderr


def test_eager_mode_sends(here: Site, project: DjangoProject, shared: Database) -> None:
    """In eager mode Celery sends what is enqueued by name, and a worker executes the job."""
    (block,) = blocks("`CELERY_TASK_ALWAYS_EAGER`")
    printed = project.run_python(block, shared, CELERY_BROKER_URL=here.broker)
    assert printed == ["{'success': True, 'created_access_count': 0}"] * 2


TWO_DATABASES = """
from service.settings import *

DATABASES["interviews"] = {**DATABASES["default"], "NAME": os.environ["INTERVIEWS"]}
DATABASE_ROUTERS = ["service.routers.InterviewRouter"]
"""


def test_another_database_alias(
    stack: LocalStack, project: DjangoProject, database_url: str
) -> None:
    """With the router the tables are created in their database only, and requests go there."""
    default = Database(database_url)
    project.write("service/two_databases.py", TWO_DATABASES)
    with temporary_database(stack.database_url) as url:
        interviews = Database(url)
        printed = project.run_python(
            "from django.core.management import call_command\n"
            "from interview_access.django.models import OutboxRequest\n"
            "from interview_access.outbox import enqueue_in_django\n"
            "from interview_access.testing import assert_requested\n"
            "for name in 'default', 'interviews':\n"
            "    call_command('migrate', database=name, verbosity=0)\n"
            "enqueue_in_django('ann', [])\n"
            "enqueue_in_django('bob', [], using='interviews')\n"
            "print(*OutboxRequest.objects.values_list('user_id', flat=True).order_by('user_id'))\n"
            "print(len(assert_requested()), len(assert_requested(using='interviews')))",
            default,
            DJANGO_SETTINGS_MODULE="service.two_databases",
            INTERVIEWS=interviews.environment["PGDATABASE"],
        )
        assert printed == ["ann bob", "2 2"]
        assert {GRANTS, "grant_access_request"} <= set(interviews.catalog())
        assert {GRANTS, "grant_access_request"}.isdisjoint(default.catalog())


def test_role_of_the_web_processes(project: DjangoProject, shared: Database) -> None:
    """A role with the page's privileges requests jobs, and reads requests and finished jobs."""
    (block,) = blocks("Databases and roles", "sql")
    privileges = re.findall(r"^GRANT (.*) TO service;$", block, re.MULTILINE)
    with role(shared.url, *privileges) as url:
        printed = project.run_python(
            "from interview.invitations import invite\n"
            "from interview_access.django.models import FinishedJob, OutboxRequest\n"
            "from django.db import transaction\n"
            "with transaction.atomic():\n"
            "    print(OutboxRequest.objects.filter(job_id=invite('ann', [])).count())\n"
            "print(FinishedJob.objects.filter(job_id='nothing').count())",
            Database(url),
        )
    assert printed == ["1", "0"]
