"""Migrates a database, one process at a time, and checks it at a worker's start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress

from sqlalchemy import Connection, Engine, NullPool, event, text
from sqlalchemy.exc import DBAPIError

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
    TO_READ_VERSION,
    Needed,
    missing_for_migration,
    missing_privileges,
    missing_usage,
    missing_usage_of_path,
)
from storage.schema.revisions import (
    KNOWN_REVISIONS,
    VERSION_TABLE,
    current_revision,
    expected_revision,
    oldest_compatible_revision,
)
from storage.schema.upgrade import Report, exclusive_run, run_revisions

_OLDEST_POSTGRESQL = (14,)  # the first with client_connection_check_interval
_ENCODING = "UTF8"
_CHECK_REPLY_SECONDS = 30.0  # the statements of a check are short
_REFUSALS = ("28", "3D", "42")  # classes: authentication; no such database; privileges and names
_DENIALS = "42"  # class: privileges, and names of tables that the role cannot see
_UNREACHABLE = ("08", "53", "57P")
_READ_REVISION = {VERSION_TABLE: {"SELECT": ()}}
_RUN_MIGRATE = "run `interview-access migrate`"


class DatabaseUnavailableError(StorageError):
    """PostgreSQL cannot be reached, or failed in a way that a later attempt may not."""


def migrate(database_url: str, *, dry_run: bool = False, report: Report) -> None:
    """Bring the database to the newest revision. If it has that or a later one, change nothing.

    The tables stay in use: no lock that blocks writers is waited for longer than 0.1 s. The next
    run continues an interrupted one. A run waits for the end of another. Through a pooler it
    leaves no setting behind, uses two of the pooler's connections, and builds indexes under the
    role's timeouts.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        dry_run: Report what would be done, and change nothing.
        report: Called with a sentence about each step.

    Raises:
        SchemaMismatchError: if an existing table does not fit, or the schema is that of a later
            release and not compatible with this one; nothing was changed.
        DuplicateGrantsError: if duplicate grants could not be removed.
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if the role lacks a privilege, PostgreSQL refused a statement, or another run
            did not end.
    """
    with (
        _engine(database_url) as engine,
        nullcontext() if dry_run else exclusive_run(engine, report),
        _connected(engine, read_only=dry_run) as connection,
    ):
        if problem := _server_problem(connection) or _search_path_problem(connection):
            raise SchemaMismatchError(problem)
        if problem := missing_privileges(connection, _READ_REVISION):
            raise StorageError(problem)
        for warning in changed_collations(connection):
            report(f"warning: {warning}")
        revision = current_revision(connection)
        if problem := _compatibility_problem(connection, revision):
            raise SchemaMismatchError(problem)
        refuse_differences(connection, revision)
        if revision is not None and revision >= expected_revision():
            report(f"nothing to do: {_version_in_words(connection, revision)}")
        elif problem := missing_for_migration(connection):
            raise StorageError(problem)
        else:
            run_revisions(connection, revision, dry_run=dry_run, report=report)
        for sentence in grant_key.find_redundant_keys(connection):
            report(sentence)


def check_schema(
    database_url: str,
    *,
    prunes: bool = False,
    warn: Report = lambda _: None,
    inform: Report = lambda _: None,
) -> str | None:
    """Verify the server, the schema's revision and the role's privileges.

    A schema of a later release is accepted if it is compatible with this release.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``, of the worker's role.
        prunes: Whether the role prunes.
        warn: Called with a sentence about each risk that does not prevent a start.
        inform: Called with a sentence if the schema is that of a later release.

    Returns:
        What is wrong and what to do about it, or None if nothing is.

    Raises:
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if PostgreSQL refused a query.
    """
    with _read_only(database_url) as connection:
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
        if problem := _compatibility_problem(connection, found):
            return problem
        try:
            refuse_differences(connection, found)
        except SchemaMismatchError as error:
            return str(error)
        if found is None:
            return f"the database does not have the worker's schema: {_RUN_MIGRATE}"
        if found < expected:
            return f"the database is at revision {found}, expected {expected}: {_RUN_MIGRATE}"
        missing = missing_privileges(connection, NEEDED, TO_READ_VERSION)
        if missing is None and prunes:
            missing = missing_privileges(connection, TO_PRUNE)
        if missing is None and found > expected:
            inform(_version_in_words(connection, found))
        return missing


def read_identity(database_url: str) -> tuple[str, str]:
    """Read the identity and the name of a database; see :func:`database_identity`.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.

    Raises:
        DatabaseUnavailableError: if PostgreSQL cannot be reached, or failed.
        StorageError: if PostgreSQL refused a query.
    """
    with _read_only(database_url) as connection:
        return database_identity(connection)


def explain_denial(error: StorageError, database_url: str, *needed: Needed) -> str | None:
    """Name the missing privileges that made a statement fail.

    Args:
        error: The statement's error.
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        *needed: What the statement needs.

    Returns:
        The missing privileges and the GRANT statements to run. None if the error has another cause,
        or the privileges cannot be read now.
    """
    if not (error.sqlstate or "").startswith(_DENIALS):
        return None
    with (
        suppress(StorageError),
        _read_only(database_url) as connection,
    ):
        return missing_usage(connection, next(iter(needed[0]))) or missing_privileges(
            connection, *needed
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


def _compatibility_problem(connection: Connection, revision: str | None) -> str | None:
    """Return why this release cannot use the revision of a later release."""
    if revision is None or revision in KNOWN_REVISIONS:
        return None
    if problem := missing_privileges(connection, TO_READ_VERSION):
        return problem
    oldest = oldest_compatible_revision(connection) or revision
    if oldest <= expected_revision():
        return None
    return (
        f"the database is at revision {revision}, which this release does not know (its newest is "
        f"{expected_revision()}) and cannot use: expected a release with revision {oldest} or a "
        "newer one; install the release that created it"
    )


def _version_in_words(connection: Connection, revision: str) -> str:
    expected = expected_revision()
    if revision == expected:
        return f"the schema is at revision {revision}"
    return (
        f"the schema is at revision {revision}, newer than {expected} of this release and "
        f"compatible with revisions from {oldest_compatible_revision(connection)} on"
    )


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
def _read_only(database_url: str) -> Iterator[Connection]:
    """Connect for a check, whose statements are short."""
    with (
        _engine(database_url, reply_seconds=_CHECK_REPLY_SECONDS) as engine,
        _connected(engine, read_only=True) as connection,
    ):
        yield connection


@contextmanager
def _connected(engine: Engine, *, read_only: bool) -> Iterator[Connection]:
    with engine.connect() as connection:
        yield connection.execution_options(postgresql_readonly=read_only)
