"""All tasks in the outbox, with their options: columns of ``grant_access_request``."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations import request_tasks
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the columns when no transaction that writes requests is open.

    Raises:
        StorageError: if there was no such moment in a minute.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        table = migration.table(request_tasks.TABLE)
        request_tasks.add(migration.connection, table, migration.report)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from request_tasks.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: pending requests would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
