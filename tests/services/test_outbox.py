"""Jobs that another service requests within its own database transaction."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest
from interview_access.errors import InvalidGrantRequestException, JobIdReusedException
from interview_access.outbox import (
    enqueue_attempt_in_sqlalchemy,
    enqueue_cohort_in_sqlalchemy,
    enqueue_in_sqlalchemy,
)
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from sqlalchemy import text

from devstack.servers import LocalStack
from storage.dtos import AccessRequestDTO
from storage.errors import StorageError
from storage.memory import MemoryStorage
from storage.postgres import PostgresStorage, PostgresTransaction
from storage.samples import NAMED_SAMPLES, load_samples
from tests.client.test_producers import blocks
from tests.support.commands import run_module
from tests.support.database import connected, role
from tests.support.platform import Database, DjangoService
from tests.support.sentinels import redis_of
from tests.support.stores import Background, all_at_once, until
from tests.support.workers import QUEUE, Site, migrated_site, worker
from worker.services.outbox_relay import OutboxRelay

OPTIONS = ("eta", "expires")
SECTION = "Inside a transaction of your database"
REQUESTS = "SELECT count(*) FROM grant_access_request"
LISTENERS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
"""Counts the relays that wait for a notification."""


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    with (
        migrated_site(stack, _migrated, 13) as here,
        worker(here, tmp_path_factory.mktemp("outbox") / "worker.log"),
    ):
        load_samples(here.store.database_url, len(NAMED_SAMPLES))
        yield here


@pytest.fixture
def idle(idle: Site) -> Site:
    """A site without a worker, with sample interviews."""
    load_samples(idle.store.database_url, len(NAMED_SAMPLES))
    return idle


def request_job(here: Site, user_id: str, *, job_id: str | None = None) -> str:
    """Request a job in a transaction, commit, and return its ID."""
    with connected(here.store.database_url) as connection:
        job_id = enqueue_in_sqlalchemy(connection, user_id, NAMED_SAMPLES, job_id=job_id)
        connection.commit()
    return job_id


def messages(here: Site) -> list[Any]:
    """Return the queued messages, the latest first."""
    found: Any = here.redis.lrange(QUEUE, 0, -1)
    return [json.loads(message) for message in found]


def queued(here: Site) -> list[str]:
    """Return the IDs of the queued jobs, the latest first."""
    return [message["headers"]["id"] for message in messages(here)]


def run_relay(
    here: Site, storage: PostgresStorage | None = None, redis: Redis | None = None
) -> None:
    """Run the relay once."""
    relay = OutboxRelay(here.producer, lambda: storage or here.store.storage)
    relay.run_once(redis or here.redis)


def is_outbox_empty(here: Site) -> bool:
    """Whether no request is left."""
    return bool(here.store.value(REQUESTS) == 0)


class TestDocumentedExamples:
    """The examples of docs/producers.md, executed as they are."""

    def test_the_insert(self, here: Site) -> None:
        """The INSERT returns a job ID by which the result is polled."""
        (block,) = blocks(SECTION, "sql")
        began = time.monotonic()
        with Database(here.store.database_url).connect() as connection:
            begin, insert, commit = block.rstrip(";\n").split(";\n")
            connection.execute(begin.encode())
            (row,) = connection.execute(insert.encode()).fetchall()
            connection.execute(commit.encode())
        assert here.answer(row["job_id"])["result"]["created_access_count"] == 1
        assert time.monotonic() - began < 5  # documented: one second; a busy machine is slower
        until(lambda: is_outbox_empty(here))

    def test_django(self, here: Site) -> None:
        """The Django service requests a job inside ``atomic``."""
        block, _ = blocks(SECTION, "python")
        printed = DjangoService(Database(here.store.database_url)).run_python(block)
        check_examples(here, printed)

    def test_sqlalchemy(self, here: Site) -> None:
        """The SQLAlchemy session requests a job."""
        _, block = blocks(SECTION, "python")
        done = subprocess.run(
            [sys.executable, "-c", block],
            env=here.environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        check_examples(here, done.stdout)


def check_examples(here: Site, printed: str) -> None:
    """Verify the results of a grant, a cohort of the same and another user, and an attempt."""
    grant, cohort, attempt = (here.answer(job_id)["result"] for job_id in printed.split())
    counts = [one["created_access_count"] for one in (grant, cohort)]
    assert sorted(counts) in ([0, 2], [1, 1])  # jobs of one transaction run in any order
    assert sum(counts) == 2
    assert attempt["interview_attempt_id"]


class TestRelay:
    """Every committed request takes effect once; others have no effect."""

    def test_a_request_that_is_rolled_back_has_no_effect(self, here: Site, user: str) -> None:
        """A request that is rolled back is never sent."""
        with connected(here.store.database_url) as connection:
            undone = enqueue_in_sqlalchemy(connection, user, NAMED_SAMPLES)
        here.answer(request_job(here, str(uuid4())))
        assert here.store.granted(user) == []
        assert InterviewAccessClient(here.broker).status(undone).state == "unknown"

    def test_lost_messages_are_sent_again(self, idle: Site, user: str, tmp_path: Path) -> None:
        """Messages that Redis has lost are sent again, and each job counts once."""
        job_id = request_job(idle, user)
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == 1
        idle.redis.flushdb()
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == 1
        idle.redis.flushdb()
        with worker(idle, tmp_path / "log"):
            assert idle.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
            until(lambda: is_outbox_empty(idle))

    def test_an_outage_of_redis_loses_no_request(self, idle: Site, user: str) -> None:
        """A request that cannot be sent stays due."""
        request_job(idle, user)
        with Redis(unix_socket_path="/nowhere") as away, pytest.raises(RedisConnectionError):
            OutboxRelay(idle.producer, lambda: idle.store.storage).run_once(away)
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == 1

    def test_a_request_sent_twice_counts_once(self, idle: Site, user: str, tmp_path: Path) -> None:
        """A relay that fails between sending and COMMIT sends the request again; it counts once."""

        class Dying(PostgresStorage):
            """Fails before COMMIT."""

            @contextmanager
            def transaction(self) -> Iterator[PostgresTransaction]:
                with super().transaction() as transaction:
                    yield transaction
                    raise StorageError("the worker is gone")

        idle.redis.set("interview-access:relay", 1)
        dying = Dying(idle.store.database_url)
        job_id = request_job(idle, user)
        with pytest.raises(StorageError, match="the worker is gone"):
            run_relay(idle, dying)
        dying.close()
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == 2
        with worker(idle, tmp_path / "log"):
            assert idle.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
            until(lambda: idle.redis.llen(QUEUE) == 0)
        assert idle.store.rows() == len(NAMED_SAMPLES)

    def test_simultaneous_relays_send_each_request_once(self, idle: Site) -> None:
        """Relays that run at the same time share the requests."""
        idle.redis.set("interview-access:relay", 1)
        jobs = {request_job(idle, str(uuid4())) for _ in range(20)}
        with idle.store.another() as one, idle.store.another() as other:
            all_at_once([lambda: run_relay(idle, one), lambda: run_relay(idle, other)])
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == len(jobs)

    def test_a_reused_id_is_refused_by_the_worker(self, here: Site, user: str) -> None:
        """Another request under a finished job's ID has no effect and becomes a dead letter."""
        job_id = here.send(user, NAMED_SAMPLES[:1])
        here.answer(job_id)
        request_job(here, user, job_id=job_id)
        until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
        until(lambda: is_outbox_empty(here))
        assert here.store.granted(user) == list(NAMED_SAMPLES[:1])

    def test_an_invalid_request_fails(self, here: Site, user: str) -> None:
        """A request with a NULL among its IDs fails with its reason, and is deleted."""
        with connected(here.store.database_url) as connection:
            row = {"job_id": user, "user_id": user, "interview_ids": [NAMED_SAMPLES[0], None]}
            connection.execute(
                text(
                    "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
                    " VALUES (:job_id, :user_id, :interview_ids)"
                ),
                row,
            )
            connection.commit()
        assert "interview_ids[1]" in here.answer(user)["result"]["exc_message"][0]
        until(lambda: is_outbox_empty(here))

    def test_every_task_can_be_requested(self, here: Site, user: str) -> None:
        """A cohort and an interview attempt that are requested in the database are executed."""
        with connected(here.store.database_url) as service:
            cohort = enqueue_cohort_in_sqlalchemy(service, [user, f"{user[:30]}-2"], NAMED_SAMPLES)
            attempt = enqueue_attempt_in_sqlalchemy(service, NAMED_SAMPLES[0], user)
            service.commit()
        assert here.answer(cohort)["result"]["created_access_count"] == 2 * len(NAMED_SAMPLES)
        attempt_id = here.answer(attempt)["result"]["interview_attempt_id"]
        assert [one.id for one in here.store.attempts() if one.user_id == user] == [attempt_id]

    def test_a_delayed_request_is_sent_at_once_with_its_eta(self, idle: Site, user: str) -> None:
        """A request is sent at once with its ETA and expiry, and not again until it could run."""
        with connected(idle.store.database_url) as service:
            job_id = enqueue_in_sqlalchemy(service, user, [], countdown=3600, expires=7200)
            service.commit()
        run_relay(idle)
        (message,) = messages(idle)
        eta, expires = (datetime.fromisoformat(message["headers"][one]) for one in OPTIONS)
        assert timedelta(minutes=59) < eta - datetime.now(UTC) < timedelta(minutes=61)
        assert expires - eta < timedelta(minutes=61)
        for eta_age, copies in ("-10 min", 1), ("5 min", 1), ("15 min", 2):
            idle.store.execute(
                "UPDATE grant_access_request SET look_at = now(), requested_at = now(),"
                " sent_at = now() - interval '2 hours',"
                " eta = now() - CAST(:age AS interval)",
                age=eta_age,
            )
            run_relay(idle)
            assert queued(idle) == [job_id] * copies

    def test_a_request_expires(self, here: Site, user: str) -> None:
        """A request whose expiry has passed fails as expired."""
        here.store.execute(
            "INSERT INTO grant_access_request (job_id, user_id, interview_ids, expires_at)"
            " VALUES (:job_id, 'ann', '{}', '-infinity')",
            job_id=user,
        )
        assert here.answer(user)["result"]["exc_type"] == "JobExpiredException"

    def test_headers_are_added_to_the_message(
        self, idle: Site, user: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Headers of a request are added; those of the envelope stay, and the others are logged."""
        given = {"traceparent": "00-1-2-01", "id": "x", "compression": "gzip", "task": "x", "n": 1}
        for job_id, headers in (user, given), (f"{user}-2", []), (f"{user}-3", None):
            idle.store.execute(
                "INSERT INTO grant_access_request (job_id, user_id, interview_ids, headers)"
                " VALUES (:job_id, 'ann', '{}', CAST(:headers AS jsonb))",
                job_id=job_id,
                headers=json.dumps(headers),
            )
        run_relay(idle)
        *_, first = sent = messages(idle)
        assert [one["headers"]["id"] for one in sent] == [f"{user}-3", f"{user}-2", user]
        assert first["headers"]["traceparent"] == "00-1-2-01"
        assert first["headers"]["task"] == "interview_access.grant_access"
        assert not {"compression", "n"} & first["headers"].keys()
        logged = [record.getMessage() for record in caplog.records]
        assert [line.startswith("outbox headers ignored: job=") for line in logged] == [True] * 3
        assert "headers='n, compression'" in logged[0]

    @pytest.mark.parametrize("task", ["grant_cohort_access", "create_interview_attempt"])
    def test_an_unsent_request_of_any_task_can_be_cancelled(self, idle: Site, task: str) -> None:
        """An unsent cohort or attempt is reported with its task, and is cancelled in the ledger."""
        with connected(idle.store.database_url) as service:
            job_id = (
                enqueue_cohort_in_sqlalchemy(service, ["ann"], NAMED_SAMPLES, countdown=9)
                if task == "grant_cohort_access"
                else enqueue_attempt_in_sqlalchemy(service, NAMED_SAMPLES[0], "ann", countdown=9)
            )
            service.commit()
        known, cancelled = (
            json.loads(run_module(idle.environment(), "worker.cli", *words, "--json").stdout)
            for words in (("status", job_id), ("cancel", job_id))
        )
        assert (known["state"], known["task"]) == ("queued", f"interview_access.{task}")
        assert known["eta"]
        assert cancelled["state"] == "cancelled"
        finished = idle.store.storage.get_finished_job(job_id)
        assert finished
        digest = idle.store.value("SELECT digest FROM grant_access_request")
        assert finished.job.request_digest == digest

    def test_an_unsent_request_is_queued_and_can_be_cancelled(
        self, idle: Site, user: str, tmp_path: Path
    ) -> None:
        """An unsent request is reported as queued; once it is cancelled it never runs."""
        client = InterviewAccessClient(idle.broker)
        with worker(idle, tmp_path / "log"), connected(idle.store.database_url) as service:
            request_job(idle, user)
            until(lambda: is_outbox_empty(idle))  # the relay has registered this Redis by now
            job_id = enqueue_in_sqlalchemy(service, user, NAMED_SAMPLES)
            service.exec_driver_sql("UPDATE grant_access_request SET look_at = 'infinity'")
            service.commit()
            assert client.status(job_id).state == "queued"
            assert client.cancel(job_id).state == "cancelled"
            service.exec_driver_sql("UPDATE grant_access_request SET look_at = now()")
            service.commit()
            until(lambda: is_outbox_empty(idle))
            assert client.status(job_id).state == "cancelled"

    def test_a_request_that_redis_refuses_stops_no_other(self, idle: Site, user: str) -> None:
        """A request that is too large for Redis is logged, and the others are sent."""
        limit = "proto-max-bulk-len"
        previous: Any = idle.redis.config_get(limit)[limit]
        with connected(idle.store.database_url) as connection:
            first, large, last = (
                enqueue_in_sqlalchemy(connection, user, ids)
                for ids in (NAMED_SAMPLES, [str(uuid4())] * 40_000, NAMED_SAMPLES)
            )
            connection.commit()
        try:
            idle.redis.config_set(limit, 1024 * 1024)
            run_relay(idle)
        finally:
            idle.redis.config_set(limit, previous)
        assert sorted(queued(idle)) == sorted([first, last])
        assert idle.store.value(f"{REQUESTS} WHERE sent_at IS NULL") == 1
        idle.store.storage.schedule_all_requests_now()
        run_relay(idle)
        assert large in queued(idle)

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("ACL SETUSER default -lpush", "no permissions"),
            ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS"),
        ],
        ids=["NOPERM", "NOREPLICAS"],
    )
    def test_a_refusal_of_every_request_is_raised(
        self, idle: Site, tmp_path: Path, command: str, message: str
    ) -> None:
        """If Redis refuses every request, its error is raised at the first, and all stay due."""
        for _ in range(2):
            request_job(idle, str(uuid4()))
        with redis_of(tmp_path) as port, Redis(port=port) as redis:
            redis.set("interview-access:relay", 1)
            redis.execute_command(*command.split())
            with pytest.raises(ResponseError, match=message):
                run_relay(idle, redis=redis)
        run_relay(idle)
        assert idle.redis.llen(QUEUE) == 2

    @pytest.mark.parametrize(
        ("task", "columns", "users"),
        [
            ("grant_access", "user_id", "'ann'"),
            ("grant_cohort_access", "user_ids", "ARRAY['ann', 'bob']"),
        ],
    )
    def test_an_oversized_request_fails_and_stops_no_other(
        self, idle: Site, user: str, task: str, columns: str, users: str
    ) -> None:
        """A request of more IDs than a relay reads fails in the ledger, and is deleted."""
        first = request_job(idle, user)
        idle.store.execute(
            f"INSERT INTO grant_access_request (job_id, task, {columns}, interview_ids)"  # noqa: S608 - constants
            f" VALUES ('large', 'interview_access.{task}', {users},"
            " array_fill(CAST(gen_random_uuid() AS text), ARRAY[1000000]))"
        )
        last = request_job(idle, user)
        run_relay(idle)
        assert sorted(queued(idle)) == sorted([first, last])
        finished = idle.store.storage.get_finished_job("large")
        assert finished
        assert finished.outcome.error
        assert finished.outcome.error["type"] == "InvalidGrantRequestException"
        assert finished.job.task == f"interview_access.{task}"
        idle.store.storage.schedule_all_requests_now()
        run_relay(idle)
        assert idle.store.value(f"{REQUESTS} WHERE job_id = 'large'") == 0

    def test_a_page_of_compressible_requests_is_bounded(self, idle: Site) -> None:
        """Requests that are small on disk and large in memory are read a few at a time."""
        idle.store.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids)"
            " SELECT 'ann', array_fill(CAST(gen_random_uuid() AS text), ARRAY[50000])"
            " FROM generate_series(1, 5)"
        )
        run_relay(idle)
        assert len(queued(idle)) == 1

    def test_a_request_with_an_invalid_id_stops_no_other(
        self, idle: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A row that cannot become a message is logged, and the others are sent."""
        requests = MemoryStorage(chunk_size=1)
        for job_id in "first", "no\nid", "last":
            row = AccessRequestDTO(job_id, "ann", NAMED_SAMPLES, datetime.now(UTC))
            requests.add_request(row)
        OutboxRelay(idle.producer, lambda: requests).run_once(idle.redis)
        assert sorted(queued(idle)) == ["first", "last"]
        (record,) = caplog.records
        assert (
            "job='no\\nid' error_type=ValueError error=job ID: expected 1 to 255"
            in record.getMessage()
        )

    @pytest.mark.parametrize(("waited", "copies"), [("90 minutes", 0), ("20 minutes", 1)])
    def test_the_resend_interval_grows_with_the_waiting_time(
        self, idle: Site, user: str, waited: str, copies: int
    ) -> None:
        """A request that waited long is sent again only after it has waited as long again."""
        job_id = request_job(idle, user)
        run_relay(idle)
        idle.store.execute(
            "UPDATE grant_access_request SET look_at = now(), sent_at = now() - interval '30 min',"
            " requested_at = now() - interval '30 min' - CAST(:waited AS interval)",
            waited=waited,
        )
        run_relay(idle)
        assert queued(idle) == [job_id] * (1 + copies)

    @pytest.mark.parametrize(
        ("user_id", "ids"),
        [
            (None, []),
            (7, []),
            ("ann", "89d96f4b-c19d-4e69-8eae-e818f3123b09"),
            ("ann", [7]),
            ("", []),
        ],
    )
    def test_an_invalid_request_is_refused_at_once(
        self, idle: Site, user_id: Any, ids: Any
    ) -> None:
        """The helper refuses invalid users and IDs before they reach the table."""
        with (
            connected(idle.store.database_url) as connection,
            pytest.raises(InvalidGrantRequestException),
        ):
            enqueue_in_sqlalchemy(connection, user_id, ids)
        assert is_outbox_empty(idle)

    def test_other_arguments_are_refused_at_once(
        self, idle: Site, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cohorts, attempts, options and the number of IDs are checked before any statement."""
        with connected(idle.store.database_url) as service:
            with pytest.raises(InvalidGrantRequestException, match=re.escape("user_ids[1]")):
                enqueue_cohort_in_sqlalchemy(service, ["ann", ""], [])
            with pytest.raises(InvalidGrantRequestException, match=re.escape("str(user.pk)")):
                enqueue_attempt_in_sqlalchemy(service, NAMED_SAMPLES[0], cast("str", 7))
            with pytest.raises(InvalidGrantRequestException, match=re.escape("interview_ids[1]")):
                enqueue_in_sqlalchemy(service, "ann", ["no-uuid", "nul\0"])
            with pytest.raises(InvalidGrantRequestException, match="interview_id: expected a UUID"):
                enqueue_attempt_in_sqlalchemy(service, "nul\0", "ann")
            with pytest.raises(ValueError, match="countdown: expected a number"):
                enqueue_in_sqlalchemy(service, "ann", [], countdown=cast("float", "soon"))
            monkeypatch.setenv("GRANT_MAX_INTERVIEW_IDS", "3")
            with pytest.raises(InvalidGrantRequestException, match="at most 1 IDs for 2 users"):
                enqueue_cohort_in_sqlalchemy(service, ["ann", "bob"], NAMED_SAMPLES)
            monkeypatch.setenv("GRANT_MAX_INTERVIEW_IDS", "many")
            with pytest.raises(ValueError, match="GRANT_MAX_INTERVIEW_IDS: expected a number"):
                enqueue_in_sqlalchemy(service, "ann", [])
            service.commit()
        assert is_outbox_empty(idle)

    def test_an_invalid_job_id_is_refused_at_once(self, idle: Site) -> None:
        """The helper refuses job IDs that the table would not accept."""
        for job_id in "", "x" * 256, "Zoë":
            with pytest.raises(ValueError, match=re.escape("job ID: expected 1 to 255")):
                request_job(idle, "ann", job_id=job_id)


class TestRepeatedJobIds:
    """Requests under a job ID that the outbox has or had."""

    def test_the_same_request_is_inserted_once(self, idle: Site, user: str) -> None:
        """The same request, in any order and spelling, succeeds again and adds no row."""
        with connected(idle.store.database_url) as service:
            for ids in NAMED_SAMPLES, [one.upper() for one in reversed(NAMED_SAMPLES)]:
                assert enqueue_in_sqlalchemy(service, user, ids, job_id="same") == "same"
            service.commit()
        assert request_job(idle, user, job_id="same") == "same"
        assert idle.store.value(REQUESTS) == 1

    def test_another_request_is_refused(self, idle: Site, user: str) -> None:
        """Another request or task under the ID is refused, and the transaction can continue."""
        request_job(idle, user, job_id="taken")
        with connected(idle.store.database_url) as service:
            with pytest.raises(JobIdReusedException, match="job ID of its own: 'taken'"):
                enqueue_in_sqlalchemy(service, user, NAMED_SAMPLES[:1], job_id="taken")
            with pytest.raises(JobIdReusedException):
                enqueue_cohort_in_sqlalchemy(service, [user], NAMED_SAMPLES, job_id="taken")
            enqueue_in_sqlalchemy(service, user, NAMED_SAMPLES[:1], job_id="another")
            service.commit()
        assert idle.store.value(REQUESTS) == 2

    def test_a_row_without_a_digest_is_not_taken_for_the_same(self, idle: Site, user: str) -> None:
        """A row of plain SQL has no digest: the same ID is refused, since it may be another."""
        idle.store.execute(
            "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
            " VALUES ('plain', 'ann', '{}')"
        )
        with pytest.raises(JobIdReusedException, match="a row without a digest"):
            request_job(idle, user, job_id="plain")

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_a_concurrent_transaction_is_waited_for(self, idle: Site, user: str, end: str) -> None:
        """A request under the ID of an open transaction waits for its end, and succeeds."""
        with connected(idle.store.database_url) as first:
            enqueue_in_sqlalchemy(first, user, NAMED_SAMPLES, job_id="both")
            second = Background(lambda: request_job(idle, user, job_id="both"))
            idle.store.until_waiting(second)
            assert not second.over
            getattr(first, end)()
            assert second.result() == "both"
        assert idle.store.value(REQUESTS) == 1

    def test_a_finished_job_has_its_first_result(self, here: Site, user: str) -> None:
        """A request that is repeated after its row was deleted gets the first result again."""
        job_id = request_job(here, user, job_id=f"{user}-again")
        assert here.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
        until(lambda: is_outbox_empty(here))
        here.redis.delete(f"celery-task-meta-{job_id}")
        request_job(here, user, job_id=job_id)
        assert here.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
        until(lambda: is_outbox_empty(here))

    def test_a_role_needs_few_privileges(self, idle: Site, user: str) -> None:
        """A role that may insert, and read the columns job_id and digest, can repeat a request."""
        columns = "job_id, task, user_id, user_ids, interview_ids, eta, expires_at, digest, headers"
        grants = [
            f"INSERT ({columns}) ON grant_access_request",
            "SELECT (job_id, digest) ON grant_access_request",
        ]
        with role(idle.store.database_url, *grants) as url, connected(url) as service:
            for _ in range(2):
                enqueue_in_sqlalchemy(service, user, NAMED_SAMPLES, job_id="restricted")
            service.commit()
        assert idle.store.value(REQUESTS) == 1


class TestWaiting:
    """A relay without due requests waits for a notification of PostgreSQL."""

    @pytest.fixture
    def relay(self, idle: Site) -> Iterator[OutboxRelay]:
        """A waiting relay with its own storage."""
        with idle.store.another() as storage:
            relay = OutboxRelay(idle.producer, lambda: storage)
            relay.start()
            until(lambda: idle.store.value(LISTENERS) == 1)
            yield relay
            relay.stop()
            relay._thread.join(30)
            assert not relay._thread.is_alive()

    @pytest.mark.usefixtures("relay")
    def test_a_request_is_sent_at_once(self, idle: Site, user: str) -> None:
        """A waiting relay sends each new request at once."""
        first = request_job(idle, user)
        until(lambda: queued(idle) == [first])
        until(lambda: idle.store.value(LISTENERS) == 1)
        second = request_job(idle, user)
        until(lambda: queued(idle) == [second, first])

    @pytest.mark.usefixtures("relay")
    def test_a_request_without_a_notification_is_sent(self, idle: Site) -> None:
        """A request whose notification was lost is found by a query."""
        with Database(idle.store.database_url).connect() as connection:
            connection.execute("SET session_replication_role = replica")  # disables the trigger
            connection.execute(
                "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
                " VALUES ('silent', 'ann', '{}')"
            )
        until(lambda: queued(idle) == ["silent"])

    @pytest.mark.usefixtures("relay")
    def test_a_waiting_relay_detects_lost_messages(self, idle: Site, user: str) -> None:
        """A waiting relay sends again the messages that Redis has lost."""
        job_id = request_job(idle, user)
        until(lambda: queued(idle) == [job_id])
        idle.redis.flushdb()
        until(lambda: queued(idle) == [job_id])

    @pytest.mark.usefixtures("relay")
    def test_a_lost_session_is_replaced(self, idle: Site, user: str) -> None:
        """A relay whose database session is terminated listens on a new one."""
        idle.store.execute(LISTENERS.replace("count(*)", "pg_terminate_backend(pid)"))
        job_id = request_job(idle, user)
        until(lambda: queued(idle) == [job_id])

    def test_locked_requests_are_queried_with_pauses(self, idle: Site, user: str) -> None:
        """A relay pauses while another transaction has locked the due requests."""
        pauses: list[float] = []

        class Pausing(OutboxRelay):
            def pause(self, seconds: float, *_: socket.socket) -> bool:
                pauses.append(seconds)
                return False

        request_job(idle, user)
        with connected(idle.store.database_url) as service:
            service.execute(text("SELECT FROM grant_access_request FOR UPDATE"))
            Pausing(idle.producer, lambda: idle.store.storage).run_once(idle.redis)
        assert pauses == [0.5]
        assert queued(idle) == []

    def test_a_waiting_relay_stops_at_once(self, idle: Site, relay: OutboxRelay) -> None:
        """Stopping a relay ends its wait."""
        relay.stop()
        relay._thread.join(1.4)  # shorter than the interval at which it checks Redis, 1.5 s
        assert not relay._thread.is_alive()
        assert queued(idle) == []
