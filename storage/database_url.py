"""Validation of ``DATABASE_URL``, without a connection.

The URL may be written for another driver: Prisma, JDBC, Rails, Django, SQLAlchemy with any driver,
or libpq itself. ``FOREIGN_OPTIONS`` has what their options become.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

FORM = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"

FOREIGN_OPTIONS: Mapping[str, str | None] = {
    # Prisma
    "schema": "search_path",
    "connection_limit": None,
    "max_connection_lifetime": None,
    "max_idle_connection_lifetime": None,
    "pgbouncer": None,
    "pool_timeout": None,
    "single_use_connections": None,
    "socket_timeout": None,
    "statement_cache_size": None,
    # JDBC
    "ApplicationName": "application_name",
    "channelBinding": "channel_binding",
    "connectTimeout": "connect_timeout",
    "currentSchema": "search_path",
    "gssEncMode": "gssencmode",
    "kerberosServerName": "krbsrvname",
    "loadBalanceHosts": "load_balance_hosts",
    "ssl": "sslmode",
    "sslNegotiation": "sslnegotiation",
    "targetServerType": "target_session_attrs",
    "tcpKeepAlive": "keepalives",
    "assumeMinServerVersion": None,
    "autosave": None,
    "binaryTransfer": None,
    "cancelSignalTimeout": None,
    "defaultRowFetchSize": None,
    "hostRecheckSeconds": None,
    "loginTimeout": None,
    "logUnclosedConnections": None,
    "preferQueryMode": None,
    "preparedStatementCacheQueries": None,
    "preparedStatementCacheSizeMiB": None,
    "prepareThreshold": None,
    "reWriteBatchedInserts": None,
    "socketTimeout": None,
    "stringtype": None,
    "tcpNoDelay": None,
    # Rails
    "database": "dbname",
    "schema_search_path": "search_path",
    "username": "user",
    "adapter": None,
    "advisory_locks": None,
    "checkout_timeout": None,
    "encoding": None,
    "idle_timeout": None,
    "min_messages": None,
    "pool": None,
    "prepared_statements": None,
    "reaping_frequency": None,
    "statement_limit": None,
    "timeout": None,
    # Django, and SQLAlchemy with asyncpg
    "CONN_HEALTH_CHECKS": None,
    "CONN_MAX_AGE": None,
    "conn_health_checks": None,
    "conn_max_age": None,
    "command_timeout": None,
    "prepared_statement_cache_size": None,
}
"""Options of other drivers: libpq's name for each, or None if a worker has no use for it."""

_VALUES: Mapping[str, Mapping[str, str]] = {
    "loadBalanceHosts": {"true": "random", "false": "disable"},
    "ssl": {
        "true": "verify-full",
        "false": "disable",
        **{mode: mode for mode in ("disable", "allow", "prefer", "require")},
        **{mode: mode for mode in ("verify-ca", "verify-full")},
    },
    "targetServerType": {
        "primary": "primary",
        "master": "primary",
        "any": "any",
        "preferPrimary": "any",
    },
    "tcpKeepAlive": {"true": "1", "false": "0"},
}
"""What the values of these options become; a worker accepts no other."""

_INSTEAD: Mapping[str, str] = {
    "sslaccept": "sslmode=verify-full&sslrootcert=FILE, or sslmode=require for any certificate,"
    " in place of sslaccept",
    "sslidentity": "sslcert=FILE&sslkey=FILE (in PEM format) in place of sslidentity",
    "sslfactory": "sslmode=verify-full&sslrootcert=FILE, or sslmode=require for any certificate,"
    " in place of sslfactory",
    "socketFactory": "a host, or the folder of a Unix socket (host=FOLDER), in place of"
    " socketFactory",
    "variables": "options=-c%20NAME%3DVALUE in place of variables",
}
"""Options that change which server is trusted or what a session does: what replaces them."""

_SCHEME = re.compile(r"(?:jdbc:)?(?:postgres(?:ql)?|postgis|pgsql)(?:\+\w+)?", re.ASCII)
_INTEGERS = ("connect_timeout", "tcp_user_timeout", "keepalives")
_SERVER = ("host", "hostaddr", "port", "service", "dbname", "user", "password")
_SECRET_LIKE = re.compile(r"pass|pw|secret|token|auth|cred|key", re.IGNORECASE)
_PORTS = "a host and a port from 1 to 65535"


def parse_database_url(url: str) -> str:
    """Validate a database URL and convert it for SQLAlchemy with psycopg.

    Args:
        url: ``postgresql://…`` as libpq or another driver reads it, or libpq's ``host=… dbname=…``.

    Raises:
        ValueError: if it is not a PostgreSQL URL, or has an option that neither libpq nor
            ``FOREIGN_OPTIONS`` has, or an invalid value. The message says what is expected and
            contains no part of a password.
    """
    parsed = _from_keywords(url) if _is_keywords(url) else _from_url(url)
    parsed = parsed.set(query=_libpq_options(parsed.query))
    _check_options(parsed)
    parsed = _with_a_port_each(_with_credentials_before_the_host(parsed))
    # SQLAlchemy does not encode spaces, which are invalid in a URL.
    return parsed.render_as_string(hide_password=False).replace(" ", "%20")


def _is_keywords(text: str) -> bool:
    return re.match(r"\s*\w+\s*=", text) is not None


def _from_keywords(text: str) -> URL:
    try:
        keywords = conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        raise ValueError(f"keywords of libpq (host=… dbname=…), or a URL as in {FORM}") from None
    options = {name: str(value) for name, value in keywords.items()}
    return URL.create(
        "postgresql+psycopg",
        username=options.pop("user", None),
        password=options.pop("password", None),
        database=options.pop("dbname", None),
        query=options,
    )


def _from_url(url: str) -> URL:
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ValueError(FORM)
    credentials, at, location = rest.rpartition("@")
    if not rest.isprintable() or " " in rest:
        raise ValueError(f"a URL without spaces and control characters, as in {FORM}")
    _check_values(location)
    if "@" in credentials or "?" in credentials:
        raise ValueError(
            "special characters in user name and password to be percent-encoded"
            f" (%40 for @, %3F for ?), as in {FORM}"
        )
    try:
        parsed = make_url(f"postgresql+psycopg://{credentials}{at}{_with_one_host(location)}")
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or not 0 < (parsed.port or 1) < 1 << 16:
        raise ValueError(f"{_PORTS}, as in {FORM}") from None
    return parsed


def _check_values(location: str) -> None:
    """Refuse an option without a value. SQLAlchemy drops it; for JDBC ``ssl`` means verify-full."""
    options = [part.partition("=") for part in location.partition("?")[2].split("&") if part]
    if empty := [name for name, _, value in options if not value]:
        # Beside a secret, an apparent option may be the rest of an unescaped secret.
        is_secret = any(_SECRET_LIKE.search(name) for name, _, _ in options)
        names = "" if is_secret else f"; none for: {', '.join(empty)[:100]}"
        raise ValueError(f"a value for each option (ssl=true, not ssl){names}")
    if any("+" in value and name.startswith(("user", "password")) for name, _, value in options):
        # libpq reads it as it is, JDBC and SQLAlchemy as a space.
        raise ValueError("+ in the options user and password to be percent-encoded (%2B)")


def _with_one_host(location: str) -> str:
    """Convert several hosts, or a percent-encoded one, into options, which SQLAlchemy decodes."""
    hosts, rest = re.fullmatch(r"([^/?]*)(.*)", location, re.DOTALL).groups()  # type: ignore[union-attr] # matches any
    if "," not in hosts and "%" not in hosts:
        return location
    pairs = [re.fullmatch(r"(\[[^\]]*\]|[^:]*):?([0-9]*)", host) for host in hosts.split(",")]
    names = ",".join(pair[1].strip("[]") for pair in pairs if pair)
    ports = ",".join(pair[2] for pair in pairs if pair)
    if None in pairs:
        raise ValueError(_PORTS)
    database, _, query = rest.partition("?")
    options = [f"host={names}", f"port={ports}" if ports.strip(",") else "", query]
    return f"{database or '/'}?{'&'.join(filter(None, options))}"


def _libpq_options(given: Mapping[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
    """Convert the options of other drivers into libpq's, which take precedence."""
    options = {name: value for name, value in given.items() if name not in FOREIGN_OPTIONS}
    for name, value in given.items():
        if name in _INSTEAD:
            raise ValueError(_INSTEAD[name])
        if libpq_name := FOREIGN_OPTIONS.get(name):
            options.setdefault(libpq_name, _libpq_value(name, value))
    if path := options.pop("search_path", None):
        setting = "-c search_path=" + re.sub(r"([\\\s])", r"\\\1", str(path))
        options["options"] = " ".join(filter(None, [str(options.get("options", "")), setting]))
    return options


def _libpq_value(name: str, value: str | tuple[str, ...]) -> str:
    if isinstance(value, tuple):
        raise ValueError(f"{name} at most once")  # noqa: TRY004 - a wrong value, not a wrong type
    if values := _VALUES.get(name):
        if value not in values:
            raise ValueError(f"{name} to be {' or '.join(values)}")
        return values[value]
    if name == "schema":  # for Prisma one name, whose case counts
        return '"{}"'.format(value.replace('"', '""'))
    return value


def _with_credentials_before_the_host(url: URL) -> URL:
    """Move user, password and database out of the options, where SQLAlchemy masks no password."""
    parts = {"username": "user", "password": "password", "database": "dbname"}
    moved = {part: str(url.query[name]) for part, name in parts.items() if url.query.get(name)}
    url = url.difference_update_query(parts.values()).set(**moved)  # type: ignore[arg-type] # three of its arguments
    # SQLAlchemy omits a password without a user name; libpq takes an empty name for the default.
    return url.set(username="") if url.password and url.username is None else url


def _with_a_port_each(url: URL) -> URL:
    """Repeat one port for several hosts, as libpq does and SQLAlchemy does not."""
    hosts, ports = url.query.get("host", ""), url.query.get("port", str(url.port or ""))
    if not isinstance(hosts, str) or not isinstance(ports, str):
        if hosts and "port" in url.query:
            raise ValueError("ports beside their hosts (HOST:5432,HOST:5432)")
        return url
    count = hosts.count(",") + 1
    if "port" not in url.query and (not ports or count == 1):
        return url
    if "," not in ports:
        ports = ",".join([ports] * count)
    if ports.count(",") + 1 != count:
        raise ValueError("one port, or one for each host")
    return url.update_query_dict({"port": ports})


def _check_options(url: URL) -> None:
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    # Beside a secret, an apparent option may be the rest of an unescaped secret.
    is_secret = any(_SECRET_LIKE.search(name) for name in url.query)
    if unknown := url.query.keys() - known:
        names = "" if is_secret else f"; unknown: {', '.join(sorted(unknown))[:100]}"
        raise ValueError(f"only options of libpq{names}")
    for name, value in url.query.items():
        values = [value] if isinstance(value, str) else value
        if len(values) > 1 and name not in {"host", "port"}:
            raise ValueError(f"{name} at most once")
        if name == "port":
            ports = [port for one in values for port in one.split(",") if port]
            if not all(re.fullmatch(r"[0-9]{1,5}", p) and 0 < int(p) < 1 << 16 for p in ports):
                raise ValueError("port to be from 1 to 65535")
        elif name.startswith(_INTEGERS) and not re.fullmatch(r"[0-9]{1,9}", values[0]):
            raise ValueError(f"{name} to be a whole number")
    options = {name: value for name, value in url.query.items() if name not in _SERVER}
    # libpq validates options before it opens the socket, which does not exist.
    refusal = _refusal(options)
    if refusal != _refusal({}):
        # A value in another syntax may contain further options (sslmode=prefer;password=…).
        is_secret = is_secret or any(
            "=" in str(value) for name, value in options.items() if name != "options"
        )
        sentence = "" if is_secret else f"; libpq reports: {refusal}"
        raise ValueError(f"options that libpq accepts{sentence}")


def _refusal(options: Mapping[str, object]) -> str:
    connection = pq.PGconn.connect_start(make_conninfo(host="/nonexistent", **options).encode())  # type: ignore[arg-type] # psycopg's
    try:
        return connection.get_error_message().strip()
    finally:
        connection.finish()
