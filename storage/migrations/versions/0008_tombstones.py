"""Tombstones of pruned jobs, and an index on the age of cancellation requests."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from storage.migrations.concurrent_index import ConcurrentIndex
from storage.migrations.live import FORWARD_ONLY, live_migration, plan_missing

revision = "0008"
down_revision = "0007"

_TABLE = "grant_access_tombstone"
_INDEX = ConcurrentIndex(
    "grant_access_cancellation_requested_at_idx", "grant_access_cancellation", "(requested_at)"
)


def upgrade() -> None:
    """Create the table if it is missing, and build the index concurrently.

    Raises:
        StorageError: if older transactions stayed open for too long.
    """
    migration = live_migration()
    migration.create_missing({_TABLE: _create_tombstone})
    with op.get_context().autocommit_block():
        _INDEX.build(migration)


def plan(connection: sa.Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from plan_missing(connection, [_TABLE])
    yield from _INDEX.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: late deliveries of pruned jobs would be executed again.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)


def _create_tombstone() -> None:
    op.create_table(
        _TABLE,
        sa.Column("job_key", sa.Uuid, primary_key=True),
        sa.Column("digest", sa.Integer),
        sa.Column("created", sa.Integer),
        sa.Column("result", JSONB),
        sa.Column("error", sa.Text),
    )
