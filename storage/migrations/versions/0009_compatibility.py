"""The oldest compatible revision, in a column of Alembic's version table."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.errors import StorageError
from storage.migrations.catalog import find_table
from storage.migrations.compatibility import COLUMN, Compatibility
from storage.migrations.live import FORWARD_ONLY, live_migration
from storage.migrations.locks import retry_statement

revision = "0009"
down_revision = "0008"
compatibility = Compatibility("0005", "they are older than release 0.1.0")

_TABLE = "grant_access_alembic_version"
_SECONDS = 60


def upgrade() -> None:
    """Add the column when no worker that starts reads the table.

    Raises:
        StorageError: if there was no such moment in a minute.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        table = migration.table(_TABLE)
        statement = f"ALTER TABLE {table.qualified_name} ADD COLUMN IF NOT EXISTS {COLUMN} text"
        if not retry_statement(migration.connection, statement, seconds=_SECONDS):
            raise StorageError(
                f"{_TABLE} was locked for {_SECONDS} s, so its column {COLUMN} could not be added; "
                "check pg_stat_activity for a transaction left open, and run migrate again"
            )
    migration.report(
        f"{'adopted' if COLUMN in table.columns else 'added'} the column {COLUMN} of {_TABLE}"
    )


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    table = find_table(connection, _TABLE)
    verb = "adopt" if table and COLUMN in table.columns else "add"
    yield f"would {verb} the column {COLUMN} of {_TABLE}"


def downgrade() -> None:
    """Refuse to downgrade: workers of this release read the column.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
