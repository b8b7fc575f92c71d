"""Brings a database to the schema that the worker needs, and says whether it has it.

Owns what a table must be like to fit. The platform's four tables are adopted where they stand, so
they are measured before anything is changed:

- every column of ours, by name, type and whether it may be null. A string column may be wider
  than ours or without a limit, never narrower, and must tell any two strings apart: ids are taken
  to the letter, so a collation that folds case does not fit;
- the primary key; the foreign key to interview_interview, whatever it does at a delete; the
  unique keys, in any order of their columns and under any name;
- in the tables that the worker adds rows to: no other column that must be given, no other unique
  key that a row could break, and no deferrable key on the pair (ON CONFLICT cannot stand it).

Other columns, indexes, constraints and names are the platform's own affair, and stay.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, NullPool, String, Table, event, text
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, PendingRollbackError
from sqlalchemy.schema import UniqueConstraint

from storage import models
from storage.connections import open_engine, parsed, place_of
from storage.driver_errors import is_refused
from storage.errors import StorageError
from storage.migrations import grant_key
from storage.migrations.catalog import ORDINARY_TABLE, FoundColumn, FoundTable, find_tables
from storage.migrations.grant_key import DuplicateGrantsError
from storage.migrations.locks import set_up_transaction, sqlstate
from storage.privileges import NEEDED, missing_privileges, missing_usage

__all__ = [
    "DatabaseUnavailableError",
    "Difference",
    "DuplicateGrantsError",
    "SchemaMismatchError",
    "check_schema",
    "current_revision",
    "expected_revision",
    "migrate",
]

Report = Callable[[str], None]
"""Called with one sentence for people about each thing that is done."""

_VERSION_TABLE = "grant_access_alembic_version"  # not Alembic's own name: the platform may use that
_REVISIONS = sorted(
    path.name.partition("_")[0] for path in Path(__file__).parent.glob("migrations/versions/0*.py")
)
"""By the names of their files: a worker that starts is not to wait for Alembic."""
_WRITTEN = frozenset(
    table.name for table in (models.grants, models.interview_attempts, models.jobs)
)
_POSTGRESQL = URL.create("postgresql+psycopg").get_dialect()()
_KINDS = {
    "v": "a view",
    "m": "a materialized view",
    "f": "a foreign table",
    "p": "a partitioned table",
}
_OLDEST_POSTGRESQL = (14,)  # the first with client_connection_check_interval
_ENCODING = "UTF8"
_TURN_SECONDS = 3600  # an index on a very large table takes its time
_TURN_PAUSE_SECONDS = 0.2
_TURN_KEY = 5_704_311_926_800_214_177  # of the advisory lock: any number that nobody else uses
_CHECK_REPLY_SECONDS = 30.0  # the statements of a check are short
_REFUSALS = ("28", "3D", "42")  # authentication; no such database; privileges and names
_UNREACHABLE = ("08", "53", "57P")
_RUN_MIGRATE = "run `interview-access migrate`"


class DatabaseUnavailableError(StorageError):
    """PostgreSQL cannot be reached, or failed in a way that a later attempt may not."""


class SchemaMismatchError(StorageError):
    """The database is not as the worker needs it, in a way that migrating does not mend.

    Attributes:
        differences: All of them; empty where the revision itself is unknown.
    """

    def __init__(self, reason: str, differences: Sequence[Difference] = ()) -> None:
        self.differences = tuple(differences)
        super().__init__("\n- ".join([reason, *map(str, self.differences)]))


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing of a table that does not fit.

    Attributes:
        column: The column, or the key's columns in brackets, or None for the table itself.
    """

    table: str
    column: str | None
    found: str
    expected: str

    def __str__(self) -> str:
        where = self.table
        if self.column is not None:
            where += self.column if self.column.startswith("(") else f".{self.column}"
        return f"{where}: found {self.found}, expected {self.expected}"


def migrate(database_url: str, *, dry_run: bool = False, report: Report) -> None:
    """Bring the database to the newest revision; where it has that already, change nothing.

    Reading and writing of the tables go on meanwhile: no lock that a writer waits behind is
    waited for longer than a moment. A run that was ended anywhere is taken up by the next. While
    another run is on, this one waits for its end. Through a pooler it leaves nothing behind; it
    uses two of its connections, and the role's timeouts apply to the build of an index.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        dry_run: Change nothing, and say what would be done.
        report: Called with what is, or would be, done.

    Raises:
        SchemaMismatchError: A table that stands does not fit; nothing was changed.
        DuplicateGrantsError: Duplicate grants stand that could not be removed.
        DatabaseUnavailableError: No connection, it was lost, or PostgreSQL failed.
        StorageError: PostgreSQL refused something else.
    """
    with (
        _engine(database_url) as engine,
        nullcontext() if dry_run else _turn(engine, report),
        _connected(engine, read_only=dry_run) as connection,
    ):
        if problem := _server_problem(connection):
            raise SchemaMismatchError(problem)
        revision = current_revision(connection)
        _refuse_what_does_not_fit(connection, revision)
        if revision == expected_revision():
            report(f"nothing to do: the schema is at revision {revision}")
        elif dry_run:
            _foretell(connection, report)
        else:
            _upgrade(connection, report)


def check_schema(database_url: str) -> str | None:
    """Verify the server, the schema's revision and the role's privileges.

    Returns:
        What is wrong and what to do about it, or None if nothing is.

    Raises:
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if PostgreSQL refused a query.
    """
    with (
        _engine(database_url, reply_seconds=_CHECK_REPLY_SECONDS) as engine,
        _connected(engine, read_only=True) as connection,
    ):
        if problem := _server_problem(connection) or missing_usage(connection, _VERSION_TABLE):
            return problem
        if problem := missing_privileges(connection, {_VERSION_TABLE: {"SELECT": ()}}):
            return problem
        found, expected = current_revision(connection), expected_revision()
        try:
            _refuse_what_does_not_fit(connection, found)
        except SchemaMismatchError as error:
            return str(error)
        if found is None:
            return f"the database does not have the worker's schema: {_RUN_MIGRATE}"
        if found != expected:
            return f"the database is at revision {found}, expected {expected}: {_RUN_MIGRATE}"
        return missing_privileges(connection, NEEDED)


def _server_problem(connection: Connection) -> str | None:
    """What is wrong with the server or the database whatever its tables are."""
    version = connection.dialect.server_version_info or ()
    if version < _OLDEST_POSTGRESQL:
        return f"got PostgreSQL {'.'.join(map(str, version))}, expected 14 or newer"
    encoding = connection.scalar(text("SHOW server_encoding"))
    if encoding != _ENCODING:
        return (
            f"got a database in the encoding {encoding}, expected {_ENCODING}: create one with "
            f"ENCODING '{_ENCODING}' and move the tables to it"
        )
    return None


def current_revision(connection: Connection) -> str | None:
    """The revision that the database is at; None before the first."""
    if connection.scalar(text("SELECT to_regclass(:table)"), {"table": _VERSION_TABLE}) is None:
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {_VERSION_TABLE}"))  # noqa: S608 - a constant
    return revision


def expected_revision() -> str:
    """The newest revision, the one that this code is written for."""
    if not _REVISIONS:
        raise RuntimeError("the package storage.migrations has come without its revisions")
    return _REVISIONS[-1]


def _upgrade(connection: Connection, report: Report) -> None:
    from alembic import command  # noqa: PLC0415 - see _REVISIONS
    from alembic.config import Config  # noqa: PLC0415 - likewise

    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    config.attributes.update(connection=connection, report=report, version_table=_VERSION_TABLE)
    connection.commit()  # Alembic makes transactions of its own
    try:
        command.upgrade(config, "head")
    except PendingRollbackError as stumble:
        raise _origin(stumble) from None


@contextmanager
def _engine(database_url: str, *, reply_seconds: float | None = None) -> Iterator[Engine]:
    """Open the database; what the driver says leaves it as one of our errors."""
    url = parsed(database_url)
    engine = open_engine(
        url,
        application_name="interview-access migrate",
        reply_seconds=reply_seconds,
        poolclass=NullPool,
    )
    event.listen(engine, "begin", set_up_transaction)
    try:
        yield engine
    except DBAPIError as error:
        reason, code = " ".join(str(error.orig).split()), sqlstate(error)
        place = place_of(url)
        if is_refused(url, error) or (code or "").startswith(_REFUSALS):
            raise StorageError(f"PostgreSQL at {place} refused: {reason}", code) from error
        if code is None or code.startswith(_UNREACHABLE):
            raise DatabaseUnavailableError(
                f"PostgreSQL at {place} cannot be reached: {reason}; see that it runs and that "
                "DATABASE_URL names it",
                code,
            ) from error
        raise DatabaseUnavailableError(f"PostgreSQL at {place} failed: {reason}", code) from error
    finally:
        engine.dispose()


@contextmanager
def _connected(engine: Engine, *, read_only: bool) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(postgresql_readonly=read_only)


def _origin(stumble: PendingRollbackError) -> BaseException:
    """What ended a connection, where clearing up then stumbled over its being gone."""
    origin: BaseException = stumble
    while isinstance(origin, PendingRollbackError) and origin.__context__ is not None:
        origin = origin.__context__
    return origin


@contextmanager
def _turn(engine: Engine, report: Report) -> Iterator[None]:
    """Have this run alone, by a lock that a second connection's open transaction holds.

    That transaction has no snapshot, so that no concurrent build waits for it. Asked for again and
    again: a statement that waited for the lock would hold an old snapshot, and the two would wait
    for each other.
    """
    deadline = time.monotonic() + _TURN_SECONDS
    has_waited = False
    with engine.connect() as connection:
        while not connection.scalar(
            text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _TURN_KEY}
        ):
            connection.rollback()
            if not has_waited:
                report("waiting: another migrate is running on this database")
                has_waited = True
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"another migrate has been running for {_TURN_SECONDS} s; look for the "
                    "application 'interview-access migrate' in pg_stat_activity"
                )
            time.sleep(_TURN_PAUSE_SECONDS)
        # Without parameters, for an executed portal keeps its snapshot until the next statement.
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield


def _foretell(connection: Connection, report: Report) -> None:
    """Say what an upgrade would do."""
    tables = find_tables(connection, models.METADATA.tables)
    for name in models.METADATA.tables:
        report(f"would adopt table {name}" if name in tables else f"would create table {name}")
    grants = tables.get(grant_key.TABLE)
    key = grants and grant_key.find_key(grants)
    if key:
        report(f"would adopt the unique key {key.name}")
        return
    if grants:
        duplicates = grant_key.count_duplicates(connection, grants)
        report(f"would remove {duplicates} (the lowest id of each would stay)")
    report(f"would add the unique key {grant_key.KEY}")


def _refuse_what_does_not_fit(connection: Connection, revision: str | None) -> None:
    """Compare what stands with the models; from the newest revision on, everything must stand."""
    if revision is not None and revision not in _REVISIONS:
        raise SchemaMismatchError(
            f"the database is at revision {revision}, which this release does not know (its "
            f"newest is {expected_revision()}): use the release that made it, or a newer one"
        )
    is_complete = revision == expected_revision()
    differences: list[Difference] = []
    tables = find_tables(connection, models.METADATA.tables)
    for expected in models.METADATA.sorted_tables:
        if expected.name in tables:
            differences += _differences(tables, expected, is_complete=is_complete)
        elif is_complete:
            differences.append(Difference(expected.name, None, "nothing", "a table"))
    if differences:
        count = len(differences)
        raise SchemaMismatchError(
            f"the database's tables do not fit the worker, in {count} "
            f"{'point' if count == 1 else 'points'}; nothing was changed; put them right by hand:",
            differences,
        )


def _differences(
    tables: Mapping[str, FoundTable], expected: Table, *, is_complete: bool
) -> Iterator[Difference]:
    """Everything in which a standing table does not fit."""
    found = tables[expected.name]
    if found.kind != ORDINARY_TABLE:
        kind = _KINDS.get(found.kind, "something else")
        yield Difference(found.name, None, kind, "an ordinary table")
        return
    for column in expected.columns:
        yield from _column_differences(found, column)
    yield from _key_differences(found, expected, is_complete=is_complete)
    yield from _reference_differences(tables, expected)
    if found.name in _WRITTEN:
        yield from _obstacles(found, expected)


def _column_differences(found: FoundTable, expected: Column[Any]) -> Iterator[Difference]:
    column = found.columns.get(expected.name)
    if column is None:
        yield Difference(found.name, expected.name, "no such column", _type_in_words(expected))
        return
    if not _type_fits(column, expected):
        yield Difference(found.name, column.name, column.type, _type_in_words(expected))
    if column.not_null == expected.nullable:
        nullability = {True: "not null", False: "null allowed"}
        yield Difference(
            found.name,
            column.name,
            nullability[column.not_null],
            nullability[not expected.nullable],
        )
    if not column.is_to_the_letter:
        yield Difference(
            found.name,
            column.name,
            "a collation that takes different strings for equal",
            "a deterministic collation",
        )
    if expected.identity is not None and not column.is_filled:
        yield Difference(found.name, column.name, "no default", "an identity or a sequence")


def _type_fits(column: FoundColumn, expected: Column[Any]) -> bool:
    """Whether the column holds every value of ours as it is."""
    if column.type == _sql_type(expected):
        return True
    if not isinstance(expected.type, String):
        return False
    if column.type in {"text", "character varying"}:
        return True
    bounded = re.fullmatch(r"character varying\((\d+)\)", column.type)
    length = expected.type.length
    return bounded is not None and length is not None and int(bounded[1]) >= length


def _sql_type(column: Column[Any]) -> str:
    """The column's type as PostgreSQL writes it."""
    if isinstance(column.type, String):
        length = column.type.length
        return "text" if length is None else f"character varying({length})"
    return column.type.compile(dialect=_POSTGRESQL).lower()


def _type_in_words(column: Column[Any]) -> str:
    name = _sql_type(column)
    return f"{name} or a wider string" if isinstance(column.type, String) else name


def _key_differences(
    found: FoundTable, expected: Table, *, is_complete: bool
) -> Iterator[Difference]:
    primary = [column.name for column in expected.primary_key]
    if not any(key.is_primary and key.holds_for(*primary) for key in found.unique_keys):
        yield Difference(found.name, _in_brackets(primary), "no primary key", "the primary key")
    for columns in _unique_columns(expected):
        is_ours = found.name == grant_key.TABLE and columns == frozenset(grant_key.COLUMNS)
        if is_ours and not is_complete:
            continue  # it is what the migration adds
        if not any(key.holds_for(*columns) for key in found.unique_keys):
            yield Difference(found.name, _in_brackets(columns), "no unique key", "a unique key")


def _unique_columns(table: Table) -> list[frozenset[str]]:
    return [
        frozenset(column.name for column in constraint.columns)
        for constraint in table.constraints
        if isinstance(constraint, UniqueConstraint)
    ]


def _reference_differences(
    tables: Mapping[str, FoundTable], expected: Table
) -> Iterator[Difference]:
    found = tables[expected.name]
    for constraint in expected.foreign_key_constraints:
        target = tables.get(constraint.referred_table.name)
        columns = frozenset(constraint.column_keys)
        target_columns = frozenset(element.column.name for element in constraint.elements)
        references = [key for key in found.foreign_keys if key.columns == columns]
        if any(
            target is not None
            and key.target_oid == target.oid
            and key.target_columns == target_columns
            and key.is_enforced
            for key in references
        ):
            continue
        seen = [
            f"a foreign key to {key.target}{_in_brackets(key.target_columns)}"
            + ("" if key.is_enforced else " that is not enforced")
            for key in references
        ]
        wanted = f"{constraint.referred_table.name}{_in_brackets(target_columns)}"
        yield Difference(
            found.name,
            _in_brackets(columns),
            " and ".join(seen) or "no foreign key",
            f"a foreign key to {wanted}",
        )


def _obstacles(found: FoundTable, expected: Table) -> Iterator[Difference]:
    """What would refuse a row of ours."""
    ours = {column.name for column in expected.columns}
    for column in found.columns.values():
        if column.name not in ours and column.not_null and not column.is_filled:
            yield Difference(
                found.name,
                column.name,
                f"{column.type} not null without a default",
                "a default, or null allowed: the worker does not give this column",
            )
    primary = {column.name for column in expected.primary_key}
    allowed = _unique_columns(expected)
    for key in found.unique_keys:
        pair = found.name == grant_key.TABLE and key.holds_for(*grant_key.COLUMNS)
        if pair and not key.is_immediate:
            yield Difference(
                found.name,
                _in_brackets(key.columns),
                f"the deferrable unique key {key.name}",
                "one that is checked at once: INSERT … ON CONFLICT cannot stand a deferrable one",
            )
        elif (
            not key.is_partial
            and key.columns <= ours
            and not key.columns & primary
            and key.columns not in allowed
        ):
            yield Difference(
                found.name,
                _in_brackets(key.columns),
                f"the unique key {key.name}",
                "none: two rows of the worker may agree in it",
            )


def _in_brackets(columns: Iterable[str]) -> str:
    return f"({', '.join(sorted(columns, reverse=True))})"  # (user_id, interview_id)
