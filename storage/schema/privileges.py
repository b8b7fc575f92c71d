"""The privileges that the worker's role needs, and those that it lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, text

Needed = Mapping[str, Mapping[str, Sequence[str]]]
"""Columns by privilege by table. Without columns: the privilege on any column or on the table."""

_LEDGER_COLUMNS = (
    *("job_id", "task", "state", "user_id", "request_digest", "requested", "repeated"),
    *("already_granted", "created", "result", "error", "finished_at"),
)

NEEDED: Needed = {
    "interview_interview": {
        "SELECT": ("id", "title", "description", "duration"),
        "UPDATE": (),  # FOR KEY SHARE asks for it; nothing is updated
    },
    "interview_interviewconfig": {
        "SELECT": (
            "interview_id",
            "is_default_access_allowed",
            "should_end_interview_after_duration",
        ),
    },
    "interview_interviewattempt": {
        "INSERT": (
            *("id", "interview_id", "user_id"),
            *("start_datetime", "end_datetime", "scheduled_end_datetime"),
        ),
    },
    "interview_userinterviewaccess": {
        "SELECT": ("user_id", "interview_id"),
        "INSERT": ("user_id", "interview_id"),
    },
    "grant_access_job": {"SELECT": _LEDGER_COLUMNS, "INSERT": _LEDGER_COLUMNS},
    "grant_access_request": {
        "SELECT": (
            *("job_id", "task", "user_id", "user_ids", "interview_ids", "eta", "expires_at"),
            *("headers", "requested_at", "sent_at", "look_at"),
        ),
        "UPDATE": ("sent_at", "look_at"),
        "DELETE": (),
    },
    "grant_access_cancellation": {"SELECT": ("job_id",), "INSERT": ("job_id",)},
    "grant_access_rejection": {
        "SELECT": ("job_id", "unknown_interview_ids", "malformed_interview_ids"),
        "INSERT": ("job_id", "unknown_interview_ids", "malformed_interview_ids"),
        "UPDATE": ("unknown_interview_ids", "malformed_interview_ids"),
    },
    "grant_access_cohort": {
        "SELECT": ("job_id", "created_by_user"),
        "INSERT": ("job_id", "created_by_user"),
        "UPDATE": ("created_by_user",),
    },
}

# A role has a privilege on the table or on each of the columns; DELETE only on the table.
_MISSING = text("""
    SELECT format('%I.%I', n.nspname, c.relname) AS object, needed.privilege,
           quote_ident(current_user) AS role
    FROM unnest(CAST(:tables AS text[]), CAST(:privileges AS text[]), CAST(:columns AS text[]))
         WITH ORDINALITY AS needed (name, privilege, columns, number)
    JOIN pg_class c ON c.oid = to_regclass(needed.name)
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT has_table_privilege(c.oid, needed.privilege)
      AND NOT CASE
          WHEN needed.privilege = 'DELETE' THEN false
          WHEN needed.columns = '' THEN has_any_column_privilege(c.oid, needed.privilege)
          ELSE (SELECT bool_and(has_column_privilege(c.oid, name, needed.privilege))
                FROM unnest(string_to_array(needed.columns, ',')) AS name)
      END
    ORDER BY needed.number
""")
# An identity column needs no privilege on its sequence; a "serial" column of older Djangos does.
_MISSING_OF_SEQUENCES = text("""
    SELECT format('%I.%I', n.nspname, s.relname) AS object, 'USAGE' AS privilege,
           quote_ident(current_user) AS role
    FROM unnest(CAST(:tables AS text[])) AS needed (name)
    JOIN pg_attrdef d ON d.adrelid = to_regclass(needed.name)
    JOIN pg_depend r ON r.classid = 'pg_attrdef'::regclass AND r.objid = d.oid
                    AND r.refclassid = 'pg_class'::regclass
    JOIN pg_class s ON s.oid = r.refobjid
    JOIN pg_namespace n ON n.oid = s.relnamespace
    WHERE CASE WHEN s.relkind = 'S' THEN NOT has_sequence_privilege(s.oid, 'USAGE, UPDATE') END
""")
_HIDDEN = text("""
    SELECT quote_ident(n.nspname) AS object, 'USAGE' AS privilege,
           quote_ident(current_user) AS role
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relname = :table AND to_regclass(:table) IS NULL
      AND NOT has_schema_privilege(n.oid, 'USAGE')
    LIMIT 1
""")


def missing_privileges(connection: Connection, needed: Needed) -> str | None:
    """Find the privileges on these tables that the role lacks.

    Args:
        connection: A connection of the role.
        needed: Columns by privilege by table. Tables that do not exist are ignored.

    Returns:
        The missing privileges and the GRANT statements to run, or None if none is missing.
    """
    wanted = [
        (table, privilege, ",".join(columns))
        for table, privileges in needed.items()
        for privilege, columns in privileges.items()
    ]
    tables, privileges, columns = (list(part) for part in zip(*wanted, strict=True))
    of_tables = {"tables": tables, "privileges": privileges, "columns": columns}
    written = {"tables": [table for table in needed if "INSERT" in needed[table]]}
    return _report(
        [
            *(("TABLE", *row) for row in connection.execute(_MISSING, of_tables)),
            *(("SEQUENCE", *row) for row in connection.execute(_MISSING_OF_SEQUENCES, written)),
        ]
    )


def missing_usage(connection: Connection, table: str) -> str | None:
    """Detect that a table exists in a schema on which the role lacks USAGE.

    Args:
        connection: A connection of the role.
        table: The table's name.

    Returns:
        The missing privilege and the GRANT statement to run, or None if none is missing.
    """
    return _report([("SCHEMA", *row) for row in connection.execute(_HIDDEN, {"table": table})])


def _report(missing: Sequence[tuple[str, str, str, str]]) -> str | None:
    if not missing:
        return None
    lacks = ", ".join(f"{privilege} on {name}" for _, name, privilege, _ in missing)
    grants = "; ".join(
        f"GRANT {privilege} ON {kind} {name} TO {role}" for kind, name, privilege, role in missing
    )
    return f"the role {missing[0][3]} lacks {lacks}: run {grants}"
