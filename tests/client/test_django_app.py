"""The Django app: its tables, its migration operation, its checks and its admin pages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import make_url

from devstack.servers import LocalStack
from storage.schema import check_schema
from tests.storage.migrations import GRANTS, KEY, add_grants, add_interviews, migrated
from tests.support.database import database as temporary_database
from tests.support.django_projects import DjangoProject
from tests.support.platform import Database
from tests.support.stores import Background
from tests.support.workers import Site

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
    """A project whose second migration adds the key. The template has the first one only."""
    project = DjangoProject.create(tmp_path_factory.mktemp("project"))
    project.append("service/settings.py", 'INSTALLED_APPS += ["interview"]\n')
    project.write("interview/models.py", MODELS)
    project.migrate(template)
    project.append("service/settings.py", 'INSTALLED_APPS += ["interview_access.django"]\n')
    meta = f"    class Meta:\n        constraints = [{CONSTRAINT}]\n"
    project.append("interview/models.py", meta)
    project.write("interview/migrations/0002_key.py", MIGRATION)
    return project


@pytest.fixture
def database(stack: LocalStack, template: Database, project: DjangoProject) -> Iterator[Database]:  # noqa: ARG001 - the project has filled the template
    """A database with the tables of the service, and without the key."""
    name = str(make_url(template.url).database)
    with temporary_database(stack.database_url, template=name) as url:
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


MIGRATE_TO = """
from django.core.management import call_command
from django.db import connection

def migrate_to(name):
    call_command("migrate", "interview", name, verbosity=0)
    show()

def show():
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT indexrelid::regclass::text, EXISTS"
            " (SELECT FROM pg_constraint WHERE conindid = indexrelid)"
            " FROM pg_index WHERE indrelid = 'interview_userinterviewaccess'::regclass"
            " AND indisunique AND NOT indisprimary"
        )
        print(cursor.fetchall())
"""
ADOPT_EQUAL_KEYS = f"""{MIGRATE_TO}
from interview.models import UserInterviewAccess

def unique_together():
    with connection.schema_editor() as editor:
        editor.alter_unique_together(UserInterviewAccess, (), {{("user_id", "interview")}})

def execute(statement):
    with connection.cursor() as cursor:
        cursor.execute(statement)

unique_together()
migrate_to("0002")
migrate_to("0001")
for statement in (
    "CREATE UNIQUE INDEX mine ON {GRANTS} (user_id, interview_id)",
    "CREATE UNIQUE INDEX one_grant ON {GRANTS} (interview_id, user_id)",
    "ALTER TABLE {GRANTS} ADD CONSTRAINT mine UNIQUE (interview_id, user_id)",
    "ALTER TABLE {GRANTS} ADD CONSTRAINT one_grant UNIQUE (user_id, interview_id)",
):
    execute(statement)
    migrate_to("0002")
    migrate_to("0001")
"""
REFUSE_CONSTRAINTS = """
from django.apps import apps
from django.db import connection, models
from interview_access.django.operations import AddGrantKey

class State:
    apps = apps

for given in (
    {"fields": ["user_id", "interview"], "condition": models.Q(id=1)},
    {"fields": ["user_id"]},
):
    try:
        key = AddGrantKey("userinterviewaccess", models.UniqueConstraint(name="k", **given))
        with connection.schema_editor() as editor:
            key.database_forwards("interview", editor, State, State)
    except ValueError as error:
        print(error)
"""


class TestOperation:
    """``AddGrantKey`` in every order of steps."""

    def test_django_first(self, project: DjangoProject, database: Database) -> None:
        """The key that Django adds is adopted by the worker's migration."""
        project.succeed("python manage.py migrate --verbosity 0", database)
        assert "adopted the unique key one_grant" in migrated(database.url)
        assert unique_keys(database) == key("one_grant")
        assert check_schema(database.url) is None

    def test_worker_first(self, project: DjangoProject, database: Database) -> None:
        """The worker's key is renamed, and renamed back by the reverse migration.

        If the worker's key exists beside the model's, the reverse migration drops the model's.
        """
        (interview,) = add_interviews(database, 1)
        add_grants(database, ("ann", interview), ("ann", interview))
        migrated(database.url)
        to = "migrate_to('0002')\nmigrate_to('0001')\nmigrate_to('0002')"
        printed = project.run_python(f"{MIGRATE_TO}\n{to}", database)
        ours, theirs = "[('one_grant', True)]", f"[('{KEY}', True)]"
        assert printed == [ours, theirs, ours]
        assert check_schema(database.url) is None
        both = f"ALTER TABLE {GRANTS} ADD CONSTRAINT {KEY} UNIQUE (user_id, interview_id)"
        database.execute(both)
        printed = project.run_python(f"{MIGRATE_TO}\nmigrate_to('0001')", database)
        assert printed == [theirs]

    def test_tables_of_the_worker(self, project: DjangoProject, database_url: str) -> None:
        """With the worker's tables and a faked first migration, the key is renamed too."""
        database = Database(database_url)
        migrated(database.url)
        printed = project.succeed("python manage.py migrate --fake-initial --no-color", database)
        assert "Applying interview.0001_initial... FAKED" in printed
        assert unique_keys(database) == key("one_grant")

    def test_equal_key_is_adopted(self, project: DjangoProject, database: Database) -> None:
        """An equal index or constraint of any name and order becomes the constraint of the model.

        Without the worker the reverse migration drops it.
        """
        printed = project.run_python(ADOPT_EQUAL_KEYS, database)
        assert printed == ["[('one_grant', True)]", "[]"] * 5

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

    def test_other_constraint_is_refused(self, project: DjangoProject, database: Database) -> None:
        """A constraint that cannot be the key is refused with what was expected."""
        partial, other = project.run_python(REFUSE_CONSTRAINTS, database)
        assert partial.startswith("AddGrantKey: expected a UniqueConstraint with fields and a name")
        assert "condition=" in partial
        assert other.endswith(f"got user_id of {GRANTS}")


class TestTables:
    """The app's own tables, whichever side creates them."""

    def test_both_sides_create_equal_tables(
        self, project: DjangoProject, database: Database, migrated_url: str
    ) -> None:
        """Django's tables equal the worker's in every column, default, index and constraint.

        They lack the trigger, which notifies workers. The worker's migration adds it.
        """
        project.succeed("python manage.py migrate --verbosity 0", database)
        worker = Database(migrated_url)
        notify = "CREATE TRIGGER grant_access_request_notify"
        for table in TABLES:
            expected = [one for one in worker.catalog()[table] if not one.startswith(notify)]
            assert database.catalog()[table] == expected
            assert defaults(database, table) == defaults(worker, table)
        migrated(database.url)
        assert check_schema(database.url) is None
        for table in TABLES:
            assert database.catalog()[table] == worker.catalog()[table]
            assert defaults(database, table) == defaults(worker, table)

    def test_tables_of_the_worker_stay_unchanged(
        self, project: DjangoProject, database: Database
    ) -> None:
        """Where the worker's migration ran first, Django's creates nothing, and drops nothing."""
        migrated(database.url)
        before = database.catalog()
        project.run_python(
            "from django.core.management import call_command\n"
            "for target in '0002', '0001', 'zero', '0002':\n"
            "    call_command('migrate', 'interview_access', target, verbosity=0)",
            database,
        )
        after = database.catalog()
        assert {table: after[table] for table in TABLES} == {
            table: before[table] for table in TABLES
        }

    def test_flush_empties_the_tables(self, project: DjangoProject, database: Database) -> None:
        """Django's flush, which ends each TransactionTestCase, empties both tables."""
        project.succeed("python manage.py migrate interview_access --verbosity 0", database)
        statements = project.succeed("python manage.py sqlflush", database)
        assert all(f'"{table}"' in statements for table in TABLES)

    def test_models_have_the_columns_of_the_tables(
        self, project: DjangoProject, migrated_url: str
    ) -> None:
        """Each model has every column of its table, with its type and nullability."""
        database = Database(migrated_url)
        printed = project.run_python(
            "from django.db import connection\n"
            "from interview_access.django.models import FinishedJob, OutboxRequest\n"
            "for model in FinishedJob, OutboxRequest:\n"
            "    for field in model._meta.fields:\n"
            "        print(model._meta.db_table, field.column, field.db_type(connection),"
            " 'NULL' if field.null else 'NOT NULL')",
            database,
        )
        rows = database.execute(
            """
            SELECT format('%%s %%s %%s %%s', attrelid::regclass, attname,
                          replace(replace(format_type(atttypid, atttypmod),
                                  'character varying', 'varchar'), 'varying', 'varchar'),
                          CASE WHEN attnotnull THEN 'NOT NULL' ELSE 'NULL' END) AS line
            FROM pg_attribute
            WHERE attrelid = ANY (%s::regclass[]) AND attnum > 0 AND NOT attisdropped
            """,
            list(TABLES),
        )
        assert sorted(printed) == sorted(row["line"] for row in rows)


def defaults(database: Database, table: str) -> dict[str, str]:
    """The defaults of a table's columns."""
    rows = database.execute(
        "SELECT column_name, column_default FROM information_schema.columns"
        " WHERE table_name = %s AND table_schema = 'public' ORDER BY ordinal_position",
        table,
    )
    return {row["column_name"]: row["column_default"] for row in rows}


WRITE = """
from asgiref.sync import async_to_sync
from django.core import serializers
from interview_access.django.models import FinishedJob, OutboxRequest
for model in OutboxRequest, FinishedJob:
    objects, first = model.objects, model.objects.get()
    for write in (
        lambda: objects.create(job_id='new'),
        lambda: objects.get_or_create(job_id='new'),
        lambda: objects.update_or_create(job_id=first.pk, defaults={'task': 'other'}),
        lambda: objects.bulk_create([model(job_id='new')]),
        lambda: objects.bulk_update([first], ['task']),
        lambda: objects.all().update(task='other'),
        lambda: objects.filter(job_id=first.pk).delete(),
        lambda: model(job_id='new').save(),
        first.save,
        first.delete,
        lambda: async_to_sync(objects.acreate)(job_id='new'),
        lambda: async_to_sync(objects.all().adelete)(),
        lambda: async_to_sync(first.asave)(),
    ):
        try:
            write()
        except NotImplementedError as error:
            print(error)
    assert model.objects.get().task == first.task
for row in serializers.deserialize('json', serializers.serialize('json', [first])):
    row.save()
"""


class TestModels:
    """The models of the outbox and of the ledger."""

    def test_models_refuse_to_write(self, project: DjangoProject, database: Database) -> None:
        """Each method that writes is refused with what to use instead, and changes no row.

        Fixtures can be loaded.
        """
        migrated(database.url)
        database.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids) VALUES ('ann', '{}')"
        )
        database.execute(
            "INSERT INTO grant_access_job (job_id, task, state, request_digest)"
            " VALUES ('done', 'interview_access.grant_access', 'failed', '')"
        )
        printed = project.run_python(WRITE, database)
        assert [line.partition(":")[0] for line in printed] == [
            *["OutboxRequest is read-only"] * 13,
            *["FinishedJob is read-only"] * 13,
        ]


VISIT_ADMIN = """
from django.contrib.admin.utils import quote
from django.contrib.auth.models import User
from django.test import Client
from django.test.utils import setup_test_environment
from interview_access.django.models import FinishedJob, OutboxRequest
setup_test_environment()
client = Client()
client.force_login(User.objects.create_superuser('root'))
for model in OutboxRequest, FinishedJob:
    url = f'/admin/interview_access/{model._meta.model_name}/'
    own = 'sent_at__isempty=1' if model is OutboxRequest else 'state__exact=failed'
    for query in '', 'q=ann', 'q=cohort', 'task__exact=interview_access.grant_access', own:
        response = client.get(f'{url}?{query}')
        print(response.status_code, len(response.context['cl'].result_list))
    for row in model.objects.order_by('job_id'):
        page = f'{url}{quote(row.pk)}/'
        print(client.get(f'{page}change/').status_code,
              client.post(f'{page}change/').status_code,
              client.post(f'{page}delete/', {'post': 'yes'}).status_code)
    print(client.get(f'{url}add/').status_code)
    keys = list(model.objects.values_list('pk', flat=True))
    action = {'action': 'delete_selected', '_selected_action': keys, 'post': 'yes'}
    client.post(url, action)
    print(model.objects.count() == len(keys))
page = client.get('/admin/interview_access/outboxrequest/cohort/change/')
print('30: x, x' in page.text and 'and 10 more' in page.text)
"""


class TestAdmin:
    """The admin pages, through Django's test client."""

    def test_pages_are_read_only(self, project: DjangoProject, database: Database) -> None:
        """Lists, searches, filters and pages of rows answer 200; nothing can be changed."""
        migrated(database.url)
        database.execute(
            "INSERT INTO grant_access_request (job_id, task, user_id, user_ids, interview_ids,"
            " sent_at) VALUES"
            " ('empty', DEFAULT, 'ann', NULL, '{}', NULL),"
            " ('a/b c_3F', DEFAULT, 'ann', NULL, '{{a,NULL},{b,c}}', now()),"
            " ('cohort', 'interview_access.grant_cohort_access', NULL, '{ann,NULL}',"
            " array_fill('x'::text, ARRAY[30]), NULL)"
        )
        database.execute(
            "INSERT INTO grant_access_job (job_id, task, state, request_digest) VALUES"
            " ('nulls', 'a task of another release', 'failed', '')"
        )
        database.execute(
            "INSERT INTO grant_access_job VALUES"
            " ('done', 'interview_access.grant_access', 'succeeded', 'ann', 'd', 3, 1, 1, 1,"
            " '{\"success\": true}', NULL, now())"
        )
        printed = project.run_python(VISIT_ADMIN, database)
        requests = ["200 3", "200 2", "200 1", "200 2", "200 2"]
        jobs = ["200 2", "200 1", "200 0", "200 1", "200 1"]
        row, end = "200 403 403", ["403", "True"]
        assert printed == [*requests, *[row] * 3, *end, *jobs, *[row] * 2, *end, "True"]


CHECK_DATABASE = f"""{MIGRATE_TO}
from django.core.checks import run_checks

def check():
    found = run_checks(tags=["database"], databases=["default"])
    print(*(f"{{one.id}} {{one.msg}}\\n{{one.hint}}" for one in found))

check()
call_command("migrate", "interview", verbosity=0)
check()
with connection.cursor() as cursor:
    cursor.execute("DROP TABLE {GRANTS}")
check()
"""
RUN_CHECKS = """
from django.core import checks
from django.db import models
from interview.models import UserInterviewAccess
meta = UserInterviewAccess._meta
def key(**more):
    fields = ['user_id', 'interview']
    return [models.UniqueConstraint(fields=fields, name='k', **more)]
partial = key(condition=models.Q(id=1))
for constraints in [], partial, key(deferrable=models.Deferrable.DEFERRED), key():
    meta.constraints = constraints
    meta.__dict__.pop('total_unique_constraints', None)
    print([found.id for found in checks.run_checks(tags=['models'])])
meta.constraints = []
meta.__dict__.pop('total_unique_constraints', None)
meta.unique_together = [('interview', 'user_id')]
print(checks.run_checks(tags=['models']))
"""


class TestChecks:
    """The system checks."""

    def test_missing_key_is_a_warning(self, project: DjangoProject, database: Database) -> None:
        """A database without the key gets a warning, and none with a key or without the table."""
        warning, hint, *nothing = project.run_python(CHECK_DATABASE, database)
        assert warning == (
            f"interview_access.W001 {GRANTS} in the database 'default' has no unique key on "
            "(user_id, interview_id)."
        )
        assert hint.startswith("Run `interview-access migrate`")
        assert nothing == ["", ""]

    def test_undeclared_key_is_a_warning(self, project: DjangoProject, database: Database) -> None:
        """A model without the key gets a warning with the remedy, in any form but a usable key."""
        printed = project.run_python(RUN_CHECKS, database)
        missing = "['interview_access.W002']"
        assert printed == [missing, missing, missing, "[]", "[]"]


ENQUEUE = """
from uuid import UUID
from django.db import transaction
from interview_access.django.on_commit import *
from interview_access.producer import InterviewAccessClient
with InterviewAccessClient() as client:
    with transaction.atomic():
        ids = (id for id in [UUID(int=0)])
        print(enqueue_on_commit(client, 'ann', ids, job_id='one', countdown=60))
        enqueue_cohort_on_commit(client, ['ann'], [], job_id='two', expires=60, actor='hr')
        enqueue_attempt_on_commit(client, UUID(int=0), 'ann', job_id='three', reason='late')
        print(client._queue.llen('interview-access'))
    try:
        with transaction.atomic():
            enqueue_on_commit(client, 'ann', [])
            raise KeyError
    except KeyError:
        print(client._queue.llen('interview-access'))
"""


ENQUEUE_INVALID = """
from interview_access.django.on_commit import *
from interview_access.producer import InterviewAccessClient
client = InterviewAccessClient('redis://nowhere.invalid/0')
for arguments, options in (
    ((7, []), {}), (('ann', 'one'), {}), (('ann', []), {'job_id': ''}),
    (('ann', []), {'countdown': 'soon'}), (('ann', []), {'actor': 'a\\nb'}),
):
    try:
        enqueue_on_commit(client, *arguments, **options)
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize(
    "columns", ["user_id DESC, interview_id", 'user_id COLLATE "C", interview_id']
)
def test_an_index_that_cannot_become_a_constraint_stays(
    project: DjangoProject, database: Database, columns: str
) -> None:
    """AddGrantKey builds the constraint beside a unique index in another order."""
    database.execute(f"CREATE UNIQUE INDEX sorted_key ON {GRANTS} ({columns})")
    project.succeed("python manage.py migrate interview", database)
    (index,) = (one for one in unique_keys(database) if "sorted_key" in one)
    assert sorted(unique_keys(database)) == sorted([*key("one_grant"), index])


OTHER_DATABASE = """
DATABASES["reports"] = {"ENGINE": "django.db.backends.sqlite3", "NAME": BASE_DIR / "reports.db"}
"""


def test_a_database_of_another_vendor_is_migrated(
    project: DjangoProject, database: Database
) -> None:
    """Without a router, Django applies every migration to every database, also in its tests."""
    settings = project.folder / "service/settings.py"
    before = settings.read_text(encoding="utf-8")
    project.append("service/settings.py", OTHER_DATABASE)
    try:
        for target in ("", "", " interview 0001"):
            project.succeed(f"python manage.py migrate --database reports{target}", database)
    finally:
        settings.write_text(before, encoding="utf-8")


DUMP = """
from django.core import serializers
from django.db import connection
from interview_access.django.models import OutboxRequest
from interview_access.outbox import enqueue_cohort_in_django, enqueue_in_django
enqueue_in_django("ann", ['a "b"', "c,d"], job_id="1")
enqueue_cohort_in_django(["ann", "bob"], [], job_id="2")
dumped = serializers.serialize("json", OutboxRequest.objects.all())
connection.cursor().execute("DELETE FROM grant_access_request")
for one in serializers.deserialize("json", dumped):
    one.save()
for row in OutboxRequest.objects.order_by("job_id"):
    print(row.user_ids, row.interview_ids)
"""


def test_requests_are_dumped_and_loaded(project: DjangoProject, database: Database) -> None:
    """`dumpdata`, `loaddata` and `serialized_rollback` keep the lists of IDs."""
    project.succeed("python manage.py migrate interview_access", database)
    printed = project.run_python(DUMP, database)
    assert printed == ["None ['a \"b\"', 'c,d']", "['ann', 'bob'] []"]


ENQUEUE_WITH_OTHER_CLIENTS = """
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.django.on_commit import *
for client in AsyncInterviewAccessClient('redis://nowhere.invalid/0'), None:
    for enqueue, arguments in (
        (enqueue_on_commit, ('ann', [])), (enqueue_cohort_on_commit, (['ann'], [])),
        (enqueue_attempt_on_commit, ('one', 'ann')),
    ):
        try:
            enqueue(client, *arguments)
        except TypeError as error:
            print(error)
"""


class TestOnCommit:
    """Enqueueing after the commit."""

    def test_job_is_sent_after_the_commit(
        self, project: DjangoProject, database: Database, idle: Site
    ) -> None:
        """A job of each task is sent after the commit, with its options; none after a rollback."""
        printed = project.run_python(
            ENQUEUE,
            database,
            CELERY_BROKER_URL=idle.broker,
        )
        assert printed == ["one", "0", "3"]
        raw: Any = idle.redis.lrange("interview-access", 0, -1)
        headers = [json.loads(message)["headers"] for message in reversed(raw)]
        assert [(one["id"], one["task"].partition(".")[2]) for one in headers] == [
            ("one", "grant_access"),
            ("two", "grant_cohort_access"),
            ("three", "create_interview_attempt"),
        ]
        assert headers[0]["eta"]
        assert headers[1]["expires"]
        assert (headers[1]["actor"], headers[2]["reason"]) == ("hr", "late")
        assert not {"actor", "reason"} & headers[0].keys()

    def test_invalid_argument_is_an_error_at_the_call(
        self, project: DjangoProject, database: Database
    ) -> None:
        """Invalid arguments and options raise at the call, before anything is connected to."""
        printed = project.run_python(ENQUEUE_INVALID, database)
        refused = "InvalidGrantRequestException"
        assert printed == [refused, refused, "ValueError", "ValueError", "ValueError"]

    def test_another_client_is_an_error_at_the_call(
        self, project: DjangoProject, database: Database
    ) -> None:
        """An asyncio client, whose coroutine nothing would await, and None are refused."""
        printed = project.run_python(ENQUEUE_WITH_OTHER_CLIENTS, database)
        expected = "client: expected an InterviewAccessClient, got "
        assert all(line.startswith(expected) for line in printed)
        found = [line.removeprefix(expected).partition(";")[0] for line in printed]
        assert found == ["AsyncInterviewAccessClient"] * 3 + ["NoneType"] * 3
