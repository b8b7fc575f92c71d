"""The unique key on (user_id, interview_id), added to a table while it is written to.

The index is built concurrently, which blocks nobody, but fails on duplicates that exist or arrive
meanwhile, and then leaves an invalid index. So it is dropped, the duplicates are removed, and it is
built again, for up to five rounds. From the second round on a trigger rejects new duplicates, as
the key will: without it a frequent writer of duplicates would fail every round.

Every function needs a connection in AUTOCOMMIT. A run begins by removing what an interrupted one
left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from storage import sqlstate
from storage.driver_errors import sqlstate_of
from storage.errors import StorageError
from storage.migrations.catalog import FoundTable, FoundUniqueKey, find_table
from storage.migrations.duplicate_grants import (
    DuplicateGrantsError,
    count_duplicates,
    remove_duplicates,
)
from storage.migrations.locks import (
    OLD_TRANSACTIONS_SECONDS,
    retry_statement,
    run_concurrently,
    transaction,
)

TABLE = "interview_userinterviewaccess"
COLUMNS = ("user_id", "interview_id")
KEY = "interview_userinterviewaccess_user_id_interview_id_key"
ROUNDS = 5

_TRIGGER = "interview_access_refuse_duplicate"  # name of the trigger and of its function
_TRIGGER_SECONDS = 5
_ATTACH_SECONDS = 30
_CLEAN_UP_SECONDS = 60
_CLEAN_UP_AFTER_ERROR_SECONDS = 10


def find_keys(table: FoundTable) -> list[FoundUniqueKey]:
    """Return the existing keys on the pair that ON CONFLICT can use.

    Their names and the order of their columns do not matter. The worker's own key is the last one,
    since the migrations of the service refer to another key by its name.

    Args:
        table: The table of grants.
    """
    keys = [key for key in table.unique_keys if key.is_unique_on(*COLUMNS) and key.is_immediate]
    return sorted(keys, key=lambda key: (key.name == KEY, not key.is_constraint, key.name))


def find_redundant_keys(connection: Connection) -> Iterator[str]:
    """Yield a sentence about each key that equals another, with the statement that drops it.

    Args:
        connection: A connection to the database; the table need not exist.

    Raises:
        sqlalchemy.exc.DBAPIError: if PostgreSQL refused the query or the connection is lost.
    """
    table = find_table(connection, TABLE)
    if table is None:
        return
    keys = find_keys(table)
    for key in keys[1:]:
        name = connection.dialect.identifier_preparer.quote(key.name)
        drop = (
            f"ALTER TABLE {table.qualified_name} DROP CONSTRAINT {name}"
            if key.is_constraint
            else f"DROP INDEX CONCURRENTLY {table.quoted_schema}.{name}"
        )
        yield (
            f"the unique key {key.name} is redundant: {keys[0].name} is equal, and every insert "
            f"maintains both; unless a migration of the service names it, run {drop}"
        )


def has_adopted_key(table: FoundTable) -> bool:
    """Return whether :func:`add` changes nothing, since the table has the key.

    Args:
        table: The table of grants.
    """
    return any(map(_is_adopted, find_keys(table)[:1]))


def add(connection: Connection, report: Callable[[str], None]) -> None:
    """Add the key unless one exists, after removing duplicate grants but the lowest ID of each.

    Args:
        connection: A connection in AUTOCOMMIT.
        report: Called with a sentence about each step.

    Raises:
        DuplicateGrantsError: if duplicates arrived in every round, or cannot be removed.
        StorageError: if a lock was not free in time.
    """
    table = _grants(connection)
    _drop_trigger(connection, table)
    _drop_unfinished_key(connection)
    key = next(iter(find_keys(table)), None)
    if key is not None and _is_adopted(key):
        report(f"adopted the unique key {key.name}")
        return
    try:
        if key is None:
            _build(connection, table, report)
        _attach(connection, table, report)
    except BaseException:
        # The original error is reported. The next run removes what this clean-up cannot.
        with contextlib.suppress(SQLAlchemyError, StorageError):
            _drop_trigger(connection, table)
            _drop_unfinished_key(connection, seconds=_CLEAN_UP_AFTER_ERROR_SECONDS)
        raise
    _drop_trigger(connection, table)


def plan(connection: Connection) -> Iterator[str]:
    """Yield what :func:`add` would do.

    Args:
        connection: A connection to the database; the table need not exist.
    """
    table = find_table(connection, TABLE)
    key = next(iter(find_keys(table)), None) if table else None
    if key is not None and _is_adopted(key):
        yield f"would adopt the unique key {key.name}"
        return
    if table and key is None:
        duplicates = count_duplicates(connection, table)
        yield f"would remove {duplicates} (the lowest ID of each would stay)"
    yield f"would add the unique key {KEY}"


def _is_adopted(key: FoundUniqueKey) -> bool:
    """Return whether the key stays as it is: the worker's own index becomes a constraint."""
    return key.is_constraint or key.name != KEY


def _grants(connection: Connection) -> FoundTable:
    table = find_table(connection, TABLE)
    if table is None:
        raise StorageError(f"table {TABLE} does not exist, though revision 0001 creates it")
    return table


def _build(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Build the unique index, in up to :data:`ROUNDS` rounds."""
    for number in range(1, ROUNDS + 1):
        removed = remove_duplicates(connection, table)
        if removed.rows:
            report(f"removed {removed} (the lowest ID of each stays)")
        report(
            "building the unique key on (user_id, interview_id) without blocking reads or writes: "
            f"round {number} of {ROUNDS}"
        )
        if _built_index(connection, table):
            return
        _drop_unfinished_key(connection)
        if number == 1:
            _create_trigger(connection, table)
    with transaction(connection):
        left = count_duplicates(connection, table)
    raise DuplicateGrantsError(
        f"duplicate grants kept arriving in each of {ROUNDS} rounds, so {TABLE} has no unique key "
        f"on (user_id, interview_id) and no unfinished index; there are {left} now; stop "
        "what writes them, and run migrate again",
        left.rows,
    )


def _built_index(connection: Connection, table: FoundTable) -> bool:
    """Build the index. Returns False if a duplicate made it invalid."""
    statement = (
        f"CREATE UNIQUE INDEX CONCURRENTLY {KEY} ON {table.qualified_name} (user_id, interview_id)"
    )
    try:
        run_concurrently(connection, statement, KEY)
    except DBAPIError as error:
        if sqlstate_of(error) == sqlstate.UNIQUE_VIOLATION:
            return False
        raise
    return True


def _attach(connection: Connection, table: FoundTable, report: Callable[[str], None]) -> None:
    """Make the index a constraint. If the table stays locked, the index alone has the effect."""
    statement = f"ALTER TABLE {table.qualified_name} ADD CONSTRAINT {KEY} UNIQUE USING INDEX {KEY}"
    if retry_statement(connection, statement, seconds=_ATTACH_SECONDS):
        report(f"added the unique key {KEY}")
    else:
        report(
            f"added the unique key {KEY} as a unique index, which has the same effect: {TABLE} was "
            f"locked for {_ATTACH_SECONDS} s, so it could not become a constraint"
        )


def _drop_unfinished_key(
    connection: Connection, *, seconds: int = OLD_TRANSACTIONS_SECONDS
) -> None:
    """Drop the index that a failed build left, after waiting for old transactions."""
    table = _grants(connection)
    if any(key.name == KEY and not key.is_valid for key in table.unique_keys):
        drop = f"DROP INDEX CONCURRENTLY IF EXISTS {table.quoted_schema}.{KEY}"
        run_concurrently(connection, drop, KEY, seconds=seconds)


def _create_trigger(connection: Connection, table: FoundTable) -> None:
    """Create a trigger that rejects duplicates with the key's own error, until the key exists.

    It only reduces the number of duplicates: it rejects neither of two transactions that cannot see
    each other's rows. It is not created on a table without an index on user_id, where it would
    slow every writer down.
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
    # Runs as the table's owner, since a writer may lack the SELECT privilege.
    connection.execute(
        text(f"""
            CREATE OR REPLACE FUNCTION {table.quoted_schema}.{_TRIGGER}() RETURNS trigger
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
        f"CREATE TRIGGER {_TRIGGER} BEFORE INSERT OR UPDATE OF user_id, interview_id "
        f"ON {table.qualified_name} FOR EACH ROW "
        f"EXECUTE FUNCTION {table.quoted_schema}.{_TRIGGER}()"
    )
    retry_statement(connection, trigger, seconds=_TRIGGER_SECONDS)


def _drop_trigger(connection: Connection, table: FoundTable) -> None:
    """Drop the trigger and its function if they exist.

    Raises:
        StorageError: if the table was not free in time.
    """
    names = {"oid": table.oid, "name": _TRIGGER}
    exists = text("SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = :oid AND tgname = :name)")
    if connection.execute(exists, names).scalar_one():
        drop = f"DROP TRIGGER IF EXISTS {_TRIGGER} ON {table.qualified_name}"
        if not retry_statement(connection, drop, seconds=_CLEAN_UP_SECONDS):
            raise StorageError(
                f"{TABLE} was locked for {_CLEAN_UP_SECONDS} s, so the trigger {_TRIGGER} could "
                "not be dropped; it rejects duplicates as the key does; run migrate again"
            )
    connection.execute(text(f"DROP FUNCTION IF EXISTS {table.quoted_schema}.{_TRIGGER}()"))
