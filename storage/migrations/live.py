"""What the revisions share: the running migration, and the announcement of a dry run.

Each revision has a function ``plan`` that yields the steps that its ``upgrade`` would report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from alembic import op
from sqlalchemy import Connection

from storage.migrations.catalog import FoundTable, find_table, find_tables

FORWARD_ONLY = "migrations go forward only"
"""Error of every ``downgrade``."""


class LiveMigration(NamedTuple):
    """The migration that is running.

    Attributes:
        report: Called with a sentence about each step.
    """

    connection: Connection
    report: Callable[[str], None]

    def table(self, name: str) -> FoundTable:
        """Return a table that an earlier revision has created.

        Raises:
            RuntimeError: if it does not exist.
        """
        table = find_table(self.connection, name)
        if table is None:
            raise RuntimeError(f"table {name} is missing, though an earlier revision creates it")
        return table

    def create_missing(self, creators: dict[str, Callable[[], None]]) -> None:
        """Create the tables that do not exist, and report what was created and adopted.

        Args:
            creators: A function that creates the table, by the table's name.
        """
        for name, create in creators.items():
            if find_table(self.connection, name):
                self.report(f"adopted table {name}")
            else:
                create()
                self.report(f"created table {name}")


def plan_missing(connection: Connection, names: Iterable[str]) -> Iterator[str]:
    """Yield what :meth:`LiveMigration.create_missing` would do.

    Args:
        connection: A connection to the database.
        names: Names of the tables.
    """
    names = list(names)
    existing = find_tables(connection, names)
    for name in names:
        yield f"would {'adopt' if name in existing else 'create'} table {name}"


def live_migration() -> LiveMigration:
    """Return the migration that Alembic is running.

    Raises:
        RuntimeError: if Alembic only generates SQL.
    """
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions need a live connection; call storage.schema.migrate")
    return LiveMigration(context.connection, context.config.attributes["report"])
