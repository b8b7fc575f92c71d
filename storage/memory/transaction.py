"""A transaction of the reference model."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import astuple, replace
from datetime import UTC, datetime, timedelta

from storage import sqlstate
from storage.dtos import (
    AccessRequestDTO,
    FinishedJobDTO,
    FoundJobsDTO,
    InterviewAttemptDTO,
    InterviewDTO,
    JobPageDTO,
    NamingRequestDTO,
    PruneCountsDTO,
    PrunedBatchDTO,
    PrunedJobDTO,
    RequestedGrantsDTO,
    UserInterviewAccessDTO,
)
from storage.errors import LedgerConflictError, StorageError
from storage.interface import MAX_REQUEST_BYTES, ChunkDone, Transaction
from storage.memory.tables import Tables


class MemoryTransaction(Transaction):
    """One transaction on a copy of the tables."""

    def __init__(self, tables: Tables, chunk_size: int) -> None:
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

    def find_requests_naming(self, user_id: str) -> Sequence[NamingRequestDTO]:
        """See the interface."""
        found = [
            NamingRequestDTO(
                job_id,
                user_id in (request.user_id, *(request.user_ids or ())),
                _header(request, "actor"),
                _header(request, "reason"),
            )
            for job_id, request in sorted(self._tables.requests.items())
        ]
        return [
            one
            for one in found
            if one.is_for_user or user_id in (one.actor or "") or user_id in (one.reason or "")
        ]

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


def _header(request: AccessRequestDTO, name: str) -> str | None:
    headers = json.loads(request.headers or "{}")
    value = headers.get(name) if isinstance(headers, dict) else None
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _names(job: FinishedJobDTO, user_id: str) -> bool:
    outcome, audit = job.outcome, job.job.audit
    rejected = outcome.rejected and astuple(outcome.rejected)
    texts = (audit.actor, audit.reason, outcome.error, rejected, outcome.created_by_user)
    return json.dumps(user_id)[1:-1] in json.dumps(texts)
