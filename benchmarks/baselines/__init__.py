"""Baselines: the database's own limit, and plain Celery tasks."""

from __future__ import annotations


def plain_url(database_url: str) -> str:
    """Return a database URL for libpq, without the driver's name that SQLAlchemy needs."""
    return database_url.replace("postgresql+psycopg://", "postgresql://", 1)
