"""Control requests: job status and cancellation, answered by a real worker."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    GRANT_COHORT_ACCESS,
    JOB_STATUS,
    REPLY_BYTES,
    JobStatus,
    reply_key,
)
from interview_access.errors import (
    InvalidGrantRequestException,
    InvalidInterviewIdException,
    JobCancelledException,
    JobExpiredException,
    JobIdReusedException,
    NoAnswerInTimeError,
    StorageUnavailableException,
)
from interview_access.producer import InterviewAccessClient

from devstack.servers import LocalStack
from tests.support.commands import run_module
from tests.support.control import control_request, reply, reply_sizes
from tests.support.stores import Background, until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    Site,
    held_grant,
    site_with_worker,
    worker,
)

CHUNK = 10


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker of two pool processes and sample interviews."""
    folder = tmp_path_factory.mktemp("control")
    with site_with_worker(stack, _migrated, 8, folder, GRANT_CHUNK_SIZE=CHUNK) as here:
        yield here


@pytest.fixture(scope="module")
def client(here: Site) -> InterviewAccessClient:
    """A client of the site."""
    return InterviewAccessClient(here.broker)


@contextmanager
def all_busy(here: Site, samples: list[str]) -> Iterator[list[str]]:
    """Every pool process of the worker executes a job that is blocked in its second chunk."""
    users = [f"busy-{uuid4()}"[:36] for _ in range(2)]
    with ExitStack() as stack:
        for one in users:
            stack.enter_context(held_grant(here, one, samples[CHUNK]))
        jobs = [here.send(one, samples) for one in users]
        for job_id in jobs:
            here.until_state(job_id, "PROGRESS")
        yield jobs
    for job_id in jobs:
        here.answer(job_id)


class TestStatus:
    """The status of a job."""

    def test_a_success_has_figures_that_add_up(
        self, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """The requested grants are the repeated, the already granted and the created ones."""
        client.wait(client.enqueue(user, samples[:4]), timeout=30)
        job_id = client.enqueue(user, [*samples[:7], samples[0].upper(), samples[1]])
        result = client.wait(job_id, timeout=30)
        known = client.status(job_id)
        assert (known.state, known.result, known.user_id) == ("succeeded", result, user)
        assert (known.requested, known.repeated, known.already_granted, known.created) == (
            *(9, 2, 4, 3),
        )

    def test_all_offending_ids_are_reported_as_given(
        self, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """The status has every unknown and malformed ID as it was given, in each spelling."""
        unknown = [str(uuid4()) for _ in range(30)]
        respelled = [one.replace("-", "").upper() for one in unknown[:3]]
        malformed = [f"no-uuid-{number}" for number in range(30)] + ["\ud800", "NUL\0", "ä"]
        requested = [*samples[:5], *unknown, *malformed, *respelled, *unknown[:2]]
        job_id = client.enqueue(user, requested)
        with pytest.raises(InvalidInterviewIdException) as caught:
            client.wait(job_id, timeout=30)
        assert len(caught.value.details["interview_ids"]) == 20
        known = client.status(job_id)
        assert known.unknown_interview_ids == [*unknown, *respelled]
        assert known.malformed_interview_ids == malformed
        bad = {*known.unknown_interview_ids, *known.malformed_interview_ids}
        again = client.enqueue(user, [one for one in requested if one not in bad])
        assert client.wait(again, timeout=30)["created_access_count"] == 5

    def test_a_result_that_redis_dropped_comes_from_the_ledger(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """Status and result come from the ledger when Redis has neither result nor announcement."""
        done, failed = client.enqueue(user, samples[:2]), client.enqueue(user, ["no-uuid"])
        for job_id in done, failed:
            here.answer(job_id)
            here.redis.delete(f"celery-task-meta-{job_id}", f"interview-access:job:{job_id}")
        assert client.status(done).state == "succeeded"
        assert client.status(failed).state == "failed"
        assert client.wait(done, timeout=30)["created_access_count"] == 2
        with pytest.raises(InvalidInterviewIdException, match="'no-uuid'"):
            client.wait(failed, timeout=30)

    def test_an_id_without_a_job_is_unknown(self, client: InterviewAccessClient) -> None:
        """The status of an ID that was never sent is unknown, not queued."""
        job_id = str(uuid4())
        assert client.status(job_id) == JobStatus(job_id=job_id, state="unknown")

    def test_busy_workers_reply(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A worker whose pool processes are all busy reports running and queued jobs."""
        with all_busy(here, samples) as running:
            waiting = client.enqueue(user, samples[:1])
            known = client.status(running[0])
            assert known.state == "running"
            assert known.progress is not None
            assert (known.progress.done, known.progress.total) == (CHUNK, 3 * CHUNK)
            known = client.status(waiting)
            assert (known.state, known.task) == ("queued", GRANT_ACCESS)
            assert known.sent_at is not None
        assert client.wait(waiting, timeout=30)["created_access_count"] == 1

    def test_an_unannounced_job_is_known_once_it_runs(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A job without announcement is unknown while it is queued, and running after that."""
        with all_busy(here, samples) as running:
            waiting = here.send(user, samples[:1])
            assert client.status(waiting).state == "unknown"
            assert client.status(running[0]).state == "running"
        here.answer(waiting)
        assert client.status(waiting).state == "succeeded"

    def test_an_expired_job_is_expired(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A job that expired before it began is expired, and nothing is granted."""
        with all_busy(here, samples):
            job_id = client.enqueue(user, samples[:1], expires=0.1)
            known = client.status(job_id)
            assert known.state == "queued"
            until(lambda: known.expires_at is not None and datetime.now(UTC) > known.expires_at)
        with pytest.raises(JobExpiredException, match="before a worker started it"):
            client.wait(job_id, timeout=30)
        known = client.status(job_id)
        assert (known.state, known.error and known.error.type) == ("expired", "JobExpiredException")
        assert here.store.granted(user) == []

    def test_without_a_worker_requests_time_out(self, idle: Site) -> None:
        """Without a worker a request fails at its deadline, and leaves no key in Redis."""
        client = InterviewAccessClient(idle.broker)
        for request in client.status, client.cancel:
            with pytest.raises(NoAnswerInTimeError, match=r"No worker replied .* within 0\.2 s"):
                request("nobodys", timeout=0.2)
        assert idle.redis.keys("*") == []

    def test_an_outage_of_the_database_is_reported(
        self, idle: Site, samples: list[str], tmp_path: Path
    ) -> None:
        """A worker that cannot read the ledger replies with an error."""
        client = InterviewAccessClient(idle.broker)
        nowhere = "postgresql://nobody@127.0.0.1:1/none"
        with worker(idle, tmp_path / "log", DATABASE_URL=nowhere):
            job_id = client.enqueue("ann", samples)
            for request in client.status, client.cancel:
                with pytest.raises(StorageUnavailableException, match="Send the request again"):
                    request(job_id, timeout=30)

    def test_a_wait_reads_the_ledger(self, here: Site, samples: list[str], user: str) -> None:
        """A client's wait returns a result from the ledger if Redis has dropped it."""
        client = InterviewAccessClient(here.broker)
        job_id = client.enqueue(user, samples[:1])
        result = client.wait(job_id, timeout=30)
        here.redis.delete(f"celery-task-meta-{job_id}")
        assert here.redis.exists(f"interview-access:job:{job_id}")
        assert client.wait(job_id, timeout=3) == result

    def test_any_celery_producer_can_send_a_request(
        self, here: Site, samples: list[str], user: str
    ) -> None:
        """A control request is a Celery task, whose result is the status as a JSON object."""
        job_id = here.send(user, samples[:1])
        here.answer(job_id)
        request = here.producer.send_task(JOB_STATUS, (job_id,), queue=CONTROL_QUEUE)
        known = request.get(timeout=30)
        assert (known["job_id"], known["state"], known["created"]) == (job_id, "succeeded", 1)
        assert None not in known.values()
        until(lambda: 0 < here.redis.ttl(f"celery-task-meta-{request.id}") <= 60)

    @pytest.mark.parametrize(
        ("task", "args", "kwargs", "expected"),
        [
            (JOB_STATUS, [], {}, "job_id: expected 1 to 255 printable characters"),
            (JOB_STATUS, [7], {}, "got the number 7"),
            (CANCEL_JOB, ["x", "y"], {}, "and nothing else"),
            (GRANT_ACCESS, [], {"user_id": "x"}, "task: expected interview_access.job_status or"),
        ],
    )
    def test_an_invalid_request_fails(
        self, here: Site, task: str, args: list[object], kwargs: dict[str, object], expected: str
    ) -> None:
        """A control request with other arguments or another task fails with what was expected."""
        request = here.producer.send_task(task, args, kwargs, queue=CONTROL_QUEUE)
        with pytest.raises(InvalidGrantRequestException, match=expected):
            request.get(timeout=30)

    def test_unreadable_requests_do_not_stop_the_service(
        self, here: Site, client: InterviewAccessClient, samples: list[str]
    ) -> None:
        """After unreadable messages on the control queue the next request is answered."""
        for message in "", "[]", "{}", "\0", '{"headers": {"id": 1}, "body": "", "properties": {}}':
            here.redis.lpush(CONTROL_QUEUE, message)
        assert client.status("nobodys").state == "unknown"
        assert here.answer(here.send("after-unreadable", samples[:1]))["status"] == "SUCCESS"


class TestCancel:
    """The cancellation of a job."""

    def test_a_queued_job_never_runs(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A queued job is cancelled at once, and its message has no effect."""
        with all_busy(here, samples):
            job_id = client.enqueue(user, samples)
            known = client.cancel(job_id)
            assert (known.state, known.task) == ("cancelled", GRANT_ACCESS)
            assert client.status(job_id) == known
            with pytest.raises(JobCancelledException):
                client.wait(job_id, timeout=30)
        until(lambda: here.redis.llen(QUEUE) == 0)
        here.answer(here.send("after-it", samples[:1]))
        until(lambda: here.redis.keys("interview-access:held:*") == [])
        assert here.store.granted(user) == []
        assert client.cancel(job_id).state == "cancelled"

    def test_a_running_job_stops_at_the_next_chunk(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A job that is cancelled in its second chunk of three stops after it, without effect."""
        with held_grant(here, user, samples[CHUNK]):
            job_id = client.enqueue(user, samples)
            here.until_state(job_id, "PROGRESS")
            known = client.cancel(job_id, timeout=0.3)
            assert (known.state, known.cancel_requested) == ("running", True)
            assert client.status(job_id).cancel_requested
            stopped = Background(lambda: client.cancel(job_id, timeout=30))
        assert stopped.result().state == "cancelled"
        with pytest.raises(JobCancelledException):
            client.wait(job_id, timeout=30)
        assert here.store.granted(user) == []

    def test_a_finished_job_is_not_cancelled(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """The reply to cancelling a finished job is its state, succeeded or failed."""
        done, failed = client.enqueue(user, samples[:2]), client.enqueue(user, ["no-uuid"])
        here.answer(done)
        here.answer(failed)
        known = client.cancel(done)
        assert (known.state, known.created, known.cancel_requested) == ("succeeded", 2, None)
        assert client.cancel(failed).state == "failed"
        assert len(here.store.granted(user)) == 2

    def test_the_ledger_decides_the_race_with_finishing(
        self, here: Site, client: InterviewAccessClient, samples: list[str]
    ) -> None:
        """A cancelled job has either succeeded or had no effect, in agreement with the reply."""
        seen = set()
        for number in range(40):
            user_id = f"race-{number}-{uuid4()}"[:36]
            job_id = client.enqueue(user_id, samples)
            if number % 2:
                here.until_state(job_id, "STARTED", "PROGRESS", "SUCCESS")
            state = client.cancel(job_id, timeout=30).state
            rows = len(here.store.granted(user_id))
            assert (state, rows) in {("cancelled", 0), ("succeeded", len(samples))}
            assert here.answer(job_id)["status"] == {0: "FAILURE"}.get(rows, "SUCCESS")
            seen.add(state)
        assert "cancelled" in seen

    def test_an_unknown_job_never_runs(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """An unknown ID can be cancelled; a job that is sent under it later never runs."""
        job_id = str(uuid4())
        known = client.cancel(job_id)
        assert (known.state, known.cancel_requested) == ("unknown", True)
        here.send(user, samples, job_id=job_id)
        assert here.answer(job_id)["result"]["exc_type"] == "JobCancelledException"
        assert client.status(job_id).state == "cancelled"
        assert here.store.granted(user) == []

    def test_a_delayed_job_can_be_cancelled(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A job with a countdown is delayed in Redis, unclaimed, and can be cancelled."""
        job_id = client.enqueue(user, samples, countdown=2)
        until(lambda: here.redis.hlen("interview-access:deferred") == 1)
        assert here.redis.keys("interview-access:held:*") == []
        known = client.status(job_id)
        assert known.state == "queued"
        assert known.eta is not None
        assert client.cancel(job_id).state == "cancelled"
        until(lambda: here.redis.hlen("interview-access:deferred") == 0)
        here.answer(here.send("after-due", samples[:1]))
        assert here.store.granted(user) == []

    def test_a_cancelled_id_stays_cancelled(
        self, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A cancelled job that is sent again stays cancelled; its ID cannot be reused."""
        job_id = str(uuid4())
        client.enqueue(user, samples, job_id=job_id, countdown=60)
        client.cancel(job_id)
        client.enqueue(user, samples, job_id=job_id)
        with pytest.raises(JobCancelledException, match="under a new job ID"):
            client.wait(job_id, timeout=30)
        with pytest.raises(JobIdReusedException):
            client.enqueue(user, samples[:1], job_id=job_id)


class TestCommand:
    """The commands ``status`` and ``cancel``."""

    @staticmethod
    def run(here: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command as an operator does."""
        return run_module(here.environment(), "worker.cli", *arguments)

    def test_status_prints_what_the_client_returns(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """With --json the status is one JSON object, equal to the client's; otherwise lines."""
        job_id = client.enqueue(user, [*samples[:2], "no-uuid", "\ud800"])
        here.answer(job_id)
        known = client.status(job_id)
        printed = json.loads(self.run(here, "status", job_id, "--json").stdout)
        assert JobStatus.model_validate(printed) == known
        assert "malformed_interview_ids  2 (--json" in self.run(here, "status", job_id).stdout

    def test_cancel_reports_success_by_its_exit_status(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """Cancel ends with status 0 if the job is cancelled, and 1 if it had finished before."""
        waiting = client.enqueue(user, samples, countdown=60)
        done = self.run(here, "cancel", waiting, "--json")
        assert (done.returncode, json.loads(done.stdout)["state"]) == (0, "cancelled")
        finished = client.enqueue(user, samples[:1])
        here.answer(finished)
        done = self.run(here, "cancel", finished, "--json")
        assert (done.returncode, json.loads(done.stdout)["state"]) == (1, "succeeded")

    def test_control_characters_are_escaped(self, here: Site) -> None:
        """Control characters of a user ID are stored as they are and printed with escapes."""
        job_id = here.send("x\x1b]0;owned\x07\nforged \x9b\u202e", ["\x1b[2J\nforged"])
        here.answer(job_id)
        for words in ("status", job_id), ("status", job_id, "--json"), ("cancel", job_id):
            printed = self.run(here, *words).stdout
            assert "owned" in printed
            assert all(one.isprintable() or one == "\n" for one in printed)
            assert not any(line.startswith("forged") for line in printed.splitlines())

    def test_a_malformed_id_is_a_usage_error(self, here: Site) -> None:
        """A malformed job ID is refused before a request is sent."""
        done = self.run(here, "status", "a\x1b[2Jb")
        assert done.returncode == 2
        assert "'a\\x1b[2Jb', expected 1 to 255 printable" in done.stderr


class TestReplies:
    """Replies to control requests: their keys, sizes and retention."""

    @pytest.mark.parametrize("with_reply_key", [True, False])
    def test_a_finished_jobs_result_is_not_touched(
        self,
        here: Site,
        client: InterviewAccessClient,
        samples: list[str],
        user: str,
        with_reply_key: bool,
    ) -> None:
        """A control request under a job's ID changes neither its result nor its retention."""
        job_id = here.send(user, samples[:1])
        result = here.answer(job_id)
        control_request(here, job_id, request_id=job_id, with_reply_key=with_reply_key)
        assert client.status(job_id).state == "succeeded"  # the reply comes after the other one
        assert here.meta(job_id) == result
        ttl: Any = here.redis.ttl(f"celery-task-meta-{job_id}")
        assert ttl > 3_600
        assert here.redis.exists(reply_key(job_id)) == with_reply_key

    def test_no_reply_is_stored_under_an_announced_job(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """While an announced job is queued, no reply is stored under the key of its result."""
        with all_busy(here, samples):
            job_id = client.enqueue(user, samples[:1])
            control_request(here, "other", request_id=job_id, with_reply_key=False)
            assert client.status(job_id).state == "queued"
            assert here.meta(job_id)["status"] == "PENDING"
        assert client.wait(job_id, timeout=30)["created_access_count"] == 1

    def test_the_result_of_an_unannounced_job_replaces_a_reply(
        self, here: Site, client: InterviewAccessClient, samples: list[str], user: str
    ) -> None:
        """A reply under the ID of an unannounced job is replaced by the job's result."""
        with all_busy(here, samples):
            job_id = here.send(user, samples[:1])
            control_request(here, "other", request_id=job_id, with_reply_key=False)
            until(lambda: here.meta(job_id)["status"] == "SUCCESS")
            assert client.status(job_id).state == "unknown"
            waiting = Background(lambda: client.wait(job_id, timeout=30))
        assert waiting.result()["created_access_count"] == 1
        until(lambda: here.meta(job_id)["result"].get("created_access_count") == 1)
        ttl: Any = here.redis.ttl(f"celery-task-meta-{job_id}")
        assert ttl > 3_600

    def test_a_request_of_an_earlier_client_is_answered(
        self, here: Site, samples: list[str], user: str
    ) -> None:
        """Without a reply key the reply is stored as a task's result, for a minute."""
        job_id = here.send(user, samples[:1])
        here.answer(job_id)
        request_id = control_request(here, job_id, with_reply_key=False)
        assert here.answer(request_id)["result"]["state"] == "succeeded"
        ttl: Any = here.redis.ttl(f"celery-task-meta-{request_id}")
        assert 0 < ttl <= 60

    def test_a_reply_replaces_nothing(self, here: Site, client: InterviewAccessClient) -> None:
        """A reply does not replace an existing key."""
        request_id = str(uuid4())
        here.redis.set(reply_key(request_id), "mine", ex=30)
        control_request(here, "other", request_id=request_id)
        client.status("other")
        assert here.redis.get(reply_key(request_id)) == b"mine"

    def test_a_large_status_is_cut(
        self, here: Site, client: InterviewAccessClient, user: str
    ) -> None:
        """A reply omits entries of a large status and counts them; the command prints all."""
        unknown = [str(uuid4()) for _ in range(9_000)]
        malformed = [f"\u20ac{number}" for number in range(1_000)]
        job_id = here.send(user, [*unknown, *malformed])
        here.answer(job_id)
        known = client.status(job_id)
        assert known.unknown_interview_ids == unknown[: len(known.unknown_interview_ids or [])]
        assert known.malformed_interview_ids == []
        assert known.omitted == {
            "unknown_interview_ids": 9_000 - len(known.unknown_interview_ids or []),
            "malformed_interview_ids": 1_000,
        }
        assert REPLY_BYTES - 1_000 < max(reply_sizes(here)) < REPLY_BYTES + 1_000
        printed = TestCommand.run(here, "status", job_id, "--json").stdout
        everything = JobStatus.model_validate_json(printed)
        assert everything.unknown_interview_ids == unknown
        assert everything.malformed_interview_ids == malformed
        assert everything.omitted is None

    def test_a_large_cohorts_status_is_cut(
        self, here: Site, client: InterviewAccessClient, samples: list[str]
    ) -> None:
        """The counts by user are cut, also with user IDs of multi-byte characters."""
        users = [f"{number:04}{chr(0x1F600) * 30}" for number in range(1_000)]
        job_id = here.send(task=GRANT_COHORT_ACCESS, user_ids=users, interview_ids=[samples[0]])
        here.answer(job_id)
        known = client.status(job_id)
        counted = known.created_by_user or {}
        assert (known.created, set(counted.values())) == (1_000, {1})
        assert known.omitted == {"created_by_user": 1_000 - len(counted)}

    def test_unfetched_replies_are_bounded(
        self, here: Site, client: InterviewAccessClient, user: str
    ) -> None:
        """Redis holds 8 MB of replies at most; the oldest ones are deleted."""
        job_id = here.send(user, [str(uuid4()) for _ in range(9_000)])
        here.answer(job_id)
        requests = [control_request(here, job_id) for _ in range(60)]
        last = client.status("nobodys")
        assert last.state == "unknown"
        assert sum(reply_sizes(here)) <= 8 * 1024 * 1024
        assert len(reply_sizes(here)) >= 30
        assert here.redis.exists(reply_key(requests[0])) == 0
        assert reply(here, requests[-1])["result"]["state"] == "failed"
