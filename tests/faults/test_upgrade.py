"""An upgrade and a rollback under load, and a release that excludes this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from storage.schema import expected_revision
from tests.faults.upgrades import (
    Fleet,
    drain,
    load,
    roll_back,
    start,
    until_working,
    upgrade,
    verify,
)
from tests.support.releases import ADDS, LATER, RENAMES, later_release
from tests.support.stores import until
from tests.support.workers import ROOT, Site

INTERVIEWS = 12


@pytest.fixture
def idle_url(migrated_url: str) -> str:
    """A database for one test: later releases change its tables."""
    return migrated_url


@pytest.fixture
def fleet(request: pytest.FixtureRequest, idle: Site, tmp_path: Path) -> Iterator[Fleet]:
    """Workers of this release and of a later one; the parameter is what the later one alters."""
    later = later_release(tmp_path / "later", alteration=getattr(request, "param", ADDS))
    with ExitStack() as services:
        yield Fleet(idle, tmp_path, later, services)


def test_upgrade_and_rollback_under_load(fleet: Fleet, idle: Site, tmp_path: Path) -> None:
    """Each job succeeds once while workers are upgraded and rolled back, from either client."""
    ids = idle.store.add_interviews(INTERVIEWS)
    old = fleet.worker("old-1"), fleet.worker("old-2")
    new = (fleet.worker("new", fleet.later),)
    with load(idle, ids) as sent:
        start(*old)
        until_working(*old)
        fleet.grant("new-client", ids[0], folder=fleet.later)
        upgrade(fleet, old, new)
        fleet.grant("old-client", ids[0], folder=ROOT)
        roll_back(fleet, old[:1], new)
    verify(idle, tmp_path, sent)
    drain(old[0])
    assert f"newer than {expected_revision()} of this release" in old[1].log.read_text("utf-8")


@pytest.mark.parametrize("fleet", [RENAMES], indirect=True)
def test_excluded_worker_refuses_to_start(fleet: Fleet, idle: Site) -> None:
    """Jobs of a running worker wait, none fails, and a worker that starts names both revisions."""
    (interview,) = idle.store.add_interviews(1)
    running, later = fleet.worker("running"), fleet.worker("later")
    start(running)
    reported = fleet.migrate(fleet.later)
    assert f"stop the workers of revisions before {LATER} first" in reported

    later.start()
    assert later.wait(30) == 1
    assert (
        f"the database is at revision {LATER}, which this release does not know (its newest is "
        f"{expected_revision()}) and cannot use: expected a release with revision {LATER}"
    ) in later.log.read_text("utf-8")

    job_id = idle.send("ann", [interview])
    until(lambda: "42703" in running.log.read_text("utf-8"))
    idle.store.execute("ALTER TABLE grant_access_job RENAME COLUMN renamed TO repeated")
    assert idle.answer(job_id)["status"] == "SUCCESS"
    assert not idle.dead_letters()
