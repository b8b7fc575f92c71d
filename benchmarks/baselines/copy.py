"""The limit: COPY of the rows into the table of grants, with its constraints."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from uuid import UUID

import psycopg

from benchmarks.baselines import plain_url

_COPY = "COPY interview_userinterviewaccess (user_id, interview_id) FROM STDIN"


def copy_grants(
    database_url: str, user_ids: Iterable[str | UUID], interview_ids: Sequence[str | UUID]
) -> float:
    """Copy the grants of every user for every interview in one transaction.

    Args:
        database_url: ``postgresql://…``, with or without ``+psycopg``.
        user_ids: The users of the grants.
        interview_ids: The interviews, in the order in which they are written.

    Returns:
        Seconds for encoding the rows, COPY and COMMIT.
    """
    with psycopg.connect(plain_url(database_url)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1")  # opens the connection and begins the transaction
        started = time.perf_counter()
        rows = "".join(
            f"{user_id}\t{interview_id}\n" for user_id in user_ids for interview_id in interview_ids
        )
        with cursor.copy(_COPY) as copy:
            copy.write(rows)
        connection.commit()
        return time.perf_counter() - started
