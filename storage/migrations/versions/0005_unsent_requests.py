"""An index of the requests that were never sent, in the order in which a relay takes them."""

from __future__ import annotations

from alembic import op
from sqlalchemy import text

from storage.migrations.catalog import find_table
from storage.migrations.locks import run_concurrently

revision = "0005"
down_revision = "0004"

INDEX = "grant_access_request_unsent_idx"
_TABLE = "grant_access_request"
_IS_VALID = text("""
    SELECT x.indisvalid FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = :table AND i.relname = :index
""")


def upgrade() -> None:
    """Build the index while services go on writing requests; an unfinished one is built anew."""
    context = op.get_context()
    if context.config is None or context.connection is None:
        raise RuntimeError("the revisions run on a live connection only: call storage.schema")
    report = context.config.attributes["report"]
    with context.autocommit_block():
        connection = context.connection
        table = find_table(connection, _TABLE)
        if table is None:
            raise RuntimeError(f"table {_TABLE} is not there, though revision 0003 creates it")
        is_valid = connection.scalar(_IS_VALID, {"table": table.oid, "index": INDEX})
        if is_valid:
            report(f"adopted the index {INDEX}")
            return
        if is_valid is False:
            drop = f"DROP INDEX CONCURRENTLY {table.quoted_schema}.{INDEX}"
            run_concurrently(connection, drop, INDEX)
        create = (
            f"CREATE INDEX CONCURRENTLY {INDEX} ON {table.qualified_name} (look_at)"
            " WHERE sent_at IS NULL"
        )
        run_concurrently(connection, create, INDEX)
        report(f"added the index {INDEX}")


def downgrade() -> None:
    """Refused: a relay would sort all requests that are due for each page."""
    raise NotImplementedError("migrations go forward only")
