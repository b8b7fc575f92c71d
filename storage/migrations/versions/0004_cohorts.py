"""A table of the number of grants that a cohort job created for each user."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa
from alembic import op

from storage.migrations.live import FORWARD_ONLY, live_migration, plan_missing

revision = "0004"
down_revision = "0003"

_TABLE = "grant_access_cohort"


def upgrade() -> None:
    """Create the table if it is missing."""
    live_migration().create_missing({_TABLE: _create_cohort})


def plan(connection: sa.Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from plan_missing(connection, [_TABLE])


def downgrade() -> None:
    """Refuse to downgrade: counts of finished jobs would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)


def _create_cohort() -> None:
    op.create_table(
        _TABLE,
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column("created_by_user", sa.JSON, nullable=False),
    )
