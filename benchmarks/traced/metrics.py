"""Metrics: the endpoint is served, and the main process measures each batch."""

from __future__ import annotations

import os
import socket

with socket.socket() as _free:
    _free.bind(("127.0.0.1", 0))
    os.environ["METRICS_ADDRESS"] = f"127.0.0.1:{_free.getsockname()[1]}"

import worker.celery

app = worker.celery.app
