"""A relay before a server, which holds what passes at the point that a test names.

The product knows nothing of it: it connects to the relay's socket as it would to the server's.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from tests.stores import PATIENCE_SECONDS
from worker import claims


def script(body: str) -> bytes:
    """What Redis is asked by to run one of the scripts in worker.claims."""
    return hashlib.sha1((claims._SCRIPT + body).encode()).hexdigest().encode()  # noqa: S324


class Gate:
    """Holds the first traffic that holds ``pattern``, or the answer to it, until it is opened."""

    def __init__(self, pattern: bytes, *, answered: bool = False) -> None:
        self.pattern = pattern
        self.answered = answered
        self.pid = 0
        """The process whose traffic is held."""
        self._taken = threading.Lock()
        self._reached = threading.Event()
        self._opened = threading.Event()

    def take(self, data: bytes) -> bool:
        """Whether this traffic, and no earlier one, is the gate's."""
        return self.pattern in data and self._taken.acquire(blocking=False)

    def hold(self, pid: int) -> None:
        """Stand until the gate is opened."""
        self.pid = pid
        self._reached.set()
        self._opened.wait()

    @property
    def reached(self) -> bool:
        """Whether traffic has come to the gate."""
        return self._reached.is_set()

    def until_reached(self, within: float = PATIENCE_SECONDS) -> int:
        """The process at the gate, as soon as there is one."""
        assert self._reached.wait(within), f"nothing came with {self.pattern!r}"
        return self.pid

    def open(self) -> None:
        """Let it pass, and all that comes after it."""
        self._opened.set()


class Relay:
    """One server's relay."""

    def __init__(self, server: Path, address: Path, *, children_only: bool = False) -> None:
        """Listens at ``address`` from now on, and connects to ``server`` for each who comes.

        With ``children_only``, gates are for the workers' children: what their main processes do
        beside the jobs passes.
        """
        self._server = server
        self._children_only = children_only
        self._gates: list[Gate] = []
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(address))
        self._listener.listen(100)
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def gate(self, pattern: bytes, *, answered: bool = False) -> Iterator[Gate]:
        """A gate that stands for the time of a with block, and is open after it."""
        gate = Gate(pattern, answered=answered)
        self._gates.append(gate)
        try:
            yield gate
        finally:
            self._gates.remove(gate)
            gate.open()

    def cut(self) -> int:
        """Cut every connection. Returns how many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            self._part(pair)
        return len(pairs)

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()
        for gate in self._gates:
            gate.open()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(str(self._server))
            except OSError:
                client.close()
                server.close()
                continue
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            pid = struct.unpack("3i", credentials)[0]
            pair = client, server
            self._pairs.add(pair)
            answers: list[Gate] = []
            if self._children_only and not _is_child(pid):
                pid = 0
            for relay in self._ask, self._answer:
                threading.Thread(target=relay, args=(pair, pid, answers), daemon=True).start()

    def _ask(
        self, pair: tuple[socket.socket, socket.socket], pid: int, answers: list[Gate]
    ) -> None:
        client, server = pair
        with suppress(OSError):
            while data := client.recv(1 << 20):
                for gate in list(self._gates) if pid else ():
                    if gate.take(data):
                        if gate.answered:
                            answers.append(gate)
                        else:
                            gate.hold(pid)
                server.sendall(data)
        self._part(pair)

    def _answer(
        self, pair: tuple[socket.socket, socket.socket], pid: int, answers: list[Gate]
    ) -> None:
        client, server = pair
        with suppress(OSError):
            while data := server.recv(1 << 20):
                while answers:
                    answers.pop().hold(pid)
                client.sendall(data)
        self._part(pair)

    def _part(self, pair: tuple[socket.socket, socket.socket]) -> None:
        self._pairs.discard(pair)
        for one in pair:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def _is_child(pid: int) -> bool:
    """Whether it is a worker's child: forked off, it has its parent's command line."""
    try:
        process = psutil.Process(pid)
        parent = process.parent()
        return parent is not None and parent.cmdline() == process.cmdline()
    except psutil.NoSuchProcess:
        return False


class Relays:
    """Relays before the queue, the results and the database of a site, for its workers alone."""

    def __init__(self, broker_url: str, database_url: str) -> None:
        """Takes the URLs that the site's own processes use."""
        self._folder = Path(tempfile.mkdtemp(prefix="gates-"))
        redis, _, rest = broker_url.removeprefix("redis+socket://").partition("?")
        folder = database_url.partition("host=")[2].replace("%2F", "/")
        postgres = ".s.PGSQL.5432"
        self.queue = Relay(Path(redis), self._folder / "queue")
        self.results = Relay(Path(redis), self._folder / "results", children_only=True)
        self.database = Relay(Path(folder) / postgres, self._folder / postgres, children_only=True)
        self.settings = {
            "CELERY_BROKER_URL": f"redis+socket://{self._folder}/queue?{rest}",
            "CELERY_RESULT_BACKEND": f"redis+socket://{self._folder}/results?{rest}",
            "DATABASE_URL": database_url.partition("host=")[0] + f"host={self._folder}",
        }
        """What their workers are told."""

    def close(self) -> None:
        """Cut everything and go."""
        for relay in self.queue, self.results, self.database:
            relay.close()
        shutil.rmtree(self._folder)
