"""Sample interviews for the demo and for local use; never for a production database."""

from __future__ import annotations

from sqlalchemy import create_engine, text

NAMED_SAMPLES = ("89d96f4b-c19d-4e69-8eae-e818f3123b09", "a1b2c3d4-e5f6-4a8b-9c0d-e1f2a3b4c5d6")
"""The IDs of the first two sample interviews."""

_INSERT = text("""
    INSERT INTO interview_interview (id, title, duration)
    SELECT CASE WHEN n <= cardinality(CAST(:named AS uuid[])) THEN (CAST(:named AS uuid[]))[n]
                ELSE CAST(md5('sample interview ' || n) AS uuid) END,
           'Sample interview ' || n, interval '1 hour'
    FROM generate_series(1, :count) AS n
    ON CONFLICT (id) DO NOTHING
""")
_SELECT = text("""
    SELECT id::text FROM interview_interview WHERE title LIKE 'Sample interview %'
    ORDER BY CAST(substring(title FROM '[0-9]+$') AS int) LIMIT :count
""")


def load_samples(database_url: str, count: int) -> list[str]:
    """Insert the missing ones of the first ``count`` sample interviews.

    Args:
        database_url: URL of a migrated database, ``postgresql+psycopg://…``.
        count: Number of sample interviews.

    Returns:
        Their IDs, :data:`NAMED_SAMPLES` first.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: if the database failed.
    """
    engine = create_engine(database_url)
    try:
        with engine.begin() as connection:
            connection.execute(_INSERT, {"named": list(NAMED_SAMPLES), "count": count})
            return list(connection.execute(_SELECT, {"count": count}).scalars())
    finally:
        engine.dispose()
