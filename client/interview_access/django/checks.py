"""System checks: one unique key on grants exists in the database, and the model declares it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Tags, register
from django.core.checks import Warning as CheckWarning
from django.db import connections

from interview_access.django.grant_key import COLUMNS, TABLE, find_keys


@register(Tags.models)
def check_declared_key(app_configs: Iterable[Any] | None, **_: object) -> list[CheckMessage]:
    """Check that the model of the grants declares the unique key.

    Otherwise a duplicate in a form of the admin is an IntegrityError, which is answered with 500.

    Args:
        app_configs: The apps to check; None for all.
    """
    checked = apps.get_app_configs() if app_configs is None else app_configs
    return [
        CheckWarning(
            "The model does not declare the unique key on (user_id, interview_id).",
            hint=(
                'Add UniqueConstraint(fields=["user_id", "interview"], name=…) to Meta.constraints '
                "and run makemigrations. In the new migration, replace migrations.AddConstraint "
                "with interview_access.django.operations.AddGrantKey, which adopts an existing key."
            ),
            obj=model,
            id="interview_access.W002",
        )
        for app in checked
        for model in app.get_models()
        if model._meta.db_table == TABLE and not model._meta.proxy
        if COLUMNS not in _unique_columns(model)
    ]


@register(Tags.database)
def check_existing_key(databases: Iterable[str] | None, **_: object) -> list[CheckMessage]:
    """Check that the table of the grants has the unique key, without which no job can run.

    This is no error: Django's migrate, which may be about to add the key, stops at errors.

    Args:
        databases: Names of the databases to check; None for none.
    """
    return [
        CheckWarning(
            f"{TABLE} in the database {name!r} has no unique key on (user_id, interview_id).",
            hint="Run `interview-access migrate`, which also removes duplicate grants.",
            id="interview_access.W001",
        )
        for name in databases or ()
        if connections[name].vendor == "postgresql" and find_keys(connections[name]) == []
    ]


@register(Tags.database)
def check_redundant_keys(databases: Iterable[str] | None, **_: object) -> list[CheckMessage]:
    """Check that the table of the grants has no second key, which every insert would maintain.

    ``migrations.AddConstraint`` builds one if ``interview-access migrate`` has run before.

    Args:
        databases: Names of the databases to check; None for none.
    """
    found: list[CheckMessage] = []
    for name in databases or ():
        connection = connections[name]
        if connection.vendor != "postgresql":
            continue
        keys = find_keys(connection) or []
        for key in keys[1:]:
            quoted = connection.ops.quote_name(key.name)
            drop = (
                f"ALTER TABLE {TABLE} DROP CONSTRAINT {quoted}"
                if key.is_constraint
                else f"DROP INDEX CONCURRENTLY {quoted}"
            )
            found.append(
                CheckWarning(
                    f"{TABLE} in the database {name!r} has two equal unique keys: "
                    f"{keys[0].name} and {key.name}.",
                    hint=f"Unless a migration of yours names {key.name}, run {drop};",
                    id="interview_access.W003",
                )
            )
    return found


def _unique_columns(model: Any) -> Iterator[frozenset[str]]:
    """Yield the columns of each unique key of the whole table that ON CONFLICT can use."""
    keys = [
        *(key.fields for key in model._meta.total_unique_constraints if key.deferrable is None),
        *model._meta.unique_together,
    ]
    for fields in keys:
        yield frozenset(model._meta.get_field(name).column for name in fields)
