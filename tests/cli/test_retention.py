"""The command ``prune``, on a real database and queue."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from devstack.servers import LocalStack
from tests.support.stores import a_job, until
from tests.support.workers import ROOT, Site, migrated_site
from worker.cli import main


@pytest.fixture(scope="module")
def shared_site(stack: LocalStack, _migrated: str) -> Iterator[Site]:
    """A site without a worker."""
    with migrated_site(stack, _migrated, 15) as one:
        yield one


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The site, without jobs and with an empty Redis database."""
    shared_site.redis.flushdb()
    shared_site.store.clear()
    return shared_site


def command(here: Site, *arguments: str, given: str = "") -> Result:
    """Run `interview-access` in this process."""
    return CliRunner().invoke(
        main, arguments, input=given, env=here.environment(), catch_exceptions=False
    )


def fill(here: Site, jobs: int) -> None:
    """Insert jobs that finished between now and a hundred days ago, the first ones latest."""
    here.store.execute(
        "INSERT INTO grant_access_job (job_id, task, state, request_digest, created, finished_at)"
        " SELECT 'job ' || number, 'task', 'succeeded', repeat('d', 64), 1,"
        " clock_timestamp() - number * interval '100 days' / :jobs"
        " FROM generate_series(1, :jobs) AS number",
        jobs=jobs,
    )


def jobs(here: Site) -> int:
    """Return the number of ledger rows."""
    count: int = here.store.value("SELECT count(*) FROM grant_access_job")
    return count


def test_prune_reports_what_it_deletes(here: Site) -> None:
    """It reports the number of rows of each kind, and leaves what is younger."""
    fill(here, 100)
    old = int((time.time() - 95 * 86_400) * 1000)
    here.redis.xadd("interview-access:dead", {"time": old / 1000, "message": b"x"}, id=f"{old}-0")
    here.redis.xadd("interview-access:dead", {"time": time.time(), "message": b"y"})
    expected = [
        "ledger rows                        11 {}",
        "lists of rejected IDs               0 {}",
        "counts of cohorts                   0 {}",
        "cancellations                       0 {}",
        "answered outbox requests            0 {}",
        "dead letters                        1 {}",
    ]
    for options, done in ((["--dry-run"], "would be deleted"), ([], "deleted")):
        ended = command(here, "prune", "--older-than", "90d", *options)
        assert ended.exit_code == 0, ended.output
        assert ended.stdout.splitlines() == [line.format(done) for line in expected]
        assert jobs(here) == (100 if options else 89)
        assert here.redis.xlen("interview-access:dead") == (2 if options else 1)
    assert here.store.value("SELECT count(*) FROM grant_access_tombstone") == 11


@pytest.mark.parametrize("age", ["0d", "90", "1h", "-1d", "d", "90 days"])
def test_an_age_that_is_too_short_or_not_one_is_refused(here: Site, age: str) -> None:
    """A usage error names what was received and what was expected."""
    ended = command(here, "prune", f"--older-than={age}")
    assert ended.exit_code == 2
    assert f"got '{age}', expected days or weeks of one day or more" in ended.stderr


def test_a_killed_run_is_continued(here: Site) -> None:
    """After SIGKILL each job is in the ledger or has a tombstone; another run does the rest."""
    total = 20_000
    fill(here, total)
    words = (sys.executable, "-m", "worker.cli", "prune", "--older-than", "1d")
    with subprocess.Popen(words, env=here.environment(), cwd=ROOT) as run:
        until(lambda: jobs(here) < total)
        run.send_signal(signal.SIGKILL)
    kept = jobs(here)
    assert 0 < kept < total
    tombstones = "SELECT count(*) FROM grant_access_tombstone"
    until(lambda: here.store.value(tombstones) + jobs(here) == total)
    assert command(here, "prune", "--older-than", "1d").exit_code == 0
    assert jobs(here) == total // 100 - 1
    assert here.store.value(tombstones) + jobs(here) == total


def test_status_reports_a_pruned_job(here: Site) -> None:
    """The status of a pruned job has its state and the number of created grants."""
    here.store.grant(a_job("old", "ann", here.store.add_interviews(2)))
    here.store.execute("UPDATE grant_access_job SET finished_at = now() - interval '100 days'")
    assert command(here, "prune", "--older-than", "12w").exit_code == 0
    ended = command(here, "status", "old")
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert lines["state"] == "succeeded"
    assert lines["created"] == "2"
