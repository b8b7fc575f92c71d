"""A migration operation that adopts an existing unique key on grants."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from django.db import OperationalError, transaction
from django.db.migrations.operations import AddConstraint
from django.db.models import UniqueConstraint

from interview_access.django.grant_key import COLUMNS, TABLE, WORKER_KEY, find_keys

_LOCK_SECONDS = 60
_LOCK_TIMEOUT = "100ms"
_RETRY_SECONDS = 0.4  # leaves other statements four fifths of the time
_LOCK_NOT_AVAILABLE = "55P03"


class AddGrantKey(AddConstraint):
    """Add the unique key on (user_id, interview_id), or adopt an equal key of any name.

    It replaces ``migrations.AddConstraint``, which builds a second index if ``interview-access
    migrate`` has built one. Other readers and writers are not blocked: an existing constraint is
    renamed without a lock on the table, and a unique index becomes a constraint under a lock of a
    few milliseconds. Only if no key exists is the index built, as by ``AddConstraint``. A unique
    index with another order, operator class or collation than its columns' cannot become a
    constraint, and stays.

    Backwards the key remains under the worker's name if the worker needs it, and is dropped
    otherwise.
    """

    def __init__(self, model_name: str, constraint: UniqueConstraint) -> None:
        """Create the operation.

        Args:
            model_name: The model of the table of grants.
            constraint: A unique constraint with fields, a name and, if needed, an error message.

        Raises:
            ValueError: if the constraint has another option, such as a condition.
        """
        options = set(constraint.deconstruct()[2])
        more = options - {"fields", "name", "violation_error_code", "violation_error_message"}
        if not isinstance(constraint, UniqueConstraint) or more:
            raise ValueError(
                f"AddGrantKey: expected a UniqueConstraint with fields and a name, got {constraint}"
            )
        super().__init__(model_name, constraint)

    def database_forwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Rename an equal constraint, make an equal index a constraint, or build the index.

        Raises:
            ValueError: if the constraint is not on the two columns of the table of grants.
            django.db.OperationalError: if the table was locked for a minute.
            django.db.IntegrityError: if the table has no key and duplicate grants.
        """
        model = to_state.apps.get_model(app_label, self.model_name)
        connection = schema_editor.connection
        if not self.allow_migrate_model(connection.alias, model):
            return
        self._check(model)
        if connection.vendor != "postgresql":  # workers use no other database
            super().database_forwards(app_label, schema_editor, from_state, to_state)
            return
        name = self.constraint.name
        found = find_keys(connection) or ()
        keys = {key.name: key for key in found if key.is_constraint or key.can_be_constraint}
        key = keys.get(name) or next(iter(keys.values()), None)
        if key is None:
            _retry_lock(
                connection,
                lambda: super(AddGrantKey, self).database_forwards(
                    app_label, schema_editor, from_state, to_state
                ),
            )
        elif not key.is_constraint:
            table, index, constraint = map(schema_editor.quote_name, (TABLE, key.name, name))
            statement = (
                f"ALTER TABLE {table} ADD CONSTRAINT {constraint} UNIQUE USING INDEX {index}"
            )
            _retry_lock(connection, lambda: schema_editor.execute(statement))
        elif key.name != name:
            _rename(schema_editor, key.name, name)

    def database_backwards(
        self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any
    ) -> None:
        """Rename the key if the worker needs it; otherwise drop it.

        Raises:
            django.db.OperationalError: if the table was locked for a minute.
        """
        model = to_state.apps.get_model(app_label, self.model_name)
        connection = schema_editor.connection
        if not self.allow_migrate_model(connection.alias, model):
            return
        if connection.vendor != "postgresql":
            super().database_backwards(app_label, schema_editor, from_state, to_state)
            return
        name = self.constraint.name
        others = [key for key in find_keys(connection) or () if key.name != name]
        if others or not _has_worker(connection):
            _retry_lock(
                connection,
                lambda: super(AddGrantKey, self).database_backwards(
                    app_label, schema_editor, from_state, to_state
                ),
            )
        elif name != WORKER_KEY:
            _rename(schema_editor, name, WORKER_KEY)

    def describe(self) -> str:
        """Describe the operation for ``migrate --plan`` and ``sqlmigrate``."""
        return f"Add or adopt the unique key {self.constraint.name} of {self.model_name}"

    def _check(self, model: Any) -> None:
        columns = [model._meta.get_field(name).column for name in self.constraint.fields]
        if model._meta.db_table != TABLE or set(columns) != COLUMNS:
            raise ValueError(
                f"AddGrantKey: expected the columns user_id and interview_id of {TABLE}, got "
                f"{' and '.join(columns)} of {model._meta.db_table}"
            )


def _has_worker(connection: Any) -> bool:
    """Return whether ``interview-access migrate`` has migrated the database."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass('grant_access_alembic_version') IS NOT NULL")
        (has_worker,) = cursor.fetchone()
    return bool(has_worker)


def _rename(schema_editor: Any, old: str, new: str) -> None:
    """Rename an index and its constraint, under a lock of the index that blocks no statement."""
    old, new = map(schema_editor.quote_name, (old, new))
    schema_editor.execute(f"ALTER INDEX {old} RENAME TO {new}")


def _retry_lock(connection: Any, action: Callable[[], object]) -> None:
    """Retry an action until the table is free. A longer wait would block later statements.

    Raises:
        django.db.OperationalError: if the table was locked for a minute.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            with transaction.atomic(using=connection.alias), connection.cursor() as cursor:
                cursor.execute("SELECT current_setting('lock_timeout')")
                (before,) = cursor.fetchone()
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", [_LOCK_TIMEOUT])
                action()
                cursor.execute("SELECT set_config('lock_timeout', %s, true)", [before])
        except OperationalError as error:
            # The attribute is called pgcode in psycopg2.
            code = getattr(error.__cause__, "sqlstate", getattr(error.__cause__, "pgcode", None))
            if code != _LOCK_NOT_AVAILABLE or time.monotonic() >= deadline:
                raise
            time.sleep(_RETRY_SECONDS)
        else:
            return
