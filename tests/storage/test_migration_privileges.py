"""`migrate` and its dry run check the role's privileges before they do anything."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import make_url

from storage.errors import StorageError
from storage.schema import check_schema, migrate
from tests.storage.migrations import GRANTS, migrated
from tests.support.database import role
from tests.support.platform import Database, DjangoService

SERVICE_TABLES = (
    *("interview_interview", "interview_interviewconfig"),
    *("interview_interviewattempt", GRANTS),
)


@pytest.fixture(params=[True, False], ids=["dry run", "run"])
def dry_run(request: pytest.FixtureRequest) -> bool:
    """Whether to run `migrate --dry-run`."""
    return bool(request.param)


def refusal(database: Database, url: str, *, dry_run: bool) -> str:
    """Return the error with which a migration by a role ends, before it has changed anything."""
    before, sentences = database.catalog(), list[str]()
    with pytest.raises(StorageError) as refused:
        migrate(url, dry_run=dry_run, report=sentences.append)
    assert (database.catalog(), sentences) == (before, [])
    return str(refused.value)


def test_a_schema_without_create_is_named(database: Database, *, dry_run: bool) -> None:
    """A role that cannot create tables in the schema gets the GRANT statement."""
    with role(database.url) as url:
        name = make_url(url).username
        assert refusal(database, url, dry_run=dry_run) == (
            f"the role {name} lacks CREATE on public: run GRANT CREATE ON SCHEMA public TO {name}"
        )


def test_a_search_path_without_usage_is_named(database: Database, *, dry_run: bool) -> None:
    """A role that can use no schema of its search path gets the GRANT statement."""
    database.execute("REVOKE USAGE ON SCHEMA public FROM PUBLIC")
    with role(database.url) as url:
        name = make_url(url).username
        assert refusal(database, url, dry_run=dry_run) == (
            f"the role {name} lacks USAGE on public: run GRANT USAGE ON SCHEMA public TO {name}"
        )


@pytest.fixture
def adopted(database: Database, service: DjangoService) -> Iterator[tuple[Database, str, str]]:
    """The service's tables, which a role owns. Yields the database, and two roles' URLs."""
    del service  # it has created the tables
    with role(database.url) as owner, role(database.url, "CREATE ON SCHEMA public") as other:
        for table in SERVICE_TABLES:
            database.execute(f"ALTER TABLE {table} OWNER TO {make_url(owner).username}")
        yield database, owner, other


def test_adopted_tables_of_another_owner_are_named(
    adopted: tuple[Database, str, str], *, dry_run: bool
) -> None:
    """The unique key requires the table's owner, and foreign keys privileges on their target."""
    database, owner, other = adopted
    name, owning = make_url(other).username, make_url(owner).username
    database.execute("DROP TABLE interview_interviewattempt")
    assert refusal(database, other, dry_run=dry_run) == (
        f"the role {name} lacks REFERENCES on public.interview_interview, UPDATE on "
        f"public.interview_interview, ownership of public.{GRANTS}: run "
        f"GRANT REFERENCES ON TABLE public.interview_interview TO {name}; "
        f"GRANT UPDATE ON TABLE public.interview_interview TO {name}, "
        f"and migrate as the role {owning} or as a member of it"
    )


def test_a_member_of_the_owner_migrates(adopted: tuple[Database, str, str]) -> None:
    """A member of the owner's role migrates."""
    database, owner, other = adopted
    name, owning = make_url(other).username, make_url(owner).username
    database.execute(f"GRANT {owning} TO {name}")
    migrated(other)


def test_tables_of_another_owner_are_named(database: Database, *, dry_run: bool) -> None:
    """An older schema can be migrated by the owner of the worker's tables only."""
    migrated(database.url)
    database.execute("UPDATE grant_access_alembic_version SET version_num = '0005'")
    with role(database.url, "CREATE ON SCHEMA public") as url:
        name = make_url(url).username
        database.execute(f"GRANT SELECT ON grant_access_alembic_version TO {name}")
        sentence = refusal(database, url, dry_run=dry_run)
        assert "ownership of public.grant_access_request" in sentence
        assert "ownership of public.grant_access_alembic_version" in sentence
        assert sentence.endswith(": migrate as the role postgres or as a member of it")


def test_an_unreadable_revision_is_named(database: Database, *, dry_run: bool) -> None:
    """A role that cannot read the revision gets the GRANT statement."""
    migrated(database.url)
    with role(database.url) as url:
        name = make_url(url).username
        table = "public.grant_access_alembic_version"
        assert refusal(database, url, dry_run=dry_run) == (
            f"the role {name} lacks SELECT on {table}: run GRANT SELECT ON TABLE {table} TO {name}"
        )


def test_nothing_to_do_needs_no_privilege(database: Database, *, dry_run: bool) -> None:
    """At the newest revision a role that can read it is told that nothing is to be done."""
    migrated(database.url)
    with role(database.url, "SELECT ON grant_access_alembic_version") as url:
        sentences: list[str] = []
        migrate(url, dry_run=dry_run, report=sentences.append)
        assert "nothing to do" in sentences[0]


def test_the_named_grants_suffice_for_a_worker_and_no_more(database: Database) -> None:
    """A worker's role with these privileges starts, and cannot update an interview."""
    migrated(database.url)
    with role(database.url, "SELECT ON grant_access_alembic_version") as url:
        grants = re.findall(r"GRANT [^;]+", str(check_schema(url)))
        for grant in grants:
            database.execute(grant)
        assert check_schema(url) is None
        with Database(url).connect() as worker, pytest.raises(psycopg.Error) as denied:
            worker.execute("UPDATE interview_interview SET title = 'x'")
    assert denied.value.sqlstate == "42501"


def test_a_privilege_on_a_column_does_not_suffice_for_the_lock(
    adopted: tuple[Database, str, str], *, dry_run: bool
) -> None:
    """LOCK TABLE needs UPDATE on the table: the role is refused first, and can migrate then."""
    database, _, other = adopted
    name = make_url(other).username
    database.execute(f"CREATE UNIQUE INDEX service_key ON {GRANTS} (user_id, interview_id)")
    database.execute(f'ALTER TABLE {GRANTS} ADD created_by_job varchar(255) COLLATE "C"')
    database.execute(f"GRANT UPDATE (id) ON interview_interview TO {name}")
    grant = f"GRANT UPDATE ON TABLE public.interview_interview TO {name}"
    assert refusal(database, other, dry_run=dry_run).endswith(f": run {grant}")
    database.execute(grant)
    migrated(other)
