"""The column by which a grant names the job that created it.

Owns what migration 0011 adds to the platform's table of grants. Django's models do not declare the
column, so the statements of the service leave it out, and their rows name no job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlalchemy import Connection

from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, find_table
from storage.migrations.locks import retry_statement

TABLE = "interview_userinterviewaccess"
COLUMN = "created_by_job"

_SECONDS = 60
_NAME = f"the column {COLUMN} of {TABLE}"


def add(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Add the column unless it exists, in the milliseconds of a lock. The table is not rewritten.

    Args:
        connection: A connection in AUTOCOMMIT.
        table: The table of grants.
        report: Called with a sentence about the step.

    Raises:
        StorageError: if the lock was not free in time.
    """
    if COLUMN in table.columns:
        report(f"adopted {_NAME}")
        return
    if not retry_statement(connection, statement(table), seconds=_SECONDS):
        raise StorageError(
            f"{TABLE} was locked by writers for {_SECONDS} s, so its column {COLUMN} could not be "
            "added; check pg_stat_activity for a transaction left open, and run migrate again"
        )
    report(f"added {_NAME}")


def statement(table: FoundTable) -> str:
    """Return the statement that adds the column to the table of grants."""
    return f'ALTER TABLE {table.qualified_name} ADD COLUMN {COLUMN} varchar(255) COLLATE "C"'


def plan(connection: Connection) -> Iterator[str]:
    """Yield what :func:`add` would do."""
    table = find_table(connection, TABLE)
    yield f"would {'adopt' if table and COLUMN in table.columns else 'add'} {_NAME}"


def is_to_add(table: FoundTable, column: str) -> bool:
    """Return whether :func:`add` adds this column to the table.

    Args:
        table: Any table.
        column: The column's name.
    """
    return table.name == TABLE and column == COLUMN and column not in table.columns
