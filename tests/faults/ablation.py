"""Ablations of a chaos run: with one mechanism disabled, an invariant must fail."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.faults.invariants import PREFIX, claimed_job_ids, heartbeats, session_keys
from tests.support.database import connected
from tests.support.workers import Site

MECHANISMS = ("claims", "takeover", "ledger")
INTERVAL_SECONDS = 0.03

_DELETE_OUTCOMES = text(
    "DELETE FROM grant_access_job WHERE job_id = ANY (:job_ids)"
    " AND finished_at < clock_timestamp() - interval '0.5 s'"
)


class Ablation(threading.Thread):
    """Disables a mechanism of the worker from outside, by changing Redis or the database."""

    def __init__(self, here: Site, mechanism: str) -> None:
        """Disable the mechanism while the thread runs.

        Args:
            here: The site.
            mechanism: ``claims``: claims are deleted shortly after they were made, as if messages
                were acknowledged early. ``takeover``: no dead session's lease expires.
                ``ledger``: an outcome is deleted if its message is still claimed half a second
                later, as that of a killed worker, so that its redelivery finds none. Empty: none.
        """
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self._here = here
        self._mechanism = mechanism
        self._seen: set[tuple[str, bytes]] = set()

    def run(self) -> None:
        """Keep the mechanism disabled until stopped."""
        while not self.stop.wait(INTERVAL_SECONDS):
            with suppress(RedisError, OperationalError):
                if self._mechanism == "claims":
                    self._delete_claims()
                elif self._mechanism == "takeover":
                    self._renew_leases()
                elif self._mechanism == "ledger":
                    self._delete_outcomes()

    def _delete_claims(self) -> None:
        redis: Any = self._here.redis
        claims = {
            (key, delivery) for key in session_keys(self._here) for delivery in redis.hkeys(key)
        }
        for key, delivery in claims & self._seen:
            redis.hdel(key, delivery)
        self._seen = claims

    def _renew_leases(self) -> None:
        redis: Any = self._here.redis
        key = f"{PREFIX}leases"
        is_hash = redis.type(key) == b"hash"
        for session in heartbeats(self._here):
            if is_hash:
                redis.hincrby(key, session, 1)
            else:
                redis.zincrby(key, 1_000, session)

    def _delete_outcomes(self) -> None:
        with connected(self._here.store.database_url, autocommit=True) as database:
            database.execute(_DELETE_OUTCOMES, {"job_ids": list(claimed_job_ids(self._here))})
