"""Both clients during outages of Redis: the same error, in time, without a password."""

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
from interview_access.contracts import result_key
from interview_access.errors import NoAnswerInTimeError, QueueUnavailableError
from interview_access.producer import InterviewAccessClient
from redis import Redis

from devstack.servers import LocalStack
from tests.support.clients import CLIENTS, Client, longest_gap
from tests.support.stores import Background, all_at_once

BOUND = 10.0  # seconds within which a call fails while Redis is unavailable
PASSWORD = "s3cret"  # noqa: S105 - of servers that only these tests use

CALLS: dict[str, Callable[[Client], object]] = {
    "enqueue": lambda client: client.enqueue("ann", ["i"]),
    "enqueue by id": lambda client: client.enqueue("ann", ["i"], job_id="chosen"),
    "wait": lambda client: client.wait("chosen", timeout=60),
    "status": lambda client: client.status("chosen", timeout=60),
    "cancel": lambda client: client.cancel("chosen", timeout=60),
}
SAYS = {
    "enqueue": "Expected a Redis that can be reached and written to.*same ID is safe",
    "enqueue by id": "Job chosen might not have been queued.*same ID is safe",
    "wait": "result of job chosen cannot be read.*poll it again|Sending it again is safe",
    "status": "Expected a Redis that can be reached and written to. Sending it again is safe",
    "cancel": "Expected a Redis that can be reached and written to. Sending it again is safe",
}


def fails_in_time(client: Client, call: str) -> str:
    """Check that a call fails as expected within the limit; return the sentence."""
    began = time.monotonic()
    with pytest.raises(QueueUnavailableError, match=SAYS[call]) as caught:
        CALLS[call](client)
    assert time.monotonic() - began < BOUND
    assert PASSWORD not in str(caught.value) + repr(caught.value.details)
    return str(caught.value)


@contextmanager
def stopped(server: LocalStack) -> Iterator[None]:
    """Stop the server meanwhile."""
    server.valkey.stop()
    try:
        yield
    finally:
        server.valkey.start()


@contextmanager
def frozen(server: LocalStack) -> Iterator[None]:
    """Suspend the server meanwhile."""
    os.kill(server.valkey.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.valkey.pid, signal.SIGCONT)


@contextmanager
def full(redis: Redis) -> Iterator[None]:
    """Let the server refuse commands that need memory meanwhile."""
    redis.config_set("maxmemory", 1)
    try:
        yield
    finally:
        redis.config_set("maxmemory", 0)


@contextmanager
def read_only(redis: Redis) -> Iterator[None]:
    """Make the server a replica meanwhile."""
    redis.replicaof("127.0.0.1", 1)
    try:
        yield
    finally:
        redis.replicaof("NO", "ONE")


def test_a_stopped_server(server: LocalStack, client: Client) -> None:
    """Each call fails at once, and the same client works when the server is back."""
    client.enqueue("ann", ["i"])
    with stopped(server):
        for call in CALLS:
            fails_in_time(client, call)
    assert client.enqueue("ann", ["i"], job_id="chosen") == "chosen"


@pytest.mark.parametrize(("refusing", "reason"), [(full, "maxmemory"), (read_only, "read only")])
def test_a_server_that_refuses_writes(
    redis: Redis, client: Client, refusing: Callable[[Redis], Any], reason: str
) -> None:
    """The error of a full or read-only server has the reason, and nothing is sent."""
    with refusing(redis):
        for call in CALLS.keys() - {"wait"}:
            assert reason in fails_in_time(client, call)
    assert redis.keys() == []
    assert client.enqueue("ann", ["i"], job_id="chosen") == "chosen"


@pytest.mark.parametrize("refusing", [full, read_only])
def test_waiting_needs_no_writes(
    redis: Redis, client: Client, refusing: Callable[[Redis], Any]
) -> None:
    """A result is read from a full or read-only server, and waiting for one goes on."""
    redis.set(result_key("done"), '{"status": "SUCCESS", "result": {"success": true}}')
    with refusing(redis):
        assert client.wait("done", timeout=5) == {"success": True}
        with pytest.raises(NoAnswerInTimeError, match="nothing is stored of it"):
            client.wait("chosen", timeout=0.1)


def test_a_suspended_server(server: LocalStack) -> None:
    """Each call of either client fails within 10 s, and the event loop is not blocked."""
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
        results = all_at_once(calls)
    assert results[0] < 0.5
    assert results[1] > 2
    for client in (*connected.values(), *fresh.values()):
        assert client.enqueue("ann", ["i"])
        client.close()
    blocking.close()


@contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """Another server on a TCP port, which handles each connection with a function."""
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


def accepts_only(_: socket.socket) -> None:
    """Accept and send nothing."""


def closes(connection: socket.socket) -> None:
    """Read a little and close."""
    connection.recv(10)
    connection.close()


def replies_http(connection: socket.socket) -> None:
    """Reply as a web server."""
    connection.recv(10)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def greets_as_ssh(connection: socket.socket) -> None:
    """Send first, as an SSH server."""
    connection.sendall(b"SSH-2.0-OpenSSH_9.9\r\n")


def replies_invalid(connection: socket.socket) -> None:
    """Begin as a Redis, and continue with an invalid reply."""
    connection.sendall(b":no number\r\n*\xff\r\n$-7\r\n" * 5)


@pytest.mark.parametrize("scheme", ["redis", "rediss"])
@pytest.mark.parametrize("answer", [closes, replies_http, greets_as_ssh, replies_invalid])
def test_a_server_that_is_not_a_redis(answer: Callable[[socket.socket], None], scheme: str) -> None:
    """A server with another protocol is an unavailable Redis."""
    with listening(answer) as port:
        for make in CLIENTS.values():
            client = make(f"{scheme}://:{PASSWORD}@127.0.0.1:{port}/0")
            fails_in_time(client, "enqueue by id")
            fails_in_time(client, "wait")
            client.close()


def test_a_server_that_never_replies() -> None:
    """Each call fails within 10 s if connections are accepted and never served, also with TLS."""
    with listening(accepts_only) as port:
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


def test_a_closed_port_or_missing_socket(tmp_path: Path) -> None:
    """A refused connection is an error at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    for url in (f"redis://:{PASSWORD}@127.0.0.1:{port}/0", f"redis+socket://{tmp_path}/none.sock"):
        for make in CLIENTS.values():
            client = make(url)
            for call in CALLS:
                fails_in_time(client, call)
            client.close()


def test_a_name_with_many_silent_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call fails within 10 s, however many addresses of the name do not reply."""
    resolve = socket.getaddrinfo
    ports: list[int] = []

    def resolved(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        """Resolve a test name to 16 addresses; the real resolver knows the others."""
        if host != "silent.invalid":
            return resolve(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", ports[0]))] * 16

    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        ports.append(listener.getsockname()[1])
        for _ in range(4):  # fill the backlog, so that later connections get no reply
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", ports[0]))
        monkeypatch.setattr(socket, "getaddrinfo", resolved)
        clients = [make("redis://silent.invalid/0") for make in CLIENTS.values()]
        all_at_once([lambda one=client: fails_in_time(one, "enqueue") for client in clients])  # type: ignore[misc] # a loop's
        for client in clients:
            client.close()


def test_an_unknown_host() -> None:
    """The error names a host that cannot be resolved."""
    for make in CLIENTS.values():
        client = make(f"redis://:{PASSWORD}@no-such-host.invalid/0")
        assert "no-such-host.invalid" in fails_in_time(client, "enqueue")
        client.close()


@pytest.mark.parametrize(
    ("user", "reason"),
    [("", "authenticated"), (f":{PASSWORD}x@", "invalid username-password pair")],
)
@pytest.mark.parametrize("kind", CLIENTS)
def test_a_missing_or_wrong_password(
    server: LocalStack, redis: Redis, kind: str, user: str, reason: str
) -> None:
    """The error has the reason, and the right password works."""
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
