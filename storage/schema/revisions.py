"""The schema's revisions: the one that a database has, and the one that this code expects."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, text

from storage import migrations
from storage.migrations import compatibility

VERSION_TABLE = "grant_access_alembic_version"
"""Alembic's version table. Its default name may be in use by the platform."""

KNOWN_REVISIONS = sorted(
    path.name.partition("_")[0]
    for folder in migrations.__path__
    for path in Path(folder).glob("versions/0*.py")
)
"""All revisions, from their file names: a worker does not load Alembic at its start."""


def current_revision(connection: Connection) -> str | None:
    """Return the database's revision, or None before the first migration."""
    if connection.scalar(text("SELECT to_regclass(:table)"), {"table": VERSION_TABLE}) is None:
        return None
    revision: str | None = connection.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}"))  # noqa: S608 - a constant
    return revision


def oldest_compatible_revision(connection: Connection) -> str | None:
    """Return the oldest revision whose workers can use a database at revision 0009 or newer.

    Args:
        connection: A connection of a role that may read both columns of the version table.

    Returns:
        The revision, or None if none is stored.
    """
    query = text(f"SELECT {compatibility.COLUMN} FROM {VERSION_TABLE}")  # noqa: S608 - constants
    revision: str | None = connection.scalar(query)
    return revision


def expected_revision() -> str:
    """Return the newest revision, for which this code is written.

    Raises:
        RuntimeError: if the revisions are missing from the installation.
    """
    if not KNOWN_REVISIONS:
        raise RuntimeError("the installed package storage.migrations has no revisions; reinstall")
    return KNOWN_REVISIONS[-1]
