"""The statement of each revision which workers can use the schema after it.

A worker does not know the revisions of later releases. So `migrate` stores the oldest compatible
revision in Alembic's version table, in the transaction that records the revision, and a worker
whose own revision is not older starts on a newer schema. CONTRIBUTING.md has the rules.
"""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import Connection, text

COLUMN = "oldest_compatible"
"""Column of Alembic's version table, which revision 0009 adds."""


class Compatibility(NamedTuple):
    """What a revision states in its constant ``compatibility``.

    An additive revision repeats the oldest revision of its predecessor.

    Attributes:
        oldest: The oldest revision whose workers can use the schema after this revision.
        reason: Why workers of earlier revisions cannot, as a clause.
    """

    oldest: str
    reason: str


def stated_by(revision: object) -> Compatibility | None:
    """Return what a revision states, or None for those before 0009, which state nothing.

    Args:
        revision: The module of the revision.
    """
    stated: Compatibility | None = getattr(revision, "compatibility", None)
    return stated


def record(connection: Connection, version_table: str, compatibility: Compatibility) -> None:
    """Store the oldest compatible revision.

    Args:
        connection: The connection in whose transaction the revision is recorded.
        version_table: Alembic's version table.
        compatibility: What the revision states.
    """
    connection.execute(
        text(f"UPDATE {version_table} SET {COLUMN} = :oldest"),  # noqa: S608 - constants
        {"oldest": compatibility.oldest},
    )
