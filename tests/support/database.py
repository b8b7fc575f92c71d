"""Temporary databases and roles, and connections to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from sqlalchemy import Connection, create_engine, make_url, text


@contextmanager
def connected(database_url: str, *, autocommit: bool = False) -> Iterator[Connection]:
    """A connection outside of a pool; at the end it is rolled back and closed."""
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
    """The URL of a new database on the server, which is dropped at the end with all connections."""
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
    """The database's URL for a new role; privileges have the form ``SELECT ON some_table``."""
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
