"""An index on the unsent requests, in the order in which a relay locks them."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection, text

from storage.migrations.catalog import FoundTable, find_table
from storage.migrations.live import FORWARD_ONLY, live_migration
from storage.migrations.locks import run_concurrently

revision = "0005"
down_revision = "0004"

INDEX = "grant_access_request_unsent_idx"
_TABLE = "grant_access_request"
_IS_VALID = text("""
    SELECT x.indisvalid FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = :table AND i.relname = :index
""")


def upgrade() -> None:
    """Build the index concurrently, and replace an unfinished one.

    Raises:
        StorageError: if older transactions stayed open for too long.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        connection, report = migration
        table = migration.table(_TABLE)
        is_valid = _is_valid(connection, table)
        if is_valid:
            report(f"adopted the index {INDEX}")
            return
        if is_valid is False:
            drop = f"DROP INDEX CONCURRENTLY {table.quoted_schema}.{INDEX}"
            run_concurrently(connection, drop, INDEX)
        create = (
            f"CREATE INDEX CONCURRENTLY {INDEX} ON {table.qualified_name} (look_at)"
            " WHERE sent_at IS NULL"
        )
        run_concurrently(connection, create, INDEX)
        report(f"added the index {INDEX}")


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    table = find_table(connection, _TABLE)
    yield f"would {'adopt' if table and _is_valid(connection, table) else 'add'} the index {INDEX}"


def downgrade() -> None:
    """Refuse to downgrade: a relay would sort all due requests for each page.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)


def _is_valid(connection: Connection, table: FoundTable) -> bool | None:
    """Return whether the index is finished, or None if it does not exist."""
    is_valid: bool | None = connection.scalar(_IS_VALID, {"table": table.oid, "index": INDEX})
    return is_valid
