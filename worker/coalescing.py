"""Small jobs taken together: what a worker claimed at once is done by one child in one go.

Most of what a small job costs is the way there and back: a claim, a child woken, a transaction, a
result, an acknowledgement. A batch pays for each once. From outside nothing of it can be told: each
job has its own state, result, events and lines in the log. And whatever goes wrong with a batch,
its jobs go the ordinary way, one by one, under all of Celery's ordinary rules.

Nothing waits for others to come: what stands in the queue when a child is free is what is taken,
one job by itself most often. That a job has begun is told when it has not ended soon: most small
ones are done sooner than that could be said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import ceil
from typing import TYPE_CHECKING, Any
from weakref import ref

from celery import current_app
from celery.exceptions import TaskRevokedError
from celery.utils.log import get_logger
from interview_access.errors import InterviewAccessError
from kombu.serialization import loads, prepare_accept_content

from tasks.celery_tasks import Call, End

if TYPE_CHECKING:
    from worker.delivery import JobRequest

logger = get_logger(__name__)

Content = tuple[str, Any, str | None, str | None]
"""A job's id, and its message's body, content type and encoding."""


@contextmanager
def let_go_in_any_case(requests: Sequence[JobRequest]) -> Iterator[None]:
    """Have jobs come again for which the block fails.

    Celery logs or drops what is raised, or ends the worker for it; their messages would be held.
    """
    try:
        yield
    except TaskRevokedError:
        raise
    except Exception:
        logger.exception("jobs go back: %s", ", ".join(str(request.id) for request in requests))
        for request in requests:
            request.let_go()


class Batch:
    """Small jobs of one task, which Celery's worker takes as it takes a request."""

    def __init__(
        self, requests: Sequence[JobRequest], begin: Callable[[JobRequest], object]
    ) -> None:
        """Nothing has begun yet.

        Args:
            requests: Of the jobs.
            begin: Gives a request to a child by itself, as soon as one is free.
        """
        self._requests = list(requests)
        self._begin = begin

    @property
    def receipts(self) -> tuple[str, ...]:
        """What their messages are known by."""
        return tuple(request.receipt for request in self._requests)

    def execute_using_pool(self, pool: Any) -> None:
        """Begin those that may begin, in one child.

        Raises:
            TaskRevokedError: there are none; by this Celery learns that no child was needed.
        """
        with let_go_in_any_case(self._requests):
            self._execute_using_pool(pool)
            return
        raise TaskRevokedError

    def _execute_using_pool(self, pool: Any) -> None:
        first = self._requests[0]
        held = first.lease.start(*self.receipts)
        for request in self._requests:
            if request.receipt not in held:
                request.settled()
        self._requests = [request for request in self._requests if request.receipt in held]
        if not self._requests:
            raise TaskRevokedError
        result = pool.apply_async(
            run_together,
            args=(
                first.task.name,
                [request.content for request in self._requests],
                first.hostname,
            ),
            accept_callback=self.on_accepted,
            callback=self.on_success,
            error_callback=self.on_failure,
            soft_timeout=first.task.soft_time_limit,
            timeout=first.task.time_limit,
            correlation_id=first.id,
        )
        for request in self._requests:
            # By which Celery ends its child; not every pool has one.
            request._apply_result = result and ref(result)  # noqa: SLF001

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """A child has them."""
        for request in self._requests:
            request.on_accepted(pid, time_accepted)

    def on_success(self, told: tuple[Sequence[End | None], float]) -> None:
        """A child is through with them, one way or another."""
        with let_go_in_any_case(self._requests):
            self._on_success(*told)

    def _on_success(self, ends: Sequence[End | None], seconds: float) -> None:
        ours = [
            (request, end)
            for request, end in zip(self._requests, ends, strict=True)
            if not request.acknowledged
        ]
        done = [request for request, end in ours if isinstance(end, dict | InterviewAccessError)]
        if done:
            done[0].lease.no_trouble()
            done[0].lease.acknowledge({request.receipt: str(request.id) for request in done})
        for request in done:
            request.settled()
        for request, end in ours:
            if end is None:
                self._begin(request)
            else:
                request.on_end(end, seconds)

    def on_failure(self, exc_info: Any) -> None:
        """Their child is gone, or said that it could not."""
        left = [request for request in self._requests if not request.acknowledged]
        if len(self._requests) == 1:
            for request in left:
                request.on_failure(exc_info)
            return
        logger.warning("%d jobs are done one by one: %r", len(left), exc_info.exception)
        for request in left:
            self._begin(request)

    def reject(self, requeue: bool = False) -> None:
        """All of them, back to their queue in their order, or to the dead letters."""
        for request in reversed(self._requests):
            request.reject(requeue=requeue)


def divided(
    requests: Sequence[JobRequest], children: int, begin: Callable[[JobRequest], object]
) -> list[Batch | JobRequest]:
    """What each child is to be given of the jobs that were claimed at once.

    Args:
        requests: Of the jobs, in order.
        children: How many are free. Jobs that can be done together are shared out among them.
        begin: See :class:`Batch`.
    """
    pieces: list[Batch | JobRequest] = []
    plain: list[JobRequest] = []
    for one in requests:  # asked once: it may be past its time a moment later
        (plain if one.is_plain else pieces).append(one)
    plain.sort(key=_task)
    for _, group in groupby(plain, key=_task):
        jobs = list(group)
        size = ceil(len(jobs) / max(children - len(pieces), 1))
        shares = [jobs[start : start + size] for start in range(0, len(jobs), size)]
        pieces += [Batch(share, begin) for share in shares]
    return pieces


def _task(request: JobRequest) -> str:
    return str(request.task.name)


def run_together(
    task: str, contents: Sequence[Content], hostname: str
) -> tuple[list[End | None], float]:
    """Do jobs of one task, in the child of the worker of that name.

    Returns:
        How each ended, in step, None for those to be run by themselves; and the seconds it took.
    """
    accept = prepare_accept_content(current_app.conf.accept_content)
    calls = []
    for job_id, body, content_type, encoding in contents:
        args, kwargs, _ = loads(body, content_type, encoding, accept=accept)
        calls.append(Call(job_id, args, kwargs))
    ends, seconds = current_app.tasks[task].run_together(calls, hostname)
    return ends, seconds
