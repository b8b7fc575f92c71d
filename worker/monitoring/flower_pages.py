"""Flower's pages for this worker: tasks in words, the queue's counts, and what is not shown.

``flowerconfig.py`` installs them in Flower; nothing else imports this module. Flower knows tasks by
the events of workers, and queues by kombu's keys, so each page has a note that says what it does
not show and where to look instead.
"""

from __future__ import annotations

import asyncio
import html
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

from flower.api.tasks import GetQueueLengths
from flower.utils.template import humanize
from flower.views import BaseHandler
from flower.views.broker import BrokerView
from flower.views.tasks import TasksView, TaskView
from flower.views.workers import WorkersView, WorkerView
from interview_access.connections import connect
from interview_access.contracts import QUEUE
from redis.exceptions import RedisError

from worker.operations.inspection import MessageCounts, count_messages
from worker.operations.pause import Pause

CLIENT_NAME = "interview-access-flower"
"""The name of this module's connections in ``CLIENT LIST``."""


# --- Tasks ---------------------------------------------------------------------------------------


def describe_task(task: Any) -> Any:
    """Say in a task's result what its state does not; Flower's ``format_task``.

    Args:
        task: Flower's copy of a task.

    Returns:
        The task.
    """
    rejected = task.rejected or 0.0
    is_dead = rejected > max(task.received or 0.0, task.started or 0.0)
    if is_dead and task.state == "STARTED":
        task.state = "REJECTED"  # Celery has a rejected task stay in its higher state
    task.result = _in_words(task, is_dead=is_dead)
    task.rejected = humanize(rejected, type="time") if rejected else None
    task.traceback = task.traceback or None  # an empty one is shown as an empty box
    return task


def _in_words(task: Any, *, is_dead: bool) -> str:
    error = re.split("[(:]", str(task.exception or ""), maxsplit=1)[0]
    words = str(task.result or "")
    match task.state:
        case "SUCCESS" if is_dead:
            words = f"dead letter beside the result {words}"
        case "FAILURE" | "REJECTED" if is_dead:
            words = "dead letter"
        case "FAILURE":
            words = f"failed: {error}"
        case "REVOKED":
            words = "expired" if error == "JobExpiredException" else "cancelled"
        case "RETRY":
            words = "waits for a retry"
        case "RECEIVED":
            words = f"delayed until {_time(task.eta)}" if task.eta else "claimed"
        case "STARTED":
            words = "running"
    return words


def _time(text: str) -> str:
    """Write an ETA as Flower writes times; Celery takes one without a time zone for UTC."""
    with suppress(ValueError):
        moment = datetime.fromisoformat(text)
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
        return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
    return text


# --- Pages ---------------------------------------------------------------------------------------


class _Annotated(BaseHandler):  # type: ignore[misc] # Flower ships no types
    """A page with a note below its content, also if its content is an error."""

    def notes(self) -> Iterator[str]:
        """Return the note's paragraphs as HTML."""
        raise NotImplementedError

    def render_string(self, template_name: str, **values: Any) -> bytes:
        """Render a template of Flower's, with the note."""
        page: bytes = super().render_string(template_name, **values)
        note = "".join(f"<p>{paragraph}</p>" for paragraph in self.notes())
        note = (
            f'<aside id="note" class="page-section pt-0 small text-body-secondary">{note}</aside>'
        )
        return page.replace(b"</main>", note.encode() + b"</main>", 1)


class TasksPage(_Annotated, TasksView):  # type: ignore[misc] # Flower ships no types
    """The list of tasks."""

    def notes(self) -> Iterator[str]:
        """Say which jobs are not listed."""
        yield (
            "Listed are jobs of which a worker has sent an event since Flower started. A job that "
            "waits in the queue or in the outbox is not listed before a worker claims it. A "
            "delayed job that is cancelled is listed as delayed until it is due."
        )
        yield (
            f"{_command('status JOB_ID')} reports the state of any job, {_command('queue')} counts "
            f"those that wait, and {_command('dead-letters list')} lists dead letters, also those "
            "without a job ID."
        )


class TaskPage(_Annotated, TaskView):  # type: ignore[misc] # Flower ships no types
    """One task, or the error that Flower knows none of this ID."""

    def notes(self) -> Iterator[str]:
        """Say where the outcome and the dead letter of this job are."""
        job_id = shlex.quote(self.path_args[0])
        yield (
            "Flower knows a job only by the events that workers have sent since it started. The "
            f"recorded outcome: {_command(f'status {job_id}')}. The ID of a dead letter, by which "
            f"it is requeued: {_command('dead-letters list')}."
        )
        yield (
            "Revoke and Terminate reach the workers that run now. A cancellation that lasts: "
            f"{_command(f'cancel {job_id}')}."
        )


class WorkersPage(_Annotated, WorkersView):  # type: ignore[misc] # Flower ships no types
    """The list of workers."""

    def notes(self) -> Iterator[str]:
        """Say what the columns count."""
        yield (
            "Processed counts each time that a worker received a job: again after a delay, a retry "
            "or a redelivery. Failed includes jobs that became dead letters; cancelled and expired "
            "jobs count neither as failed nor as succeeded. The counts begin when Flower starts. "
            "The metrics of the workers (<code>METRICS_ADDRESS</code>) do not depend on it."
        )


class WorkerPage(_Annotated, WorkerView):  # type: ignore[misc] # Flower ships no types
    """One worker."""

    def notes(self) -> Iterator[str]:
        """Say what the tabs do not show, and what the controls do."""
        yield (
            "Scheduled tasks are always empty, because delayed jobs stay in Redis, as waiting ones "
            "do: the page Broker counts both. The timeouts of the pool are 0, because the worker "
            "enforces the time limits of jobs itself."
        )
        yield (
            "Shut Down stops the worker gracefully, and its supervisor starts it again. Grow, "
            "Shrink and Cancel Consumer last until the worker restarts; "
            f"{_command('pause')} stops all workers from claiming, until {_command('resume')}. The "
            "worker refuses Restart Pool, Autoscale, rate limits and timeouts."
        )


class _Queue(BaseHandler):  # type: ignore[misc] # Flower ships no types
    """Counts the messages of the queue where Flower asks its broker."""

    counts: MessageCounts | None = None
    problem = ""

    def get_broker(self) -> Self:
        """Return what counts messages."""
        return self

    async def queues(self, _names: list[str]) -> list[dict[str, object]]:
        """Return the queue and its parts, as RabbitMQ describes queues to Flower.

        Args:
            _names: The queues that the workers consume; there is one.

        Raises:
            RedisError: if Redis is unavailable or refuses.
        """
        try:
            self.counts = await asyncio.to_thread(self._count)
        except (RedisError, OSError) as error:
            self.problem = str(error)
            raise
        counts, active = self.counts, self._active()
        waiting = sum(counts.lanes.values())
        queue = {"name": QUEUE, "messages": waiting + active, "messages_ready": waiting}
        queue |= {"messages_unacknowledged": active, "consumers": counts.workers}
        lanes = [
            {"name": f"{QUEUE}: {lane}", "messages": number, "messages_ready": number}
            for lane, number in counts.lanes.items()
        ]
        return [
            queue,
            *lanes,
            {"name": f"{QUEUE}: delayed", "messages": counts.delayed},
            {"name": f"{QUEUE}: dead letters", "messages": counts.dead_letters},
        ]

    def _count(self) -> MessageCounts:
        with connect(self.capp.settings.broker, client_name=CLIENT_NAME) as redis:
            return count_messages(redis)

    def _active(self) -> int:
        """Return the number of running jobs, as the workers' heartbeats have it."""
        workers = self.application.events.state.workers.values()
        return sum(worker.active or 0 for worker in workers if worker.alive)


class BrokerPage(_Annotated, _Queue, BrokerView):  # type: ignore[misc] # Flower ships no types
    """The queue."""

    def notes(self) -> Iterator[str]:
        """Say whether the queue is paused, and what is not shown."""
        if self.problem:
            yield f"The queue could not be read: {html.escape(self.problem)}"
        if self.counts and self.counts.pause:
            yield f"<strong>{html.escape(_paused(self.counts.pause))}</strong>"
        yield (
            "Ready messages wait in lanes, of which workers claim from the first that has one. "
            "Unacked messages are running jobs by the last heartbeats of the workers, without "
            "those of a dead worker, which are requeued. Consumers are worker sessions."
        )
        yield (
            "Not shown are the requests in the outbox, which is in PostgreSQL, the age of the "
            f"oldest job, and the reasons of dead letters: {_command('queue')} and "
            f"{_command('dead-letters list')} show them."
        )


class QueueLengths(_Queue, GetQueueLengths):  # type: ignore[misc] # Flower ships no types
    """The same counts in Flower's API."""


def _paused(pause: Pause) -> str:
    when = f" since {pause.at:%Y-%m-%d %H:%M:%S} UTC" if pause.at else ""
    reason = f": {pause.reason}" if pause.reason else ""
    return f"Paused{when}{f' by {pause.by}' if pause.by else ''}{reason}"


def _command(words: str) -> str:
    return f"<code>interview-access {html.escape(words)}</code>"


PAGES = [
    (r"/", WorkersPage),
    (r"/workers", WorkersPage),
    (r"/tasks", TasksPage),
    (r"/task/(.+)", TaskPage),
    (r"/worker/(.+)", WorkerPage),
    (r"/broker", BrokerPage),
    (r"/api/queues/length", QueueLengths),
]
"""Tornado's handlers by path; each takes the place of one of Flower's."""
