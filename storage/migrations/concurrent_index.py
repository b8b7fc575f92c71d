"""An index of a table in use: built concurrently, and again if a build was interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, text

from storage.migrations.catalog import find_table
from storage.migrations.live import LiveMigration
from storage.migrations.locks import run_concurrently

_IS_VALID = text("""
    SELECT x.indisvalid FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = :table AND i.relname = :index
""")


@dataclass(frozen=True, slots=True)
class ConcurrentIndex:
    """An index that a revision adds.

    Attributes:
        table: Name of its table, which an earlier revision has created.
        definition: What follows the table's name in CREATE INDEX.
    """

    name: str
    table: str
    definition: str

    def build(self, migration: LiveMigration) -> None:
        """Build the index unless it exists, and replace an unfinished one.

        Args:
            migration: The running migration, whose connection is in AUTOCOMMIT.

        Raises:
            StorageError: if older transactions stayed open for too long.
        """
        connection, report = migration
        table = migration.table(self.table)
        is_valid = self._is_valid(connection, table.oid)
        if is_valid:
            report(f"adopted the index {self.name}")
            return
        if is_valid is False:
            drop = f"DROP INDEX CONCURRENTLY {table.quoted_schema}.{self.name}"
            run_concurrently(connection, drop, self.name)
        create = (
            f"CREATE INDEX CONCURRENTLY {self.name} ON {table.qualified_name} {self.definition}"
        )
        run_concurrently(connection, create, self.name)
        report(f"added the index {self.name}")

    def plan(self, connection: Connection) -> Iterator[str]:
        """Yield what :meth:`build` would do."""
        table = find_table(connection, self.table)
        is_valid = table and self._is_valid(connection, table.oid)
        yield f"would {'adopt' if is_valid else 'add'} the index {self.name}"

    def _is_valid(self, connection: Connection, table_oid: int) -> bool | None:
        """Return whether the index is finished, or None if it does not exist."""
        names = {"table": table_oid, "index": self.name}
        is_valid: bool | None = connection.scalar(_IS_VALID, names)
        return is_valid
