"""The control service without a worker: single requests, and waiting for requests."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    LIMITS_KEY,
    WorkerLimits,
    reply_key,
)
from redis.exceptions import OutOfMemoryError

from storage.postgres import PostgresStorage
from tests.support.control import control_request, reply
from tests.support.stores import until
from tests.support.workers import Site
from worker.services.control import ControlService

LIMITS = WorkerLimits(max_interview_ids=7)


class TestControlService:
    """Single requests, processed without a worker."""

    @staticmethod
    def service(idle: Site) -> ControlService:
        """Return a service that is run by the test."""
        return ControlService(idle.producer, lambda: idle.store.storage, LIMITS)

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
            ControlService(idle.producer, lambda: away, LIMITS).run_once(idle.redis)
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
            service = ControlService(idle.producer, lambda: idle.store.storage, LIMITS)
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

    def test_a_connected_service_states_the_limits(
        self, idle: Site, services: Callable[[], ControlService]
    ) -> None:
        """Before it waits for requests, a service states the worker's limits in Redis."""
        services()
        until(lambda: len(waiting(idle)) == 1)
        stated: Any = idle.redis.get(LIMITS_KEY)
        assert WorkerLimits.model_validate_json(stated) == LIMITS
        assert 0 < idle.redis.ttl(LIMITS_KEY) <= 600

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
        """A full Redis refuses to block, which is logged once, as its end is; the service polls."""
        caplog.set_level(logging.INFO, logger="worker.services.control")
        services()
        before = count_polls(idle)
        (client,) = waiting(idle)
        idle.redis.config_set("maxmemory", 1)
        try:
            idle.redis.client_unblock(int(client))
            until(lambda: count_polls(idle) >= before + 3)
        finally:
            idle.redis.config_set("maxmemory", 0)
        assert reply(idle, control_request(idle, "job"))["result"]["state"] == "unknown"
        until(lambda: "waiting for control requests again" in caplog.text)
        began, ended = [record.getMessage() for record in caplog.records]
        assert began.startswith("Redis refuses to wait for control requests, polling: error=BLMOVE")
        assert "OutOfMemoryError: command not allowed when used memory > 'maxmemory'" in began
        assert ended == "Redis permits waiting for control requests again"


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
