"""The columns and indexes that answer who requested a job, when, and which worker executed it.

Owns what migration 0010 adds to ``grant_access_job``.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import Connection

from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, find_table
from storage.migrations.concurrent_index import ConcurrentIndex
from storage.migrations.live import LiveMigration
from storage.migrations.locks import retry_statement

TABLE = "grant_access_job"

COLUMNS = {
    "requested_at": "timestamptz",
    "enqueued_at": "timestamptz",
    "started_at": "timestamptz",
    "attempts": "integer",
    "worker": "varchar(255)",
    "actor": "varchar(255)",
    "reason": "varchar(1000)",
}
"""Definitions of the new columns, which are null in older rows."""

# One for each filter of `interview-access jobs`. Most rows are in the first only, in which a hash
# index takes a third of the WAL and less than half of the space of a B-tree.
INDEXES = (
    ConcurrentIndex(
        "grant_access_job_user_idx", TABLE, "USING hash (user_id) WHERE user_id IS NOT NULL"
    ),
    ConcurrentIndex(
        "grant_access_job_actor_idx", TABLE, "(actor, finished_at) WHERE actor IS NOT NULL"
    ),
    ConcurrentIndex(
        "grant_access_job_state_idx", TABLE, "(state, finished_at) WHERE state <> 'succeeded'"
    ),
)

_SECONDS = 60


def add(migration: LiveMigration) -> None:
    """Add the missing columns without rewriting the table, and build the indexes concurrently.

    Args:
        migration: The running migration, whose connection is in AUTOCOMMIT.

    Raises:
        StorageError: if a lock was not free in time, or older transactions stayed open for too
            long.
    """
    table = migration.table(TABLE)
    missing = _missing(table)
    if missing:
        added = ", ".join(f"ADD COLUMN IF NOT EXISTS {name} {COLUMNS[name]}" for name in missing)
        statement = f"ALTER TABLE {table.qualified_name} {added}"
        if not retry_statement(migration.connection, statement, seconds=_SECONDS):
            raise StorageError(
                f"{TABLE} was locked by writers for {_SECONDS} s, so its columns could not be "
                "added; check pg_stat_activity for a transaction left open, and run migrate again"
            )
    for (past, _), names in _steps(missing):
        migration.report(f"{past} the columns {names} of {TABLE}")
    for index in INDEXES:
        index.build(migration)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what :func:`add` would do."""
    for (_, infinitive), names in _steps(_missing(find_table(connection, TABLE))):
        yield f"would {infinitive} the columns {names} of {TABLE}"
    for index in INDEXES:
        yield from index.plan(connection)


def is_to_add(table: FoundTable, column: str) -> bool:
    """Return whether :func:`add` adds this column to the table.

    Args:
        table: Any table.
        column: The column's name.
    """
    return table.name == TABLE and column in _missing(table)


def _missing(table: FoundTable | None) -> list[str]:
    return [name for name in COLUMNS if table is None or name not in table.columns]


def _steps(missing: list[str]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield for each step its verb, in the past and as an infinitive, and names of columns."""
    existing = [name for name in COLUMNS if name not in missing]
    for verbs, names in ((("added", "add"), missing), (("adopted", "adopt"), existing)):
        if names:
            yield verbs, ", ".join(names)
