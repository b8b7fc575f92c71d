"""Notify the relays that wait, on the channel of the table's name, of requests added to it."""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from storage.errors import StorageError
from storage.migrations.catalog import find_table
from storage.migrations.locks import executed_briefly

revision = "0006"
down_revision = "0005"

_TABLE = "grant_access_request"
_NAME = "grant_access_request_notify"
"""Of the trigger and its function."""

_LOCK = 7_160_244_398_155_012_683
"""Of relays that sleep, as in storage/notifications.py: any number that nobody else uses."""

_SECONDS = 60

# PostgreSQL commits transactions that notify one after another, so they do only while a relay
# sleeps: it holds the lock then. And one that has notified cannot be prepared: where services may
# do that, relays poll.
_FUNCTION = """
    CREATE OR REPLACE FUNCTION {schema}.{name}() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
    BEGIN
        IF current_setting('max_prepared_transactions') <> '0' THEN
            RETURN NULL;
        -- One expression, so that a statement that is cancelled leaves no lock behind.
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
    """Create the trigger in a gap between the transactions that write requests."""
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions run on a live connection only: call storage.schema")
    with context.autocommit_block():
        connection = context.connection
        table = find_table(connection, _TABLE)
        if table is None:
            raise RuntimeError(f"table {_TABLE} is not there, though revision 0003 creates it")
        names = {
            "name": _NAME,
            "lock": _LOCK,
            "schema": table.quoted_schema,
            "table": table.qualified_name,
        }
        connection.execute(text(_FUNCTION.format(**names)))
        if not executed_briefly(connection, _TRIGGER.format(**names), seconds=_SECONDS):
            raise StorageError(
                f"{_TABLE} was in use for {_SECONDS} s without a gap to add the trigger {_NAME} "
                "in; look in pg_stat_activity for a transaction left open, and run migrate again"
            )
    context.config.attributes["report"](f"added the trigger {_NAME}")


def downgrade() -> None:
    """Refused: a relay would notice requests late."""
    raise NotImplementedError("migrations go forward only")
