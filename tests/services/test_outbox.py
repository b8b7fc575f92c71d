"""Jobs that a service asks for in a transaction of its own."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from interview_access.errors import InvalidGrantRequestException
from interview_access.outbox import INSERT, enqueue_in_sqlalchemy
from interview_access.producer import InterviewAccessClient
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from sqlalchemy import text

from devstack.servers import LocalStack
from storage.dtos import AccessRequestDTO
from storage.interface import StorageError
from storage.memory import MemoryStorage
from storage.postgres import PostgresStorage, PostgresTransaction
from storage.samples import NAMED_SAMPLES, load_samples
from tests.client.test_producers import blocks
from tests.storage.test_migrations import Database, DjangoService
from tests.support.database import connected, database
from tests.support.sentinels import redis_of
from tests.support.stores import all_at_once, until
from tests.support.workers import QUEUE, Site, site, worker
from worker.services.outbox_relay import OutboxRelay

SECTION = "Inside a transaction of your database"
REQUESTS = "SELECT count(*) FROM grant_access_request"
SLEEPERS = """
    SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
"""Relays that wait for a notification."""


@pytest.fixture(scope="module")
def here(
    stack: LocalStack, _migrated: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A site with a worker and sample interviews."""
    with (
        database(stack.database_url, template=_migrated) as url,
        site(stack, url, 13) as here,
        worker(here, tmp_path_factory.mktemp("outbox") / "worker.log"),
    ):
        load_samples(url, len(NAMED_SAMPLES))
        yield here


@pytest.fixture
def idle(stack: LocalStack, migrated_url: str) -> Iterator[Site]:
    """A site without a worker, with sample interviews."""
    with site(stack, migrated_url, 14) as idle:
        load_samples(migrated_url, len(NAMED_SAMPLES))
        yield idle


@pytest.fixture
def user() -> str:
    """A user of the test's own."""
    return str(uuid4())


def ask(here: Site, user_id: str, *, job_id: str | None = None) -> str:
    """Ask for a job, and commit."""
    with connected(here.store.database_url) as connection:
        job_id = enqueue_in_sqlalchemy(connection, user_id, NAMED_SAMPLES, job_id=job_id)
        connection.commit()
    return job_id


def queued(here: Site) -> list[str]:
    """The jobs on the queue."""
    messages: Any = here.redis.lrange(QUEUE, 0, -1)
    return [json.loads(message)["headers"]["id"] for message in messages]


def go_round(
    here: Site, storage: PostgresStorage | None = None, redis: Redis | None = None
) -> None:
    """Have the relay go one round."""
    relay = OutboxRelay(here.producer, lambda: storage or here.store.storage)
    relay.run_once(redis or here.redis)


def is_answered(here: Site) -> bool:
    """Whether no request stands any more."""
    return bool(here.store.value(REQUESTS) == 0)


class TestThePage:
    """What docs/producers.md shows, as it stands there."""

    def test_the_insert(self, here: Site) -> None:
        """The page's INSERT asks for a job of which the result is polled by the id returned."""
        (block,) = blocks(SECTION, "sql")
        began = time.monotonic()
        with Database(here.store.database_url).connect() as connection:
            begin, insert, commit = block.rstrip(";\n").split(";\n")
            connection.execute(begin.encode())
            (row,) = connection.execute(insert.encode()).fetchall()
            connection.execute(commit.encode())
        assert here.answer(row["job_id"])["result"]["created_access_count"] == 1
        assert time.monotonic() - began < 5  # a second, it says; machines are busy at times
        until(lambda: is_answered(here))

    def test_django(self, here: Site) -> None:
        """The page's Django service asks for a job inside of atomic."""
        block, _ = blocks(SECTION, "python")
        printed = DjangoService(Database(here.store.database_url)).run_python(block)
        assert here.answer(printed.strip())["result"]["created_access_count"] == 1

    def test_sqlalchemy(self, here: Site) -> None:
        """The page's SQLAlchemy session asks for a job."""
        _, block = blocks(SECTION, "python")
        done = subprocess.run(
            [sys.executable, "-c", block],
            env=here.environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert here.answer(done.stdout.strip())["result"]["created_access_count"] == 1


class TestPromises:
    """What is asked for takes effect once, or not at all."""

    def test_rolled_back_it_never_runs(self, here: Site, user: str) -> None:
        """Of two requests, the one that is rolled back is never known."""
        with connected(here.store.database_url) as connection:
            undone = enqueue_in_sqlalchemy(connection, user, NAMED_SAMPLES)
        here.answer(ask(here, str(uuid4())))
        assert here.store.granted(user) == []
        assert InterviewAccessClient(here.broker).status(undone).state == "unknown"

    def test_an_emptied_redis_is_filled_again(self, idle: Site, user: str, tmp_path: Path) -> None:
        """A message that Redis lost is sent again as soon as that is seen, and counts once."""
        job_id = ask(idle, user)
        go_round(idle)
        assert idle.redis.llen(QUEUE) == 1
        idle.redis.flushdb()
        go_round(idle)
        assert idle.redis.llen(QUEUE) == 1
        idle.redis.flushdb()
        with worker(idle, tmp_path / "log"):
            assert idle.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
            until(lambda: is_answered(idle))

    def test_a_redis_that_is_away_costs_time_only(self, idle: Site, user: str) -> None:
        """What cannot be sent stays due."""
        ask(idle, user)
        with Redis(unix_socket_path="/nowhere") as away, pytest.raises(RedisConnectionError):
            OutboxRelay(idle.producer, lambda: idle.store.storage).run_once(away)
        go_round(idle)
        assert idle.redis.llen(QUEUE) == 1

    def test_sent_and_not_noted_it_counts_once(self, idle: Site, user: str, tmp_path: Path) -> None:
        """A relay that dies before it notes what it sent has it sent again, to one effect."""

        class Dying(PostgresStorage):
            """Ends before its COMMIT."""

            @contextmanager
            def transaction(self) -> Iterator[PostgresTransaction]:
                with super().transaction() as transaction:
                    yield transaction
                    raise StorageError("the worker is gone")

        idle.redis.set("interview-access:relay", 1)
        dying = Dying(idle.store.database_url)
        job_id = ask(idle, user)
        with pytest.raises(StorageError, match="the worker is gone"):
            go_round(idle, dying)
        dying.close()
        go_round(idle)
        assert idle.redis.llen(QUEUE) == 2
        with worker(idle, tmp_path / "log"):
            assert idle.answer(job_id)["result"]["created_access_count"] == len(NAMED_SAMPLES)
            until(lambda: idle.redis.llen(QUEUE) == 0)
        assert idle.store.rows() == len(NAMED_SAMPLES)

    def test_relays_share_the_requests(self, idle: Site) -> None:
        """Relays that go round at once send every request once."""
        idle.redis.set("interview-access:relay", 1)
        jobs = {ask(idle, str(uuid4())) for _ in range(20)}
        with idle.store.another() as one, idle.store.another() as other:
            all_at_once([lambda: go_round(idle, one), lambda: go_round(idle, other)])
        go_round(idle)
        assert idle.redis.llen(QUEUE) == len(jobs)

    def test_a_reused_id_is_refused_by_the_worker(self, here: Site, user: str) -> None:
        """Another request under an id that has an answer has no effect and is a dead letter."""
        job_id = here.send(user, NAMED_SAMPLES[:1])
        here.answer(job_id)
        ask(here, user, job_id=job_id)
        until(lambda: job_id in {letter["job_id"] for letter in here.dead_letters()})
        until(lambda: is_answered(here))
        assert here.store.granted(user) == list(NAMED_SAMPLES[:1])

    def test_what_no_worker_can_read_fails_as_any_job(self, here: Site, user: str) -> None:
        """A request with a NULL among its ids fails, saying so, and is gone."""
        with connected(here.store.database_url) as connection:
            row = {"job_id": user, "user_id": user, "interview_ids": [NAMED_SAMPLES[0], None]}
            connection.exec_driver_sql(INSERT, row)
            connection.commit()
        assert "interview_ids[1]" in here.answer(user)["result"]["exc_message"][0]
        until(lambda: is_answered(here))

    def test_it_is_queued_and_can_be_cancelled_before_it_is_sent(
        self, idle: Site, user: str, tmp_path: Path
    ) -> None:
        """A request that waits for its relay is known, and cancelled it never runs."""
        client = InterviewAccessClient(idle.broker)
        with worker(idle, tmp_path / "log"), connected(idle.store.database_url) as service:
            ask(idle, user)
            until(lambda: is_answered(idle))  # by a relay that knows this Redis by now
            job_id = enqueue_in_sqlalchemy(service, user, NAMED_SAMPLES)
            service.exec_driver_sql("UPDATE grant_access_request SET look_at = 'infinity'")
            service.commit()
            assert client.status(job_id).state == "queued"
            assert client.cancel(job_id).state == "cancelled"
            service.exec_driver_sql("UPDATE grant_access_request SET look_at = now()")
            service.commit()
            until(lambda: is_answered(idle))
            assert client.status(job_id).state == "cancelled"

    def test_one_that_redis_refuses_stops_no_other(self, idle: Site, user: str) -> None:
        """A request too large for Redis is named in the log, and the others are sent."""
        limit = "proto-max-bulk-len"
        standing: Any = idle.redis.config_get(limit)[limit]
        with connected(idle.store.database_url) as connection:
            first, large, last = (
                enqueue_in_sqlalchemy(connection, user, ids)
                for ids in (NAMED_SAMPLES, [str(uuid4())] * 40_000, NAMED_SAMPLES)
            )
            connection.commit()
        try:
            idle.redis.config_set(limit, 1024 * 1024)
            go_round(idle)
        finally:
            idle.redis.config_set(limit, standing)
        assert sorted(queued(idle)) == sorted([first, last])
        assert idle.store.value(f"{REQUESTS} WHERE sent_at IS NULL") == 1
        idle.store.storage.make_requests_due()
        go_round(idle)
        assert large in queued(idle)

    @pytest.mark.parametrize(
        ("command", "says"),
        [
            ("ACL SETUSER default -lpush", "no permissions"),
            ("CONFIG SET min-replicas-to-write 1", "NOREPLICAS"),
        ],
        ids=["NOPERM", "NOREPLICAS"],
    )
    def test_a_refusal_of_every_request_ends_the_page(
        self, idle: Site, tmp_path: Path, command: str, says: str
    ) -> None:
        """Redis's refusal is raised at the first request, and all requests stay due."""
        for _ in range(2):
            ask(idle, str(uuid4()))
        with redis_of(tmp_path) as port, Redis(port=port) as redis:
            redis.set("interview-access:relay", 1)
            redis.execute_command(*command.split())
            with pytest.raises(ResponseError, match=says):
                go_round(idle, redis=redis)
        go_round(idle)
        assert idle.redis.llen(QUEUE) == 2

    def test_one_that_is_too_large_fails_and_stops_no_other(self, idle: Site, user: str) -> None:
        """A request of more IDs than a relay reads fails in the ledger, once, and is deleted."""
        first = ask(idle, user)
        idle.store.execute(
            "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
            " VALUES ('large', 'ann', array_fill(CAST(gen_random_uuid() AS text), ARRAY[1000000]))"
        )
        last = ask(idle, user)
        go_round(idle)
        assert sorted(queued(idle)) == sorted([first, last])
        finished = idle.store.storage.get_finished_job("large")
        assert finished
        assert finished.answer.error
        assert finished.answer.error["type"] == "InvalidGrantRequestException"
        idle.store.storage.make_requests_due()
        go_round(idle)
        assert idle.store.value(f"{REQUESTS} WHERE job_id = 'large'") == 0

    def test_a_page_of_compressible_requests_is_bounded(self, idle: Site) -> None:
        """Requests that are small in the table and large in memory are read a few at a time."""
        idle.store.execute(
            "INSERT INTO grant_access_request (user_id, interview_ids)"
            " SELECT 'ann', array_fill(CAST(gen_random_uuid() AS text), ARRAY[50000])"
            " FROM generate_series(1, 5)"
        )
        go_round(idle)
        assert len(queued(idle)) == 1

    def test_one_that_is_no_message_stops_no_other(
        self, idle: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A row that no message can be made of is reported, and the others are sent."""
        requests = MemoryStorage(chunk_size=1)
        for job_id in "first", "no\nid", "last":
            row = AccessRequestDTO(job_id, "ann", NAMED_SAMPLES, datetime.now(UTC))
            requests.add_request(row)
        OutboxRelay(idle.producer, lambda: requests).run_once(idle.redis)
        assert sorted(queued(idle)) == ["first", "last"]
        (record,) = caplog.records
        assert "job='no\\nid' error=ValueError: job id: expected 1 to 255" in record.getMessage()

    @pytest.mark.parametrize(("waited", "copies"), [("90 minutes", 0), ("20 minutes", 1)])
    def test_one_is_sent_again_the_later_the_longer_it_waits(
        self, idle: Site, user: str, waited: str, copies: int
    ) -> None:
        """A request that had to wait is trusted to be on the queue for as long again."""
        job_id = ask(idle, user)
        go_round(idle)
        idle.store.execute(
            "UPDATE grant_access_request SET look_at = now(), sent_at = now() - interval '30 min',"
            " requested_at = now() - interval '30 min' - CAST(:waited AS interval)",
            waited=waited,
        )
        go_round(idle)
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
    def test_what_is_no_request_is_refused_at_once(
        self, idle: Site, user_id: Any, ids: Any
    ) -> None:
        """The helper takes no user and no ids of another type for their text."""
        with (
            connected(idle.store.database_url) as connection,
            pytest.raises(InvalidGrantRequestException),
        ):
            enqueue_in_sqlalchemy(connection, user_id, ids)
        assert is_answered(idle)

    def test_an_id_that_is_none_is_refused_at_once(self, idle: Site) -> None:
        """The helper names a job id that the table would not take."""
        for job_id in "", "x" * 256, "Zoë":
            with pytest.raises(ValueError, match=re.escape("job id: expected 1 to 255")):
                ask(idle, "ann", job_id=job_id)


class TestWaiting:
    """A relay without requests waits for a notification of PostgreSQL."""

    @pytest.fixture
    def relay(self, idle: Site) -> Iterator[OutboxRelay]:
        """A relay that sleeps, with a storage of its own."""
        with idle.store.another() as storage:
            relay = OutboxRelay(idle.producer, lambda: storage)
            relay.start()
            until(lambda: idle.store.value(SLEEPERS) == 1)
            yield relay
            relay.stop()
            relay._thread.join(30)
            assert not relay._thread.is_alive()

    @pytest.mark.usefixtures("relay")
    def test_a_request_is_sent_at_once(self, idle: Site, user: str) -> None:
        """A relay that sleeps sends what is requested, again and again."""
        first = ask(idle, user)
        until(lambda: queued(idle) == [first])
        until(lambda: idle.store.value(SLEEPERS) == 1)
        second = ask(idle, user)
        until(lambda: queued(idle) == [second, first])

    @pytest.mark.usefixtures("relay")
    def test_a_request_without_a_notification_is_sent(self, idle: Site) -> None:
        """A request of which no notification comes is found by a query."""
        with Database(idle.store.database_url).connect() as connection:
            connection.execute("SET session_replication_role = replica")  # no trigger is fired
            connection.execute(
                "INSERT INTO grant_access_request (job_id, user_id, interview_ids)"
                " VALUES ('silent', 'ann', '{}')"
            )
        until(lambda: queued(idle) == ["silent"])

    @pytest.mark.usefixtures("relay")
    def test_a_redis_that_is_emptied_is_filled_again(self, idle: Site, user: str) -> None:
        """A relay that sleeps notices that Redis has lost the messages."""
        job_id = ask(idle, user)
        until(lambda: queued(idle) == [job_id])
        idle.redis.flushdb()
        until(lambda: queued(idle) == [job_id])

    @pytest.mark.usefixtures("relay")
    def test_a_lost_session_is_replaced(self, idle: Site, user: str) -> None:
        """A relay whose session is ended listens on another one."""
        idle.store.execute(SLEEPERS.replace("count(*)", "pg_terminate_backend(pid)"))
        job_id = ask(idle, user)
        until(lambda: queued(idle) == [job_id])

    def test_requests_that_others_have_locked_are_not_queried_without_a_pause(
        self, idle: Site, user: str
    ) -> None:
        """Another relay sends them, or a service changes one: this relay pauses meanwhile."""
        pauses: list[float] = []

        class Pausing(OutboxRelay):
            def pause(self, seconds: float, *_: socket.socket) -> bool:
                pauses.append(seconds)
                return False

        ask(idle, user)
        with connected(idle.store.database_url) as service:
            service.execute(text("SELECT FROM grant_access_request FOR UPDATE"))
            Pausing(idle.producer, lambda: idle.store.storage).run_once(idle.redis)
        assert pauses == [0.5]
        assert queued(idle) == []

    def test_a_relay_that_sleeps_stops_at_once(self, idle: Site, relay: OutboxRelay) -> None:
        """Stopping ends the wait."""
        relay.stop()
        relay._thread.join(1.4)  # it looks at Redis every 1.5 s
        assert not relay._thread.is_alive()
        assert queued(idle) == []
