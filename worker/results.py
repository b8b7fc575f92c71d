"""Where results go: Celery's Redis backend, without what a poller should not see."""

from __future__ import annotations

from typing import Any

from interview_access.errors import InterviewAccessError
from interview_access.producer import PolledResults

from storage.interface import StorageError


class JobResults(PolledResults):
    """Stores a failure for a known cause without a trace: its sentence says what was wrong."""

    def store_result(
        self,
        task_id: str,
        result: Any,
        state: str,
        traceback: str | None = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Celery's own; the log has the trace where there is one to be had."""
        if isinstance(result, InterviewAccessError | StorageError):
            traceback = None
        return super().store_result(task_id, result, state, traceback, request, **kwargs)
