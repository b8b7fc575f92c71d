"""The job that created each grant: a column of ``interview_userinterviewaccess``."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations import attribution
from storage.migrations.compatibility import Compatibility
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0011"
down_revision = "0010"
compatibility = Compatibility("0005", "they are older than release 0.1.0")


def upgrade() -> None:
    """Add the column when no transaction that writes grants is open.

    Raises:
        StorageError: if there was no such moment in a minute.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        table = migration.table(attribution.TABLE)
        attribution.add(migration.connection, table, migration.report)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from attribution.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: which job created a grant would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
