"""The outbox and the ledger, created as the worker's own migrations create them.

``interview-access migrate`` adopts these tables, and adds its trigger and its other tables. Where
it ran first, this migration changes nothing. It needs no privilege and no lock then.
"""

from __future__ import annotations

from typing import Any, ClassVar

from django.db import migrations, models
from django.db.models.functions import Now

import interview_access.django.models

_TASKS = [
    ("interview_access.grant_access", "grant access"),
    ("interview_access.grant_cohort_access", "grant cohort access"),
    ("interview_access.create_interview_attempt", "create interview attempt"),
]
_STATES = [(state, state) for state in ("succeeded", "failed", "cancelled", "expired")]

_CREATE = """
    DO $$
    BEGIN
        IF to_regclass('grant_access_job') IS NULL THEN
            CREATE TABLE grant_access_job (
                job_id varchar(255) COLLATE "C" PRIMARY KEY,
                task varchar(255) NOT NULL,
                state varchar(16) NOT NULL,
                user_id varchar(36),
                request_digest varchar(64) NOT NULL,
                requested integer,
                repeated integer,
                already_granted integer,
                created integer,
                result jsonb,
                error jsonb,
                finished_at timestamptz
            );
            CREATE INDEX grant_access_job_finished_at_idx ON grant_access_job (finished_at);
        END IF;
        IF to_regclass('grant_access_request') IS NULL THEN
            CREATE TABLE grant_access_request (
                job_id varchar(255) COLLATE "C" PRIMARY KEY DEFAULT gen_random_uuid()::text
                    CONSTRAINT grant_access_request_job_id_check
                    CHECK (job_id ~ '^[ -~]{1,255}$'),
                user_id text,
                interview_ids text[] NOT NULL,
                requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
                sent_at timestamptz,
                look_at timestamptz NOT NULL DEFAULT clock_timestamp(),
                task text NOT NULL DEFAULT 'interview_access.grant_access',
                user_ids text[],
                eta timestamptz,
                expires_at timestamptz,
                digest text,
                headers jsonb,
                CONSTRAINT grant_access_request_task_check CHECK (CASE task
                    WHEN 'interview_access.grant_access'
                        THEN user_id IS NOT NULL AND user_ids IS NULL
                    WHEN 'interview_access.grant_cohort_access'
                        THEN user_id IS NULL AND user_ids IS NOT NULL
                    WHEN 'interview_access.create_interview_attempt'
                        THEN user_id IS NOT NULL AND user_ids IS NULL
                            AND cardinality(interview_ids) = 1
                    ELSE false
                END)
            );
            CREATE INDEX grant_access_request_look_at_idx ON grant_access_request (look_at);
            CREATE INDEX grant_access_request_unsent_idx ON grant_access_request (look_at)
                WHERE sent_at IS NULL;
        END IF;
    END $$
"""


class _CreateTables(migrations.RunSQL):
    """Creates the tables on PostgreSQL; does nothing on another database of a project."""

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        if schema_editor.connection.vendor == "postgresql":
            super().database_forwards(app_label, schema_editor, from_state, to_state)


class Migration(migrations.Migration):
    """Create the tables that do not exist. Backwards they stay: they hold requests and results."""

    initial = True

    dependencies: ClassVar[list[tuple[str, str]]] = []

    operations: ClassVar = [
        migrations.SeparateDatabaseAndState(
            database_operations=[_CreateTables(_CREATE, _CreateTables.noop)],
            state_operations=[
                migrations.CreateModel(
                    name="OutboxRequest",
                    fields=[
                        (
                            "job_id",
                            models.CharField(
                                default=interview_access.django.models.random_id,
                                max_length=255,
                                primary_key=True,
                                serialize=False,
                            ),
                        ),
                        (
                            "task",
                            models.TextField(
                                choices=_TASKS, db_default="interview_access.grant_access"
                            ),
                        ),
                        ("user_id", models.TextField(null=True)),
                        ("user_ids", interview_access.django.models.TextArrayField(null=True)),
                        ("interview_ids", interview_access.django.models.TextArrayField()),
                        ("requested_at", models.DateTimeField(db_default=Now())),
                        ("sent_at", models.DateTimeField(null=True)),
                        ("look_at", models.DateTimeField(db_default=Now())),
                        ("eta", models.DateTimeField(null=True)),
                        ("expires_at", models.DateTimeField(null=True)),
                        ("digest", models.TextField(null=True)),
                        ("headers", models.JSONField(null=True)),
                    ],
                    options={
                        "db_table": "grant_access_request",
                        "ordering": ("-requested_at",),
                        "default_permissions": ("view",),
                    },
                ),
                migrations.CreateModel(
                    name="FinishedJob",
                    fields=[
                        (
                            "job_id",
                            models.CharField(max_length=255, primary_key=True, serialize=False),
                        ),
                        ("task", models.CharField(choices=_TASKS, max_length=255)),
                        ("state", models.CharField(choices=_STATES, max_length=16)),
                        ("user_id", models.CharField(max_length=36, null=True)),
                        ("request_digest", models.CharField(max_length=64)),
                        ("requested", models.IntegerField(null=True)),
                        ("repeated", models.IntegerField(null=True)),
                        ("already_granted", models.IntegerField(null=True)),
                        ("created", models.IntegerField(null=True)),
                        ("result", models.JSONField(null=True)),
                        ("error", models.JSONField(null=True)),
                        ("finished_at", models.DateTimeField(null=True)),
                    ],
                    options={
                        "db_table": "grant_access_job",
                        "ordering": ("-finished_at",),
                        "default_permissions": ("view",),
                    },
                ),
            ],
        )
    ]
