"""The columns by which an outbox request names its task and its options.

Owns what migration 0007 adds to ``grant_access_request``, also to a table that the platform's
service has created with some of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from sqlalchemy import Connection, text

from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, find_table
from storage.migrations.locks import retry_statement

TABLE = "grant_access_request"

COLUMNS = {
    "task": "text NOT NULL DEFAULT 'interview_access.grant_access'",
    "user_ids": "text[]",
    "eta": "timestamptz",
    "expires_at": "timestamptz",
    "digest": "text",
    "headers": "jsonb",
}
"""Definitions of the new columns. The column ``user_id``, which is older, becomes nullable."""

CONSTRAINT = "grant_access_request_task_check"
"""Name of the constraint that a request has the arguments of its task."""

_SECONDS = 60
_CHECK = """
    CHECK (CASE task
        WHEN 'interview_access.grant_access' THEN user_id IS NOT NULL AND user_ids IS NULL
        WHEN 'interview_access.grant_cohort_access' THEN user_id IS NULL AND user_ids IS NOT NULL
        WHEN 'interview_access.create_interview_attempt'
            THEN user_id IS NOT NULL AND user_ids IS NULL AND cardinality(interview_ids) = 1
        ELSE false
    END)
"""
_IS_CONSTRAINED = text("""
    SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = :table AND conname = :name)
""")


def add(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Add the missing columns and the constraint, each step in a transaction of its own.

    No step rewrites the table. The constraint is validated under a lock that admits writers.

    Args:
        connection: A connection in AUTOCOMMIT.
        table: The table.
        report: Called with a sentence about each step.

    Raises:
        StorageError: if a lock was not free in time.
    """
    steps = list(_steps(connection, table))
    alterations = [
        *(f"ADD COLUMN IF NOT EXISTS {name} {kind}" for name, kind in COLUMNS.items()),
        f"ALTER COLUMN task SET {COLUMNS['task'].partition('NULL ')[2]}",
        "ALTER COLUMN user_id DROP NOT NULL",
    ]
    if not _is_constrained(connection, table):
        alterations.append(f"ADD CONSTRAINT {CONSTRAINT} {_CHECK} NOT VALID")
    for alteration in (", ".join(alterations), f"VALIDATE CONSTRAINT {CONSTRAINT}"):
        statement = f"ALTER TABLE {table.qualified_name} {alteration}"
        if not retry_statement(connection, statement, seconds=_SECONDS):
            raise StorageError(
                f"{TABLE} was locked by writers for {_SECONDS} s, so its columns could not be "
                "added; check pg_stat_activity for a transaction left open, and run migrate again"
            )
    for past, _, what in steps:
        report(f"{past} {what}")


def plan(connection: Connection) -> Iterator[str]:
    """Yield what :func:`add` would do."""
    for _, infinitive, what in _steps(connection, find_table(connection, TABLE)):
        yield f"would {infinitive} {what}"


def is_to_change(table: FoundTable, column: str) -> bool:
    """Return whether :func:`add` adds this column to the table, or makes it nullable.

    Args:
        table: Any table.
        column: The column's name.
    """
    if table.name != TABLE:
        return False
    found = table.columns.get(column)
    return column in COLUMNS if found is None else column == "user_id" and found.not_null


def _steps(connection: Connection, table: FoundTable | None) -> Iterator[tuple[str, str, str]]:
    """Yield for each step its verb, in the past and as an infinitive, and its object."""
    missing = [name for name in COLUMNS if not table or name not in table.columns]
    for found, names in ((False, missing), (True, [one for one in COLUMNS if one not in missing])):
        if names:
            verbs = ("adopted", "adopt") if found else ("added", "add")
            yield (*verbs, f"the columns {', '.join(names)} of {TABLE}")
    is_constrained = table is not None and _is_constrained(connection, table)
    verbs = ("adopted", "adopt") if is_constrained else ("added", "add")
    yield (*verbs, f"the constraint {CONSTRAINT}")


def _is_constrained(connection: Connection, table: FoundTable) -> bool:
    values = {"table": table.oid, "name": CONSTRAINT}
    return bool(connection.scalar(_IS_CONSTRAINED, values))
