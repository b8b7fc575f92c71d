"""The columns that say who requested a job, when, and which worker executed it.

Owns what migration 0010 adds to the table ``grant_access_job``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, find_table
from storage.migrations.locks import retry_statement

if TYPE_CHECKING:
    from storage.migrations.live import LiveMigration

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

_SECONDS = 60


def add(migration: LiveMigration) -> None:
    """Add the missing columns without rewriting the table.

    Args:
        migration: The running migration, whose connection is in AUTOCOMMIT.

    Raises:
        StorageError: if the table's lock was not free in time.
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


def plan(connection: Connection) -> Iterator[str]:
    """Yield what :func:`add` would do."""
    for (_, infinitive), names in _steps(_missing(find_table(connection, TABLE))):
        yield f"would {infinitive} the columns {names} of {TABLE}"


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
