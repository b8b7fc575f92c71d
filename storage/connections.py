"""Engines of the worker and of migrations, with the options that every connection needs.

Whatever the URL, the server, the database and the role have set, every connection has UTF-8 as its
encoding, READ COMMITTED and READ WRITE transactions, and a limit on how long a lost server goes
unnoticed:

- a host that disappears: TCP keepalives and ``tcp_user_timeout``, 10 s;
- a connection lost between two running hosts (a firewall that forgets it, a failover behind one
  address, a proxy that drops data): :class:`~storage.server_connection.ServerConnection`;
- a host that accepts no connection: ``connect_timeout``, 5 s for each host of the URL.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy
from psycopg import pq
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import ArgumentError

from storage.database_url import parse_database_url
from storage.errors import StorageError
from storage.server_connection import (
    CHECK_SECONDS,
    DEFAULT_OPTIONS,
    FIXED_OPTIONS,
    ServerConnection,
)

_SECRET_OPTIONS = [
    option.keyword.decode() for option in pq.Conninfo.get_defaults() if option.dispchar == b"*"
]
"""libpq's secret options, which SQLAlchemy would show in an engine's representation."""


def parse_url(database_url: str) -> URL:
    """Parse the database URL.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.

    Raises:
        StorageError: if it is not a PostgreSQL URL. The message omits the password.
    """
    try:
        return make_url(parse_database_url(database_url))
    except ValueError as error:
        raise StorageError(f"the database URL is invalid; expected {error}") from None


def without_secrets(url: URL) -> str:
    """Return a URL for messages, without the password and the options, which may contain one.

    Args:
        url: A URL as :func:`parse_url` returns it.
    """
    if service := url.query.get("service"):
        return f"postgresql:///{url.database or ''}?service={service}"
    hosts = url.query.get("host", url.host or "localhost")
    host = hosts if isinstance(hosts, str) else ",".join(hosts)
    ports = url.query.get("port", url.port)
    port = f":{ports}" if ports else ""
    user = f"{url.username}@" if url.username else ""
    return f"postgresql://{user}{host}{port}/{url.database or ''}"


def open_engine(
    url: URL,
    *,
    application_name: str,
    check_seconds: float = CHECK_SECONDS,
    reply_seconds: float | None = None,
    **options: Any,
) -> Engine:
    """Create an engine, which connects at its first use.

    Args:
        url: A URL as :func:`parse_url` returns it.
        application_name: Name shown in ``pg_stat_activity``.
        check_seconds: Wait for a reply before the server is asked whether it is working on it.
        reply_seconds: Longest wait for any reply; None for statements of any length.
        options: Arguments of SQLAlchemy's ``create_engine``.

    Raises:
        StorageError: if the URL's numbers of hosts and ports do not match.
    """
    secrets = {name: value for name, value in url.query.items() if name in _SECRET_OPTIONS}
    try:
        # Tracing libraries replace this function, perhaps after this module is imported.
        engine = sqlalchemy.create_engine(
            url.difference_update_query(_SECRET_OPTIONS),
            isolation_level="READ COMMITTED",
            use_native_hstore=False,  # looking up its types would cost each connection a query
            hide_parameters=True,  # keeps user IDs out of errors and logs
            connect_args={
                **{name: value for name, value in DEFAULT_OPTIONS.items() if name not in url.query},
                **secrets,
                "application_name": application_name,
                **FIXED_OPTIONS,
            },
            **options,
        )
    except ArgumentError:
        raise StorageError(
            "the database URL has several hosts and ports; expected one port or one for each host"
        ) from None

    def connect(
        _dialect: object, _record: object, _args: object, parameters: dict[str, Any]
    ) -> ServerConnection:
        connection = ServerConnection.connect(**parameters)
        connection.parameters = parameters
        connection.check_seconds = check_seconds
        connection.reply_seconds = reply_seconds
        return connection

    event.listen(engine, "do_connect", connect)
    event.listen(engine, "connect", _set_up)
    return engine


def _set_up(connection: ServerConnection, _record: object) -> None:
    connection.read_only = False  # in each BEGIN, whatever the default
    connection.autocommit = True
    ((pid,),) = connection.execute("SELECT pg_backend_pid()").fetchall()
    connection.autocommit = False
    if pid == connection.info.backend_pid:
        connection.server_pid = pid
    else:
        # A pooler accepted the connection. Each transaction may get another session, which lacks a
        # prepared statement, or has another client's statement of the same name.
        connection.is_pooled = True
        connection.prepare_threshold = None
