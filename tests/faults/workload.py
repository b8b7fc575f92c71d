"""Jobs that overlap as a platform's retries do, and slow jobs that a test blocks and releases."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

from interview_access.contracts import GrantJob
from interview_access.producer import InterviewAccessClient
from sqlalchemy import text

from tests.faults.invariants import final_results, leftover_keys, live_sessions, verified_results
from tests.support.database import connected
from tests.support.stores import PATIENCE_SECONDS, until
from tests.support.workers import QUEUE, Site

BATCH = 40
"""Small jobs that the workers of a test execute in batches."""

INTERVIEWS = [str(UUID(int=(0xB << 124) + number)) for number in range(12)]

_BLOCK_SLOW_JOBS = """
CREATE TABLE blocking ();
INSERT INTO blocking DEFAULT VALUES;
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    WHILE EXISTS (SELECT FROM blocking) LOOP PERFORM pg_sleep(0.02); END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER slow BEFORE INSERT ON interview_userinterviewaccess
    FOR EACH ROW WHEN (NEW.user_id LIKE 'slow%') EXECUTE FUNCTION slow()
"""
_COUNT_BLOCKED = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND state = 'active' AND wait_event = 'PgSleep'"
)


class Workload:
    """The jobs of a site, and the verification of their results.

    Attributes:
        here: The site.
        results: The results' server; the queue's, unless the test sets another.
        sent: The IDs of all jobs that were sent.
    """

    def __init__(self, here: Site) -> None:
        """Add interviews and a trigger that blocks slow jobs to the site's database."""
        self.here = here
        self.results = here.redis
        self.sent: list[str] = []
        here.store.add_interviews_with_ids(INTERVIEWS)
        here.store.execute(_BLOCK_SLOW_JOBS)

    def send(self, count: int) -> list[str]:
        """Send jobs of few users with overlapping requests, and return their IDs."""
        numbers = range(len(self.sent), len(self.sent) + count)
        sent = [self.here.send(f"user-{n % 7}", INTERVIEWS[n % 5 : n % 5 + 4]) for n in numbers]
        self.sent += sent
        return sent

    def send_slow(self, count: int = 1) -> list[str]:
        """Send jobs that run until :meth:`release`, and return their IDs once all of them run."""
        sent = [
            self.here.send(f"slow-{number}", INTERVIEWS)
            for number in range(len(self.sent), len(self.sent) + count)
        ]
        self.sent += sent
        until(lambda: self.blocked() == count)
        return sent

    def release(self) -> None:
        """Let slow jobs finish, running and future ones."""
        self.execute("DELETE FROM blocking")

    def block(self) -> None:
        """Block slow jobs again."""
        self.execute("DELETE FROM blocking")
        self.execute("INSERT INTO blocking DEFAULT VALUES")

    def blocked(self) -> int:
        """Count the transactions of blocked slow jobs."""
        return int(self.value(_COUNT_BLOCKED))

    def execute(self, statement: str) -> None:
        """Run a statement on a new connection, because faults cut existing ones."""
        with connected(self.here.store.database_url, autocommit=True) as connection:
            connection.execute(text(statement))

    def value(self, statement: str) -> Any:
        """Return a query's single value, from a new connection."""
        with connected(self.here.store.database_url, autocommit=True) as connection:
            return connection.execute(text(statement)).scalar_one()

    def queued(self) -> int:
        """Count the messages on the queue's list of the default priority."""
        count: Any = self.here.redis.llen(QUEUE)
        return int(count)

    def live_sessions(self) -> set[str]:
        """Return the worker sessions that renew their leases."""
        return live_sessions(self.here)

    def finished(self) -> int:
        """Count the sent jobs that have a final result."""
        return len(final_results(self.results, self.sent))

    def verify(self) -> None:
        """Wait until every job has a final result, and verify the invariants."""
        until(lambda: self.finished() == len(self.sent), within=2 * PATIENCE_SECONDS)
        verified_results(self.here, self.sent, results=self.results)
        until(lambda: not leftover_keys(self.here))


def new_users(count: int) -> list[str]:
    """Return user IDs that no other test uses."""
    return [f"user-{number}-{uuid4().hex[:8]}" for number in range(count)]


def send_together(
    here: Site, users: Sequence[str], ids: list[str], **ids_of: list[str]
) -> list[str]:
    """Send a job for each user in one call, and return the job IDs.

    Args:
        here: The site.
        users: The user IDs.
        ids: The interview IDs of every job.
        **ids_of: Other interview IDs for some users.
    """
    with closing(InterviewAccessClient(here.broker)) as client:
        return client.enqueue_many([GrantJob(user, ids_of.get(user, ids)) for user in users])
