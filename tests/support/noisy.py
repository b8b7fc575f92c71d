"""The worker's app with a signal handler that prints, warns and fails, as an operator's may."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from celery import signals

import worker.celery

app = worker.celery.app


@signals.task_prerun.connect  # type: ignore[untyped-decorator] # Celery ships no types
def _make_noise(**_: Any) -> None:
    print("printed\x1b[2J", "by a handler", sep="\n")  # noqa: T201 - what the test is about
    print("printed on standard error", file=sys.stderr)  # noqa: T201 - likewise
    warnings.warn("a warning\x1b[2J", stacklevel=1)
    raise ValueError("a handler's defect\n\x1b[2J")
