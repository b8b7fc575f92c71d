"""`celery -A benchmarks.ablated_worker worker`: our worker without what ABLATED names."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from types import SimpleNamespace

from kombu.utils.json import loads

import worker.execution

match os.environ["ABLATED"]:
    case "no StartedReporter":
        reporter = SimpleNamespace(reporting=lambda _: nullcontext())
        vars(worker.execution)["_reporter"] = lambda: reporter
    case "kombu's loads":
        vars(worker.execution)["json"] = SimpleNamespace(loads=loads)
    case "no gc.freeze":
        gc.freeze = lambda: None
    case other:
        raise SystemExit(f"ABLATED: expected what benchmarks/ablations.py names, got {other!r}")

from worker.celery import app  # noqa: F401 - reads the replaced attributes
