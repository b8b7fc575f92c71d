"""The reference model outside a transaction, and what the platform and services do to it."""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from operator import itemgetter

from storage import sqlstate
from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FinishedJobFilterDTO,
    GrantOriginDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    LedgerTotalsDTO,
    OutboxTotalsDTO,
    PrunedJobDTO,
    UserInterviewAccessDTO,
)
from storage.errors import StorageError
from storage.interface import MAX_HEADERS_BYTES, HasFileno, Storage
from storage.memory.tables import Tables
from storage.memory.transaction import MemoryTransaction

_MAX_AGE = timedelta(days=36_525)  # of a request
_POLL_SECONDS = 0.01


class MemoryStorage(Storage):
    """The storage in dictionaries."""

    def __init__(self, *, chunk_size: int = 10_000) -> None:
        """Create an empty storage.

        Args:
            chunk_size: Number of grants after which progress is reported.
        """
        self._tables = Tables()
        self._lock = threading.Lock()
        self._may_have_requests = threading.Event()
        self._may_have_requests.set()
        self._chunk_size = chunk_size

    @contextmanager
    def transaction(self) -> Iterator[MemoryTransaction]:
        """See the interface."""
        with self._lock:
            tables = self._tables.copy()
            yield MemoryTransaction(tables, self._chunk_size)
            self._tables = tables

    def get_finished_job(self, job_id: str) -> FinishedJobDTO | None:
        """See the interface."""
        return self._tables.jobs.get(job_id)

    def get_pruned_job(self, job_id: str) -> PrunedJobDTO | None:
        """See the interface."""
        return self._tables.pruned.get(job_id)

    def get_request(self, job_id: str) -> AccessRequestDTO | None:
        """See the interface."""
        return self._tables.requests.get(job_id)

    def is_cancelled(self, job_id: str) -> bool:
        """See the interface."""
        return job_id in self._tables.cancellations

    def schedule_all_requests_now(self) -> None:
        """See the interface."""
        with self._lock:
            now, due_at = datetime.now(UTC), self._tables.due_at
            self._tables.due_at = {job_id: min(at, now) for job_id, at in due_at.items()}

    def list_finished_jobs(
        self, wanted: FinishedJobFilterDTO, limit: int
    ) -> Sequence[FinishedJobDTO]:
        """See the interface."""
        creators = {
            job_id
            for grant, job_id in self._tables.grants.items()
            if wanted.user_id in {None, grant.user_id}
            and wanted.interview_id in {None, grant.interview_id}
        }
        found = [
            (one.finished_at, one)
            for job_id, one in self._tables.jobs.items()
            if one.finished_at
            and _is_selected(one, one.finished_at, wanted)
            and (job_id in creators or _needs_no_grant(one, wanted))
        ]
        return [one for _, one in sorted(found, key=itemgetter(0), reverse=True)[:limit]]

    def find_grant_origin(self, user_id: str, interview_id: str) -> GrantOriginDTO:
        """See the interface."""
        grant, tables = UserInterviewAccessDTO(user_id, interview_id), self._tables
        return GrantOriginDTO(
            interview_id in tables.interviews, grant in tables.grants, tables.grants.get(grant)
        )

    def measure_ledger(self) -> LedgerTotalsDTO:
        """See the interface."""
        finished = [one.finished_at for one in self._tables.jobs.values() if one.finished_at]
        return LedgerTotalsDTO(len(self._tables.jobs), 0, min(finished, default=None))

    def count_requests(self) -> OutboxTotalsDTO:
        """See the interface."""
        requests = self._tables.requests.values()
        unsent = [one.requested_at for one in requests if one.sent_at is None]
        return OutboxTotalsDTO(len(unsent), min(unsent, default=None), len(requests) - len(unsent))

    def list_unsent_requests(self, after: str, limit: int) -> Sequence[str]:
        """See the interface."""
        requests = self._tables.requests.values()
        unsent = sorted(one.job_id for one in requests if one.sent_at is None)
        return [job_id for job_id in unsent if job_id > after][:limit]

    def has_due_requests(self) -> bool:
        """See the interface."""
        now = datetime.now(UTC)
        return any(at <= now for at in self._tables.due_at.values())

    def wait_for_requests(self, seconds: float, wakeup: HasFileno | None = None) -> bool | None:
        """See the interface."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not _is_readable(wakeup):
            if self._may_have_requests.wait(_POLL_SECONDS):
                break
        is_added = self._may_have_requests.is_set()
        self._may_have_requests.clear()
        return is_added

    def add_request(self, request: AccessRequestDTO) -> None:
        """Insert an outbox request, as a service does."""
        with self._lock:
            now = datetime.now(UTC)
            self._tables.requests[request.job_id] = replace(
                request,
                requested_at=_clamped(request.requested_at, now, now),
                eta=request.eta and _clamped(request.eta, now, now + _MAX_AGE),
                expires_at=request.expires_at and _clamped(request.expires_at, now, now + _MAX_AGE),
                headers=None if request.headers is None else _readable_headers(request.headers),
            )
            self._tables.due_at[request.job_id] = now
        self._may_have_requests.set()

    def add_interview(self, interview: InterviewDTO) -> None:
        """Insert an interview, as the platform does."""
        with self._lock:
            self._tables.interviews[interview.id] = interview

    def delete_interview(self, interview_id: str) -> None:
        """Delete an interview, as the platform does.

        Raises:
            StorageError: if a grant or an attempt refers to it.
        """
        with self._lock:
            granted = {grant.interview_id for grant in self._tables.grants}
            attempted = {attempt.interview_id for attempt in self._tables.attempts.values()}
            if interview_id in granted | attempted:
                raise StorageError("the interview is referred to", sqlstate.FOREIGN_KEY_VIOLATION)
            self._tables.interviews.pop(interview_id, None)

    def attempts(self) -> Sequence[InterviewAttemptDTO]:
        """Return all attempts."""
        return list(self._tables.attempts.values())


def _is_selected(job: FinishedJobDTO, finished_at: datetime, wanted: FinishedJobFilterDTO) -> bool:
    pairs = (wanted.actor, job.job.audit.actor), (wanted.state, job.outcome.state)
    is_in_period = (wanted.since is None or finished_at >= wanted.since) and (
        wanted.until is None or finished_at < wanted.until
    )
    return is_in_period and all(value in {None, found} for value, found in pairs)


def _needs_no_grant(job: FinishedJobDTO, wanted: FinishedJobFilterDTO) -> bool:
    return wanted.interview_id is None and wanted.user_id in {None, job.job.user_id}


def _clamped(when: datetime, now: datetime, latest: datetime) -> datetime:
    return max(min(when, latest), now - _MAX_AGE)


def _readable_headers(text: str) -> str:
    headers = json.loads(text)
    if not isinstance(headers, dict):
        return ""
    strings = {name: one if isinstance(one, str) else None for name, one in headers.items()}
    shown = json.dumps(dict(sorted(strings.items())), ensure_ascii=False)
    return shown if len(shown) <= MAX_HEADERS_BYTES else ""


def _is_readable(file: HasFileno | None) -> bool:
    return file is not None and bool(select.select([file], [], [], 0)[0])
