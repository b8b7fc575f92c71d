"""Duplicate grants, which a table without the unique key may have: count them, remove them."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from storage import sqlstate
from storage.driver_errors import sqlstate_of
from storage.errors import StorageError
from storage.migrations.catalog import FoundTable
from storage.migrations.locks import retry_lock, transaction

_DELETE_SECONDS = 60
_BATCH_SIZE = 1_000  # rows deleted by one statement, and locked for a moment only
_PASS_SIZE = 500_000  # duplicates in this process's memory at a time


class DuplicateGrantsError(StorageError):
    """Duplicate grants exist that could not be removed.

    Attributes:
        duplicates: Number of rows beside an older row of the same user and interview.
    """

    def __init__(self, reason: str, duplicates: int) -> None:
        self.duplicates = duplicates
        super().__init__(reason, sqlstate.UNIQUE_VIOLATION)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Numbers of duplicate grants.

    Attributes:
        rows: Rows beside the oldest row of the same user and interview.
        pairs: Pairs of user and interview that have such rows.
    """

    rows: int
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} duplicate {'grant' if self.rows == 1 else 'grants'} of {self.pairs:,} "
            f"{'pair' if self.pairs == 1 else 'pairs'} of user and interview"
        )


def count_duplicates(connection: Connection, table: FoundTable) -> Duplicates:
    """Count the duplicate grants.

    Args:
        connection: A connection to the database.
        table: The table of grants.

    Raises:
        sqlalchemy.exc.DBAPIError: if PostgreSQL refused the query or the connection is lost.
    """
    row = connection.execute(
        text(f"""
            SELECT coalesce(sum(grants - 1), 0)::bigint AS rows, count(*) AS pairs
            FROM (SELECT count(*) AS grants FROM {table.qualified_name}
                  GROUP BY user_id, interview_id HAVING count(*) > 1) AS repeated
        """)  # noqa: S608 - the name is quoted by PostgreSQL itself
    ).one()
    return Duplicates(row.rows, row.pairs)


def remove_duplicates(connection: Connection, table: FoundTable) -> Duplicates:
    """Delete duplicates, except the lowest ID of each pair.

    A row is deleted only while the row to be kept is locked and has the same pair. Otherwise the
    grant would be lost if that row is deleted at this moment.

    Args:
        connection: A connection in AUTOCOMMIT.
        table: The table of grants.

    Returns:
        What was deleted.

    Raises:
        DuplicateGrantsError: if rows of other tables refer to duplicates.
        StorageError: if duplicates were locked for too long.
    """
    find = text(f"""
        SELECT extra.id, kept.id AS kept_id
        FROM (SELECT user_id, interview_id, min(id) AS id FROM {table.qualified_name}
              GROUP BY user_id, interview_id HAVING count(*) > 1) AS kept
        JOIN {table.qualified_name} AS extra USING (user_id, interview_id)
        WHERE extra.id > kept.id
        LIMIT {_PASS_SIZE}
    """)  # noqa: S608 - the name is quoted by PostgreSQL itself
    delete = text(f"""
        WITH kept AS MATERIALIZED (
            SELECT id, user_id, interview_id FROM {table.qualified_name}
            WHERE id = ANY (:kept_ids) ORDER BY id FOR SHARE
        )
        DELETE FROM {table.qualified_name} AS extra
        USING kept, unnest(CAST(:ids AS bigint[]), CAST(:kept_ids AS bigint[])) AS found (id, kept_id)
        WHERE extra.id = found.id AND kept.id = found.kept_id
          AND extra.user_id = kept.user_id AND extra.interview_id = kept.interview_id
        RETURNING kept.id
    """)  # noqa: S608, E501 - the name is quoted by PostgreSQL itself
    rows = 0
    pairs: set[int] = set()
    while True:
        with transaction(connection):
            found = connection.execute(find).all()
        for start in range(0, len(found), _BATCH_SIZE):
            batch = found[start : start + _BATCH_SIZE]
            kept = _delete(
                connection, delete, [row.id for row in batch], [row.kept_id for row in batch]
            )
            rows += len(kept)
            pairs.update(kept)
        if len(found) < _PASS_SIZE:
            return Duplicates(rows, len(pairs))


def _delete(
    connection: Connection, statement: TextClause, ids: list[int], kept_ids: list[int]
) -> list[int]:
    """Delete one batch. Returns the ID of the kept row for each deleted row."""
    kept: list[int] = []

    def delete() -> None:
        chosen = {"ids": ids, "kept_ids": kept_ids}
        with transaction(connection):
            deleted = connection.execute(statement, chosen).scalars().all()
        kept.extend(deleted)

    try:
        if retry_lock(delete, seconds=_DELETE_SECONDS):
            return kept
    except DBAPIError as error:
        if sqlstate_of(error) != sqlstate.FOREIGN_KEY_VIOLATION:
            raise
        raise DuplicateGrantsError(
            f"duplicate grants cannot be removed while rows of other tables refer to them: "
            f"{error.orig}; point those rows to the lowest ID of the same user and interview, and "
            "run migrate again",
            len(ids),
        ) from error
    raise StorageError(
        f"duplicate grants were locked for {_DELETE_SECONDS} s; check pg_stat_activity for "
        "a transaction left open, and run migrate again"
    )
