"""Jobs asked for or cancelled through the database, and what failed ones rejected."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from storage.migrations.catalog import find_table

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create what is missing; nothing that stands is touched."""
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions run on a live connection only: call storage.schema")
    report = context.config.attributes["report"]
    creators = {
        "grant_access_request": _create_request,
        "grant_access_cancellation": _create_cancellation,
        "grant_access_rejection": _create_rejection,
    }
    for name, create in creators.items():
        if find_table(context.connection, name):
            report(f"adopted table {name}")
        else:
            create()
            report(f"created table {name}")


def downgrade() -> None:
    """Refused: requests that wait would be lost."""
    raise NotImplementedError("migrations go forward only")


def _create_request() -> None:
    op.create_table(
        "grant_access_request",
        sa.Column(
            "job_id",
            sa.String(255, collation="C"),
            primary_key=True,
            server_default=sa.text("gen_random_uuid()::text"),
        ),
        sa.Column("user_id", sa.Text, nullable=False),
        sa.Column("interview_ids", sa.ARRAY(sa.Text), nullable=False),
        sa.Column(
            "requested_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
        sa.Column("sent_at", sa.DateTime(timezone=True)),
        sa.Column(
            "look_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
        # A worker takes no other job id; refused here, the service's own transaction hears of it.
        sa.CheckConstraint("job_id ~ '^[ -~]{1,255}$'", name="grant_access_request_job_id_check"),
    )
    op.create_index("grant_access_request_look_at_idx", "grant_access_request", ["look_at"])


def _create_cancellation() -> None:
    op.create_table(
        "grant_access_cancellation",
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column(
            "requested_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
    )


def _create_rejection() -> None:
    # The type json keeps every string that JSON can hold; jsonb refuses NUL and lone surrogates.
    op.create_table(
        "grant_access_rejection",
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column("unknown_interview_ids", sa.JSON, nullable=False),
        sa.Column("malformed_interview_ids", sa.JSON, nullable=False),
    )
