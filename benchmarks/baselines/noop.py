"""A Celery task that does nothing: the cost of Celery itself."""

from __future__ import annotations

import os
from typing import Any

from celery import Celery

app = Celery(
    "noop", broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_BROKER_URL"]
)
app.conf.task_acks_late = True  # as in the other tasks


@app.task(name="grant")  # type: ignore[untyped-decorator] # Celery ships no types
def grant(user_id: str, interview_ids: list[str]) -> dict[str, Any]:  # noqa: ARG001 - the others' arguments
    """Grant nothing, and return a result of the contract's shape."""
    return {"success": True, "created_access_count": 0}
