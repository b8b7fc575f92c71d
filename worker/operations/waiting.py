"""Waiting and delayed jobs: cancel those that a filter selects, and remove their messages.

A message is executed here as a worker executes that of a revoked job, so that the ledger, the
result, callbacks and pollers agree. Only then is it removed. A process that is killed in between
leaves a message whose job is cancelled; its next delivery has the same result.

Workers and producers may work meanwhile. A job that is claimed before its page is read is not
affected.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

from celery import Celery
from interview_access.contracts import QUEUE
from interview_access.errors import JobCancelledException
from interview_access.protocol.messages import JobMessage
from redis import Redis

from storage.dtos import AccessRequestDTO
from storage.errors import StorageError
from worker.broker.claims import ANNOUNCEMENT_SECONDS, PREFIX, Action, Claim, Disposition
from worker.broker.delivery import Delivery
from worker.broker.scripts import claims_script
from worker.execution.pool_process import execute, prepare
from worker.execution.request import Dispatched, JobRequest
from worker.operations.inspection import lane_keys

_DELAYED = f"{PREFIX}deferred"
_PAGE = 500
_PAGE_BYTES = 4 * 1024 * 1024
_SLACK = 1_000  # messages that were requeued at the end of a list while a page was executed
_HOSTNAME = "interview-access"


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Selects jobs; a field that is None selects all.

    Attributes:
        user: Jobs for this user alone; a cohort's job is for nobody alone.
        task: Jobs of the task with this name.
    """

    user: str | None = None
    task: str | None = None


class SelectedJob(NamedTuple):
    """A selected job.

    Attributes:
        job_id: Its ID; empty if it cannot be read.
        task: Name of its task.
        is_settled: Whether it has its result now. If not, a worker is executing it.
    """

    job_id: str
    task: str
    is_settled: bool


class _Message(NamedTuple):
    name: str
    request: JobRequest


class WaitingJobs:
    """The waiting and delayed jobs of the queue.

    Methods raise redis-py's errors, and StorageError if PostgreSQL is unavailable. They may be
    called again.
    """

    def __init__(
        self, app: Celery, redis: Redis, message_of: Callable[[AccessRequestDTO], JobMessage]
    ) -> None:
        """Connect at the first call.

        Args:
            app: The worker's app, which executes the jobs.
            redis: Client of the queue's Redis.
            message_of: Builds the message of an outbox request, or raises ValueError.
        """
        self._app = app
        self._redis = redis
        self._message_of = message_of
        self._read = redis.register_script(claims_script("read_waiting"))
        self._remove = redis.register_script(claims_script("remove_waiting"))

    def select(self, wanted: JobFilter) -> Iterator[SelectedJob]:
        """Find the jobs that a filter selects, and change nothing.

        Args:
            wanted: The filter.
        """
        for page in chain(self._pages(), self._unsent_pages()):
            for one in self._selected(page, wanted):
                yield SelectedJob(one.request.id, one.request.name, is_settled=False)

    def cancel(self, wanted: JobFilter) -> Iterator[SelectedJob]:
        """Cancel the jobs that a filter selects. Their messages stay and have no effect.

        A message that moves meanwhile, as a delayed one that becomes due, may be missed.

        Args:
            wanted: The filter.
        """
        for page in self._pages():
            yield from self._reported(self._execute(self._selected(page, wanted)))
        yield from self._cancel_unsent(wanted)

    def purge(self, *, with_outbox: bool) -> Iterator[SelectedJob]:
        """Cancel all jobs that wait now, and remove their messages.

        A message without a job ID becomes a dead letter. A job that is executed at this moment, as
        a duplicate delivery, is left to its worker, as are messages that are sent from now on.

        Args:
            with_outbox: Whether to cancel and delete the unsent outbox requests, too.
        """
        if with_outbox:  # first: the relay would enqueue them meanwhile
            yield from self._cancel_unsent(JobFilter())
        for key in lane_keys().values():
            left, kept = int(self._length(key)), 0
            while left > 0:
                page = self._page(key, -1 - kept, min(_PAGE, left))[1]
                if not page:
                    break
                settled = self._execute(page)
                removable = [(one, how) for one, how in settled if _ends(how)]
                self._discard(key, removable, kept + len(page) + _SLACK)
                yield from self._reported(settled)
                left, kept = left - len(page), kept + len(settled) - len(removable)
        for page in self._delayed_pages():
            settled = self._execute(page)
            self._discard(_DELAYED, [(one, how) for one, how in settled if _ends(how)], 0)
            yield from self._reported(settled)

    def discard_delayed(self, job_ids: Collection[str]) -> None:
        """Remove the delayed messages of finished jobs, as deliveries of them would.

        Args:
            job_ids: The jobs.
        """
        for page in self._delayed_pages():
            settled = self._execute([one for one in page if one.request.id in job_ids])
            self._discard(_DELAYED, [(one, how) for one, how in settled if _ends(how)], 0)

    def _cancel_unsent(self, wanted: JobFilter) -> Iterator[SelectedJob]:
        for page in self._unsent_pages():
            if not (settled := self._execute(self._selected(page, wanted))):
                continue
            with self._app.storage().transaction() as transaction:
                transaction.delete_finished_requests([one.request.id for one, _ in settled])
            yield from self._reported(settled)

    # --- Reading --------------------------------------------------------------------------------

    def _pages(self) -> Iterator[list[_Message]]:
        """Read all messages in pages, from the end at which producers push.

        Workers take messages from the other end, so that none that stays is passed over.
        """
        for key in lane_keys().values():
            at, length = 0, int(self._length(key))
            while at < length and (page := self._page(key, at, _PAGE)[1]):
                yield page
                at += len(page)
                length = max(length, int(self._length(key)))
        yield from self._delayed_pages()

    def _length(self, key: str) -> Any:
        return self._redis.llen(key) if self._redis.type(key) == b"list" else 0

    def _delayed_pages(self) -> Iterator[list[_Message]]:
        """Read the delayed messages, each at least once if it stays."""
        names = (name for name, _ in self._redis.zscan_iter(f"{PREFIX}due", count=_PAGE))
        while some := list(islice(names, _PAGE)):
            while some:
                read, page = self._page(_DELAYED, *some)
                yield page
                some = some[read:]

    def _unsent_pages(self) -> Iterator[list[_Message]]:
        """Build the messages of the unsent outbox requests; skip what has none."""
        storage, last = self._app.storage(), ""
        while job_ids := storage.list_unsent_requests(last, _PAGE):
            page: list[_Message] = []
            size = 0
            for job_id in job_ids:
                request = storage.get_request(job_id)
                with suppress(ValueError):
                    if request and not request.sent_at:
                        page.append(self._message("", QUEUE, self._message_of(request).envelope))
                        size += page[-1].request.delivery.claim.size
                if size > _PAGE_BYTES:
                    yield page
                    page, size = [], 0
            yield page
            last = job_ids[-1]

    def _message(self, name: str, queue: str, message: bytes, size: int | None = None) -> _Message:
        size = len(message) if size is None else size
        delivery = Delivery(Claim("", queue, message, size, 0, 0))
        return _Message(name, JobRequest(delivery, self._app, self._app.limits))

    def _page(self, key: str, *arguments: Any) -> tuple[int, list[_Message]]:
        reply: Any = self._read([PREFIX, key], [self._app.limits.message_bytes, *arguments])
        page = []
        for at in range(1, len(reply), 4):
            name, queue, size, message = reply[at : at + 4]
            queue = queue.decode(errors="replace")
            page.append(self._message(name.decode(), queue, message, size))
        return int(reply[0]), page

    def _selected(self, page: Sequence[_Message], wanted: JobFilter) -> list[_Message]:
        def matches(one: _Message) -> bool:
            is_of_task = wanted.task is None or one.request.name == wanted.task
            if not one.request.id or not is_of_task:
                return False
            return wanted.user is None or self._user_of(one.request) == wanted.user

        return [one for one in page if matches(one)]

    def _user_of(self, request: JobRequest) -> str | None:
        job = prepare(self._app, request.dispatched, _HOSTNAME).job
        return None if job is None else job.entry.user_id

    # --- Settling -------------------------------------------------------------------------------

    def _execute(self, page: Sequence[_Message]) -> list[tuple[_Message, Disposition]]:
        """Execute messages as cancelled. Returns how the delivery of each would be settled.

        Raises:
            StorageError: if PostgreSQL is unavailable, or the results cannot be stored.
        """
        readable = [one for one in page if one.request.id]
        if not readable:
            return [(one, _unreadable(one)) for one in page]
        report = execute([_cancelled(one.request) for one in readable], _HOSTNAME)
        if report.outage:
            raise StorageError(report.outage)
        dispositions = iter(one.disposition for one in report.settlements)
        return [(one, next(dispositions) if one.request.id else _unreadable(one)) for one in page]

    def _reported(self, settled: Sequence[tuple[_Message, Disposition]]) -> Iterator[SelectedJob]:
        for one, how in settled:
            yield SelectedJob(one.request.id, one.request.name, is_settled=_ends(how))

    def _discard(
        self, key: str, settled: Sequence[tuple[_Message, Disposition]], positions: int
    ) -> None:
        fields = [
            field
            for message, how in settled
            for field in (
                *(message.name, how.job_id, how.task, how.reason),
                *("" if how.in_ledger is None else int(how.in_ledger), how.attempts),
            )
        ]
        if fields:
            self._remove([PREFIX, key], [positions, ANNOUNCEMENT_SECONDS, *fields])


def _cancelled(request: JobRequest) -> Dispatched:
    return replace(request.dispatched, failure=JobCancelledException.of(request.id))


def _ends(how: Disposition) -> bool:
    """Whether the message is not delivered again."""
    return how.action in {Action.ACKNOWLEDGE, Action.DEAD_LETTER}


def _unreadable(one: _Message) -> Disposition:
    reason = "Purged: its job ID cannot be read."
    return Disposition(Action.DEAD_LETTER, task=one.request.name, reason=reason, in_ledger=False)
