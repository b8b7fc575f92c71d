"""The privileges that the roles of a worker and of a migration need, and those that they lack."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from storage import models
from storage.migrations import attribution, compatibility, grant_key
from storage.migrations.catalog import find_tables
from storage.schema.revisions import VERSION_TABLE

Needed = Mapping[str, Mapping[str, Sequence[str]]]
"""Columns by privilege by table. Without columns: the privilege on any column or on the table."""

_INTERVIEWS = models.interviews.name
_REQUESTS = models.requests.name
_OWN = "grant_access_"  # begins the names of the worker's own tables

_LEDGER_COLUMNS = (
    *("job_id", "task", "state", "user_id", "request_digest", "requested", "repeated"),
    *("already_granted", "created", "result", "error", "finished_at"),
    *("requested_at", "enqueued_at", "started_at", "attempts", "worker", "actor", "reason"),
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
        "INSERT": ("user_id", "interview_id", "created_by_job"),
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
    "grant_access_tombstone": {"SELECT": ("job_key", "digest", "created", "result", "error")},
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

TO_READ_JOBS: Needed = {
    table: {"SELECT": NEEDED[table]["SELECT"]} for table in NEEDED if table.startswith(_OWN)
}
"""What reading a job's status needs."""

TO_COUNT_REQUESTS: Needed = {_REQUESTS: {"SELECT": NEEDED[_REQUESTS]["SELECT"]}}
"""What counting the requests of the outbox needs."""

TO_LIST_JOBS: Needed = {"grant_access_job": {"SELECT": _LEDGER_COLUMNS}}
"""What listing finished jobs needs."""

TO_READ_GRANTS: Needed = {
    "interview_userinterviewaccess": {"SELECT": ("user_id", "interview_id", "created_by_job")}
}
"""What finding jobs by their grants needs."""

TO_EXPLAIN_GRANTS: Needed = {
    **TO_READ_JOBS,
    **TO_READ_GRANTS,
    _INTERVIEWS: {"SELECT": ("id",)},
}
"""What finding the job that created a grant needs."""

TO_CANCEL_JOBS: Needed = {
    **TO_READ_JOBS,
    **{table: NEEDED[table] for table in ("grant_access_job", "grant_access_cancellation")},
}
"""What cancelling a job needs."""

TO_READ_VERSION: Needed = {VERSION_TABLE: {"SELECT": ("version_num", compatibility.COLUMN)}}
"""What reading the version of a schema at revision 0009 or newer needs."""

TO_PRUNE: Needed = {
    "grant_access_job": {"DELETE": ()},
    _REQUESTS: {"UPDATE": NEEDED[_REQUESTS]["UPDATE"], "DELETE": ()},
    "grant_access_tombstone": {"INSERT": ("job_key", "digest", "created", "result", "error")},
    "grant_access_cancellation": {"SELECT": ("requested_at",), "DELETE": ()},
    "grant_access_rejection": {"DELETE": ()},
    "grant_access_cohort": {"DELETE": ()},
}
"""What a role needs beside :data:`NEEDED` or :data:`TO_READ_JOBS` to prune."""

TO_ERASE: Needed = {
    "grant_access_job": {"UPDATE": ("user_id", "error", "actor", "reason")},
    _REQUESTS: {"DELETE": ()},
    **{
        table: {"UPDATE": NEEDED[table]["UPDATE"]}
        for table in ("grant_access_rejection", "grant_access_cohort")
    },
}
"""What a role needs beside :data:`TO_READ_JOBS` to erase a person."""

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
          WHEN needed.privilege = 'DELETE' OR needed.columns = '*' THEN false
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
_SCHEMA = text("""
    SELECT quote_ident(current_schema()) AS object, quote_ident(current_user) AS role,
           has_schema_privilege(current_schema(), 'CREATE') AS may_create
""")
_HIDDEN_IN_PATH = text("""
    SELECT quote_ident(n.nspname) AS object, 'USAGE' AS privilege, quote_ident(current_user) AS role
    FROM unnest(string_to_array(current_setting('search_path'), ','))
         WITH ORDINALITY AS listed (name, number)
    JOIN pg_namespace n ON n.nspname = CASE trim(name, ' "')
         WHEN '$user' THEN current_user ELSE trim(name, ' "') END
    WHERE NOT has_schema_privilege(n.oid, 'USAGE')
    ORDER BY number LIMIT 1
""")
_OWNED_BY_OTHERS = text("""
    SELECT format('%I.%I', n.nspname, c.relname) AS object,
           quote_ident(pg_get_userbyid(c.relowner)) AS owner, quote_ident(current_user) AS role
    FROM unnest(CAST(:tables AS text[])) WITH ORDINALITY AS needed (name, number)
    JOIN pg_class c ON c.oid = to_regclass(needed.name)
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE NOT pg_has_role(c.relowner, 'USAGE')
    ORDER BY needed.number
""")


def missing_privileges(connection: Connection, *needed: Needed) -> str | None:
    """Find the privileges on these tables that the role lacks.

    Args:
        connection: A connection of the role.
        *needed: Columns by privilege by table. Tables that do not exist are ignored.

    Returns:
        The missing privileges and the GRANT statements to run, or None if none is missing.
    """
    wanted = [
        (table, privilege, ",".join(columns))
        for one in needed
        for table, privileges in one.items()
        for privilege, columns in privileges.items()
    ]
    tables, privileges, columns = (list(part) for part in zip(*wanted, strict=True))
    of_tables = {"tables": tables, "privileges": privileges, "columns": columns}
    written = {"tables": [table for table, privilege, _ in wanted if privilege == "INSERT"]}
    return _report(
        [
            *(_table_grant(*row) for row in connection.execute(_MISSING, of_tables)),
            *(
                _grant("SEQUENCE", *row)
                for row in connection.execute(_MISSING_OF_SEQUENCES, written)
            ),
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
    return _report(
        [_grant("SCHEMA", *row) for row in connection.execute(_HIDDEN, {"table": table})]
    )


def missing_usage_of_path(connection: Connection) -> str | None:
    """Detect a schema of the search path on which the role lacks USAGE.

    Args:
        connection: A connection of the role.

    Returns:
        The missing privilege and the GRANT statement to run, or None if none is missing.
    """
    return _report([_grant("SCHEMA", *row) for row in connection.execute(_HIDDEN_IN_PATH)])


def missing_for_migration(connection: Connection) -> str | None:
    """Find what the role lacks for a migration from any earlier revision.

    It creates tables and functions in the first schema of the search path, and alters the worker's
    own tables and, until it has the unique key and the column of its jobs, the table of grants,
    which only an owner can.

    Args:
        connection: A connection of the migrating role.

    Returns:
        What is missing and what to do, or None if nothing is missing.
    """
    schema = connection.execute(_SCHEMA).one()
    missing = []
    if not schema.may_create:
        missing.append(_grant("SCHEMA", schema.object, "CREATE", schema.role))
    tables = find_tables(connection, models.METADATA.tables)
    for privilege in _needed_for_foreign_keys(tables.keys()):
        # LOCK TABLE requires a privilege on the whole table, a foreign key one on its column.
        columns = "*" if privilege == "UPDATE" else "id"
        of_table = {"tables": [_INTERVIEWS], "privileges": [privilege], "columns": [columns]}
        missing += [_grant("TABLE", *row) for row in connection.execute(_MISSING, of_table)]
    altered = [VERSION_TABLE, *(name for name in models.METADATA.tables if name.startswith(_OWN))]
    grants = tables.get(grant_key.TABLE)
    has_key = grants is not None and grant_key.has_adopted_key(grants)
    if grants and not (has_key and attribution.COLUMN in grants.columns):
        altered.append(grant_key.TABLE)
    of_others = connection.execute(_OWNED_BY_OTHERS, {"tables": altered}).all()
    for row in of_others:
        remedy = f"migrate as the role {row.owner} or as a member of it"
        if grants and has_key and len(of_others) == 1 and row.object == grants.qualified_name:
            remedy += f", or run as that role {attribution.statement(grants)}"
        missing.append(_Missing(f"ownership of {row.object}", remedy, row.role))
    return _report(missing)


def _needed_for_foreign_keys(existing: Collection[str]) -> list[str]:
    """Return the privileges on an existing table of interviews that revision 0001 needs."""
    created = models.METADATA.tables.keys() - existing
    refers = any(models.METADATA.tables[name].foreign_keys for name in created)
    is_locked = refers or models.jobs.name in created
    needed = ["REFERENCES"] * refers + ["UPDATE"] * is_locked
    return needed if _INTERVIEWS in existing else []


class _Missing(NamedTuple):
    """What a role lacks, and what to do about it."""

    lack: str
    remedy: str
    role: str


def _grant(kind: str, name: str, privilege: str, role: str) -> _Missing:
    return _Missing(f"{privilege} on {name}", f"GRANT {privilege} ON {kind} {name} TO {role}", role)


def _table_grant(name: str, privilege: str, role: str) -> _Missing:
    # UPDATE of any column permits the row lock; of the whole table, changes to interviews.
    is_for_lock = privilege == "UPDATE" and name.rpartition(".")[2] == _INTERVIEWS
    return _grant("TABLE", name, "UPDATE (id)" if is_for_lock else privilege, role)


def _report(missing: Sequence[_Missing]) -> str | None:
    if not missing:
        return None
    lacks = ", ".join(dict.fromkeys(one.lack for one in missing))
    remedies = list(dict.fromkeys(one.remedy for one in missing))
    grants = "; ".join(one for one in remedies if one.startswith("GRANT"))
    others = [one for one in remedies if not one.startswith("GRANT")]
    return f"the role {missing[0].role} lacks {lacks}: " + ", and ".join(
        [*([f"run {grants}"] if grants else []), *others]
    )
