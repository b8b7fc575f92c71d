"""Control requests: job status and cancellation, answered by a real worker."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
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
from redis.exceptions import OutOfMemoryError

from devstack.servers import LocalStack
from storage.postgres import PostgresStorage
from storage.samples import load_samples
from tests.support.stores import Background, until
from tests.support.workers import (
    GRANT_ACCESS,
    QUEUE,
    ROOT,
    Site,
    held_grant,
    migrated_site,
    worker,
)
from worker.services.control import ControlService

CHUNK = 10


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker of two children and sample interviews."""
    with (
        migrated_site(stack, _migrated, 8) as here,
        worker(here, tmp_path_factory.mktemp("asked") / "worker.log", GRANT_CHUNK_SIZE=CHUNK),
    ):
        yield here


@pytest.fixture(scope="module")
def samples(here: Site) -> list[str]:
    """Ids of interviews that stand, sorted."""
    return sorted(load_samples(here.store.database_url, 3 * CHUNK))


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
        with pytest.raises(JobExpiredException, match="before a worker began it"):
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
                with pytest.raises(StorageUnavailableException, match="ask again"):
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
        ("task", "args", "kwargs", "says"),
        [
            (JOB_STATUS, [], {}, "job_id: expected 1 to 255 printable characters"),
            (JOB_STATUS, [7], {}, "got the number 7"),
            (CANCEL_JOB, ["x", "y"], {}, "and nothing else"),
            (GRANT_ACCESS, [], {"user_id": "x"}, "task: expected interview_access.job_status or"),
        ],
    )
    def test_an_invalid_request_fails(
        self, here: Site, task: str, args: list[object], kwargs: dict[str, object], says: str
    ) -> None:
        """A control request with other arguments or another task fails with what was expected."""
        request = here.producer.send_task(task, args, kwargs, queue=CONTROL_QUEUE)
        with pytest.raises(InvalidGrantRequestException, match=says):
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
        with pytest.raises(JobCancelledException, match="under a new job id"):
            client.wait(job_id, timeout=30)
        with pytest.raises(JobIdReusedException):
            client.enqueue(user, samples[:1], job_id=job_id)


class TestCommand:
    """The commands ``status`` and ``cancel``."""

    @staticmethod
    def run(here: Site, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command as an operator does."""
        return subprocess.run(
            [sys.executable, "-m", "worker.cli", *arguments],
            env=here.environment(),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

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


def control_request(
    here: Site,
    job_id: str,
    *,
    request_id: str = "",
    task: str = JOB_STATUS,
    expires: str | None = None,
    with_reply_key: bool = True,
) -> str:
    """Send a control request as a bare Redis client does, and return its ID."""
    request_id = request_id or str(uuid4())
    envelope = {
        "body": json.dumps([[], {"job_id": job_id}, {}]),
        "content-type": "application/json",
        "headers": {"task": task, "id": request_id, "expires": expires},
        "properties": {"reply_to": reply_key(request_id)} if with_reply_key else {},
    }
    here.redis.lpush(CONTROL_QUEUE, json.dumps(envelope))
    return request_id


def reply(here: Site, request_id: str) -> dict[str, Any]:
    """Wait for the reply to a control request."""
    until(lambda: here.redis.exists(reply_key(request_id)) == 1)
    text: Any = here.redis.get(reply_key(request_id))
    return dict(json.loads(text))


def replies(here: Site) -> list[int]:
    """Return the sizes in bytes of all replies in Redis."""
    keys: Any = here.redis.keys(reply_key("*"))
    return [int(here.redis.strlen(key)) for key in keys]


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
        assert REPLY_BYTES - 1_000 < max(replies(here)) < REPLY_BYTES + 1_000
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
        assert sum(replies(here)) <= 8 * 1024 * 1024
        assert len(replies(here)) >= 30
        assert here.redis.exists(reply_key(requests[0])) == 0
        assert reply(here, requests[-1])["result"]["state"] == "failed"


class TestControlService:
    """Single requests, processed without a worker."""

    @staticmethod
    def service(idle: Site) -> ControlService:
        """Return a service that is run by the test."""
        return ControlService(idle.producer, lambda: idle.store.storage)

    def test_no_reply_is_stored_on_a_full_redis(self, idle: Site) -> None:
        """On a full Redis the job is cancelled without a reply."""
        request_id = control_request(idle, "job", task=CANCEL_JOB)
        idle.redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(OutOfMemoryError):
                self.service(idle).run_once(idle.redis)
        finally:
            idle.redis.config_set("maxmemory", 0)
        assert idle.redis.exists(reply_key(request_id), CONTROL_QUEUE) == 0
        assert idle.store.storage.is_cancelled("job")

    def test_an_expired_request_is_dropped(self, idle: Site) -> None:
        """An expired request is neither processed nor answered."""
        control_request(idle, "job", task=CANCEL_JOB, expires="2020-01-01T00:00:00")
        self.service(idle).run_once(idle.redis)
        assert idle.redis.keys() == []
        assert not idle.store.storage.is_cancelled("job")

    @pytest.mark.parametrize(
        "message",
        [
            b"x" * 70_000,
            b"[" * 60_000,
            b"\xff\xfe{\x00}\x00",
            b'{"headers": [], "body": "", "properties": {}}',
            b'{"headers": {"id": "a\\nb", "task": "x"}, "body": "[[],{},{}]", "properties": {}}',
            b'{"headers": {"id": "a", "expires": 7}, "body": "[[],{},{}]", "properties": {}}',
            b'{"headers": {"id": "a"}, "body": "[7,{},{}]", "properties": {"reply_to": []}}',
        ],
        ids=["large", "nested", "UTF-16", "list", "ID", "expiry", "body"],
    )
    def test_an_unreadable_request_is_dropped(
        self, idle: Site, caplog: pytest.LogCaptureFixture, message: bytes
    ) -> None:
        """An unreadable request is one short log line and raises nothing."""
        idle.redis.lpush(CONTROL_QUEUE, message)
        self.service(idle).run_once(idle.redis)
        assert idle.redis.keys() == []
        (record,) = caplog.records
        assert record.getMessage().startswith("control request cannot be read: ")
        assert len(record.getMessage()) < 600
        assert record.getMessage().isprintable()

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("celery-task-meta-job", b'{"status": "SUCCESS", "result": 7}'),
            ("celery-task-meta-job", b'{"status": "FAILURE", "result": "x"}'),
            ("celery-task-meta-job", b"[]"),
            ("celery-task-meta-job", b"\xff"),
            ("celery-task-meta-job", b'{"status": ' + b"[" * 60_000),
            ("celery-task-meta-job", b'"' + b"x" * 10_000_000 + b'"'),
            ("interview-access:job:job", b'{"task": "' + b"x" * 10_000_000 + b'"}'),
            ("interview-access:job:job", b"[" * 60_000),
        ],
    )
    def test_invalid_values_of_others_are_ignored(self, idle: Site, key: str, value: bytes) -> None:
        """An invalid result or announcement, which any producer can write, is ignored."""
        idle.redis.set(key, value)
        request_id = control_request(idle, "job")
        self.service(idle).run_once(idle.redis)
        assert reply(idle, request_id)["result"] == {"job_id": "job", "state": "unknown"}

    @pytest.mark.parametrize(
        "fields",
        [{"digest": "d" * 65}, {"task": "t" * 256}, {"digest": "d\0"}, {"task": "t\0"}],
        ids=["long digest", "long task", "NUL in the digest", "NUL in the task"],
    )
    def test_an_invalid_announcement_does_not_prevent_a_cancellation(
        self, idle: Site, fields: dict[str, str]
    ) -> None:
        """A job whose announcement the ledger cannot store is cancelled as if it had none."""
        announced = {"task": "t", "digest": "d", "sent_at": "2026-11-25T00:00:00Z", **fields}
        idle.redis.set("interview-access:job:job", json.dumps(announced))
        request_id = control_request(idle, "job", task=CANCEL_JOB)
        self.service(idle).run_once(idle.redis)
        assert reply(idle, request_id)["result"]["cancel_requested"]
        assert idle.store.storage.is_cancelled("job")

    def test_a_request_of_an_earlier_client_fails_without_the_ledger(self, idle: Site) -> None:
        """During an outage of PostgreSQL a request without a reply key fails at once."""
        request_id = control_request(idle, "job", with_reply_key=False)
        with closing(PostgresStorage("postgresql://me@127.0.0.1:1/x")) as away:
            ControlService(idle.producer, lambda: away).run_once(idle.redis)
        assert idle.meta(request_id)["result"]["exc_type"] == "StorageUnavailableException"

    @pytest.mark.parametrize("name", ["Any", "Sequence", "Details", "x\x1b", None])
    def test_a_failure_of_any_class_is_reported(self, idle: Site, name: str | None) -> None:
        """A stored failure is reported as failed, whatever its class name is."""
        failure = {"exc_type": name, "exc_message": ["No.", {}]}
        stored = {"status": "FAILURE", "result": failure}
        idle.redis.set("celery-task-meta-job", json.dumps(stored))
        request_id = control_request(idle, "job")
        self.service(idle).run_once(idle.redis)
        assert reply(idle, request_id)["result"]["state"] == "failed"


class TestWaiting:
    """A service without requests blocks in Redis."""

    @pytest.fixture
    def services(self, idle: Site) -> Iterator[Callable[[], ControlService]]:
        """A function that starts services; they are stopped after the test."""
        started: list[ControlService] = []

        def start() -> ControlService:
            service = ControlService(idle.producer, lambda: idle.store.storage)
            service.start()
            started.append(service)
            until(lambda: len(waiting(idle)) == len(started))
            return service

        yield start
        for service in started:
            service.stop()
            service._thread.join(30)
            assert not service._thread.is_alive()

    def test_a_request_ends_the_wait(
        self, idle: Site, services: Callable[[], ControlService]
    ) -> None:
        """A blocked service replies to a request, and blocks again."""
        services()
        assert reply(idle, control_request(idle, "job"))["result"]["state"] == "unknown"
        until(lambda: len(waiting(idle)) == 1)

    def test_a_blocked_service_stops_at_once(
        self, idle: Site, services: Callable[[], ControlService]
    ) -> None:
        """Stopping a blocked service also ends its wait in Redis."""
        service = services()
        service.stop()
        service._thread.join(4)  # a wait takes 5 s
        assert not service._thread.is_alive()
        until(lambda: not waiting(idle))

    def test_blocked_services_share_the_requests(
        self, idle: Site, services: Callable[[], ControlService]
    ) -> None:
        """One service replies to each request; the others poll once and block again."""
        services()
        services()
        before = count_polls(idle)
        requests = [control_request(idle, f"job-{number}") for number in range(5)]
        for request in requests:
            assert reply(idle, request)["result"]["state"] == "unknown"
        until(lambda: len(waiting(idle)) == 2)
        # A request may wake both services, and each polls once more without a result.
        assert count_polls(idle) - before <= 5 * 2 * 2

    def test_a_lost_connection_is_replaced(
        self, idle: Site, services: Callable[[], ControlService]
    ) -> None:
        """A service whose connection is killed replies after its back-off."""
        services()
        (client,) = waiting(idle)
        idle.redis.client_kill_filter(_id=client)
        assert reply(idle, control_request(idle, "job"))["result"]["state"] == "unknown"

    def test_a_redis_that_refuses_to_block_is_polled(
        self, idle: Site, services: Callable[[], ControlService], caplog: pytest.LogCaptureFixture
    ) -> None:
        """A full Redis refuses to block, which is logged once; the service polls instead."""
        services()
        idle.redis.config_set("maxmemory", 1)
        try:
            until(lambda: "refuses to wait for control requests" in caplog.text)
        finally:
            idle.redis.config_set("maxmemory", 0)
        assert reply(idle, control_request(idle, "job"))["result"]["state"] == "unknown"
        assert caplog.text.count("refuses to wait") == 1


def waiting(here: Site) -> list[str]:
    """Return the IDs of the clients that are blocked on the control queue."""
    clients: Any = here.redis.client_list(_type="normal")
    number = str(here.redis.connection_pool.connection_kwargs["db"])
    return [
        one["id"]
        for one in clients
        if one["cmd"] == "blmove" and "b" in one["flags"] and one["db"] == number
    ]


def count_polls(here: Site) -> int:
    """Count the polls of the control queue."""
    statistics: Any = here.redis.info("commandstats")
    return int(statistics.get("cmdstat_rpop", {"calls": 0})["calls"])
