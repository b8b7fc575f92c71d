"""One grant per user and interview: the unique key, added while the table is in use."""

from __future__ import annotations

from alembic import op

from storage.migrations import grant_key

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the key, outside of any transaction: an index cannot be built concurrently in one."""
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions run on a live connection only: call storage.schema")
    with context.autocommit_block():
        grant_key.add(context.connection, context.config.attributes["report"])


def downgrade() -> None:
    """Refused: without the key no count of the worker is exact."""
    raise NotImplementedError("migrations go forward only")
