"""Who requested a job, when, and which worker executed it: columns of ``grant_access_job``."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations import job_audit
from storage.migrations.compatibility import Compatibility
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0010"
down_revision = "0009"
compatibility = Compatibility("0005", "they are older than release 0.1.0")


def upgrade() -> None:
    """Add the columns when no transaction that writes the ledger is open, and build the indexes.

    Raises:
        StorageError: if there was no such moment in a minute, or older transactions stayed open
            for too long.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        job_audit.add(migration)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from job_audit.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: the audit of finished jobs would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
