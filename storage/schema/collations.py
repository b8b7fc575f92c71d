"""Collations whose sort order may have changed since the indexes of our tables were built.

A new version of the C library or of ICU may sort text in another order. An index built with the old
order then misses rows: a unique key admits duplicates. PostgreSQL records the version with which a
database or a collation was created.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from sqlalchemy import Connection, text

from storage.schema.privileges import NEEDED

_RECORDS_DATABASE_VERSION = (15,)

# The actual versions are computed last: for each of hundreds of collations they would take long.
_INDEXES = """
    WITH used (index, oid) AS (
        SELECT DISTINCT i.indexrelid, u.oid
        FROM unnest(CAST(:tables AS text[])) AS t (name)
        JOIN pg_index i ON i.indrelid = to_regclass(t.name)
        CROSS JOIN unnest(i.indcollation::oid[], i.indclass::oid[]) AS u (oid, class)
        JOIN pg_opclass o ON o.oid = u.class AND o.opcname !~ '_pattern_ops$'
        JOIN pg_am a ON a.oid = o.opcmethod AND a.amname <> 'hash'
    )
    SELECT format('%I.%I', n.nspname, x.relname) AS name,
           CASE WHEN c.collprovider = 'd' THEN format('DATABASE %I', d.datname)
                ELSE format('COLLATION %I.%I', s.nspname, c.collname) END AS changed,
           CASE WHEN c.collprovider = 'd' THEN {recorded} ELSE c.collversion END AS recorded,
           CASE WHEN c.collprovider = 'd' THEN {actual}
                ELSE pg_collation_actual_version(c.oid) END AS actual
    FROM used
    JOIN pg_class x ON x.oid = used.index
    JOIN pg_namespace n ON n.oid = x.relnamespace
    JOIN pg_collation c ON c.oid = used.oid
    JOIN pg_namespace s ON s.oid = c.collnamespace
    JOIN pg_database d ON d.datname = current_database()
    ORDER BY name
"""


def changed_collations(connection: Connection) -> list[str]:
    """Find the indexes of our tables that were built with another version of their collation.

    The order of the collation ``C`` and of ``varchar_pattern_ops`` never changes, and a hash index
    has none.

    Args:
        connection: A connection of any role.

    Returns:
        A sentence with the statements to run, for each database or collation with such indexes.
    """
    of_database = {"recorded": "NULL", "actual": "NULL"}
    if (connection.dialect.server_version_info or ()) >= _RECORDS_DATABASE_VERSION:
        of_database["recorded"] = "d.datcollversion"
        of_database["actual"] = "pg_database_collation_actual_version(d.oid)"
    query = text(_INDEXES.format(**of_database))
    indexes = defaultdict(list)
    for row in connection.execute(query, {"tables": list(NEEDED)}):
        if None not in {row.recorded, row.actual} and row.recorded != row.actual:
            indexes[row.changed, row.recorded, row.actual].append(row.name)
    return [_sentence(*changed, names) for changed, names in indexes.items()]


def _sentence(changed: str, recorded: str, actual: str, indexes: Sequence[str]) -> str:
    kind, _, name = changed.partition(" ")
    version = "COLLATION VERSION" if kind == "DATABASE" else "VERSION"
    return (
        f"the {kind.lower()} {name} has version {recorded} of its sort order, the server has "
        f"{actual}: indexes on text may miss rows, and unique keys may admit duplicates; run "
        f"{'; '.join(f'REINDEX INDEX CONCURRENTLY {index}' for index in indexes)}; reindex the "
        f"other indexes on text, if there are any; then run ALTER {changed} REFRESH {version}"
    )
