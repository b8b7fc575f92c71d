"""Who requested a job, when, and which worker executed it: columns of ``grant_access_job``."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection

from storage.migrations import job_audit
from storage.migrations.compatibility import Compatibility
from storage.migrations.concurrent_index import ConcurrentIndex
from storage.migrations.live import FORWARD_ONLY, live_migration

revision = "0010"
down_revision = "0009"
compatibility = Compatibility("0005", "they are older than release 0.1.0")

# One for each filter of `interview-access jobs`; none depends on the version of a collation. Most
# rows are in the first only: a hash index takes a third of the WAL of a B-tree, and half the space.
_INDEXES = tuple(
    ConcurrentIndex(f"grant_access_job_{name}_idx", job_audit.TABLE, definition)
    for name, definition in (
        ("user", "USING hash (user_id) WHERE user_id IS NOT NULL"),
        ("actor", "(actor varchar_pattern_ops, finished_at) WHERE actor IS NOT NULL"),
        ("state", "(state varchar_pattern_ops, finished_at) WHERE state <> 'succeeded'"),
    )
)


def upgrade() -> None:
    """Add the columns when no transaction that writes the ledger is open, and build the indexes.

    Raises:
        StorageError: if there was no such moment in a minute, or older transactions stayed open
            for too long.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        job_audit.add(migration)
        for index in _INDEXES:
            index.build(migration)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from job_audit.plan(connection)
    for index in _INDEXES:
        yield from index.plan(connection)


def downgrade() -> None:
    """Refuse to downgrade: the audit of finished jobs would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
