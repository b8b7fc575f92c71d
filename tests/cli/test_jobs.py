"""The command ``jobs``, on a database without a worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result

from devstack.servers import LocalStack
from storage.dtos import AuditDTO, FiguresDTO, FinishedJobDTO, OutcomeDTO
from tests.storage.transactions import finish, ledger_entry
from tests.support.database import database, role
from tests.support.stores import PostgresStore, postgres_store
from worker.cli import main

STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ORIGIN = AuditDTO(
    requested_at=STARTED - timedelta(seconds=2),
    enqueued_at=STARTED - timedelta(seconds=1),
    started_at=STARTED,
    attempts=2,
    worker="celery@one",
    actor="hr",
    reason="Second round",
)
OK = OutcomeDTO("succeeded", {"created_access_count": 7}, figures=FiguresDTO(10, 1, 2, 7))


def a_failure(state: str, kind: str) -> OutcomeDTO:
    """Return the outcome of a job that did not succeed."""
    return OutcomeDTO(state, error={"type": kind, "sentence": "No.", "details": {}})


JOBS = [
    ("one", "ann", ORIGIN, OK),
    ("two", "bob", ORIGIN, a_failure("failed", "InvalidInterviewIdException")),
    ("three", None, AuditDTO(actor="bot"), OK),
    ("four", "ann", AuditDTO(), a_failure("cancelled", "JobCancelledException")),
]
"""Finished jobs, oldest first: ID, user, origin and outcome."""
INTERVIEW = UUID(int=10)


@pytest.fixture(scope="module")
def store(stack: LocalStack, _migrated: str) -> Iterator[PostgresStore]:
    """A database with finished jobs, each two hours after the one before, until now."""
    with (
        database(stack.database_url, template=_migrated) as url,
        postgres_store(url) as store,
    ):
        for hours, (job_id, user, audit, outcome) in enumerate(reversed(JOBS)):
            entry = replace(ledger_entry(job_id), user_id=user, audit=audit)
            finish(store.storage, FinishedJobDTO(entry, outcome))
            store.execute(
                "UPDATE grant_access_job SET finished_at = finished_at - :age WHERE job_id = :id",
                age=timedelta(hours=2 * hours),
                id=job_id,
            )
        store.execute(
            "INSERT INTO interview_interview (id, title, duration) VALUES (:id, '', '1 hour')",
            id=INTERVIEW,
        )
        for user, creator in ("ann", "one"), ("cyd", "three"), ("dan", None):
            store.execute(
                "INSERT INTO interview_userinterviewaccess (user_id, interview_id, created_by_job)"
                " VALUES (:user, :interview, :job)",
                user=user,
                interview=INTERVIEW,
                job=creator,
            )
        yield store


def run(store: PostgresStore, *words: str, url: str = "") -> Result:
    """Run `interview-access jobs` in this process, with PostgreSQL alone."""
    env = {"DATABASE_URL": url or store.database_url, "CELERY_BROKER_URL": None}
    return CliRunner().invoke(main, ["jobs", *words], env=env, catch_exceptions=False)


def listed(store: PostgresStore, *words: str) -> list[dict[str, Any]]:
    """Return what `jobs --json` prints."""
    ended = run(store, "--json", *words)
    assert ended.exit_code == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["four", "three", "two", "one"]),
        (["--user", "ann"], ["four", "one"]),
        (["--user", "cyd"], ["three"]),
        (["--user", "cyd", "--actor", "bot", "--since", "3h"], ["three"]),
        (["--user", "cyd", "--until", "3h"], []),
        (["--user", "dan"], []),
        (["--interview", str(INTERVIEW)], ["three", "one"]),
        (["--interview", INTERVIEW.hex.upper(), "--user", "ann"], ["one"]),
        (["--interview", str(INTERVIEW), "--user", "cyd"], ["three"]),
        (["--interview", str(UUID(int=11))], []),
        (["--actor", "hr"], ["two", "one"]),
        (["--state", "failed"], ["two"]),
        (["--state", "succeeded"], ["three", "one"]),
        (["--since", "3h"], ["four", "three"]),
        (["--until", "3h"], ["two", "one"]),
        (["--since", "5h", "--until", "90min"], ["three", "two"]),
        (["--since", "2000-01-01"], ["four", "three", "two", "one"]),
        (["--until", "2000-01-01T00:00:00+02:00"], []),
        (["--user", "ann", "--actor", "hr", "--state", "succeeded", "--since", "1d"], ["one"]),
        (["--user", "nobody"], []),
    ],
    ids=" ".join,
)
def test_filters_select_jobs(store: PostgresStore, words: list[str], expected: list[str]) -> None:
    """Each option selects, all of them combine, and the newest job comes first."""
    assert [one["job_id"] for one in listed(store, *words)] == expected


def test_json_has_every_known_field(store: PostgresStore) -> None:
    """A line of JSON is the status of the job, as `status --json` prints it."""
    (job,) = listed(store, "--user", "ann", "--state", "succeeded")
    assert job.pop("finished_at")
    assert job == {
        "job_id": "one",
        "state": "succeeded",
        "task": "interview_access.grant_access",
        "user_id": "ann",
        "requested": 10,
        "repeated": 1,
        "already_granted": 2,
        "created": 7,
        "result": {"created_access_count": 7},
        "requested_at": "2026-01-02T03:04:03Z",
        "enqueued_at": "2026-01-02T03:04:04Z",
        "started_at": "2026-01-02T03:04:05Z",
        "attempts": 2,
        "worker": "celery@one",
        "actor": "hr",
        "reason": "Second round",
    }


def test_text_has_a_line_for_each_job(store: PostgresStore) -> None:
    """A line names time, state, job and task, and what is known beside."""
    ended = run(store, "--actor", "hr")
    failed, succeeded = (line.partition("Z  ")[2] for line in ended.stdout.splitlines())
    assert failed == (
        "failed     two  interview_access.grant_access  user=bob  error=InvalidInterviewIdException"
        "  attempts=2  worker=celery@one  actor=hr  reason='Second round'"
    )
    assert succeeded.startswith("succeeded  one  ")
    assert "  created=7  " in succeeded


def test_a_limit_is_noted(store: PostgresStore) -> None:
    """If there may be more jobs, standard error says how to list them."""
    ended = run(store, "--limit", "2", "--json")
    assert [json.loads(line)["job_id"] for line in ended.stdout.splitlines()] == ["four", "three"]
    assert ended.stderr == "The newest 2 are listed; --limit and --until list others.\n"


def test_no_job_is_noted(store: PostgresStore) -> None:
    """Without a job standard error says so, and the exit status is 0."""
    ended = run(store, "--user", "nobody")
    assert (ended.exit_code, ended.stdout) == (0, "")
    assert ended.stderr == "No finished job is selected.\n"


def test_control_characters_do_not_reach_the_terminal(store: PostgresStore) -> None:
    """Values of messages, also those that another writer has stored, are escaped."""
    store.execute(
        "INSERT INTO grant_access_job (job_id, task, state, user_id, request_digest, actor, reason,"
        " finished_at) VALUES ('evil', E't\\x1b', 'failed', E'u\\x1b[31m', '', E'a\\n', E'\\u202e',"
        " now() - interval '1 year')"
    )
    printed = run(store, "--until", "300d").stdout
    assert printed.removesuffix("\n").isprintable()
    assert "user=u\\x1b[31m" in printed
    assert run(store, "--until", "300d", "--json").stdout.removesuffix("\n").isprintable()


def test_no_value_reads_as_another_field(store: PostgresStore) -> None:
    """A value of a message that has spaces is in quotes."""
    store.execute(
        "INSERT INTO grant_access_job (job_id, task, state, user_id, request_digest, actor,"
        " finished_at) VALUES ('x  t  created=9', 't', 'failed', 'bob  error=none', '',"
        " $$it's me  reason=signed$$, now() - interval '2 years')"
    )
    printed = run(store, "--until", "700d").stdout
    assert printed.rstrip().partition("Z  ")[2] == (
        "failed     'x  t  created=9'  t  user='bob  error=none'  actor=\"it's me  reason=signed\""
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--since", "yesterday"], "got 'yesterday', expected an age such as 30min, 12h or 7d"),
        (["--until", "\x1b"], "got '\\\\x1b', expected an age"),
        (["--state", "queued"], "'queued' is not one of 'cancelled', 'expired', 'failed'"),
        (["--limit", "0"], "got '0', expected a whole number from 1 to 10,000."),
        (["--limit", "x"], "got 'x', expected a whole number from 1 to 10,000."),
        (["--user", "\udcff"], "expected a string of 1 to 36 characters without NUL or lone"),
        (["--user", ""], "got the string '', expected a string of 1 to 36 characters"),
        (["--user", "u" * 300], "expected a string of 1 to 36 characters"),
        (["--actor", "\udcff"], "expected text in UTF-8"),
        (["--interview", "7"], "got the string '7', expected a UUID of 32 hex digits"),
        (
            ["--since", "2030-01-02", "--until", "2030-01-01"],
            "--until: got 2030-01-01T00:00:00+00:00, expected a time after --since, 2030-01-02T00",
        ),
        (["--since", "2030-01-02", "--until", "2030-01-02"], "expected a time after --since"),
        (["--since", "1h", "--until", "2h"], "expected a time after --since"),
    ],
)
def test_invalid_options_are_refused(store: PostgresStore, words: list[str], sentence: str) -> None:
    """An invalid option is a usage error that names what was expected."""
    ended = run(store, *words)
    assert ended.exit_code == 2
    assert sentence in ended.stderr


def test_an_unavailable_database(store: PostgresStore) -> None:
    """Without PostgreSQL the exit status is 3, with one sentence."""
    ended = run(store, url="postgresql://nobody@127.0.0.1:1/none")
    assert ended.exit_code == 3
    assert ended.stderr.startswith("The finished jobs cannot be read: ")
    assert ended.stderr.endswith(
        "; check that PostgreSQL can be reached, and run the command again.\n"
    )
    assert ended.stderr.count("\n") == 1


def test_a_role_that_reads_suffices(store: PostgresStore) -> None:
    """The command needs SELECT on the ledger alone; another role learns what it lacks."""
    with role(store.database_url, "SELECT ON grant_access_job") as url:
        assert run(store, url=url).exit_code == 0
    with role(store.database_url) as url:
        ended = run(store, url=url)
    assert ended.exit_code == 3
    assert "GRANT SELECT ON TABLE public.grant_access_job" in ended.stderr


def test_jobs_by_user_are_found_through_grants(store: PostgresStore) -> None:
    """A role that may not read the grants learns what it lacks for the jobs of a user."""
    with role(store.database_url, "SELECT ON grant_access_job") as url:
        ended = run(store, "--user", "ann", url=url)
    assert ended.exit_code == 3
    assert "GRANT SELECT ON TABLE public.interview_userinterviewaccess TO" in ended.stderr
    assert "grant_access_" not in ended.stderr.partition("GRANT ")[2]
