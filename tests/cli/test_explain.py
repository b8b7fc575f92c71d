"""The command ``explain``, on a real database."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import make_url

from storage.dtos import AuditDTO
from tests.storage.transactions import create_grants
from tests.support.database import role
from tests.support.stores import PostgresStore, a_cohort, a_job, postgres_store
from tests.support.workers import ROOT
from worker.cli import main

AUDIT = ROOT / "docs" / "audit.md"
ORIGIN = AuditDTO(
    enqueued_at=datetime(2030, 1, 31, 12, tzinfo=UTC),
    started_at=datetime(2030, 1, 31, 12, 0, 1, tzinfo=UTC),
    attempts=1,
    worker="celery@worker-1",
    actor="hr",
    reason="second round",
)


@pytest.fixture(scope="module")
def shared(_stores_url: str) -> Iterator[PostgresStore]:
    """A database, which the tests empty."""
    with postgres_store(_stores_url) as store:
        yield store


@pytest.fixture
def here(shared: PostgresStore) -> PostgresStore:
    """The database, without interviews, grants and jobs."""
    shared.empty()
    return shared


def explain(url: str, user_id: str, interview_id: str, *options: str) -> Result:
    """Run `interview-access explain` in this process."""
    arguments = ["explain", "--user", user_id, "--interview", interview_id, *options]
    return CliRunner().invoke(main, arguments, env={"DATABASE_URL": url}, catch_exceptions=False)


def explained(here: PostgresStore, user_id: str, interview_id: str) -> dict[str, Any]:
    """Return what `interview-access explain --json` prints about an existing grant."""
    done = explain(here.database_url, user_id, interview_id, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_the_job_is_named_with_what_the_ledger_knows(here: PostgresStore) -> None:
    """The job's ID, task, state, figures and time are printed, as docs/audit.md shows."""
    ids = here.add_interviews(2)
    job = a_cohort("cohort", ["bob", "ann"], ids)
    here.grant(replace(job, entry=replace(job.entry, audit=ORIGIN)))
    found = explained(here, "ann", ids[0])
    (example,) = re.findall(r"```json\n(.*?)```", AUDIT.read_text(encoding="utf-8"), re.DOTALL)
    shown = json.loads(example)
    assert (shown.keys(), shown["job"].keys()) == (found.keys(), found["job"].keys())
    assert found["job"].pop("finished_at")
    assert found == {
        "user_id": "ann",
        "interview_id": ids[0],
        "interview_exists": True,
        "has_access": True,
        "job": {
            "job_id": "cohort",
            "state": "succeeded",
            "task": "interview_access.grant_cohort_access",
            "requested": 4,
            "repeated": 0,
            "already_granted": 0,
            "created": 4,
            "enqueued_at": "2030-01-31T12:00:00Z",
            "started_at": "2030-01-31T12:00:01Z",
            "attempts": 1,
            "worker": "celery@worker-1",
            "actor": "hr",
            "reason": "second round",
        },
        "job_is_pruned": False,
    }


def test_fields_are_printed_in_words(here: PostgresStore) -> None:
    """Without --json each field is a line, and a job that the ledger has needs no note."""
    ids = here.add_interviews(1)
    here.grant(a_job("one", "ann", ids))
    done = explain(here.database_url, "ann", ids[0])
    assert (done.exit_code, done.stderr) == (0, "")
    fields = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert fields["has_access"] == "yes"
    assert fields["job_id"] == "one"
    assert fields["created"] == "1"


def test_a_uuid_may_be_spelled_without_hyphens(here: PostgresStore) -> None:
    """A UUID of 32 digits, in any case, names the interview."""
    ids = here.add_interviews(1)
    here.grant(a_job("one", "ann", ids))
    found = explained(here, "ann", UUID(ids[0]).hex.upper())
    assert (found["interview_id"], found["job"]["job_id"]) == (ids[0], "one")


@pytest.mark.parametrize(
    "interview_id", ["", "no-uuid", f"urn:uuid:{UUID(int=1)}", f"{{{UUID(int=1)}}}"]
)
def test_a_malformed_uuid_is_a_usage_error(here: PostgresStore, interview_id: str) -> None:
    """An interview ID that is no UUID is refused, with what was received and is expected."""
    done = explain(here.database_url, "ann", interview_id)
    assert done.exit_code == 2
    assert f"'{interview_id}', expected a UUID of 32 hex digits or 8-4-4-4-12, in" in done.stderr


@pytest.mark.parametrize("user_id", ["", "u" * 37])
def test_an_invalid_user_is_a_usage_error(here: PostgresStore, user_id: str) -> None:
    """A user ID that no user can have is refused, with what is expected."""
    done = explain(here.database_url, user_id, str(uuid4()))
    assert done.exit_code == 2
    assert "expected a string of 1 to 36 characters" in done.stderr


def test_missing_access_and_a_missing_interview(here: PostgresStore) -> None:
    """Without access the exit status is 1, and the note tells whether the interview exists."""
    (interview_id,) = here.add_interviews(1)
    done = explain(here.database_url, "ann", interview_id)
    assert (done.exit_code, done.stderr) == (1, "The user has no access to the interview.\n")
    done = explain(here.database_url, "ann", str(uuid4()))
    assert (done.exit_code, done.stderr) == (1, "No interview has this ID.\n")


def test_a_grant_of_the_platform_names_no_job(here: PostgresStore) -> None:
    """A grant that no job created is explained as such; the user has access."""
    (interview_id,) = here.add_interviews(1)
    create_grants(here.storage, "ann", interview_id)
    here.grant(a_job("later", "ann", [interview_id]))
    done = explain(here.database_url, "ann", interview_id)
    assert done.exit_code == 0
    assert "names no job: the platform created it" in done.stderr
    assert explained(here, "ann", interview_id)["job"] is None


def test_a_pruned_job_is_named(here: PostgresStore) -> None:
    """After pruning, the job's ID, its state and its count remain, and a note says why."""
    ids = here.add_interviews(2)
    here.grant(a_job("old", "ann", ids))
    with here.storage.transaction() as transaction:
        transaction.prune_jobs(timedelta(0), 1)
    found = explained(here, "ann", ids[0])
    assert found["job"] == {"job_id": "old", "state": "succeeded", "created": 2}
    assert found["job_is_pruned"] is True
    assert "was pruned" in explain(here.database_url, "ann", ids[0]).stderr


def test_a_job_without_a_record_is_named(here: PostgresStore) -> None:
    """If somebody deleted the ledger's row, the job's ID remains."""
    ids = here.add_interviews(1)
    here.grant(a_job("lost", "ann", ids))
    here.execute("DELETE FROM grant_access_job")
    assert explained(here, "ann", ids[0])["job"] == {"job_id": "lost", "state": "unknown"}
    assert "neither its row nor a tombstone" in explain(here.database_url, "ann", ids[0]).stderr


def test_reading_suffices(here: PostgresStore) -> None:
    """A role needs SELECT on few columns, which a refusal names; then it reads the same."""
    ids = here.add_interviews(1)
    here.grant(a_job("one", "ann", ids))
    with role(here.database_url) as url:
        done = explain(url, "ann", ids[0])
        assert done.exit_code == 3
        name = make_url(url).username
        assert (
            f"GRANT SELECT ON TABLE public.interview_userinterviewaccess TO {name}" in done.stderr
        )
        for grant in done.stderr.partition("run ")[2].rstrip(".\n").split("; "):
            here.execute(grant)
        done = explain(url, "ann", ids[0], "--json")
        assert json.loads(done.stdout) == explained(here, "ann", ids[0])


def test_an_unreachable_database_is_named() -> None:
    """The exit status is 3, and the sentence says what to do."""
    done = explain("postgresql://127.0.0.1:1/none", "ann", str(uuid4()))
    assert done.exit_code == 3
    assert done.stderr.startswith("The grant cannot be read: ")
    assert done.stderr.endswith(
        "; check that PostgreSQL can be reached, and run the command again.\n"
    )
