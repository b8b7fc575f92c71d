"""Tables of outbox requests, cancellation requests and rejected interview IDs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sqlalchemy as sa
from alembic import op

from storage.migrations.live import FORWARD_ONLY, live_migration, plan_missing

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the missing tables, and leave existing ones as they are."""
    live_migration().create_missing(_creators())


def plan(connection: sa.Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from plan_missing(connection, _creators())


def downgrade() -> None:
    """Refuse to downgrade: pending requests would be lost.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)


def _creators() -> dict[str, Callable[[], None]]:
    return {
        "grant_access_request": _create_request,
        "grant_access_cancellation": _create_cancellation,
        "grant_access_rejection": _create_rejection,
    }


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
        # A worker accepts no other job ID. Here the service's own transaction fails.
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
    # The type json stores every JSON string; jsonb rejects NUL and lone surrogates.
    op.create_table(
        "grant_access_rejection",
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column("unknown_interview_ids", sa.JSON, nullable=False),
        sa.Column("malformed_interview_ids", sa.JSON, nullable=False),
    )
