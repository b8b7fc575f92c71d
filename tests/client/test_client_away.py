"""Both clients where Redis is away, refuses, or is none: one error, in time, without a password."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from interview_access.aio import AsyncInterviewAccessClient
from interview_access.errors import NoAnswerInTimeError, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, Client, longest_gap
from tests.support.stores import Background, all_at_once

BOUND = 10.0  # seconds within which a client fails where Redis is away
PASSWORD = "s3cret"  # noqa: S105 - of servers that live as long as these tests

CALLS: dict[str, Callable[[Client], object]] = {
    "enqueue": lambda client: client.enqueue("ann", ["i"]),
    "enqueue by id": lambda client: client.enqueue("ann", ["i"], job_id="chosen"),
    "wait": lambda client: client.wait("chosen", timeout=60),
    "status": lambda client: client.status("chosen", timeout=60),
    "cancel": lambda client: client.cancel("chosen", timeout=60),
}
SAYS = {
    "enqueue": "Expected a Redis that can be reached and written to.*same id is safe",
    "enqueue by id": "Job chosen might not have been queued.*same id is safe",
    "wait": "result of job chosen cannot be read.*poll it again|Sending it again is safe",
    "status": "Expected a Redis that can be reached and written to. Sending it again is safe",
    "cancel": "Expected a Redis that can be reached and written to. Sending it again is safe",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """A Redis of these tests' own, which they may stop."""
    with LocalStack(tmp_path_factory.mktemp("server") / "data", durable=False) as stack:
        yield stack


@pytest.fixture
def redis(server: LocalStack) -> Iterator[Redis]:
    """A connection to it."""
    with Redis(unix_socket_path=server.broker_url.removeprefix("redis+socket://")) as redis:
        redis.flushall()
        yield redis


@pytest.fixture(params=CLIENTS)
def client(server: LocalStack, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A client of it: the blocking one and the asyncio one in turn."""
    client = CLIENTS[request.param](server.broker_url)
    yield client
    client.close()


def fails_in_time(client: Client, call: str) -> str:
    """What the call says when it fails as it must."""
    began = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=SAYS[call]) as caught:
        CALLS[call](client)
    assert time.monotonic() - began < BOUND
    assert PASSWORD not in str(caught.value) + repr(caught.value.details)
    return str(caught.value)


@contextmanager
def stopped(server: LocalStack) -> Iterator[None]:
    """The server is gone meanwhile."""
    server.valkey.stop()
    try:
        yield
    finally:
        server.valkey.start()


@contextmanager
def frozen(server: LocalStack) -> Iterator[None]:
    """The server answers nothing meanwhile."""
    os.kill(server.valkey.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.valkey.pid, signal.SIGCONT)


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    """The server refuses what needs memory meanwhile."""
    redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        redis.config_set("maxmemory", 0)


@contextmanager
def read_only(redis: Redis) -> Iterator[None]:
    """The server is a replica meanwhile."""
    redis.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        redis.replicaof("NO", "ONE")


def test_a_server_that_is_gone(server: LocalStack, client: Client) -> None:
    """Every call fails at once, and the same client goes on when the server is back."""
    client.enqueue("ann", ["i"])
    with stopped(server):
        for call in CALLS:
            fails_in_time(client, call)
    assert client.enqueue("ann", ["i"], job_id="chosen") == "chosen"


@pytest.mark.parametrize(("refusing", "reason"), [(full, "maxmemory"), (read_only, "read only")])
def test_a_server_that_takes_nothing(
    redis: Redis, client: Client, refusing: Callable[[Redis], Any], reason: str
) -> None:
    """A full server and a read-only one are told by their reason, and nothing was sent."""
    with refusing(redis):
        for call in CALLS.keys() - {"wait"}:
            assert reason in fails_in_time(client, call)
    assert redis.keys() == []
    assert client.enqueue("ann", ["i"], job_id="chosen") == "chosen"


@pytest.mark.parametrize("refusing", [full, read_only])
def test_a_wait_needs_no_writing(
    redis: Redis, client: Client, refusing: Callable[[Redis], Any]
) -> None:
    """A wait goes on where only reading is possible: results may stand there, or come."""
    redis.set("celery-task-meta-done", '{"status": "SUCCESS", "result": {"success": true}}')
    with refusing(redis):
        assert client.wait("done", timeout=5) == {"success": True}
        with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
            client.wait("chosen", timeout=0.1)


def test_a_frozen_server(server: LocalStack) -> None:
    """Every call of either client ends within 10 s, connected before or not; the loop goes on."""
    connected = {
        (kind, call): CLIENTS[kind](server.broker_url) for kind in CLIENTS for call in CALLS
    }
    fresh = {(kind, call): CLIENTS[kind](server.broker_url) for kind in CLIENTS for call in CALLS}
    for client in connected.values():
        client.enqueue("ann", ["i"])
    blocking = InterviewAccessClient(server.broker_url)

    async def block() -> str:
        return fails_in_time(blocking, "enqueue")

    async def asyncio_gap() -> float:
        client = AsyncInterviewAccessClient(server.broker_url)
        gap, error = await longest_gap(client.enqueue("ann", ["i"]))
        assert isinstance(error, QueueUnavailableError)
        await client.close()
        return gap

    with frozen(server):
        calls: list[Callable[[], Any]] = [
            lambda: asyncio.run(asyncio_gap()),
            lambda: asyncio.run(longest_gap(block()))[0],
        ]
        for clients in (connected, fresh):
            calls += [
                lambda client=client, call=call: fails_in_time(client, call)  # type: ignore[misc] # a loop's
                for (_, call), client in clients.items()
            ]
        told = all_at_once(calls)
    assert told[0] < 0.5
    assert told[1] > 2
    for client in (*connected.values(), *fresh.values()):
        assert client.enqueue("ann", ["i"])
        client.close()
    blocking.close()


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Something else on a TCP port, that does so with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as open_ones:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                open_ones.enter_context(connection)
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

        serving = Background(serve)
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        serving.result()


def silent(_: socket.socket) -> None:
    """Accepts and says nothing."""


def hangs_up(connection: socket.socket) -> None:
    """Hears a little and closes."""
    connection.recv(10)
    connection.close()


def speaks_http(connection: socket.socket) -> None:
    """A web server."""
    connection.recv(10)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def speaks_ssh(connection: socket.socket) -> None:
    """Speaks first."""
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")


def speaks_nonsense(connection: socket.socket) -> None:
    """Begins as a Redis does, and goes wrong."""
    connection.sendall(b":no number\r\n*\xff\r\n$-7\r\n" * 5)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
@pytest.mark.parametrize("answer", [hangs_up, speaks_http, speaks_ssh, speaks_nonsense])
def test_what_is_no_redis(answer: Callable[[socket.socket], None], scheme: str) -> None:
    """Anything else that listens there is told as a Redis that cannot be reached."""
    with listening(answer) as port:
        for make in CLIENTS.values():
            client = make(f"{scheme}://:{PASSWORD}@127.0.0.1:{port}/0")
            fails_in_time(client, "enqueue by id")
            fails_in_time(client, "wait")
            client.close()


def test_what_accepts_and_never_answers() -> None:
    """A connection that is accepted and left alone ends within 10 s, with TLS too."""
    with listening(silent) as port:
        clients = [
            make(f"{scheme}://:{PASSWORD}@127.0.0.1:{port}/0")
            for make in CLIENTS.values()
            for scheme in ("redis", "rediss")
        ]
        all_at_once(
            [
                lambda client=client, call=call: fails_in_time(client, call)  # type: ignore[misc] # a loop's
                for client, call in zip(clients, CALLS, strict=False)
            ]
        )
        for client in clients:
            client.close()


def test_a_port_where_nobody_listens(tmp_path: Path) -> None:
    """No server at all is told at once, on a port as on a socket."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"redis://:{PASSWORD}@127.0.0.1:{port}/0", f"redis+socket://{tmp_path}/none.sock"):
        for make in CLIENTS.values():
            client = make(url)
            for call in CALLS:
                fails_in_time(client, call)
            client.close()


def test_a_host_that_has_no_address() -> None:
    """A host's name that stands for nothing is told as well."""
    for make in CLIENTS.values():
        client = make(f"redis://:{PASSWORD}@no-such-host.invalid/0")
        assert "no-such-host.invalid" in fails_in_time(client, "enqueue")
        client.close()


@pytest.mark.parametrize(
    ("user", "reason"),
    [("", "authenticated"), (f":{PASSWORD}x@", "invalid username-password pair")],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_a_password_that_is_missing_or_wrong(
    server: LocalStack, redis: Redis, kind: str, user: str, reason: str
) -> None:
    """A server that wants another password is told by its reason, and the right one serves."""
    path = server.broker_url.removeprefix("redis+socket://")
    redis.config_set("requirepass", "right:/@pass")
    try:
        client = CLIENTS[kind](f"redis+socket://{user}{path}")
        for call in CALLS:
            assert reason in fails_in_time(client, call)
        client.close()
        right = CLIENTS[kind](f"redis+socket://:right%3A%2F%40pass@{path}")
        assert right.enqueue("ann", ["i"], job_id="chosen") == "chosen"
        right.close()
    finally:
        redis.auth("right:/@pass")
        redis.config_set("requirepass", "")
