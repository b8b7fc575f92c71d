"""The identity of a database, by which workers of one queue detect that they use several."""

from __future__ import annotations

from sqlalchemy import Connection, text

_MAY_READ_SYSTEM = text("""
    SELECT has_function_privilege(to_regprocedure('pg_control_system()')::oid, 'EXECUTE')
""")
_IDENTITY = """
    SELECT concat_ws('/', {system}, d.oid, to_regclass('grant_access_job')::oid), d.datname
    FROM pg_database d WHERE d.datname = current_database()
"""


def database_identity(connection: Connection) -> tuple[str, str]:
    """Return the identity of a database and schema, and the database's name.

    The identity survives a restart, a failover to a physical replica and a change of the host name.
    It consists of the cluster's system identifier, which PostgreSQL lets every role read but some
    hosting services do not, and of the OIDs of the database and the ledger.

    Args:
        connection: A connection of any role.
    """
    system = "(pg_control_system()).system_identifier"
    may_read = connection.scalar(_MAY_READ_SYSTEM)
    row = connection.execute(text(_IDENTITY.format(system=system if may_read else "NULL"))).one()
    return str(row[0]), str(row[1])
