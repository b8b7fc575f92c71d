"""The platform's four tables, created or adopted, and the ledger.

Tables are created with the names that Django generates, so that the platform's own migrations
recognize them (`manage.py migrate --fake-initial`). :mod:`storage.schema.comparison` has verified
before that existing tables fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from storage.errors import StorageError
from storage.migrations.catalog import find_table
from storage.migrations.live import FORWARD_ONLY, live_migration, plan_missing
from storage.migrations.locks import retry_lock

revision = "0001"
down_revision = None

_LOCK_SECONDS = 60


def upgrade() -> None:
    """Create the missing tables in one transaction.

    Raises:
        StorageError: if interview_interview could not be locked.
    """
    migration = live_migration()
    creators = _creators()
    existing = {name for name in creators if find_table(migration.connection, name)}
    if "interview_interview" in existing and len(existing) < len(creators):
        _lock_interviews(migration.connection)
    migration.create_missing(creators)


def plan(connection: sa.Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield from plan_missing(connection, _creators())


def downgrade() -> None:
    """Refuse to downgrade: the tables belong to the platform.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)


def _creators() -> dict[str, Callable[[], None]]:
    return {
        "interview_interview": _create_interview,
        "interview_interviewconfig": _create_interview_config,
        "interview_interviewattempt": _create_interview_attempt,
        "interview_userinterviewaccess": _create_user_interview_access,
        "grant_access_job": _create_grant_access_job,
    }


def _lock_interviews(connection: sa.Connection) -> None:
    """Take the lock that a new foreign key needs, for the milliseconds until the commit.

    Raises:
        StorageError: if the lock was not free in time.
    """

    def lock() -> None:
        with connection.begin_nested():  # a lock timeout leaves the transaction usable
            op.execute("LOCK TABLE interview_interview IN SHARE ROW EXCLUSIVE MODE")

    if not retry_lock(lock, seconds=_LOCK_SECONDS):
        raise StorageError(
            f"interview_interview was locked by writers for {_LOCK_SECONDS} s, so no table that "
            "refers to it could be created; nothing was changed; check "
            "pg_stat_activity for a transaction left open, and run migrate again"
        )


def _interview_key(name: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["interview_id"],
        ["interview_interview.id"],
        name=name,
        deferrable=True,
        initially="DEFERRED",
    )


def _create_user_index(table: str, name: str) -> None:
    """Create the two indexes that Django creates for text: for equality and for LIKE."""
    op.create_index(name, table, ["user_id"])
    op.create_index(
        f"{name}_like", table, ["user_id"], postgresql_ops={"user_id": "varchar_pattern_ops"}
    )


def _create_interview() -> None:
    op.create_table(
        "interview_interview",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("title", sa.String(255), nullable=False),
        sa.Column("description", sa.Text),
        sa.Column("duration", sa.Interval, nullable=False),
    )


def _create_interview_config() -> None:
    op.create_table(
        "interview_interviewconfig",
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("is_default_access_allowed", sa.Boolean, nullable=False),
        sa.Column("should_end_interview_after_duration", sa.Boolean, nullable=False),
        sa.Column("interview_id", sa.Uuid, nullable=False),
        sa.UniqueConstraint("interview_id", name="interview_interviewconfig_interview_id_key"),
        _interview_key("interview_interviewc_interview_id_04c037b4_fk_interview"),
    )


def _create_interview_attempt() -> None:
    table = "interview_interviewattempt"
    op.create_table(
        table,
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("user_id", sa.String(36), nullable=False),
        sa.Column("start_datetime", sa.DateTime(timezone=True), nullable=False),
        sa.Column("end_datetime", sa.DateTime(timezone=True)),
        sa.Column("scheduled_end_datetime", sa.DateTime(timezone=True)),
        sa.Column("interview_id", sa.Uuid, nullable=False),
        _interview_key("interview_interviewa_interview_id_a47e01a3_fk_interview"),
    )
    _create_user_index(table, "interview_interviewattempt_user_id_ee1d88a1")
    op.create_index("interview_interviewattempt_interview_id_a47e01a3", table, ["interview_id"])


def _create_user_interview_access() -> None:
    table = "interview_userinterviewaccess"
    op.create_table(
        table,
        sa.Column("id", sa.BigInteger, sa.Identity(), primary_key=True),
        sa.Column("user_id", sa.String(36), nullable=False),
        sa.Column("interview_id", sa.Uuid, nullable=False),
        _interview_key("interview_userinterv_interview_id_473ac53f_fk_interview"),
    )
    _create_user_index(table, "interview_userinterviewaccess_user_id_0f6e2105")
    op.create_index("interview_userinterviewaccess_interview_id_473ac53f", table, ["interview_id"])


def _create_grant_access_job() -> None:
    op.create_table(
        "grant_access_job",
        sa.Column("job_id", sa.String(255, collation="C"), primary_key=True),
        sa.Column("task", sa.String(255), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("user_id", sa.String(36)),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.Column("requested", sa.Integer),
        sa.Column("repeated", sa.Integer),
        sa.Column("already_granted", sa.Integer),
        sa.Column("created", sa.Integer),
        sa.Column("result", JSONB),
        sa.Column("error", JSONB),
        sa.Column("finished_at", sa.DateTime(timezone=True)),
    )
    op.create_index("grant_access_job_finished_at_idx", "grant_access_job", ["finished_at"])
