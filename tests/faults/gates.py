"""Relays between workers and servers, with gates that hold a job's traffic at a chosen stage.

The worker connects to the relay's socket as it would to the server's. Traffic is recognized by its
content, independently of the names and digests of the worker's scripts.
"""

from __future__ import annotations

import re
import shutil
import socket
import struct
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.relay import Pair, SocketRelay
from tests.support.stores import PATIENCE_SECONDS

_MESSAGE = b'"headers"'
_JOB_ID = re.compile(rb'"id": ?"([^"]{1,255})"')
_JOBS_KEPT = 2_000


@dataclass(frozen=True, slots=True)
class Traffic:
    """A kind of traffic.

    Attributes:
        matches: Whether data that pass the relay are of this kind.
        in_reply: Whether the data are a reply of the server instead of a request.
    """

    matches: Callable[[Relay, bytes], bool]
    in_reply: bool = False


CLAIM = Traffic(lambda _, data: _is_claim(data), in_reply=True)
"""The reply of a script that claims messages; a blocked client's reply is a bare message."""

SETTLEMENT = Traffic(
    lambda relay, data: b"EVAL" in data and any(one in data for one in list(relay.claimed))
)
"""A script with the ID of a claimed job among its arguments."""


class Gate:
    """Holds the first traffic of a kind, or the reply to it, until the gate is opened."""

    def __init__(self, traffic: bytes | Traffic, *, answered: bool = False) -> None:
        self.traffic = traffic
        self.answered = answered
        self.pid = 0
        """The process whose traffic is held."""
        self._taken = threading.Lock()
        self._reached = threading.Event()
        self._opened = threading.Event()

    def take(self, relay: Relay, data: bytes, *, in_reply: bool = False) -> bool:
        """Whether the gate holds this traffic: it matches, and none did before."""
        if isinstance(self.traffic, bytes):
            matches = not in_reply and self.traffic in data
        else:
            matches = in_reply == self.traffic.in_reply and self.traffic.matches(relay, data)
        return matches and self._taken.acquire(blocking=False)

    def hold(self, pid: int) -> None:
        """Block until the gate is opened."""
        self.pid = pid
        self._reached.set()
        self._opened.wait()

    @property
    def reached(self) -> bool:
        """Whether the gate holds or has held traffic."""
        return self._reached.is_set()

    def until_reached(self, within: float = PATIENCE_SECONDS) -> int:
        """Wait until the gate holds traffic, and return the ID of the process that sent it."""
        assert self._reached.wait(within), f"nothing came with {self.traffic!r}"
        return self.pid

    def open(self) -> None:
        """Let the held traffic and all later traffic pass."""
        self._opened.set()


class Relay(SocketRelay):
    """The relay of one server."""

    def __init__(self, server: Path, address: Path, *, pool_only: bool = False) -> None:
        """Listen at ``address``, and connect to ``server`` for each client.

        With ``pool_only`` gates hold only traffic of pool processes, because main processes
        also use the server outside of jobs.
        """
        self._pool_only = pool_only
        self._gates: list[Gate] = []
        self.claimed: deque[bytes] = deque(maxlen=_JOBS_KEPT)
        """IDs of recently claimed jobs."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(address))
        listener.listen(100)
        super().__init__(server, listener)

    @contextmanager
    def gate(self, traffic: bytes | Traffic, *, answered: bool = False) -> Iterator[Gate]:
        """A gate that is closed within a ``with`` block and opened at its end.

        Args:
            traffic: What the gate holds: bytes of a request, or a kind of traffic.
            answered: Whether to hold the reply to the request instead of the request.
        """
        gate = Gate(traffic, answered=answered)
        self._gates.append(gate)
        try:
            yield gate
        finally:
            self._gates.remove(gate)
            gate.open()

    def close(self) -> None:
        """Open all gates, close all connections and stop listening."""
        for gate in self._gates:
            gate.open()
        super().close()

    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """See the base class."""
        credentials = pair[0].getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = struct.unpack("3i", credentials)[0]
        if self._pool_only and not _is_pool_process(pid):
            pid = 0
        awaiting_reply: list[Gate] = []
        return lambda: self._forward_requests(
            pair, pid, awaiting_reply
        ), lambda: self._forward_replies(pair, pid, awaiting_reply)

    def _forward_requests(self, pair: Pair, pid: int, awaiting_reply: list[Gate]) -> None:
        client, server = pair
        with suppress(OSError):
            while data := client.recv(1 << 20):
                for gate in list(self._gates) if pid else ():
                    if gate.take(self, data):
                        if gate.answered:
                            awaiting_reply.append(gate)
                        else:
                            gate.hold(pid)
                server.sendall(data)
        self.disconnect(pair)

    def _forward_replies(self, pair: Pair, pid: int, awaiting_reply: list[Gate]) -> None:
        client, server = pair
        with suppress(OSError):
            while data := server.recv(1 << 20):
                if _is_claim(data):
                    self.claimed.extend(_JOB_ID.findall(data))
                awaiting_reply += [
                    gate
                    for gate in (list(self._gates) if pid else ())
                    if gate.take(self, data, in_reply=True)
                ]
                while awaiting_reply:
                    awaiting_reply.pop().hold(pid)
                client.sendall(data)
        self.disconnect(pair)


def _is_claim(data: bytes) -> bool:
    return data.startswith(b"*") and _MESSAGE in data


def _is_pool_process(pid: int) -> bool:
    """Whether it is a pool process: a forked process has its parent's command line."""
    try:
        process = psutil.Process(pid)
        parent = process.parent()
        return parent is not None and parent.cmdline() == process.cmdline()
    except psutil.NoSuchProcess:
        return False


class Relays:
    """The relays of queue, results and database, between a site's workers and its servers."""

    def __init__(self, broker_url: str, database_url: str) -> None:
        """Listen for workers; the arguments are the URLs of the servers themselves."""
        self._folder = Path(tempfile.mkdtemp(prefix="gates-"))
        redis, _, rest = broker_url.removeprefix("redis+socket://").partition("?")
        folder = database_url.partition("host=")[2].replace("%2F", "/")
        postgres = ".s.PGSQL.5432"
        self.queue = Relay(Path(redis), self._folder / "queue")
        self.results = Relay(Path(redis), self._folder / "results", pool_only=True)
        self.database = Relay(Path(folder) / postgres, self._folder / postgres, pool_only=True)
        self.settings = {
            "CELERY_BROKER_URL": f"redis+socket://{self._folder}/queue?{rest}",
            "CELERY_RESULT_BACKEND": f"redis+socket://{self._folder}/results?{rest}",
            "DATABASE_URL": database_url.partition("host=")[0] + f"host={self._folder}",
        }
        """Environment variables of the workers."""

    def close(self) -> None:
        """Cut all connections and stop listening."""
        for relay in self.queue, self.results, self.database:
            relay.close()
        shutil.rmtree(self._folder)
