"""How many grants each user of a cohort had."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from storage.migrations.catalog import find_table

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create what is missing; nothing that stands is touched."""
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions run on a live connection only: call storage.schema")
    report = context.config.attributes["report"]
    if find_table(context.connection, "grant_access_cohort"):
        report("adopted table grant_access_cohort")
        return
    op.create_table(
        "grant_access_cohort",
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column("created_by_user", sa.JSON, nullable=False),
    )
    report("created table grant_access_cohort")


def downgrade() -> None:
    """Refused: counts that were told would be lost."""
    raise NotImplementedError("migrations go forward only")
