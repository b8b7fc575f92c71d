"""Migrations beside other transactions, for the tests of migrations."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

from storage.schema import migrate
from tests.support.platform import PATIENCE_SECONDS, Database

GRANTS = "interview_userinterviewaccess"


WORKER_TABLES = [
    "grant_access_job",
    "grant_access_request",
    "grant_access_cancellation",
    "grant_access_rejection",
    "grant_access_cohort",
    "grant_access_tombstone",
]


KEY = "interview_userinterviewaccess_user_id_interview_id_key"


BUILD_WAITS = (
    "EXISTS (SELECT FROM pg_stat_progress_create_index "
    "WHERE datname = current_database() AND phase = 'waiting for old snapshots')"
)


def migrated(url: str) -> list[str]:
    """Migrate. Returns the reported sentences."""
    sentences: list[str] = []
    migrate(url, report=sentences.append)
    return sentences


def add_interviews(database: Database, count: int) -> list[UUID]:
    """Insert interviews, as the platform does. Returns their IDs."""
    ids = [uuid4() for _ in range(count)]
    database.execute(
        "INSERT INTO interview_interview (id, title, duration) "
        "SELECT id, 'An interview', interval '1 hour' FROM unnest(%s::uuid[]) AS id",
        ids,
    )
    return ids


def add_grants(database: Database, *pairs: tuple[str, UUID]) -> None:
    """Insert grants in this order, including duplicates."""
    database.execute(
        f"INSERT INTO {GRANTS} (user_id, interview_id) "  # noqa: S608 - a constant
        "SELECT * FROM unnest(%s::text[], %s::uuid[])",
        [user for user, _ in pairs],
        [interview for _, interview in pairs],
    )


def grants(database: Database) -> list[tuple[int, str, UUID]]:
    """Return all grants, sorted by ID."""
    rows = database.execute(f"SELECT id, user_id, interview_id FROM {GRANTS} ORDER BY id")  # noqa: S608 - a constant
    return [(row["id"], row["user_id"], row["interview_id"]) for row in rows]


@contextmanager
def old_snapshot(database: Database) -> Iterator[Callable[[], object]]:
    """Hold a snapshot in a transaction, until the block or a call of the yielded function ends it.

    A concurrent index build waits for it in its last step.
    """
    with database.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield lambda: connection.execute("ROLLBACK")


@contextmanager
def migrating(url: str) -> Iterator[list[str]]:
    """Migrate in a thread beside the block. It must succeed. Yields the reported sentences."""
    sentences: list[str] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            migrate(url, report=sentences.append)
        except BaseException as error:  # noqa: BLE001 - the test must see any error
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sentences
    finally:
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert not failures, failures
