"""The unique key on (user_id, interview_id), added while the table is in use."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations import grant_key
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the key outside a transaction, since its index is built concurrently.

    Raises:
        DuplicateGrantsError: if duplicate grants kept arriving, or cannot be removed.
        StorageError: if a lock was not free in time.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        grant_key.add(migration.connection, migration.report)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from grant_key.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: without the key no count is exact.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
