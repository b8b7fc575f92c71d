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


def _close(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # wakes the threads that read from it
    connection.close()
