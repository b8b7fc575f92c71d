"""Relays connections to a server that listens on a Unix socket."""

from __future__ import annotations

import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Pair = tuple[socket.socket, socket.socket]
"""A client's connection, and the one to the server that belongs to it."""


class SocketRelay(ABC):
    """Accepts connections and opens one to the server for each; what passes is the subclass's."""

    def __init__(self, server: Path, listener: socket.socket) -> None:
        """Accept connections from now on.

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
        """The functions that pass on requests and replies, each run in a thread of its own."""

    def cut(self) -> int:
        """Cut every connection. Returns how many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            self.disconnect(pair)
        return len(pairs)

    def close(self) -> None:
        """Stop accepting, and cut every connection."""
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
        connection.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait for it
    connection.close()
