"""Temporary databases, roles and connections for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from sqlalchemy import Connection, create_engine, make_url, text


@contextmanager
def connected(database_url: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """Open a connection and close it at the end, with a rollback of uncommitted changes."""
    engine = create_engine(
        database_url, isolation_level="AUTOCOMMIT" if autocommit else "READ COMMITTED"
    )
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


@contextmanager
def database(server_url: str, *, template: str = "template0", options: str = "") -> Iterator[str]:
    """Create a database and drop it at the end, also if clients are connected. Yields its URL."""
    name = f"test_{uuid4().hex}"
    with connected(server_url, autocommit=True) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template} {options}"))
    try:
        yield make_url(server_url).set(database=name).render_as_string(hide_password=False)
    finally:
        with connected(server_url, autocommit=True) as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def role(database_url: str, *grants: str) -> Iterator[str]:
    """Create a role with privileges such as ``SELECT ON some_table``. Yields the URL with it."""
    name = f"role_{uuid4().hex}"
    with connected(database_url, autocommit=True) as connection:
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        try:
            for privileges in grants:
                connection.execute(text(f"GRANT {privileges} TO {name}"))
            yield make_url(database_url).set(username=name).render_as_string(hide_password=False)
        finally:
            connection.execute(text(f"DROP OWNED BY {name}"))
            connection.execute(text(f"DROP ROLE {name}"))
