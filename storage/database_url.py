"""Validation of ``DATABASE_URL``, without a connection."""

from __future__ import annotations

import re
from collections.abc import Mapping

from psycopg import pq
from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

FORM = "postgresql://USER:PASSWORD@HOST:5432/DATABASE"

_INTEGERS = ("connect_timeout", "tcp_user_timeout", "keepalives")
_SERVER = ("host", "hostaddr", "port", "service", "dbname", "user", "password")
_SECRET_LIKE = re.compile(r"pass|pw|secret|token|auth|cred|key", re.IGNORECASE)


def parse_database_url(url: str) -> str:
    """Validate a database URL and convert it for SQLAlchemy with psycopg.

    Args:
        url: ``postgresql://…`` or ``postgresql+psycopg://…``, with options of libpq.

    Raises:
        ValueError: if it is no PostgreSQL URL, or libpq would reject one of its options. The
            message says what is expected and contains no part of a password.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"postgresql", "postgresql+psycopg"}:
        raise ValueError(FORM)
    credentials, at, location = rest.rpartition("@")
    if not rest.isprintable() or " " in rest:
        raise ValueError(f"a URL without spaces and control characters, as in {FORM}")
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
        raise ValueError(f"a host and a port from 1 to 65535, as in {FORM}") from None
    _check_options(parsed)
    if password := parsed.query.get("password"):  # SQLAlchemy masks no option
        parsed = parsed.difference_update_query(["password"]).set(password=str(password))
    # SQLAlchemy does not encode spaces, which are invalid in a URL.
    return parsed.render_as_string(hide_password=False).replace(" ", "%20")


def _with_one_host(location: str) -> str:
    """Convert libpq's list of several hosts into SQLAlchemy's form."""
    hosts, rest = re.fullmatch(r"([^/?]*)(.*)", location, re.DOTALL).groups()  # type: ignore[union-attr] # matches any
    if "," not in hosts:
        return location
    database, _, query = rest.partition("?")
    options = [f"host={host}" for host in hosts.split(",")] + ([query] if query else [])
    return f"{database or '/'}?{'&'.join(options)}"


def _check_options(url: URL) -> None:
    known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
    # Beside a secret, an apparent option may be the rest of an unescaped secret.
    is_secret = any(_SECRET_LIKE.search(name) for name in url.query)
    if unknown := url.query.keys() - known:
        names = "" if is_secret else f"; unknown: {', '.join(sorted(unknown))[:100]}"
        raise ValueError(f"only options of libpq{names}")
    for name, value in url.query.items():
        values = [value] if isinstance(value, str) else value
        is_number = name == "port" or name.startswith(_INTEGERS)
        if is_number and not all(re.fullmatch(r"[0-9]{1,9}", one) for one in values):
            raise ValueError(f"{name} to be a whole number")
        if len(values) > 1 and name not in {"host", "port"}:
            raise ValueError(f"{name} at most once")
    options = {name: value for name, value in url.query.items() if name not in _SERVER}
    # libpq validates options before it opens the socket, which does not exist.
    refusal = _refusal(options)
    if refusal != _refusal({}):
        sentence = "" if is_secret else f"; libpq reports: {refusal}"
        raise ValueError(f"options that libpq accepts{sentence}")


def _refusal(options: Mapping[str, object]) -> str:
    connection = pq.PGconn.connect_start(make_conninfo(host="/nonexistent", **options).encode())  # type: ignore[arg-type] # psycopg's
    try:
        return connection.get_error_message().strip()
    finally:
        connection.finish()
