"""The unique key on (user_id, interview_id), added to a table that others write to all the while.

The index is built concurrently, which locks nobody out, but fails on duplicates that stand and on
those that arrive meanwhile, and then leaves an invalid index. So: drop that, remove the
duplicates, again, for five rounds. From the second round on a trigger refuses new duplicates, as
the key will a moment later: without it a writer of duplicates every few milliseconds would win
all of the rounds.

Every function wants a connection in AUTOCOMMIT. Whatever is killed wherever: the next run begins
by clearing away what the last one left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, FoundUniqueKey, find_table
from storage.migrations.locks import (
    OLD_TRANSACTIONS_SECONDS,
    executed_briefly,
    got_briefly,
    run_concurrently,
    sqlstate,
    transaction,
)

TABLE = "interview_userinterviewaccess"
COLUMNS = ("user_id", "interview_id")
KEY = "interview_userinterviewaccess_user_id_interview_id_key"
ROUNDS = 5

_GUARD = "interview_access_refuse_duplicate"  # the trigger and its function
_GUARD_SECONDS = 5
_DELETE_SECONDS = 60
_ATTACH_SECONDS = 30
_CLEAR_SECONDS = 60
_LAST_WAIT_SECONDS = 10  # for the same, where the work has failed already
_BATCH = 1_000  # rows removed by one statement: few enough to be locked for a moment only
_PASS = 500_000  # duplicates looked up at a time: what this process holds in memory

_UNIQUE_VIOLATION = "23505"
_FOREIGN_KEY_VIOLATION = "23503"


class DuplicateGrantsError(StorageError):
    """Duplicate grants stand, and could not be removed.

    Attributes:
        duplicates: Rows that stand beside an older one of the same user and interview.
    """

    def __init__(self, reason: str, duplicates: int) -> None:
        self.duplicates = duplicates
        super().__init__(reason, _UNIQUE_VIOLATION)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """How many grants are too many: rows beside the oldest of their user and interview.

    Attributes:
        pairs: The pairs of user and interview that they belong to.
    """

    rows: int
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} duplicate {'grant' if self.rows == 1 else 'grants'} of {self.pairs:,} "
            f"{'pair' if self.pairs == 1 else 'pairs'} of user and interview"
        )


def find_key(table: FoundTable) -> FoundUniqueKey | None:
    """The key on the pair that stands, in whichever order of the columns and of whoever's making.

    It serves where ON CONFLICT can rely on it: finished, for all rows, checked at once.
    """
    for key in table.unique_keys:
        if key.holds_for(*COLUMNS) and key.is_immediate:
            return key
    return None


def count_duplicates(connection: Connection, table: FoundTable) -> Duplicates:
    """Count the duplicate grants that are committed now."""
    row = connection.execute(
        text(f"""
            SELECT coalesce(sum(grants - 1), 0)::bigint AS rows, count(*) AS pairs
            FROM (SELECT count(*) AS grants FROM {table.qualified_name}
                  GROUP BY user_id, interview_id HAVING count(*) > 1) AS repeated
        """)  # noqa: S608 - the name is quoted by PostgreSQL itself
    ).one()
    return Duplicates(row.rows, row.pairs)


def add(connection: Connection, report: Callable[[str], None]) -> None:
    """Add the key, unless one stands; remove duplicate grants first, the lowest id of each stays.

    Raises:
        DuplicateGrantsError: Duplicates came in every round, or cannot be removed.
        StorageError: Others held a lock for too long; run it again.
    """
    table = _grants(connection)
    _drop_guard(connection, table)
    _drop_unfinished_key(connection)
    key = find_key(table)
    if key is not None and (key.is_constraint or key.name != KEY):
        report(f"adopted the unique key {key.name}")
        return
    try:
        if key is None:
            _build(connection, table, report)
        _attach(connection, table, report)
    except BaseException:
        # What stopped the work is what is told; the next run clears away what this cannot.
        with contextlib.suppress(SQLAlchemyError, StorageError):
            _drop_guard(connection, table)
            _drop_unfinished_key(connection, seconds=_LAST_WAIT_SECONDS)
        raise
    _drop_guard(connection, table)


def _grants(connection: Connection) -> FoundTable:
    table = find_table(connection, TABLE)
    if table is None:
        raise StorageError(f"table {TABLE} is not there, though revision 0001 creates it")
    return table


def _build(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Build the unique index, in as many rounds as there are."""
    for number in range(1, ROUNDS + 1):
        removed = _remove_duplicates(connection, table)
        if removed.rows:
            report(f"removed {removed} (the lowest id of each stays)")
        report(
            "building the unique key on (user_id, interview_id), reading and writing go on: "
            f"round {number} of {ROUNDS}"
        )
        if _built_index(connection, table):
            return
        _drop_unfinished_key(connection)
        if number == 1:
            _put_up_guard(connection, table)
    with transaction(connection):
        standing = count_duplicates(connection, table)
    raise DuplicateGrantsError(
        f"duplicate grants kept arriving in each of {ROUNDS} rounds, so {TABLE} has no unique key "
        f"on (user_id, interview_id), and no unfinished index either; {standing} stand now; stop "
        "what writes them, and run migrate again",
        standing.rows,
    )


def _built_index(connection: Connection, table: FoundTable) -> bool:
    """Build it once; False where a duplicate was in the way, which leaves an invalid index."""
    statement = (
        f"CREATE UNIQUE INDEX CONCURRENTLY {KEY} ON {table.qualified_name} (user_id, interview_id)"
    )
    try:
        run_concurrently(connection, statement, KEY)
    except DBAPIError as error:
        if sqlstate(error) == _UNIQUE_VIOLATION:
            return False
        raise
    return True


def _attach(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Make the index a constraint; where the table is never free for it, the index alone serves."""
    statement = f"ALTER TABLE {table.qualified_name} ADD CONSTRAINT {KEY} UNIQUE USING INDEX {KEY}"
    if executed_briefly(connection, statement, seconds=_ATTACH_SECONDS):
        report(f"added the unique key {KEY}")
    else:
        report(
            f"added the unique key {KEY}, as a unique index, which serves the same: {TABLE} was "
            f"in use for {_ATTACH_SECONDS} s without a gap to make it a constraint"
        )


def _remove_duplicates(connection: Connection, table: FoundTable) -> Duplicates:
    """Remove the duplicates that stand, except the lowest id of each pair.

    A row goes only while its elder is locked and still of the same pair: were the elder revoked
    at this very moment, the grant would be lost.
    """
    find = text(f"""
        SELECT extra.id, elder.id AS elder_id
        FROM (SELECT user_id, interview_id, min(id) AS id FROM {table.qualified_name}
              GROUP BY user_id, interview_id HAVING count(*) > 1) AS elder
        JOIN {table.qualified_name} AS extra USING (user_id, interview_id)
        WHERE extra.id > elder.id
        LIMIT {_PASS}
    """)  # noqa: S608 - the name is quoted by PostgreSQL itself
    delete = text(f"""
        WITH elder AS MATERIALIZED (
            SELECT id, user_id, interview_id FROM {table.qualified_name}
            WHERE id = ANY (:elder_ids) ORDER BY id FOR SHARE
        )
        DELETE FROM {table.qualified_name} AS extra
        USING elder, unnest(CAST(:ids AS bigint[]), CAST(:elder_ids AS bigint[])) AS found (id, elder_id)
        WHERE extra.id = found.id AND elder.id = found.elder_id
          AND extra.user_id = elder.user_id AND extra.interview_id = elder.interview_id
        RETURNING elder.id
    """)  # noqa: S608, E501 - the name is quoted by PostgreSQL itself
    rows = 0
    pairs: set[int] = set()
    while True:
        with transaction(connection):
            found = connection.execute(find).all()
        for start in range(0, len(found), _BATCH):
            batch = found[start : start + _BATCH]
            elders = _delete(
                connection, delete, [row.id for row in batch], [row.elder_id for row in batch]
            )
            rows += len(elders)
            pairs.update(elders)
        if len(found) < _PASS:
            return Duplicates(rows, len(pairs))


def _delete(
    connection: Connection, statement: TextClause, ids: list[int], elder_ids: list[int]
) -> list[int]:
    """Delete one batch; the ids of the elders of those that went."""
    elders: list[int] = []

    def delete() -> None:
        chosen = {"ids": ids, "elder_ids": elder_ids}
        with transaction(connection):
            deleted = connection.execute(statement, chosen).scalars().all()
        elders.extend(deleted)

    try:
        if got_briefly(delete, seconds=_DELETE_SECONDS):
            return elders
    except DBAPIError as error:
        if sqlstate(error) != _FOREIGN_KEY_VIOLATION:
            raise
        raise DuplicateGrantsError(
            f"duplicate grants cannot be removed while rows of other tables refer to them: "
            f"{error.orig}; point those rows to the lowest id of the same user and interview, and "
            "run migrate again",
            len(ids),
        ) from error
    raise StorageError(
        f"duplicate grants were kept locked for {_DELETE_SECONDS} s; look in pg_stat_activity for "
        "a transaction left open, and run migrate again"
    )


def _drop_unfinished_key(
    connection: Connection, *, seconds: int = OLD_TRANSACTIONS_SECONDS
) -> None:
    """Drop the index that an interrupted or failed build left; it waits for old transactions."""
    table = _grants(connection)
    if any(key.name == KEY and not key.is_valid for key in table.unique_keys):
        drop = f"DROP INDEX CONCURRENTLY IF EXISTS {table.quoted_schema}.{KEY}"
        run_concurrently(connection, drop, KEY, seconds=seconds)


def _put_up_guard(connection: Connection, table: FoundTable) -> None:
    """Have a trigger refuse duplicates, with the key's own error, until the key does.

    It is there to win the race against a busy writer, not to be safe: of two transactions that
    cannot see each other's rows it stops neither. It looks through an index on user_id; on a
    table without one it would hold every writer up, and stays away.
    """
    has_index = connection.execute(
        text("""
            SELECT EXISTS (
                SELECT FROM pg_index x
                JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = x.indkey[0]
                WHERE x.indrelid = :oid AND x.indisvalid AND x.indpred IS NULL
                  AND a.attname = 'user_id'
            )
        """),
        {"oid": table.oid},
    ).scalar_one()
    if not has_index:
        return
    # Run as the table's owner, since a writer may have no right to read.
    connection.execute(
        text(f"""
            CREATE OR REPLACE FUNCTION {table.quoted_schema}.{_GUARD}() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
            BEGIN
                PERFORM FROM {table.qualified_name}
                WHERE user_id = NEW.user_id AND interview_id = NEW.interview_id AND id <> NEW.id;
                IF FOUND THEN
                    RAISE unique_violation USING
                        MESSAGE = 'duplicate key value violates unique constraint "{KEY}"',
                        TABLE = '{TABLE}', CONSTRAINT = '{KEY}';
                END IF;
                RETURN NEW;
            END $$
        """)
    )
    trigger = (
        f"CREATE TRIGGER {_GUARD} BEFORE INSERT OR UPDATE OF user_id, interview_id "
        f"ON {table.qualified_name} FOR EACH ROW "
        f"EXECUTE FUNCTION {table.quoted_schema}.{_GUARD}()"
    )
    executed_briefly(connection, trigger, seconds=_GUARD_SECONDS)


def _drop_guard(connection: Connection, table: FoundTable) -> None:
    """Take the trigger away, where one stands.

    Raises:
        StorageError: The table was never free for it.
    """
    names = {"oid": table.oid, "name": _GUARD}
    stands = text("SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = :oid AND tgname = :name)")
    if connection.execute(stands, names).scalar_one():
        drop = f"DROP TRIGGER IF EXISTS {_GUARD} ON {table.qualified_name}"
        if not executed_briefly(connection, drop, seconds=_CLEAR_SECONDS):
            raise StorageError(
                f"{TABLE} was in use for {_CLEAR_SECONDS} s without a gap to drop the trigger "
                f"{_GUARD} in, which refuses duplicates as the key does; run migrate again"
            )
    connection.execute(text(f"DROP FUNCTION IF EXISTS {table.quoted_schema}.{_GUARD}()"))
