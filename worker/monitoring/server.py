"""The HTTP server of metrics and health, in threads of the main process."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from worker.monitoring.health import Health

_REQUEST_SECONDS = 5.0  # to receive a request, and for each write of a reply
_MOST_REQUESTS = 16  # at once; further connections are closed


class MonitoringServer(ThreadingHTTPServer):
    """Serves ``/metrics``, ``/healthz`` and ``/readyz``."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        """Bind the address, and accept no connection before :meth:`start`.

        Args:
            host: IPv4 or IPv6 address, or a name.
            port: The port; 0 for a free one.

        Raises:
            OSError: if the address cannot be bound.
        """
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        self._room = threading.BoundedSemaphore(_MOST_REQUESTS)
        super().__init__((str(address[0]), int(address[1])), _Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError:
            self.server_close()
            raise

    def server_bind(self) -> None:
        """Bind without looking up the host's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def start(self, registry: CollectorRegistry, health: Callable[[], Health]) -> None:
        """Serve in threads.

        Args:
            registry: The metrics.
            health: Returns the worker's health.
        """
        self.registry, self.health = registry, health
        self.server_activate()
        threading.Thread(target=self.serve_forever, name="monitoring", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread, if there are not too many."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a connection that the client has lost."""


class _Handler(BaseHTTPRequestHandler):
    server: MonitoringServer
    timeout = _REQUEST_SECONDS

    def do_GET(self) -> None:
        """Reply to a request."""
        path = self.path.partition("?")[0]
        if path == "/metrics":
            encode, content_type = choose_encoder(self.headers.get("Accept", ""))
            self._reply(HTTPStatus.OK, content_type, encode(self.server.registry))
        elif path in {"/healthz", "/readyz"}:
            health = self.server.health()
            is_good = health.is_live if path == "/healthz" else health.is_ready
            status = HTTPStatus.OK if is_good else HTTPStatus.SERVICE_UNAVAILABLE
            fields = {
                "live": health.is_live,
                "ready": health.is_ready,
                "paused": health.is_paused,
                "reasons": health.reasons,
            }
            self._reply(status, "application/json", f"{json.dumps(fields)}\n".encode())
        else:
            text = b"expected /metrics, /healthz or /readyz\n"
            self._reply(HTTPStatus.NOT_FOUND, "text/plain", text)

    def _reply(self, status: HTTPStatus, content_type: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        """Log no request."""
