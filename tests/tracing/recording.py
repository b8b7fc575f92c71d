"""Writes each task signal with its request as a JSON line to the file SIGNALS."""

from __future__ import annotations

import json
import os
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from celery import signals

NAMES = (
    *("task_prerun", "task_success", "task_failure", "task_retry", "task_revoked"),
    *("task_postrun", "task_unknown", "task_rejected"),
)
ESSENTIALS = ("task", "retries", "called_directly", "delivery_info", "args", "hostname")

_begun: ContextVar[str] = ContextVar("_begun", default="")


def _record(name: str) -> None:
    def write(sender: Any = None, **fields: Any) -> None:
        request = fields.get("message") or sender.request
        inherited = _begun.get()
        _begun.set(request.id)
        einfo = fields.get("einfo")
        line = {
            "signal": name.removeprefix("task_"),
            "job_id": request.id,
            "task_id": fields.get("task_id"),
            "inherited": inherited,
            "headers": request.headers,
            "tenant": getattr(request, "tenant", None),
            "essentials": {one: getattr(request, one, None) for one in ESSENTIALS},
            "error": type(einfo.exception.exc).__name__ if einfo else None,
            "traceback": str(einfo),
            "state": fields.get("state"),
        }
        with Path(os.environ["SIGNALS"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        if getattr(request, "tenant", None) == "raises":
            raise RuntimeError("an error of a receiver")

    getattr(signals, name).connect(write, weak=False)


for _name in NAMES:
    _record(_name)
