"""The worker's app with signal handlers: ``celery -A tests.support.listening worker``.

Each task signal is written as a line ``[signal, job ID]`` to the file SIGNALS. With NO_THREADS pool
processes cannot start threads, as at the system's limit of processes. With NO_SCRIPTS a script that
redis-py executes there fails, as by a defect of its own.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from celery import signals
from redis.commands.core import Script

import worker.celery

app = worker.celery.app

NAMES = (
    *("task_received", "task_prerun", "task_success", "task_failure", "task_retry"),
    *("task_revoked", "task_postrun"),
)


def _listen(name: str) -> None:
    def write(sender: Any = None, **fields: Any) -> None:
        request = fields.get("request") or sender.request
        job_id = fields.get("task_id") or request.id
        with Path(os.environ["SIGNALS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, job_id]) + "\n")

    getattr(signals, name).connect(write, weak=False)


for _name in NAMES:
    _listen(_name)


@signals.worker_process_init.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _forbid_threads(**_: Any) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a defect")

    if "NO_THREADS" in os.environ:
        threading.Thread.start = refuse  # type: ignore[method-assign, assignment] # as the system does
    if "NO_SCRIPTS" in os.environ:
        Script.__call__ = fail  # type: ignore[method-assign] # as a defect does
