"""What the libraries send: spans in a file, Sentry's envelopes at an HTTP server."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from sentry_sdk.envelope import Envelope

from tests.support.stores import until
from tests.support.workers import ROOT

EXPORTER = '''
import os
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

class OTLPSpanExporter(SpanExporter):
    """Appends spans to the file SPANS instead of sending them."""

    def export(self, spans):
        with open(os.environ["SPANS"], "a", encoding="utf-8") as file:
            file.writelines(span.to_json(indent=None) + "\\n" for span in spans)
        return SpanExportResult.SUCCESS
'''
"""In place of the OTLP exporter's module: the page names it, and the tests have no collector."""


def blocks(page: str, section: str) -> list[str]:
    """Find the Python blocks of a page under one heading; the page's title is the first."""
    text = (ROOT / page).read_text(encoding="utf-8")
    under = text.partition(f"# {section}\n")[2].partition("\n## ")[0]
    found: list[str] = re.findall(r"^```python\n(.*?)^```$", under, re.DOTALL | re.MULTILINE)
    assert found, f"no Python under {section}"
    return found


def write_modules(folder: Path, **modules: str) -> None:
    """Write modules for a worker, and the exporter that writes its spans to a file."""
    exporter = folder / "opentelemetry/exporter/otlp/proto/http/trace_exporter.py"
    exporter.parent.mkdir(parents=True)
    exporter.write_text(EXPORTER, encoding="utf-8")
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")


class Lines:
    """JSON lines that a worker appends to a file."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path

    def read(self) -> list[Any]:
        """Return all complete lines."""
        text = self.path.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def find(self, is_wanted: Callable[[Any], bool], count: int = 1) -> list[Any]:
        """Wait until so many lines are as wanted, and return them."""

        def found() -> list[Any]:
            return [one for one in self.read() if is_wanted(one)]

        until(lambda: len(found()) >= count)
        return found()


def span_of(spans: Lines, job_id: str, name: str = "process interview-access") -> dict[str, Any]:
    """Wait for the span of a job, and return it."""
    key = "messaging.message.id"
    (span,) = spans.find(lambda one: one["name"] == name and one["attributes"].get(key) == job_id)
    return dict(span)


class SentryServer:
    """Receives what Sentry's SDK sends.

    Attributes:
        dsn: Its DSN.
    """

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self._items: list[tuple[str, dict[str, Any]]] = []

    def receive(self, body: bytes) -> None:
        """Keep the items of an envelope."""
        for item in Envelope.deserialize(body).items:
            content = json.loads(item.get_bytes())
            is_log_line = item.type == "event" and "exception" not in content
            self._items.append(("line" if is_log_line else str(item.type), content))

    def of(self, kind: str, job_id: str) -> list[dict[str, Any]]:
        """Return the items that have the job's tag.

        Args:
            kind: Sentry's type of the items; ``line`` for events of log lines.
            job_id: The job's ID.
        """
        return [
            item
            for type_, item in list(self._items)
            if type_ == kind and item.get("tags", {}).get("celery_task_id") == job_id
        ]

    def first(self, kind: str, job_id: str) -> dict[str, Any]:
        """Wait for the only item of one type that has the job's tag."""
        until(lambda: bool(self.of(kind, job_id)))
        (item,) = self.of(kind, job_id)
        return item


@contextmanager
def sentry_server() -> Iterator[SentryServer]:
    """A server for the envelopes of Sentry's SDK."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Encoding"] == "gzip":
                body = gzip.decompress(body)
            received.receive(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        received = SentryServer(f"http://key@127.0.0.1:{server.server_port}/1")
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield received
        finally:
            server.shutdown()
            thread.join()
