"""What ours is measured against: the database's own limit, and what others would write."""

from __future__ import annotations


def plain_url(database_url: str) -> str:
    """A database's URL as libpq takes it, without the driver's name that SQLAlchemy wants."""
    return database_url.replace("postgresql+psycopg://", "postgresql://", 1)
