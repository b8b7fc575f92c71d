"""Workers behind relays, and the points of a job's way at which they can be held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from devstack.service import Service
from tests.faults.gates import CLAIM, SETTLEMENT, Gate, Relay, Relays, Traffic
from tests.support.workers import Site, worker

QUICK = {"GRANT_LEASE_SECONDS": 1, "GRANT_CHUNK_SIZE": 4}
"""A lease short enough to wait for its end; the promises do not hang on its length."""

POINTS: dict[str, tuple[str, bytes | Traffic, bool]] = {
    "claimed, unknown to the worker": ("queue", CLAIM, True),
    "before the transaction": ("database", b"BEGIN", False),
    "inside the transaction": ("database", b"INSERT INTO interview_userinterviewaccess", False),
    "at COMMIT": ("database", b"COMMIT\0", False),
    "after COMMIT": ("database", b"COMMIT\0", True),
    "before the result": ("results", b'"status": "SUCCESS"', False),
    "after the result": ("results", b'"status": "SUCCESS"', True),
    "before the acknowledgement": ("queue", SETTLEMENT, False),
    "after the acknowledgement": ("queue", SETTLEMENT, True),
}
"""Points of a job's way: the server that is asked, what, and whether it has answered."""


@contextmanager
def relayed(here: Site, folder: Path, **settings: object) -> Iterator[tuple[Relays, Service]]:
    """A worker behind relays that has done a job already, so that Redis knows its scripts."""
    relays = Relays(here.broker, here.store.database_url)
    try:
        with another(here, folder, **{**relays.settings, **settings}) as service:
            here.answer(here.send("warm", []))
            yield relays, service
    finally:
        relays.close()


@contextmanager
def another(here: Site, folder: Path, **settings: object) -> Iterator[Service]:
    """A worker with a log of its own."""
    with worker(here, folder / f"{uuid4()}.log", **{**QUICK, **settings}) as service:
        yield service


def gate_at(relays: Relays, point: str) -> AbstractContextManager[Gate]:
    """The gate of that name."""
    server, pattern, answered = POINTS[point]
    relay: Relay = getattr(relays, server)
    return relay.gate(pattern, answered=answered)


def family(service: Service) -> list[psutil.Process]:
    """A worker's own process and its children."""
    main = psutil.Process(service.pid)
    return [main, *main.children(recursive=True)]


def kill_all(service: Service) -> None:
    """Kill a worker's own process and its children, some of which go by themselves."""
    for process in family(service):
        with suppress(psutil.NoSuchProcess):
            process.kill()


def created(count: int) -> dict[str, Any]:
    """The result of a job that added so many rows."""
    return {"success": True, "created_access_count": count}
