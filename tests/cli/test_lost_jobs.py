"""The command ``lost-jobs``, on a real database and a Redis with results of every kind."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result
from interview_access.contracts import result_key

from storage.samples import NAMED_SAMPLES, load_samples
from tests.support.stores import a_job
from tests.support.workers import Site
from worker.cli import main

COUNTED = {"success": True, "created_access_count": 3}


def command(here: Site, *options: str, given: str = "") -> Result:
    """Run `interview-access lost-jobs` in this process."""
    return CliRunner().invoke(
        main, ["lost-jobs", *options], input=given, env=here.environment(), catch_exceptions=False
    )


def store(here: Site, job_id: str, result: object, status: str = "SUCCESS") -> None:
    """Store a result as a worker does."""
    meta = {"status": status, "result": result, "task_id": job_id}
    here.redis.set(result_key(job_id), json.dumps(meta))


def test_only_successes_without_outcome_are_listed(idle: Site) -> None:
    """Jobs in the ledger or pruned, failures and results of other applications are left out."""
    load_samples(idle.store.database_url, len(NAMED_SAMPLES))
    for job_id in ("finished", "pruned"):
        idle.store.grant(a_job(job_id, "ann", NAMED_SAMPLES))
        store(idle, job_id, COUNTED)
    idle.store.execute(
        "UPDATE grant_access_job SET finished_at = finished_at - interval '9 days'"
        " WHERE job_id = 'pruned'"
    )
    pruned = CliRunner().invoke(main, ["prune", "--older-than", "1d"], env=idle.environment())
    assert pruned.exit_code == 0, pruned.stderr
    store(idle, "failed", {"exc_type": "InvalidInterviewIdException"}, "FAILURE")
    store(idle, "running", {"pid": 1}, "STARTED")
    store(idle, "other's", {"rows": 3})
    store(idle, "another's", 3)
    idle.redis.set(result_key("unreadable"), b"\xff")
    idle.redis.lpush(result_key("list"), "x")
    store(idle, "lost", COUNTED)
    store(idle, "lost attempt", {"success": True, "interview_attempt_id": "an ID"})

    done = command(idle)
    assert (done.exit_code, done.stderr) == (0, "2 lost jobs.\n")
    assert sorted(done.stdout.splitlines()) == [
        "lost  -  not announced  3",
        "lost attempt  -  not announced  an ID",
    ]


def test_jobs_of_many_pages_are_forgotten_after_a_confirmation(idle: Site) -> None:
    """Nothing is deleted without a yes; then each lost job's result is."""
    for number in range(1_200):
        store(idle, f"job {number}", COUNTED)
    store(idle, "other's", {"rows": 3})
    assert command(idle, "--forget", given="n\n").exit_code == 1
    assert idle.redis.dbsize() == 1_201

    done = command(idle, "--forget", "--json", given="y\n")
    assert done.exit_code == 0, done.stderr
    listed = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["job_id"] for one in listed} == {f"job {number}" for number in range(1_200)}
    assert {one["result"]["created_access_count"] for one in listed} == {3}
    assert idle.redis.keys() == [result_key("other's").encode()]
