"""An index on the unsent requests, in the order in which a relay locks them."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations.concurrent_index import ConcurrentIndex
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0005"
down_revision = "0004"

INDEX = "grant_access_request_unsent_idx"
_INDEX = ConcurrentIndex(INDEX, "grant_access_request", "(look_at) WHERE sent_at IS NULL")


def upgrade() -> None:
    """Build the index concurrently, and replace an unfinished one.

    Raises:
        StorageError: if older transactions stayed open for too long.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        _INDEX.build(migration)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from _INDEX.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: a relay would sort all due requests for each page.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
