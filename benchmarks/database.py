"""Databases with interviews, and their grants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
from psycopg import sql

from benchmarks.baselines import plain_url
from benchmarks.measuring import BenchmarkError

GRANTS = "interview_userinterviewaccess"
_GRANTS_EACH = 100  # of a user that only fills the table


@dataclass(frozen=True, slots=True)
class Database:
    """A database with all tables.

    Attributes:
        url: The URL in SQLAlchemy's form.
        interviews: The IDs of its interviews, shuffled, as producers have them.
    """

    url: str
    interviews: list[str]

    def reset(self) -> None:
        """Empty the tables that jobs write to, and run a checkpoint."""
        with self._connected() as connection:
            names = connection.execute(
                "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
                " AND (tablename LIKE 'grant_access_%%' AND tablename NOT LIKE '%%alembic%%'"
                " OR tablename = %s)",
                [GRANTS],
            ).fetchall()
            for (name,) in names:  # one at a time, because running workers also query some
                table = sql.Identifier(name)
                connection.execute(sql.SQL("TRUNCATE {} RESTART IDENTITY").format(table))
            connection.execute("CHECKPOINT")

    def expect(self, rows: int) -> None:
        """Check the number of grants.

        Raises:
            BenchmarkError: if there are more or fewer.
        """
        if self.rows() != rows:
            raise BenchmarkError(f"expected {rows:,} rows, got {self.rows():,}")

    def rows(self) -> int:
        """Count the grants."""
        with self._connected() as connection:
            counted = connection.execute(f"SELECT count(*) FROM {GRANTS}").fetchone()  # noqa: S608 - a constant
        return int(counted[0]) if counted else 0

    def fill(self, rows: int) -> int:
        """Add grants of new users over all interviews.

        Args:
            rows: Approximate number of grants to add.

        Returns:
            The number of grants added.
        """
        each = min(_GRANTS_EACH, len(self.interviews))
        if rows < each:
            return 0
        with self._connected() as connection:
            # The foreign keys are valid by construction; their checks would double the time.
            connection.execute("SET session_replication_role = replica")
            connection.execute(
                f"INSERT INTO {GRANTS} (user_id, interview_id)"  # noqa: S608 - a constant
                " SELECT md5(users.number::text || %s), ids.id"
                " FROM generate_series(1, %s) AS users (number)"
                " CROSS JOIN generate_series(0, %s - 1) AS grants (number)"
                " JOIN unnest(%s::uuid[]) WITH ORDINALITY AS ids (id, number)"
                " ON ids.number = 1 + (users.number * %s + grants.number) %% %s",
                [uuid4().hex, rows // each, each, self.interviews, each, len(self.interviews)],
            )
            connection.execute(f"VACUUM ANALYZE {GRANTS}")
            connection.execute("CHECKPOINT")
        return rows // each * each

    def _connected(self) -> psycopg.Connection[Any]:
        return psycopg.connect(plain_url(self.url), autocommit=True)
