"""The commands ``purge`` and ``cancel`` by filter, on a queue without a worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import CliRunner, Result
from interview_access.contracts import CREATE_INTERVIEW_ATTEMPT, GRANT_ACCESS, GrantJob
from interview_access.errors import JobCancelledException
from interview_access.producer import InterviewAccessClient
from sqlalchemy import text

from tests.support.database import connected
from tests.support.stores import a_job, until
from tests.support.workers import QUEUE, ROOT, Site, worker
from worker.broker.claims import Action, Claims, Disposition
from worker.cli import main
from worker.operations.inspection import inspect

LANE = f"{QUEUE}\x06\x169"
PLACES = ("priority-0", "priority-3", "priority-9", "isolated", "delayed")
MANY = 5_000
CONTESTED = 2_500
"""Number of jobs of which a worker executes some before the command reaches them."""
ONE = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def here(shared_site: Site) -> Site:
    """The site, with an empty Redis database, ledger and outbox."""
    shared_site.redis.flushdb()
    shared_site.store.execute("DELETE FROM grant_access_request")
    shared_site.store.clear()
    return shared_site


def command(here: Site, *words: str, given: str = "", **settings: object) -> Result:
    """Run `interview-access` in this process."""
    return CliRunner().invoke(
        main, words, input=given, env=here.environment(**settings), catch_exceptions=False
    )


def state(here: Site, job_id: str) -> str:
    """Return the state of a job, as `status` reports it."""
    return str(json.loads(command(here, "status", job_id, "--json").stdout)["state"])


def claim(here: Site, session: str, room: int = 10) -> list[str]:
    """Claim as a worker session, and return the delivery tags."""
    claims = Claims(here.redis)
    claims.open(session)
    claimed = claims.claim(session, [QUEUE, LANE], first_tag=1, room=room, size=10**9)
    assert claimed
    return [one.tag for one in claimed.claims]


def place(here: Site, message: bytes, where: str) -> None:
    """Put a message where it waits."""
    if where.startswith("priority"):
        number = where[-1]
        here.redis.lpush(QUEUE if number == "0" else f"{QUEUE}\x06\x16{number}", message)
        return
    here.redis.rpush(QUEUE, message)
    session = uuid4().hex  # with a session's name a delivery tag is unique
    (tag,) = claim(here, session, room=1)
    actions = {"isolated": Action.FAILED_ATTEMPT, "delayed": Action.DELAY}
    delay = 3_600 if where == "delayed" else 0
    Claims(here.redis).settle(session, {tag: Disposition(actions[where], delay=delay)})
    Claims(here.redis).wake()
    Claims(here.redis).close(session)


def message_of(here: Site, job_id: str, *args: object) -> bytes:
    """Return the message that a stock Celery producer sends."""
    here.send(*(args or ("ann", [])), job_id=job_id)
    message: Any = here.redis.lpop(QUEUE)
    return bytes(message)


def is_empty(here: Site) -> bool:
    """Whether nothing waits, is delayed or is counted as attempted."""
    found = inspect(here.redis)
    counts = here.redis.exists("interview-access:tries", "interview-access:deferrals")
    return (found.waiting, found.delayed, counts) == (0, 0, 0)


def ledger(here: Site) -> dict[str, str]:
    """Return the state of each job in the ledger."""
    with connected(here.store.database_url) as connection:
        rows = connection.execute(text("SELECT job_id, state FROM grant_access_job"))
        return {row.job_id: row.state for row in rows}


class TestPurge:
    """interview-access purge."""

    def test_an_empty_queue(self, here: Site) -> None:
        """Nothing is purged, and the command succeeds."""
        ended = command(here, "purge", "--yes")
        assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "0 jobs purged.\n", "")

    @pytest.mark.parametrize("where", PLACES)
    def test_a_purged_job_is_cancelled(self, here: Site, where: str) -> None:
        """Wherever it waits, a job leaves the queue, and its poller reads the cancellation."""
        place(here, message_of(here, "purged"), where)
        ended = command(here, "purge", "--yes")
        assert (ended.exit_code, ended.stdout, ended.stderr) == (0, "1 job purged.\n", "")
        assert is_empty(here)
        assert here.meta("purged")["result"]["exc_type"] == "JobCancelledException"
        assert state(here, "purged") == "cancelled"
        finished = here.store.storage.get_finished_job("purged")
        assert finished
        assert finished.job.audit.worker == "interview-access"
        assert here.dead_letters() == []

    def test_a_purged_job_is_no_longer_queued(
        self, here: Site, client: InterviewAccessClient
    ) -> None:
        """The client's wait ends; sent again the job stays cancelled, as another it is refused."""
        job_id = client.enqueue("ann", [ONE])
        assert state(here, job_id) == "queued"
        command(here, "purge", "--yes")
        assert state(here, job_id) == "cancelled"
        with pytest.raises(JobCancelledException):
            client.wait(job_id, timeout=5)
        here.push({"user_id": "ann", "interview_ids": [ONE.replace("-", "")]}, job_id=job_id)
        here.push({"user_id": "bob", "interview_ids": [ONE]}, job_id=job_id)
        assert command(here, "purge", "--yes").stdout == "2 jobs purged.\n"
        (letter,) = here.dead_letters()
        assert "JobIdReusedException" in letter["reason"]

    def test_it_asks(self, here: Site) -> None:
        """The question names the jobs of each lane; without consent nothing is purged."""
        place(here, message_of(here, "one"), "priority-0")
        place(here, message_of(here, "two"), "priority-9")
        place(here, message_of(here, "three"), "delayed")
        ended = command(here, "purge", given="n\n")
        assert ended.exit_code == 1
        question = "Purge 2 waiting (priority-0 1, priority-9 1) and 1 delayed jobs?"
        assert ended.stderr.startswith(question)
        assert inspect(here.redis).waiting == 2
        assert command(here, "purge", given="y\n").stdout == "3 jobs purged.\n"

    def test_a_dry_run_changes_nothing(self, here: Site) -> None:
        """With --dry-run the numbers are printed and the job stays queued."""
        job_id = here.send("ann", [])
        ended = command(here, "purge", "--dry-run")
        assert ended.stdout.startswith("1 waiting (priority-0 1) and 0 delayed jobs would be")
        assert here.redis.llen(QUEUE) == 1
        assert here.meta(job_id)["status"] == "PENDING"

    def test_claimed_jobs_stay(self, here: Site) -> None:
        """A job that a worker has claimed is neither cancelled nor removed, also a dead one's."""
        running = here.send("ann", [])
        claim(here, "dead")
        waiting = here.send("bob", [])
        assert command(here, "purge", "--yes").stdout == "1 job purged.\n"
        assert inspect(here.redis).claimed == 1
        assert ledger(here) == {waiting: "cancelled"}
        assert here.meta(running)["status"] == "PENDING"

    @pytest.mark.parametrize("message", [b"", b"\xff\x00", b"[]", b"{}", b"[" * 9_000_000])
    @pytest.mark.parametrize("where", ["priority-0", "isolated", "delayed"])
    def test_a_message_without_an_id_is_a_dead_letter(
        self, here: Site, message: bytes, where: str
    ) -> None:
        """A message whose job ID cannot be read becomes a dead letter that can be requeued."""
        place(here, message, where)
        ended = command(here, "purge", "--yes")
        assert (ended.exit_code, ended.stdout) == (0, "0 jobs purged.\n")
        assert ended.stderr == "Dead letters now, because their job IDs cannot be read: 1.\n"
        assert is_empty(here)
        letters: Any = here.redis.xrange("interview-access:dead")
        (letter,) = letters
        assert letter[1][b"message"] == message
        assert letter[1][b"reason"] == b"Purged: its job ID cannot be read."
        command(here, "dead-letters", "requeue", letter[0].decode())
        assert here.redis.lrange(QUEUE, 0, -1) == [message]

    def test_an_unreadable_body_and_an_unknown_task(self, here: Site) -> None:
        """A job whose body or task is unknown is cancelled by its ID."""
        here.redis.lpush(QUEUE, json.dumps({"headers": {"id": "bodiless", "task": GRANT_ACCESS}}))
        here.send(1, task="nobodys.task", job_id="nobodys")
        command(here, "purge", "--yes")
        assert ledger(here) == {"bodiless": "cancelled", "nobodys": "cancelled"}
        assert is_empty(here)

    def test_a_finished_job_keeps_its_result(self, here: Site) -> None:
        """A duplicate delivery of a finished job is removed, and its result stays."""
        here.store.grant(a_job("finished", "ann", []))
        here.send("ann", [], job_id="finished")
        assert command(here, "purge", "--yes").stdout == "1 job purged.\n"
        assert ledger(here) == {"finished": "succeeded"}
        assert here.meta("finished")["status"] == "SUCCESS"

    def test_a_job_that_is_executed_is_left(self, here: Site) -> None:
        """A duplicate of a job whose transaction is open stays in the queue, and is named."""
        here.send("ann", [], job_id="busy")
        here.send("bob", [], job_id="other")
        with connected(here.store.database_url) as connection:
            connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended('grant_access_job:busy', 0))")
            )
            ended = command(here, "purge", "--yes")
        assert ended.stdout == "1 job purged.\n"
        assert "busy: not cancelled, a worker is executing it." in ended.stderr
        assert here.redis.llen(QUEUE) == 1
        assert ledger(here) == {"other": "cancelled"}

    def test_outbox_requests_stay_unless_named(self, here: Site) -> None:
        """Unsent outbox requests are cancelled and deleted with --outbox only."""
        for job_id in "a", "b":
            request(here, job_id, "ann")
        assert command(here, "purge", "--yes").stdout == "0 jobs purged.\n"
        dry = command(here, "purge", "--outbox", "--dry-run").stdout
        assert "and 2 unsent outbox requests would be purged" in dry
        assert command(here, "purge", "--outbox", "--yes").stdout == "2 jobs purged.\n"
        assert ledger(here) == {"a": "cancelled", "b": "cancelled"}
        assert here.store.storage.count_requests().unsent == 0
        assert state(here, "a") == "cancelled"

    def test_callbacks_of_a_failure_are_sent(self, here: Site) -> None:
        """The next task of a purged job's chain fails for its poller, as for a cancelled job."""
        following = {"task": GRANT_ACCESS, "args": [], "kwargs": {}, "options": {"task_id": "next"}}
        embed = {"callbacks": None, "errbacks": None, "chain": [following]}
        here.push({"user_id": "ann", "interview_ids": []}, job_id="first", embed=embed)
        command(here, "purge", "--yes")
        assert here.meta("next")["result"]["exc_type"] == "JobCancelledException"

    def test_many_jobs(self, here: Site, client: InterviewAccessClient) -> None:
        """Thousands of waiting jobs are cancelled in bounded memory, each once."""
        jobs = (GrantJob(f"user-{number}", (), f"job-{number}") for number in range(MANY))
        client.enqueue_many(jobs)
        ended = run_measured(here, "purge", "--yes")
        answer, peak = ended.stdout.splitlines()
        assert answer == f"{MANY:,} jobs purged."
        assert is_empty(here)
        states = ledger(here)
        assert (len(states), set(states.values())) == (MANY, {"cancelled"})
        assert int(peak) < 200 * 1024

    def test_a_full_redis(self, here: Site) -> None:
        """A Redis that has reached its maxmemory can be purged, which makes room."""
        place(here, message_of(here, "delayed"), "delayed")
        here.redis.lpush(QUEUE, message_of(here, "waiting"), b"unreadable")
        here.redis.config_set("maxmemory", 1)
        try:
            assert command(here, "purge", "--yes").stdout == "2 jobs purged.\n"
        finally:
            here.redis.config_set("maxmemory", 0)
        assert is_empty(here)
        assert ledger(here) == {"delayed": "cancelled", "waiting": "cancelled"}

    def test_an_outage_of_postgresql(self, here: Site) -> None:
        """Without PostgreSQL nothing is removed, and the command says so."""
        here.send("ann", [])
        nowhere = "postgresql://nobody@127.0.0.1:1/none"
        ended = command(here, "purge", "--yes", DATABASE_URL=nowhere)
        assert ended.exit_code == 3
        assert "Not all jobs are cancelled: " in ended.stderr
        assert here.redis.llen(QUEUE) == 1

    def test_a_killed_purge_loses_nothing(self, here: Site, client: InterviewAccessClient) -> None:
        """Killed half way, each job waits or is cancelled; another purge finishes the work."""
        jobs = [GrantJob(f"user-{number}", (), f"job-{number}") for number in range(5_000)]
        client.enqueue_many(jobs)
        with subprocess.Popen(
            [sys.executable, "-m", "worker.cli", "purge", "--yes"],
            env=here.environment(),
            cwd=ROOT,
        ) as process:
            until(lambda: here.redis.llen(QUEUE) < 4_000)
            process.send_signal(signal.SIGKILL)
        waiting: Any = here.redis.lrange(QUEUE, 0, -1)
        assert 0 < len(waiting) < 4_000
        in_queue = {json.loads(one)["headers"]["id"] for one in waiting}
        assert in_queue | ledger(here).keys() == {one.job_id for one in jobs}
        assert set(ledger(here).values()) == {"cancelled"}
        assert command(here, "purge", "--yes").exit_code == 0
        assert is_empty(here)
        assert len(ledger(here)) == 5_000


def request(here: Site, job_id: str, user_id: str) -> None:
    """Insert an outbox request for a grant of nothing."""
    here.store.execute(
        "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
        " VALUES (:job_id, :user_id, '{}')",
        job_id=job_id,
        user_id=user_id,
    )


def run_measured(here: Site, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a process that prints its peak memory in KiB as its last line."""
    code = (
        "import re, sys; from worker.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        env=here.environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


class TestCancel:
    """interview-access cancel --user, --task and --queued."""

    def fill(self, here: Site, client: InterviewAccessClient) -> dict[str, str]:
        """Enqueue jobs of two users and two tasks at several places. Returns their IDs."""
        jobs = {
            "ann": client.enqueue("ann", []),
            "bob": client.enqueue("bob", []),
            "attempt": client.enqueue_attempt(ONE, "ann"),
            "cohort": client.enqueue_cohort(["ann", "bob"], []),
        }
        place(here, message_of(here, "delayed"), "delayed")
        place(here, message_of(here, "isolated"), "isolated")
        request(here, "requested", "ann")
        request(here, "requested-bob", "bob")
        return jobs

    def test_by_user(self, here: Site, client: InterviewAccessClient) -> None:
        """All waiting jobs for a user alone are cancelled and printed, wherever they wait."""
        jobs = self.fill(here, client)
        ended = command(here, "cancel", "--user", "ann", "--yes")
        expected = {jobs["ann"], jobs["attempt"], "delayed", "isolated", "requested"}
        assert {line.split()[0] for line in ended.stdout.splitlines()} == expected
        assert ended.stderr == "5 jobs cancelled.\n"
        assert ledger(here) == dict.fromkeys(expected, "cancelled")
        assert {state(here, job_id) for job_id in expected} == {"cancelled"}
        assert state(here, jobs["bob"]) == state(here, jobs["cohort"]) == "queued"
        assert here.store.storage.count_requests().unsent == 1

    def test_by_task(self, here: Site, client: InterviewAccessClient) -> None:
        """With --task the jobs of that task are cancelled; both options narrow the selection."""
        jobs = self.fill(here, client)
        words = ("cancel", "--task", CREATE_INTERVIEW_ATTEMPT, "--yes", "--json")
        assert command(here, *words, "--user", "bob").stdout == ""
        (line,) = command(here, *words).stdout.splitlines()
        assert json.loads(line) == {"job_id": jobs["attempt"], "task": CREATE_INTERVIEW_ATTEMPT}
        assert ledger(here) == {jobs["attempt"]: "cancelled"}

    def test_all_that_wait(self, here: Site, client: InterviewAccessClient) -> None:
        """With --queued all waiting jobs are cancelled; their messages have no effect later."""
        self.fill(here, client)
        here.redis.lpush(QUEUE, b"unreadable")
        ended = command(here, "cancel", "--queued", "--yes")
        assert ended.stderr == "8 jobs cancelled.\n"
        assert set(ledger(here).values()) == {"cancelled"}
        assert here.redis.llen(QUEUE) == 5
        assert command(here, "purge", "--yes").stdout == "6 jobs purged.\n"

    def test_a_dry_run_changes_nothing(self, here: Site, client: InterviewAccessClient) -> None:
        """With --dry-run the selected jobs are printed and stay queued."""
        jobs = self.fill(here, client)
        ended = command(here, "cancel", "--user", "bob", "--dry-run")
        assert {line.split()[0] for line in ended.stdout.splitlines()} == {
            jobs["bob"],
            "requested-bob",
        }
        assert ended.stderr == "2 jobs would be cancelled.\n"
        assert ledger(here) == {}

    def test_it_asks(self, here: Site, client: InterviewAccessClient) -> None:
        """The question names the number; without consent nothing is cancelled."""
        self.fill(here, client)
        ended = command(here, "cancel", "--user", "bob", given="n\n")
        assert ended.exit_code == 1
        assert ended.stderr.startswith("Cancel 2 jobs?")
        assert ledger(here) == {}
        assert command(here, "cancel", "--user", "bob", given="y\n").exit_code == 0
        assert len(ledger(here)) == 2

    def test_nothing_is_selected(self, here: Site) -> None:
        """Without a selected job nothing is asked, and the command succeeds."""
        ended = command(here, "cancel", "--user", "nobody")
        assert (ended.exit_code, ended.stderr) == (0, "No waiting job is selected.\n")

    @pytest.mark.parametrize(
        ("words", "sentence"),
        [
            ((), "got nothing to select jobs, expected either a job ID alone, or --queued"),
            (("job", "--queued"), "got a job ID and --queued to select jobs, expected either"),
            (("job", "--user", "ann"), "got a job ID and --user or --task to select jobs"),
            (("--queued", "--user", "ann"), "got --queued and --user or --task to select"),
            (("job", "--dry-run"), "--dry-run and --yes belong to --user, --task and --queued"),
            (("job", "--yes"), "--dry-run and --yes belong to --user, --task and --queued"),
        ],
    )
    def test_contradictory_options(self, here: Site, words: tuple[str, ...], sentence: str) -> None:
        """An ID together with a filter, or neither, is a usage error that says what was given."""
        ended = command(here, "cancel", *words)
        assert ended.exit_code == 2
        assert sentence in ended.stderr

    @pytest.mark.parametrize("user_id", ["", "u" * 300], ids=["empty", "long"])
    def test_an_invalid_user_is_a_usage_error(self, here: Site, user_id: str) -> None:
        """A user ID that no job can have is refused instead of selecting nothing."""
        ended = command(here, "cancel", "--user", user_id, "--yes")
        assert ended.exit_code == 2
        assert "expected a string of 1 to 36 characters" in ended.stderr

    def test_an_invalid_job_id_is_a_usage_error(self, here: Site) -> None:
        """The sentence names the argument, what was received and what is expected."""
        ended = command(here, "cancel", "")
        assert ended.exit_code == 2
        assert "'JOB_ID': got the string '', expected 1 to 255 printable" in ended.stderr


@pytest.mark.parametrize("words", [("cancel", "--queued"), ("purge",)])
def test_each_job_has_one_end_while_a_worker_claims(
    here: Site, client: InterviewAccessClient, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Beside a worker that executes jobs, each job is executed or cancelled, and none is left."""
    jobs = [GrantJob("ann", (), f"job-{number}") for number in range(CONTESTED)]
    client.enqueue_many(jobs)
    # Small batches, so that some jobs are left for the command.
    with worker(here, tmp_path / "worker.log", GRANT_BATCH_SIZE=10):
        until(lambda: here.redis.llen(QUEUE) < CONTESTED)
        assert command(here, *words, "--yes").exit_code == 0
        until(lambda: here.redis.llen(QUEUE) == 0 and inspect(here.redis).claimed == 0)
    states = ledger(here)
    assert states.keys() == {one.job_id for one in jobs}
    assert set(states.values()) == {"succeeded", "cancelled"}
    results = {"SUCCESS": "succeeded", "FAILURE": "cancelled"}
    assert {job_id: results[here.meta(job_id)["status"]] for job_id in states} == states
    assert here.dead_letters() == []
