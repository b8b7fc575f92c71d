"""The commands ``prune`` and ``erase``, on a real database and queue."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from interview_access.contracts import GrantJob, announcement_key, describe, result_key
from interview_access.protocol.messages import JobMessage

from tests.storage.transactions import a_request
from tests.support.database import role
from tests.support.stores import a_cohort, a_job, until
from tests.support.workers import GRANT_ACCESS, QUEUE, ROOT, Site
from worker.cli import main

DEAD = "interview-access:dead"


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The site, without jobs and with an empty Redis database."""
    shared_site.redis.flushdb()
    shared_site.store.clear()
    return shared_site


def command(here: Site, *arguments: str, given: str = "", **settings: object) -> Result:
    """Run `interview-access` in this process."""
    return CliRunner().invoke(
        main, arguments, input=given, env=here.environment(**settings), catch_exceptions=False
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
    here.redis.xadd(DEAD, {"time": old / 1000, "message": b"x"}, id=f"{old}-0")
    here.redis.xadd(DEAD, {"time": time.time(), "message": b"y"})
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
        assert here.redis.xlen(DEAD) == (2 if options else 1)
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


@pytest.mark.parametrize(
    ("words", "failure"),
    [
        ("prune --older-than 1d", "Not everything is pruned: "),
        ("erase --user ann --yes", "Not everything is erased: "),
        ("lost-jobs", "The lost jobs cannot be read: "),
    ],
)
def test_an_outage_of_redis_is_one_sentence(
    here: Site, tmp_path: Path, words: str, failure: str
) -> None:
    """During an outage of Redis the exit status is 3, and one sentence says what to do."""
    ended = command(here, *words.split(), CELERY_BROKER_URL=f"redis+socket://{tmp_path}/none")
    assert ended.exit_code == 3
    (line,) = ended.stderr.splitlines()
    assert line.startswith(failure)
    assert line.endswith("can be reached, and run the command again.")


def test_a_role_that_may_not_prune_learns_what_it_lacks(here: Site) -> None:
    """The refusal names the missing privileges, and nothing is deleted."""
    fill(here, 100)
    privileges = "SELECT, UPDATE ON ALL TABLES IN SCHEMA public"
    with role(here.store.database_url, privileges) as url:
        ended = command(here, "prune", "--older-than", "90d", DATABASE_URL=url)
    assert ended.exit_code == 3
    assert ended.stderr.startswith("Not everything is pruned: ")
    assert "GRANT DELETE ON TABLE public.grant_access_job" in ended.stderr
    assert jobs(here) == 100


def test_a_role_without_privileges_learns_all_that_pruning_needs(here: Site) -> None:
    """Privileges to read are named beside those to delete, each once."""
    with role(here.store.database_url) as url:
        ended = command(here, "prune", "--older-than", "90d", DATABASE_URL=url)
    assert ended.exit_code == 3
    assert "GRANT SELECT ON TABLE public.grant_access_job" in ended.stderr
    assert "GRANT DELETE ON TABLE public.grant_access_job" in ended.stderr
    assert ended.stderr.count("SELECT on public.grant_access_cancellation") == 1


def test_a_role_that_may_not_erase_learns_what_it_lacks(here: Site) -> None:
    """The refusal names the missing privileges, and the user stays."""
    here.store.grant(a_job("a", "ann", []))
    with role(here.store.database_url, "SELECT ON ALL TABLES IN SCHEMA public") as url:
        ended = command(here, "erase", "--user", "ann", "--yes", DATABASE_URL=url)
    assert ended.exit_code == 3
    assert ended.stderr.startswith("Not everything is erased: the role ")
    assert "run GRANT UPDATE ON TABLE public.grant_access_job TO" in ended.stderr
    assert "INSERT" not in ended.stderr


def test_status_reports_a_pruned_job(here: Site) -> None:
    """The status of a pruned job has its state and the number of created grants."""
    here.store.grant(a_job("old", "ann", here.store.add_interviews(2)))
    here.store.execute("UPDATE grant_access_job SET finished_at = now() - interval '100 days'")
    assert command(here, "prune", "--older-than", "12w").exit_code == 0
    ended = command(here, "status", "old")
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert lines["state"] == "succeeded"
    assert lines["created"] == "2"


def test_status_of_a_pruned_job_does_not_depend_on_its_announcement(here: Site) -> None:
    """A pruned job is reported as it ended, also while Redis has its announcement."""
    sent = datetime.now(UTC).isoformat()
    announced = {"task": GRANT_ACCESS, "digest": "d" * 64, "sent_at": sent}
    here.redis.set("interview-access:job:old", json.dumps(announced))
    assert command(here, "cancel", "old").exit_code == 0
    here.redis.delete("celery-task-meta-old")
    here.store.execute("UPDATE grant_access_job SET finished_at = now() - interval '100 days'")
    assert command(here, "prune", "--older-than", "12w").exit_code == 0
    for words in ("status", "old"), ("cancel", "old"):
        assert json.loads(command(here, *words, "--json").stdout)["state"] == "cancelled"


class TestErase:
    """``erase``."""

    def message(self, here: Site, arguments: object, *, job_id: str = "x") -> bytes:
        """Return a message as a bare Redis client would push it."""
        here.push(arguments, job_id=job_id, queue="aside")
        message = here.redis.lpop("aside")
        assert isinstance(message, bytes)
        return message

    def test_nothing_names_the_user_afterwards(self, here: Site) -> None:
        """The user is in no table of the worker and in no key of Redis; the sum of counts stays."""
        ids = here.store.add_interviews(2)
        here.store.grant(
            a_job("a", "ann", ids), a_job("b", "bob", ["ann"]), a_cohort("c", ["ann", "bob"], ids)
        )
        here.redis.set(
            "celery-task-meta-b",
            json.dumps({"status": "FAILURE", "result": {"exc_message": ["'ann' is no UUID", {}]}}),
        )
        here.redis.set("celery-task-meta-a", json.dumps({"status": "SUCCESS", "result": {}}))
        message = self.message(here, {"user_id": "ann", "interview_ids": ids})
        here.redis.xadd(DEAD, {"reason": "none", "message": message})
        here.redis.xadd(DEAD, {"reason": "got 'ann'", "message": b"\xff"})
        kept = here.redis.xadd(DEAD, {"reason": "none", "message": b'{"user_id": "annette"}'})
        total = here.store.value("SELECT sum(created) FROM grant_access_job")

        ended = command(here, "erase", "--user", "ann", "--yes")

        assert ended.exit_code == 0, ended.output
        assert ended.stdout.splitlines() == [
            "jobs                                3 erased",
            "requests                            0 erased",
            "dead letters                        2 erased",
            "other announcements                 0 erased",
            "results                             1 erased",
        ]
        for table in "grant_access_job", "grant_access_cohort", "grant_access_rejection":
            named = rf"SELECT count(*) FROM {table} AS one WHERE one::text ~ '\mann\M'"  # noqa: S608 - constants
            assert here.store.value(named) == 0
        letters: Any = here.redis.xrange(DEAD)
        assert [letter_id for letter_id, _ in letters] == [kept]
        assert here.redis.exists("celery-task-meta-a", "celery-task-meta-b") == 1
        assert here.store.value("SELECT sum(created) FROM grant_access_job") == total

    def test_announcements_of_erased_jobs_are_deleted(self, here: Site) -> None:
        """Announcements of the user's jobs, which have actor and reason, leave Redis."""
        here.store.grant(a_job("a", "ann", []), a_job("b", "bob", []))
        for job_id, actor in ("a", "hr"), ("b", "bob"):
            message = JobMessage.of(GrantJob("ann", [], job_id, actor=actor, reason="She is ill."))
            here.redis.set(message.key, message.announcement.model_dump_json())
        assert command(here, "erase", "--user", "ann", "--dry-run").exit_code == 0
        assert here.redis.exists(announcement_key("a"), announcement_key("b")) == 2
        assert command(here, "erase", "--user", "ann", "--yes").exit_code == 0
        assert here.redis.exists(announcement_key("a")) == 0
        assert here.redis.exists(announcement_key("b")) == 1

    def test_announcements_of_jobs_outside_of_the_ledger_are_deleted(self, here: Site) -> None:
        """They are found by actor and reason, and those of the user's dead letters by their job."""
        for job_id, actor, reason in (
            ("actor", "ann", None),
            ("reason", "hr", "as ann asked"),
            ("dead", "hr", "She is ill."),
            ("others", "ann@example.org", "ann-marie asked at 12:00"),
        ):
            message = JobMessage.of(GrantJob("bob", [], job_id, actor=actor, reason=reason))
            here.redis.set(message.key, message.announcement.model_dump_json())
        here.redis.set(announcement_key("damaged"), "{")
        dead = {"user_id": "ann", "interview_ids": []}
        here.redis.xadd(DEAD, {"job_id": "dead", "message": self.message(here, dead)})
        here.redis.set(result_key("dead"), json.dumps({"status": "FAILURE", "result": "'ann'"}))
        letters: Any = here.redis.xrange(DEAD)
        for option, done in ("--dry-run", "would be erased"), ("--yes", "erased"):
            ended = command(here, "erase", "--user", "ann", option)
            assert ended.exit_code == 0, ended.output
            assert f"dropped: 1 ({letters[0][0].decode()}); requeue" in ended.stderr
            counts = dict(re.findall(rf"^(.+?) +(\d+) {done}$", ended.stdout, re.MULTILINE))
            assert (counts["jobs"], counts["dead letters"]) == ("0", "1")
            assert counts["other announcements"] == "3"
        assert counts["results"] == "1"
        left = set(here.redis.scan_iter("interview-access:job:*"))
        assert left == {announcement_key(one).encode() for one in ("others", "damaged")}
        assert not here.redis.exists(result_key("dead"))
        assert here.redis.xlen(DEAD) == 0

    @pytest.mark.parametrize(
        "naming",
        [
            [[42, []], {}, {}],
            [[], {"user_ids": ["bob", 42], "interview_ids": []}, {}],
            [[], {}, {"callbacks": [{"task": "t", "args": [], "kwargs": {"user": 42}}]}],
            {"task": "t", "args": [{"id": 42}], "retries": 0},
        ],
        ids=["argument", "named argument", "callback", "protocol 1"],
    )
    def test_a_number_in_the_arguments_is_the_users_id(self, here: Site, naming: Any) -> None:
        """A dead letter that has the ID as a number among its arguments is dropped."""
        message = json.dumps({"headers": {"id": "x"}, "body": json.dumps(naming)})
        here.redis.xadd(DEAD, {"message": message})
        ended = command(here, "erase", "--user", "42", "--yes")
        assert "dead letters                        1 erased" in ended.stdout.splitlines()
        assert here.redis.xlen(DEAD) == 0

    def test_other_numbers_are_not_the_users_id(self, here: Site) -> None:
        """Numbers of headers and options, and numbers that contain the ID, name nobody."""
        signature = {"task": "t", "args": [420], "kwargs": {"n": 4.2}, "options": {"retries": 42}}
        message = {
            "headers": {"id": "x", "retries": 42, "timelimit": [42, None]},
            "properties": {"priority": 42},
            "body": json.dumps([[142, True], {}, {"callbacks": [signature], "n": 42}]),
        }
        here.redis.xadd(DEAD, {"attempts": 42, "message": json.dumps(message)})
        here.redis.xadd(DEAD, {"reason": "The number 42 is not read: got the number 421."})
        ended = command(here, "erase", "--user", "42", "--yes")
        assert "dead letters                        0 erased" in ended.stdout.splitlines()
        assert here.redis.xlen(DEAD) == 2

    def test_a_dead_letter_of_any_nesting_is_searched(self, here: Site) -> None:
        """One that nests too deeply to be searched by value does not end the command."""
        for name, user in ("naming", '"ann"'), ("other", '"bob"'):
            nested = "[" * 600 + user + "]" * 600
            here.redis.xadd(DEAD, {"reason": name, "message": f'{{"headers": {nested}}}'})
        assert command(here, "erase", "--user", "ann", "--yes").exit_code == 0
        assert [one["reason"] for one in here.dead_letters()] == ["other"]

    def test_an_interrupted_erasure_is_continued(self, here: Site) -> None:
        """If Redis fails, the ledger names the user still, and the next run erases the rest."""
        here.store.grant(a_job("a", "ann", []))
        key = result_key("a")
        here.redis.lpush(key, "a value of another type, which GET refuses")
        assert command(here, "erase", "--user", "ann", "--yes").exit_code == 3
        here.redis.delete(key)
        here.redis.set(key, json.dumps({"status": "FAILURE", "result": "'ann' is no UUID"}))
        assert command(here, "erase", "--user", "ann", "--yes").exit_code == 0
        assert not here.redis.exists(key)

    @pytest.mark.parametrize(
        "place", [QUEUE, f"{QUEUE}\x06\x169", "isolated", "delayed", "claimed", "outbox"]
    )
    def test_an_unfinished_job_is_refused(self, here: Site, place: str) -> None:
        """While a job of the user is queued, delayed, running or requested, nothing is changed."""
        here.store.grant(a_job("a", "ann", []))
        if place == "outbox":
            here.store.add_request(a_request("later"))
        else:
            message = self.message(here, {"user_id": "ann", "interview_ids": []}, job_id="later")
            value = QUEUE.encode() + b"\0" + message
            if place.startswith(QUEUE):
                here.redis.lpush(place, message)
            elif place == "isolated":
                here.redis.lpush("interview-access:isolated", value)
            else:
                key = {"delayed": "deferred", "claimed": "held:session"}[place]
                here.redis.hset(f"interview-access:{key}", "1", value)
        ended = command(here, "erase", "--user", "ann", "--yes")
        assert ended.exit_code == 1
        assert ended.stderr.startswith(
            "Jobs whose messages name the user: 1 (later); wait for them"
        )
        finished = here.store.storage.get_finished_job("a")
        assert finished
        assert finished.job.user_id == "ann"

    def test_a_cancelled_job_that_is_delayed_does_not_block_it(self, here: Site) -> None:
        """The delayed message of a cancelled job is removed, and the job stays cancelled."""
        message = self.message(here, {"user_id": "ann", "interview_ids": []}, job_id="later")
        here.redis.hset("interview-access:deferred", "1", QUEUE.encode() + b"\0" + message)
        here.redis.zadd("interview-access:due", {"1": time.time() + 3600})
        assert command(here, "cancel", "--user", "ann", "--yes").exit_code == 0
        ended = command(here, "erase", "--user", "ann", "--yes")
        assert ended.exit_code == 0, ended.stderr
        assert not here.redis.exists("interview-access:deferred", "interview-access:due")
        dumps = {key: here.redis.dump(key) or b"" for key in here.redis.scan_iter()}
        assert not [key for key, dump in dumps.items() if b"ann" in dump]
        assert json.loads(command(here, "status", "later", "--json").stdout)["state"] == "cancelled"

    def test_a_person_with_a_long_name_is_erased(self, here: Site) -> None:
        """An actor's name may be longer than a user ID, and is erased too."""
        actor = f"{'a' * 60}@example.org"
        message = JobMessage.of(GrantJob("bob", [], "one", actor=actor))
        here.redis.set(message.key, message.announcement.model_dump_json())
        assert command(here, "erase", "--user", actor, "--yes").exit_code == 0
        assert here.redis.exists(announcement_key("one")) == 0

    @pytest.mark.parametrize("user_id", ["", "u" * 300, "\udcff"], ids=["empty", "long", "bytes"])
    def test_an_invalid_user_is_a_usage_error(self, here: Site, user_id: str) -> None:
        """An empty ID, as of an unset shell variable, is refused: everything contains it.

        So is one that neither a user nor an actor can have.
        """
        ended = command(here, "erase", "--user", user_id, "--yes")
        assert ended.exit_code == 2
        assert f"got {describe(user_id)}, expected a string of 1 to 36 characters" in ended.stderr

    def test_it_asks_first(self, here: Site) -> None:
        """Without a confirmation nothing is changed; a dry run does not ask."""
        here.store.grant(a_job("a", "ann", []))
        assert command(here, "erase", "--user", "ann", given="n\n").exit_code == 1
        ended = command(here, "erase", "--user", "ann", "--dry-run")
        assert ended.stdout.splitlines()[0].split() == ["jobs", "1", "would", "be", "erased"]
        finished = here.store.storage.get_finished_job("a")
        assert finished
        assert finished.job.user_id == "ann"
