"""Who requested a finished job, when, and which worker executed it: columns of the ledger.

``interview-access migrate`` adds them to a table that it has created or adopted: run it first.
This migration adds them to a table that only Django has created, as for tests.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models

_ADD = """
    DO $$
    BEGIN
        IF to_regclass('grant_access_alembic_version') IS NULL THEN
            ALTER TABLE grant_access_job
                ADD COLUMN IF NOT EXISTS requested_at timestamptz,
                ADD COLUMN IF NOT EXISTS enqueued_at timestamptz,
                ADD COLUMN IF NOT EXISTS started_at timestamptz,
                ADD COLUMN IF NOT EXISTS attempts integer,
                ADD COLUMN IF NOT EXISTS worker varchar(255),
                ADD COLUMN IF NOT EXISTS actor varchar(255),
                ADD COLUMN IF NOT EXISTS reason varchar(1000);
            CREATE INDEX IF NOT EXISTS grant_access_job_user_idx
                ON grant_access_job USING hash (user_id) WHERE user_id IS NOT NULL;
            CREATE INDEX IF NOT EXISTS grant_access_job_actor_idx
                ON grant_access_job (actor varchar_pattern_ops, finished_at)
                WHERE actor IS NOT NULL;
            CREATE INDEX IF NOT EXISTS grant_access_job_state_idx
                ON grant_access_job (state varchar_pattern_ops, finished_at)
                WHERE state <> 'succeeded';
        END IF;
    END $$
"""
_FIELDS = {
    "requested_at": models.DateTimeField(null=True),
    "enqueued_at": models.DateTimeField(null=True),
    "started_at": models.DateTimeField(null=True),
    "attempts": models.IntegerField(null=True),
    "worker": models.CharField(max_length=255, null=True),
    "actor": models.CharField(max_length=255, null=True),
    "reason": models.CharField(max_length=1000, null=True),
}


class _AddColumns(migrations.RunSQL):
    """Adds the columns on PostgreSQL; does nothing on another database of a project."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)


class Migration(migrations.Migration):
    """Add the columns that do not exist. Backwards they stay."""

    dependencies: ClassVar = [("interview_access", "0001_tables")]

    operations: ClassVar = [
        migrations.SeparateDatabaseAndState(
            database_operations=[_AddColumns(_ADD, _AddColumns.noop)],
            state_operations=[
                migrations.AddField("FinishedJob", name, field) for name, field in _FIELDS.items()
            ],
        )
    ]
