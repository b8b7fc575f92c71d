"""Compatibility of schemas and workers: what revisions state, and what a worker accepts."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import NullPool, event

from storage.connections import open_engine, parse_url
from storage.migrations.compatibility import stated_by
from storage.migrations.locks import set_up_transaction
from storage.schema import SchemaMismatchError, check_schema, expected_revision, migrate
from storage.schema.revisions import VERSION_TABLE
from tests.storage.migrations import migrated
from tests.support.database import role
from tests.support.platform import CHECKOUT, Database

LATER = "9999"
"""A revision of a later release."""

FIRST = "0009"
"""The first revision that states its compatibility."""

SCRIPTS = {
    script.revision: script
    for script in ScriptDirectory(str(CHECKOUT / "storage" / "migrations")).walk_revisions()
}
STATED = sorted(revision for revision in SCRIPTS if revision >= FIRST)


def predecessor(revision: str) -> str:
    """Return the revision before."""
    return str(SCRIPTS[revision].down_revision)


def oldest(revision: str) -> str:
    """Return the oldest revision whose workers can use this one."""
    stated = stated_by(SCRIPTS[revision].module)
    return stated.oldest if stated else revision


class Piece(NamedTuple):
    """A column, constraint, index or trigger of a table, or a foreign key to it.

    Attributes:
        columns: What it concerns.
        restricts: Whether it may reject a statement of a worker that does not know it.
    """

    table: str
    name: str
    definition: str
    columns: frozenset[str]
    restricts: bool


_PIECES = """
    SELECT c.relname::text AS table, a.attname::text AS name,
           format('column %s %s %s', format_type(a.atttypid, a.atttypmod), a.attnotnull,
                  a.attcollation::regcollation) AS definition,
           ARRAY[a.attname::text] AS columns,
           a.attnotnull AND NOT a.atthasdef AND a.attidentity = '' AS restricts
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
      AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL
    SELECT c.relname, k.conname, pg_get_constraintdef(k.oid),
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum = ANY (k.conkey)), true
    FROM pg_class c JOIN pg_constraint k ON k.conrelid = c.oid
    WHERE c.relnamespace = 'public'::regnamespace AND k.contype <> 'n'
    UNION ALL
    SELECT c.relname, k.conname, pg_get_constraintdef(k.oid) || ' of ' || k.conrelid::regclass,
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum = ANY (k.confkey)),
           k.confdeltype IN ('a', 'r')
    FROM pg_class c JOIN pg_constraint k ON k.confrelid = c.oid
    WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT c.relname, i.relname, pg_get_indexdef(x.indexrelid),
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum = ANY (x.indkey)), x.indisunique
    FROM pg_class c JOIN pg_index x ON x.indrelid = c.oid JOIN pg_class i ON i.oid = x.indexrelid
    WHERE c.relnamespace = 'public'::regnamespace
    UNION ALL
    SELECT c.relname, t.tgname, pg_get_triggerdef(t.oid),
           ARRAY(SELECT a.attname::text FROM pg_attribute a
                 WHERE a.attrelid = c.oid AND a.attnum > 0), true
    FROM pg_class c JOIN pg_trigger t ON t.tgrelid = c.oid
    WHERE c.relnamespace = 'public'::regnamespace AND NOT t.tgisinternal
"""


def pieces(database: Database) -> set[Piece]:
    """Return what the tables consist of."""
    return {
        Piece(**{**row, "columns": frozenset(row["columns"])}) for row in database.execute(_PIECES)
    }


def obstacles(before: set[Piece], after: set[Piece]) -> set[str]:
    """Name what excludes workers of the schema before: what is lost, changed or restricts rows."""
    tables = {piece.table for piece in before}
    columns = {(piece.table, column) for piece in before for column in piece.columns}
    restrictions = {
        piece
        for piece in after - before
        if piece.restricts and piece.table in tables
        if piece.definition.startswith("column")
        or not piece.columns  # an expression
        or any((piece.table, column) in columns for column in piece.columns)
    }
    remaining = {piece[:3] for piece in after}
    lost = {piece for piece in before if piece[:3] not in remaining}
    return {piece.name for piece in lost | restrictions}


def upgrade_to(database: Database, revision: str) -> None:
    """Run the revisions up to this one."""
    engine = open_engine(parse_url(database.url), application_name="test", poolclass=NullPool)
    event.listen(engine, "begin", set_up_transaction)
    with engine.connect() as connection:
        values = {"connection": connection, "report": str, "version_table": VERSION_TABLE}
        config = Config(attributes=values)
        config.set_main_option("script_location", "storage:migrations")
        command.upgrade(config, revision)


@pytest.mark.parametrize("revision", STATED)
def test_each_revision_states_its_compatibility(revision: str) -> None:
    """Each revision names an existing revision, never an older one than before, and a reason."""
    stated = stated_by(SCRIPTS[revision].module)
    assert stated is not None
    assert stated.oldest in SCRIPTS
    before = stated_by(SCRIPTS[predecessor(revision)].module)
    assert (before.oldest if before else "") <= stated.oldest <= revision
    assert stated.reason


@pytest.mark.parametrize("revision", [one for one in STATED if oldest(one) <= predecessor(one)])
def test_additive_revision_only_adds(database: Database, revision: str) -> None:
    """A revision that does not exclude workers of its predecessor only adds to the schema."""
    upgrade_to(database, predecessor(revision))
    before = pieces(database)
    upgrade_to(database, revision)
    assert obstacles(before, pieces(database)) == set()


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("ALTER TABLE grant_access_job ADD later text, ADD rank int NOT NULL DEFAULT 0", set()),
        ("ALTER TABLE grant_access_job ADD later text UNIQUE CHECK (later <> '')", set()),
        ("ALTER TABLE grant_access_job ALTER task SET DEFAULT ''", set()),
        ("CREATE TABLE later (id text REFERENCES grant_access_job ON DELETE CASCADE)", set()),
        ("CREATE INDEX later ON grant_access_job (user_id)", set()),
        ("ALTER TABLE grant_access_job ADD later text NOT NULL", {"later"}),
        ("ALTER TABLE grant_access_job DROP COLUMN repeated", {"repeated"}),
        ("ALTER TABLE grant_access_job ALTER task TYPE text", {"task"}),
        ("ALTER TABLE grant_access_job ADD CONSTRAINT later CHECK (requested > 0)", {"later"}),
        ("CREATE UNIQUE INDEX later ON grant_access_job (user_id, task)", {"later"}),
        ("CREATE UNIQUE INDEX later ON grant_access_job (lower(user_id))", {"later"}),
        ("CREATE TABLE later (id text REFERENCES grant_access_job)", {"later_id_fkey"}),
        ("DROP TABLE grant_access_cohort", {"job_id", "created_by_user"}),
    ],
)
def test_only_additions_are_additive(migrated_url: str, statement: str, expected: set[str]) -> None:
    """What excludes older workers is named, and nothing else."""
    database = Database(migrated_url)
    before = pieces(database)
    database.execute(statement)
    assert obstacles(before, pieces(database)) >= expected
    assert bool(obstacles(before, pieces(database))) == bool(expected)


def state(database: Database, revision: str, oldest: str | None) -> None:
    """Have a database be migrated to a revision by a later release."""
    database.execute(
        f"UPDATE {VERSION_TABLE} SET version_num = %s, oldest_compatible = %s",  # noqa: S608 - a constant
        revision,
        oldest,
    )


def test_migration_states_the_oldest_compatible_revision(migrated_url: str) -> None:
    """The number in the database is that of the newest revision."""
    (row,) = Database(migrated_url).execute(f"SELECT * FROM {VERSION_TABLE}")  # noqa: S608 - a constant
    newest = expected_revision()
    assert row == {"version_num": newest, "oldest_compatible": oldest(newest)}


def test_newer_compatible_schema_is_used(migrated_url: str) -> None:
    """A worker starts on additions of a later release, and `migrate` changes nothing."""
    database = Database(migrated_url)
    database.execute("CREATE TABLE grant_access_later (id bigint)")
    database.execute("ALTER TABLE grant_access_job ADD later text, ADD rank int DEFAULT 0 NOT NULL")
    database.execute("CREATE INDEX ON grant_access_job (later)")
    state(database, LATER, expected_revision())
    sentence = (
        f"the schema is at revision {LATER}, newer than {expected_revision()} of this release "
        f"and compatible with revisions from {expected_revision()} on"
    )
    informed: list[str] = []
    assert check_schema(database.url, inform=informed.append) is None
    assert informed == [sentence]
    before = database.catalog()
    assert migrated(database.url) == [f"nothing to do: {sentence}"]
    assert database.catalog() == before


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("DROP TABLE grant_access_tombstone", "grant_access_tombstone: found nothing"),
        ("ALTER TABLE grant_access_job DROP repeated", "job.repeated: found no such column"),
        ("ALTER TABLE grant_access_job ADD later text NOT NULL", "job.later: found text not null"),
    ],
)
def test_newer_schema_must_have_what_the_worker_needs(
    migrated_url: str, change: str, found: str
) -> None:
    """What a worker needs is compared with a newer schema too, whatever that states."""
    database = Database(migrated_url)
    database.execute(change)
    state(database, LATER, expected_revision())
    assert found in str(check_schema(database.url))


@pytest.mark.parametrize("stated", [LATER, None])
def test_newer_incompatible_schema_is_refused(migrated_url: str, stated: str | None) -> None:
    """The worker and `migrate` name both revisions, the expected one and the remedy."""
    database = Database(migrated_url)
    state(database, LATER, stated)
    sentence = (
        f"the database is at revision {LATER}, which this release does not know (its newest is "
        f"{expected_revision()}) and cannot use: expected a release with revision {LATER} or a "
        "newer one; install the release that created it"
    )
    assert check_schema(database.url) == sentence
    with pytest.raises(SchemaMismatchError) as caught:
        migrate(database.url, report=lambda _: None)
    assert str(caught.value) == sentence


def test_unreadable_statement_is_a_missing_privilege(migrated_url: str) -> None:
    """A role that may read the revision only is told which privilege it lacks."""
    database = Database(migrated_url)
    with role(database.url, f"SELECT (version_num) ON {VERSION_TABLE}") as url:
        state(database, LATER, expected_revision())
        assert f"lacks SELECT on public.{VERSION_TABLE}" in str(check_schema(url))


def test_dry_run_says_that_workers_may_stay(migrated_url: str) -> None:
    """A migration from a revision that stated nothing lets workers run, but not restart."""
    database = Database(migrated_url)
    state(database, predecessor(FIRST), None)
    reported: list[str] = []
    migrate(database.url, dry_run=True, report=reported.append)
    assert reported[0] == (
        "running workers may stay, but start on the new schema only after their upgrade"
    )
