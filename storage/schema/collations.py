"""Collations whose sort order may have changed since the indexes of our tables were built.

A new version of the C library or of ICU may sort text in another order. An index built with the old
order then misses rows: a unique key admits duplicates. PostgreSQL records the version with which a
database or a collation was created.
"""

from __future__ import annotations

from collections import defaultdict

from sqlalchemy import Connection, text

from storage.schema.privileges import NEEDED

_RECORDS_DATABASE_VERSION = (15,)

_INDEXES = """
    WITH used (index, oid) AS (
        SELECT DISTINCT i.indexrelid, u.oid
        FROM unnest(CAST(:tables AS text[])) AS t (name)
        JOIN pg_index i ON i.indrelid = to_regclass(t.name)
        CROSS JOIN unnest(i.indcollation::oid[], i.indclass::oid[]) AS u (oid, class)
        JOIN pg_opclass o ON o.oid = u.class AND o.opcname !~ '_pattern_ops$'
    )
    SELECT object, recorded, actual, refresh, format('%I.%I', n.nspname, x.relname) AS index
    FROM used
    JOIN pg_class x ON x.oid = used.index
    JOIN pg_namespace n ON n.oid = x.relnamespace
    JOIN ({versions}) AS versions ON versions.oid = used.oid
    WHERE recorded <> actual
    ORDER BY object, index
"""
_OF_COLLATIONS = """
    SELECT c.oid, format('the collation %I.%I', s.nspname, c.collname) AS object,
           c.collversion AS recorded, pg_collation_actual_version(c.oid) AS actual,
           format('ALTER COLLATION %I.%I REFRESH VERSION', s.nspname, c.collname) AS refresh
    FROM pg_collation c JOIN pg_namespace s ON s.oid = c.collnamespace
    WHERE c.collprovider <> 'd'
"""
_OF_DATABASE = """
    SELECT c.oid, format('the database %I', d.datname), d.datcollversion,
           pg_database_collation_actual_version(d.oid),
           format('ALTER DATABASE %I REFRESH COLLATION VERSION', d.datname)
    FROM pg_database d CROSS JOIN pg_collation c
    WHERE d.datname = current_database() AND c.collprovider = 'd'
"""


def changed_collations(connection: Connection) -> list[str]:
    """Find the indexes of our tables that were built with another version of their collation.

    The order of the collation ``C`` and of Django's ``varchar_pattern_ops`` never changes.

    Args:
        connection: A connection of any role.

    Returns:
        A sentence with the statements to run, for each database or collation with such indexes.
    """
    versions = _OF_COLLATIONS
    if (connection.dialect.server_version_info or ()) >= _RECORDS_DATABASE_VERSION:
        versions += f"UNION ALL {_OF_DATABASE}"
    rows = connection.execute(
        text(_INDEXES.format(versions=versions)), {"tables": list(NEEDED)}
    ).all()
    indexes = defaultdict(list)
    for row in rows:
        indexes[row[:4]].append(row.index)
    return [
        f"{changed} has version {recorded} of its sort order, the server has {actual}: indexes on "
        "text may miss rows, and unique keys may admit duplicates; run "
        f"{'; '.join(f'REINDEX INDEX CONCURRENTLY {index}' for index in names)}; reindex the "
        f"other indexes on text, if there are any; then run {refresh}"
        for (changed, recorded, actual, refresh), names in indexes.items()
    ]
