"""What a running revision works with: the connection, and a report for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from alembic import op
from sqlalchemy import Connection

from storage.migrations.catalog import FoundTable, find_table

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


def live_migration() -> LiveMigration:
    """Return the migration that Alembic is running.

    Raises:
        RuntimeError: if Alembic only generates SQL.
    """
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions need a live connection; call storage.schema.migrate")
    return LiveMigration(context.connection, context.config.attributes["report"])
