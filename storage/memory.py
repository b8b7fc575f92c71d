"""The reference model: the storage interface in dictionaries, for tests.

Transactions are serialized by one lock and work on a copy of the tables, which replaces the tables
when the transaction commits.
"""

from __future__ import annotations

import json
import select
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from operator import itemgetter

from storage import sqlstate
from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FinishedJobFilterDTO,
    FoundJobsDTO,
    GrantOriginDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    JobPageDTO,
    LedgerTotalsDTO,
    OutboxTotalsDTO,
    PruneCountsDTO,
    PrunedBatchDTO,
    PrunedJobDTO,
    RequestedGrantsDTO,
    UserInterviewAccessDTO,
)
from storage.errors import LedgerConflictError, StorageError
from storage.interface import (
    MAX_HEADERS_BYTES,
    MAX_REQUEST_BYTES,
    ChunkDone,
    HasFileno,
    Storage,
    Transaction,
)

_MAX_AGE = timedelta(days=36_525)  # of a request
_POLL_SECONDS = 0.01


@dataclass(slots=True)
class _Tables:
    interviews: dict[str, InterviewDTO] = field(default_factory=dict)
    grants: dict[UserInterviewAccessDTO, str | None] = field(default_factory=dict)
    attempts: dict[str, InterviewAttemptDTO] = field(default_factory=dict)
    jobs: dict[str, FinishedJobDTO] = field(default_factory=dict)
    cancellations: dict[str, datetime] = field(default_factory=dict)
    pruned: dict[str, PrunedJobDTO] = field(default_factory=dict)
    requests: dict[str, AccessRequestDTO] = field(default_factory=dict)
    due_at: dict[str, datetime] = field(default_factory=dict)

    def copy(self) -> _Tables:
        return _Tables(*(dict(getattr(self, table.name)) for table in fields(self)))


class MemoryStorage(Storage):
    """The storage in dictionaries."""

    def __init__(self, *, chunk_size: int = 10_000) -> None:
        """Create an empty storage.

        Args:
            chunk_size: Number of grants after which progress is reported.
        """
        self._tables = _Tables()
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
            if grant.interview_id == wanted.interview_id
        }
        found = [
            (one.finished_at, one)
            for job_id, one in self._tables.jobs.items()
            if one.finished_at
            and _is_selected(one, one.finished_at, wanted)
            and (wanted.interview_id is None or job_id in creators)
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


class MemoryTransaction(Transaction):
    """One transaction on a copy of the tables."""

    def __init__(self, tables: _Tables, chunk_size: int) -> None:
        self._tables = tables
        self._chunk_size = chunk_size

    def lock_jobs(self, job_ids: Collection[str], *, wait: bool) -> frozenset[str]:  # noqa: ARG002 - no other transaction runs
        """See the interface."""
        return frozenset(job_ids)

    def find_jobs(self, job_ids: Collection[str]) -> FoundJobsDTO:
        """See the interface."""
        finished = {one: self._tables.jobs[one] for one in job_ids if one in self._tables.jobs}
        pruned = {one: self._tables.pruned[one] for one in job_ids if one in self._tables.pruned}
        return FoundJobsDTO(finished, self.find_cancelled_jobs(job_ids), pruned)

    def request_cancellation(self, job_id: str) -> None:
        """See the interface."""
        self._tables.cancellations.setdefault(job_id, datetime.now(UTC))

    def find_cancelled_jobs(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        return frozenset(job_ids) & self._tables.cancellations.keys()

    def record_jobs(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """See the interface."""
        for job in jobs:
            if job.job.job_id in self._tables.jobs:
                raise LedgerConflictError(f"the ledger already has job {job.job.job_id}")
            self._tables.jobs[job.job.job_id] = replace(job, finished_at=datetime.now(UTC))

    def lock_pruning(self) -> bool:
        """See the interface: no other transaction runs."""
        return True

    def prune_jobs(
        self, older_than: timedelta, limit: int, *, since: datetime | None = None
    ) -> PrunedBatchDTO:
        """See the interface."""
        first = since or datetime.min.replace(tzinfo=UTC)
        due = [one for one in self._old_jobs(older_than) if one[0] >= first][:limit]
        counts = self._counts([job_id for _, job_id in due])
        for _, job_id in due:
            self._tables.pruned.setdefault(job_id, _tombstone(self._tables.jobs.pop(job_id)))
            self._tables.cancellations.pop(job_id, None)
            self._tables.requests.pop(job_id, None)
            self._tables.due_at.pop(job_id, None)
        return PrunedBatchDTO(counts, due[-1][0] if due and len(due) == limit else None)

    def prune_cancellations(self, older_than: timedelta, limit: int) -> PruneCountsDTO:
        """See the interface."""
        due = self._old_cancellations(older_than)[:limit]
        for job_id in due:
            del self._tables.cancellations[job_id]
            if job_id not in self._tables.jobs:
                cancelled = PrunedJobDTO(None, error_type="JobCancelledException")
                self._tables.pruned.setdefault(job_id, cancelled)
        return PruneCountsDTO(cancellations=len(due))

    def count_prunable(self, older_than: timedelta) -> PruneCountsDTO:
        """See the interface."""
        old = [job_id for _, job_id in self._old_jobs(older_than)]
        cancelled = {*self._old_cancellations(older_than)} | self._tables.cancellations.keys() & old
        return replace(self._counts(old), cancellations=len(cancelled))

    def find_jobs_naming(self, user_id: str, limit: int, *, after: str = "") -> JobPageDTO:
        """See the interface."""
        page = [job_id for job_id in sorted(self._tables.jobs) if job_id > after][:limit]
        jobs = [self._tables.jobs[job_id] for job_id in page]
        named = [one for one in jobs if user_id == one.job.user_id or _names(one, user_id)]
        return JobPageDTO(named, page[-1] if page and len(page) == limit else None)

    def replace_details(self, jobs: Sequence[FinishedJobDTO]) -> None:
        """See the interface."""
        for changed in jobs:
            before = self._tables.jobs.get(changed.job.job_id)
            if before:
                outcome = replace(
                    before.outcome,
                    error=changed.outcome.error,
                    rejected=changed.outcome.rejected,
                    created_by_user=changed.outcome.created_by_user,
                )
                new = changed.job.audit
                audit = replace(before.job.audit, actor=new.actor, reason=new.reason)
                job = replace(before.job, user_id=changed.job.user_id, audit=audit)
                self._tables.jobs[job.job_id] = replace(before, job=job, outcome=outcome)

    def find_requests_naming(self, user_id: str) -> Sequence[str]:
        """See the interface."""
        return sorted(
            job_id
            for job_id, request in self._tables.requests.items()
            if user_id in (request.user_id, *(request.user_ids or ()), _actor(request))
        )

    def _old_jobs(self, older_than: timedelta) -> list[tuple[datetime, str]]:
        jobs, before = self._tables.jobs, datetime.now(UTC) - older_than
        times = ((job.finished_at, job_id) for job_id, job in jobs.items())
        return sorted((time, job_id) for time, job_id in times if time and time < before)

    def _old_cancellations(self, older_than: timedelta) -> list[str]:
        before = datetime.now(UTC) - older_than
        requests = self._tables.cancellations.items()
        return [job_id for at, job_id in sorted((at, one) for one, at in requests) if at < before]

    def _counts(self, job_ids: Sequence[str]) -> PruneCountsDTO:
        outcomes = [self._tables.jobs[job_id].outcome for job_id in job_ids]
        return PruneCountsDTO(
            jobs=len(job_ids),
            rejections=sum(one.rejected is not None for one in outcomes),
            cohorts=sum(one.created_by_user is not None for one in outcomes),
            cancellations=len(self._tables.cancellations.keys() & job_ids),
            requests=len(self._tables.requests.keys() & job_ids),
        )

    def find_unknown_interviews(
        self,
        interview_ids: Collection[str],
        *,
        granted_to: str | None = None,  # noqa: ARG002 - nothing is deleted meanwhile
    ) -> frozenset[str]:
        """See the interface."""
        return frozenset(interview_ids) - self._tables.interviews.keys()

    def get_existing_user_access(
        self, user_ids: Collection[str]
    ) -> Sequence[UserInterviewAccessDTO]:
        """See the interface."""
        return [grant for grant in self._tables.grants if grant.user_id in set(user_ids)]

    def bulk_create_user_access(
        self, requested: Sequence[RequestedGrantsDTO], on_chunk: ChunkDone | None = None
    ) -> Sequence[int]:
        """See the interface."""
        self._check_interviews_exist(one for grants in requested for one in grants.interview_ids)
        counts = [0] * len(requested)
        first: dict[UserInterviewAccessDTO, int] = {}
        for index, grants in enumerate(requested):
            for interview_id in grants.interview_ids:
                first.setdefault(UserInterviewAccessDTO(grants.user_id, interview_id), index)
        for done, (grant, index) in enumerate(first.items(), start=1):
            if grant not in self._tables.grants:
                self._tables.grants[grant] = requested[index].job_id
                counts[index] += 1
            if on_chunk and (done % self._chunk_size == 0 or done == len(first)):
                on_chunk(done, len(first))
        return counts

    def get_interview_details(self, interview_ids: Collection[str]) -> Sequence[InterviewDTO]:
        """See the interface."""
        known = self._tables.interviews
        return [known[interview_id] for interview_id in set(interview_ids) & known.keys()]

    def create_interview_attempt(self, attempts: Sequence[InterviewAttemptDTO]) -> None:
        """See the interface."""
        self._check_interviews_exist(attempt.interview_id for attempt in attempts)
        self._tables.attempts.update((attempt.id, attempt) for attempt in attempts)

    def lock_due_requests(
        self, limit: int, *, page_bytes: int = MAX_REQUEST_BYTES
    ) -> Sequence[AccessRequestDTO]:
        """See the interface."""
        now = datetime.now(UTC)
        due = sorted(
            (self._tables.requests[job_id].sent_at is not None, at, job_id)
            for job_id, at in self._tables.due_at.items()
            if at <= now
        )
        page: list[AccessRequestDTO] = []
        for *_, job_id in due[:limit]:
            request = self._tables.requests[job_id]
            ids = (*request.interview_ids, *(request.user_ids or ()))
            size = len(request.user_id or "") + sum(64 + len(str(one)) for one in ids)
            if size > MAX_REQUEST_BYTES:
                empty = replace(request, user_id="", user_ids=None, interview_ids=())
                page.append(replace(empty, is_too_large=True))
                continue
            page_bytes -= size
            if page and page_bytes < 0:
                break
            page.append(request)
        return page

    def delete_finished_requests(self, job_ids: Collection[str]) -> frozenset[str]:
        """See the interface."""
        known = self._tables.jobs.keys() | self._tables.pruned.keys()
        finished = frozenset(job_ids) & known & self._tables.requests.keys()
        for job_id in finished:
            del self._tables.requests[job_id], self._tables.due_at[job_id]
        return finished

    def reschedule_requests(self, job_ids: Collection[str], *, sent: bool) -> None:
        """See the interface."""
        now = datetime.now(UTC)
        for job_id in job_ids:
            request = self._tables.requests[job_id]
            age = (now - request.requested_at).total_seconds()
            delay = timedelta(seconds=min(max(age, 1), 60))
            if request.eta and (sent or request.sent_at):
                delay = max(delay, (request.eta - now) / 2)
            self._tables.due_at[job_id] = now + delay
            if sent:
                self._tables.requests[job_id] = replace(request, sent_at=now)

    def _check_interviews_exist(self, interview_ids: Iterator[str]) -> None:
        missing = set(interview_ids) - self._tables.interviews.keys()
        if missing:
            reason = f"{len(missing)} interviews do not exist"
            raise StorageError(reason, sqlstate.FOREIGN_KEY_VIOLATION)


def _tombstone(job: FinishedJobDTO) -> PrunedJobDTO:
    outcome = job.outcome
    created = outcome.figures.created if outcome.figures else None
    return PrunedJobDTO(
        job.job.request_digest[:8],
        created=created,
        result=outcome.result if created is None else None,
        error_type=outcome.error["type"] if outcome.error else None,
    )


def _is_selected(job: FinishedJobDTO, finished_at: datetime, wanted: FinishedJobFilterDTO) -> bool:
    pairs = (
        (wanted.user_id, job.job.user_id),
        (wanted.actor, job.job.audit.actor),
        (wanted.state, job.outcome.state),
    )
    is_in_period = (wanted.since is None or finished_at >= wanted.since) and (
        wanted.until is None or finished_at < wanted.until
    )
    return is_in_period and all(value in {None, found} for value, found in pairs)


def _actor(request: AccessRequestDTO) -> object:
    return json.loads(request.headers or "{}").get("actor")


def _names(job: FinishedJobDTO, user_id: str) -> bool:
    outcome, audit = job.outcome, job.job.audit
    rejected = outcome.rejected and astuple(outcome.rejected)
    texts = (audit.actor, audit.reason, outcome.error, rejected, outcome.created_by_user)
    return json.dumps(user_id)[1:-1] in json.dumps(texts)


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
