"""The unique key on (user_id, interview_id) of the platform's table of grants, in its catalog."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TABLE = "interview_userinterviewaccess"
"""The table of grants."""

COLUMNS = frozenset({"user_id", "interview_id"})
"""The columns of the key, in any order."""

WORKER_KEY = "interview_userinterviewaccess_user_id_interview_id_key"
"""Name of the key that ``interview-access migrate`` creates."""

# INSERT ... ON CONFLICT uses no other index: see storage/migrations/catalog.py of the worker.
_KEYS = """
    SELECT i.relname,
           EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.oid AND k.contype = 'u'),
           (SELECT bool_and(x.indoption[n] = 0 AND o.opcdefault
                            AND x.indcollation[n] = a.attcollation)
            FROM generate_series(0, x.indnkeyatts - 1) AS n
            JOIN pg_opclass o ON o.oid = x.indclass[n]
            JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[n])
    FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
    WHERE x.indrelid = %s AND x.indisunique
      AND x.indisvalid AND x.indisready AND x.indislive AND x.indimmediate
      AND x.indpred IS NULL AND x.indexprs IS NULL
      AND ARRAY(SELECT a.attname::text FROM pg_attribute a
                WHERE a.attrelid = x.indrelid
                  AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1])
                ORDER BY 1) = %s
    ORDER BY i.relname = %s, 2 DESC, i.relname
"""


@dataclass(frozen=True, slots=True)
class FoundKey:
    """A unique index on the columns of the key.

    Attributes:
        is_constraint: Whether a constraint of the same name owns it.
        can_be_constraint: Whether its columns have their default order, as a constraint requires.
    """

    name: str
    is_constraint: bool
    can_be_constraint: bool


def find_keys(connection: Any) -> list[FoundKey] | None:
    """Return the unique indexes by which the worker's statements detect existing grants.

    Args:
        connection: Django's connection to a PostgreSQL database.

    Returns:
        The indexes, the worker's own last; None if the table does not exist.

    Raises:
        django.db.DatabaseError: if PostgreSQL refused a query or the connection is lost.
    """
    with connection.cursor() as cursor:
        cursor.execute("SELECT to_regclass(%s)::oid", [TABLE])
        (table,) = cursor.fetchone()
        if table is None:
            return None
        cursor.execute(_KEYS, [table, sorted(COLUMNS), WORKER_KEY])
        return [FoundKey(*row) for row in cursor.fetchall()]
