"""Migrates a database, one process at a time, and checks it at a worker's start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING

from sqlalchemy import Connection, Engine, NullPool, event, text
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from storage.connections import open_engine, parse_url, without_secrets
from storage.driver_errors import is_refused, is_tls_failure, sqlstate_of
from storage.errors import StorageError
from storage.migrations import grant_key
from storage.migrations.locks import set_up_transaction
from storage.schema.collations import changed_collations
from storage.schema.comparison import SchemaMismatchError, refuse_differences
from storage.schema.identity import database_identity
from storage.schema.privileges import (
    NEEDED,
    TO_PRUNE,
    Needed,
    missing_for_migration,
    missing_privileges,
    missing_usage,
    missing_usage_of_path,
)
from storage.schema.revisions import VERSION_TABLE, current_revision, expected_revision

if TYPE_CHECKING:
    from alembic.config import Config

Report = Callable[[str], None]
"""Called with a sentence about each step."""

_OLDEST_POSTGRESQL = (14,)  # the first with client_connection_check_interval
_ENCODING = "UTF8"
_RUN_SECONDS = 3600  # building an index on a very large table takes long
_RUN_POLL_SECONDS = 0.2
_MIGRATION_LOCK = 5_704_311_926_800_214_177  # key of the advisory lock: an arbitrary number
_CHECK_REPLY_SECONDS = 30.0  # the statements of a check are short
_REFUSALS = ("28", "3D", "42")  # classes: authentication; no such database; privileges and names
_DENIALS = "42"  # class: privileges, and names of tables that the role cannot see
_UNREACHABLE = ("08", "53", "57P")
_READ_REVISION = {VERSION_TABLE: {"SELECT": ()}}
_RUN_MIGRATE = "run `interview-access migrate`"


class DatabaseUnavailableError(StorageError):
    """PostgreSQL cannot be reached, or failed in a way that a later attempt may not."""


def migrate(database_url: str, *, dry_run: bool = False, report: Report) -> None:
    """Bring the database to the newest revision. If it has that already, change nothing.

    The tables stay in use: no lock that blocks writers is waited for longer than 0.1 s. The next
    run continues an interrupted one. A run waits for the end of another. Through a pooler it
    leaves no setting behind, uses two of the pooler's connections, and builds indexes under the
    role's timeouts.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        dry_run: Report what would be done, and change nothing.
        report: Called with a sentence about each step.

    Raises:
        SchemaMismatchError: if an existing table does not fit; nothing was changed.
        DuplicateGrantsError: if duplicate grants could not be removed.
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if the role lacks a privilege, PostgreSQL refused a statement, or another run
            did not end.
    """
    with (
        _engine(database_url) as engine,
        nullcontext() if dry_run else _exclusive_run(engine, report),
        _connected(engine, read_only=dry_run) as connection,
    ):
        if problem := _server_problem(connection) or _search_path_problem(connection):
            raise SchemaMismatchError(problem)
        if problem := missing_privileges(connection, _READ_REVISION):
            raise StorageError(problem)
        for warning in changed_collations(connection):
            report(f"warning: {warning}")
        revision = current_revision(connection)
        refuse_differences(connection, revision)
        if revision == expected_revision():
            report(f"nothing to do: the schema is at revision {revision}")
        elif problem := missing_for_migration(connection):
            raise StorageError(problem)
        elif dry_run:
            _report_plan(connection, revision, report)
        else:
            _upgrade(connection, report)
        for sentence in grant_key.find_redundant_keys(connection):
            report(sentence)


def check_schema(
    database_url: str, *, prunes: bool = False, warn: Report = lambda _: None
) -> str | None:
    """Verify the server, the schema's revision and the role's privileges.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``, of the worker's role.
        prunes: Whether the role prunes.
        warn: Called with a sentence about each risk that does not prevent a start.

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
        if problem := (
            _server_problem(connection)
            or missing_usage(connection, VERSION_TABLE)
            or _search_path_problem(connection)
            or missing_privileges(connection, _READ_REVISION)
        ):
            return problem
        for warning in changed_collations(connection):
            warn(warning)
        found, expected = current_revision(connection), expected_revision()
        try:
            refuse_differences(connection, found)
        except SchemaMismatchError as error:
            return str(error)
        if found is None:
            return f"the database does not have the worker's schema: {_RUN_MIGRATE}"
        if found != expected:
            return f"the database is at revision {found}, expected {expected}: {_RUN_MIGRATE}"
        missing = missing_privileges(connection, NEEDED)
        if missing is None and prunes:
            missing = missing_privileges(connection, TO_PRUNE)
        return missing


def read_identity(database_url: str) -> tuple[str, str]:
    """Read the identity and the name of a database; see :func:`database_identity`.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.

    Raises:
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if PostgreSQL refused a query.
    """
    with (
        _engine(database_url, reply_seconds=_CHECK_REPLY_SECONDS) as engine,
        _connected(engine, read_only=True) as connection,
    ):
        return database_identity(connection)


def explain_denial(error: StorageError, database_url: str, needed: Needed) -> str | None:
    """Name the missing privileges that made a statement fail.

    Args:
        error: The statement's error.
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        needed: What the statement needs.

    Returns:
        The missing privileges and the GRANT statements to run. None if the error has another cause,
        or the privileges cannot be read now.
    """
    if not (error.sqlstate or "").startswith(_DENIALS):
        return None
    with (
        suppress(StorageError),
        _engine(database_url, reply_seconds=_CHECK_REPLY_SECONDS) as engine,
        _connected(engine, read_only=True) as connection,
    ):
        return missing_usage(connection, next(iter(needed))) or missing_privileges(
            connection, needed
        )
    return None


def _server_problem(connection: Connection) -> str | None:
    """Return what is wrong with the server or the database, apart from its tables."""
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


def _search_path_problem(connection: Connection) -> str | None:
    """Return what is wrong if no schema of the search path exists."""
    schema, path = connection.execute(
        text("SELECT current_schema(), current_setting('search_path')")
    ).one()
    if schema is None:
        return missing_usage_of_path(connection) or (
            f"got the search_path {path}, expected one with a schema that exists and that the role "
            "may use: create the schema, or correct the role's search_path or DATABASE_URL"
        )
    return None


def _upgrade(connection: Connection, report: Report) -> None:
    from alembic import command  # noqa: PLC0415 - a worker that checks the schema needs no Alembic

    config = _alembic_config()
    config.attributes.update(connection=connection, report=report, version_table=VERSION_TABLE)
    connection.commit()  # Alembic begins its own transactions
    try:
        command.upgrade(config, "head")
    except PendingRollbackError as error:
        raise _original(error) from None


def _alembic_config() -> Config:
    from alembic.config import Config  # noqa: PLC0415 - as in _upgrade

    config = Config()
    config.set_main_option("script_location", "storage:migrations")
    return config


def _original(error: PendingRollbackError) -> BaseException:
    """Return the error that ended a connection, if clean-up on the connection then failed."""
    original: BaseException = error
    while isinstance(original, PendingRollbackError) and original.__context__ is not None:
        original = original.__context__
    return original


@contextmanager
def _engine(database_url: str, *, reply_seconds: float | None = None) -> Iterator[Engine]:
    """Open the database. Errors of the driver leave the block as storage errors."""
    url = parse_url(database_url)
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
        reason, code = " ".join(str(error.orig).split()), sqlstate_of(error)
        place = without_secrets(url)
        if is_tls_failure(error):
            raise StorageError(
                f"TLS to PostgreSQL at {place} failed: {reason}; check the options ssl… and the "
                "host of DATABASE_URL, and the server's certificate"
            ) from error
        if is_refused(url, error) or (code or "").startswith(_REFUSALS):
            remedy = ""
            if "CONNECT privilege" in reason:  # libpq reports no SQLSTATE
                quote = engine.dialect.identifier_preparer.quote_identifier
                database, role = quote(url.database or ""), quote(url.username or "")
                remedy = f": run GRANT CONNECT ON DATABASE {database} TO {role}"
            raise StorageError(f"PostgreSQL at {place} refused: {reason}{remedy}", code) from error
        if code is None or code.startswith(_UNREACHABLE):
            raise DatabaseUnavailableError(
                f"PostgreSQL at {place} cannot be reached: {reason}; check that it is running and "
                "that DATABASE_URL names it",
                code,
            ) from error
        raise DatabaseUnavailableError(f"PostgreSQL at {place} failed: {reason}", code) from error
    finally:
        engine.dispose()


@contextmanager
def _connected(engine: Engine, *, read_only: bool) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(postgresql_readonly=read_only)


@contextmanager
def _exclusive_run(engine: Engine, report: Report) -> Iterator[None]:
    """Exclude other runs by an advisory lock, in the open transaction of a second connection.

    The lock is polled: a statement that blocked on it would hold an old snapshot, for which a
    concurrent index build waits, and the two runs would wait for each other. For the same reason
    the transaction holds no snapshot while it is open.
    """
    deadline = time.monotonic() + _RUN_SECONDS
    has_waited = False
    with engine.connect() as connection:
        while not connection.scalar(
            text("SELECT pg_try_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK}
        ):
            connection.rollback()
            if not has_waited:
                report("waiting: another migrate is running on this database")
                has_waited = True
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"another migrate has been running for {_RUN_SECONDS} s; find the "
                    "application 'interview-access migrate' in pg_stat_activity"
                )
            time.sleep(_RUN_POLL_SECONDS)
        # Without parameters: an executed portal keeps its snapshot until the next statement.
        connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield


def _report_plan(connection: Connection, revision: str | None, report: Report) -> None:
    """Report what the revisions after this one would do."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - as in _upgrade

    scripts = ScriptDirectory.from_config(_alembic_config())
    for script in reversed([*scripts.iterate_revisions("head", revision or "base")]):
        for step in script.module.plan(connection):
            report(step)
