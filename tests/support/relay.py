"""A relay for connections to a server that listens on a Unix socket."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Pair = tuple[socket.socket, socket.socket]
"""A client's connection, and the corresponding one to the server."""


class SocketRelay(ABC):
    """Accepts connections and opens one to the server for each; subclasses forward data."""

    def __init__(self, server: Path, listener: socket.socket) -> None:
        """Accept connections in a thread.

        Args:
            server: The server's socket.
            listener: A listening socket.
        """
        self._server = server
        self._listener = listener
        self._pairs: set[Pair] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @abstractmethod
    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return the functions that forward requests and replies, each for its own thread."""

    def cut(self) -> int:
        """Cut every connection, and return how many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            self.disconnect(pair)
        return len(pairs)

    def close(self) -> None:
        """Stop accepting connections, and cut the existing ones."""
        _close(self._listener)
        self.cut()

    def disconnect(self, pair: Pair) -> None:
        """Close both connections of a pair."""
        self._pairs.discard(pair)
        for one in pair:
            _close(one)

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
            pair = client, server
            self._pairs.add(pair)
            for pump in self.pumps(pair):
                threading.Thread(target=pump, daemon=True).start()


class Relay(SocketRelay):
    """A network path to the server that can drop the data of its connections, as a firewall may."""

    def __init__(self, server: str, port: int = 0) -> None:
        self.is_used = False
        """Whether a client has connected."""
        self._generation = 0
        listener = socket.create_server(("127.0.0.1", port))
        self.port: int = listener.getsockname()[1]
        super().__init__(Path(server), listener)

    def drop_data(self) -> None:
        """Drop all further data of the present connections, and close none."""
        self._generation += 1

    def pumps(self, pair: Pair) -> tuple[Callable[[], object], Callable[[], object]]:
        """See the base class."""
        self.is_used = True
        (client, server), generation = pair, self._generation
        return (
            lambda: self._pump(pair, client, server, generation),
            lambda: self._pump(pair, server, client, generation),
        )

    def _pump(
        self, pair: Pair, source: socket.socket, target: socket.socket, generation: int
    ) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                if generation == self._generation:
                    target.sendall(data)
        if generation == self._generation:
            self.disconnect(pair)


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the threads that read from it
    connection.close()
