"""A trigger that notifies relays of new requests, on the channel of the table's name."""

from __future__ import annotations

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Connection, text

from storage.errors import StorageError
from storage.migrations.live import FORWARD_ONLY, live_migration
from storage.migrations.locks import retry_statement

revision = "0006"
down_revision = "0005"

_TABLE = "grant_access_request"
_NAME = "grant_access_request_notify"
"""Name of the trigger and of its function."""

_LOCK = 7_160_244_398_155_012_683
"""Key of the advisory lock of listening relays, as in storage/postgres/notifications.py."""

_SECONDS = 60

# PostgreSQL serializes the commits of transactions that notify. So they notify only while a relay
# holds the lock. A transaction that has notified cannot be prepared: if services may prepare
# transactions, relays poll.
_FUNCTION = """
    CREATE OR REPLACE FUNCTION {schema}.{name}() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
    BEGIN
        IF current_setting('max_prepared_transactions') <> '0' THEN
            RETURN NULL;
        -- One expression, so that a cancelled statement leaves no lock behind.
        ELSIF (CASE WHEN pg_try_advisory_lock({lock}) THEN NOT pg_advisory_unlock({lock})
               ELSE true END) THEN
            PERFORM pg_notify(TG_TABLE_NAME, '');
        END IF;
        RETURN NULL;
    END $$
"""
_TRIGGER = """
    CREATE OR REPLACE TRIGGER {name} AFTER INSERT ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}.{name}()
"""


def upgrade() -> None:
    """Create the trigger when no transaction that writes requests is open.

    Raises:
        StorageError: if there was no such moment in a minute.
    """
    migration = live_migration()
    with op.get_context().autocommit_block():
        connection = migration.connection
        table = migration.table(_TABLE)
        names = {
            "name": _NAME,
            "lock": _LOCK,
            "schema": table.quoted_schema,
            "table": table.qualified_name,
        }
        connection.execute(text(_FUNCTION.format(**names)))
        if not retry_statement(connection, _TRIGGER.format(**names), seconds=_SECONDS):
            raise StorageError(
                f"{_TABLE} was locked by writers for {_SECONDS} s, so the trigger {_NAME} could "
                "not be added; check pg_stat_activity for a transaction left open, and run "
                "migrate again"
            )
    migration.report(f"added the trigger {_NAME}")


def plan(_connection: Connection) -> Iterator[str]:
    """Yield what an upgrade would do."""
    yield f"would add the trigger {_NAME}"


def downgrade() -> None:
    """Refuse to downgrade: relays would poll for requests.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(FORWARD_ONLY)
