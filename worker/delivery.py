"""What the worker's main process does with one delivered message, from its claim to its end.

It never judges a job. Only the ledger says how a job ended: a child that settled it there says so,
and its message is acknowledged. Whatever else happens to a child, the message goes back to the
queue; and when it has gone back too often, was revoked or is past its time, a child is told to
settle it as failed, which the ledger allows only where there is no answer yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import InvalidTaskError, Reject, Retry, TaskRevokedError
from celery.utils.log import get_logger
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from interview_access.contracts import is_job_id
from interview_access.errors import (
    InterviewAccessError,
    JobCancelledException,
    JobExpiredException,
    JobFailedError,
)
from kombu.utils.encoding import safe_repr
from redis.exceptions import RedisError

from storage.interface import StorageError, TransientStorageError
from tasks.celery_tasks import End, shown
from tasks.ledger import failure
from worker.coalescing import divided, let_go_in_any_case
from worker.lease import Lease
from worker.transport import lease_of_this_process

logger = get_logger(__name__)

_AGAIN_SECONDS = 2.0  # until a job whose child died runs again
_PASSING = (
    *(WorkerLostError, TimeLimitExceeded, Terminated, MemoryError, OSError),
    *(RedisError, StorageError),
)
_HEEDED = ("group", "parent_id", "ignore_result", "shadow", "stamps", "stamped_headers")
"""Of a message's headers: what Celery does something about in the child."""
_EVENTS_TOGETHER, _EVENTS_SECONDS = 1_000, 0.05
"""Events in one message, and how long they wait for it: 24 at a time cost a third of the loop."""
_LEVELS = 50  # of a message's headers; some hundred more overflow the pickler
_LONGEST_LIMIT_SECONDS = 366 * 86_400.0
_HOPELESS_TRIES = 3  # of settling a job as failed, when even that ends its child


def _limit(value: object) -> bool:
    """Whether the value can be a time limit: seconds of which a clock can tell the end, or none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0 < value <= _LONGEST_LIMIT_SECONDS
    return value is None


def _nested(value: Any, levels: int) -> bool:
    """Whether an object or a list, as JSON makes them, has more levels of them than that."""
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(
        _nested(one, levels - 1) for one in inner if isinstance(one, dict | list)
    )


class JobRequest(Request):  # type: ignore[misc] # Celery ships no types
    """A message as the worker's main process holds it, shown short.

    A producer's own representation of 100,000 ids would be the first thousand characters of them,
    in every event and in Flower; a plain ``LPUSH`` brings none at all.
    """

    def __init_subclass__(cls) -> None:
        """Celery derives a class for each task, two of whose methods ask nothing of ours."""
        super().__init_subclass__()
        for name in "on_success", "execute_using_pool":
            setattr(cls, f"_celerys_{name}", getattr(cls, name))
            setattr(cls, name, getattr(JobRequest, name))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check()
        self._argsrepr, self._kwargsrepr = shown(self._args, self._kwargs)
        self.lease: Lease = self.message.channel.lease
        self.receipt: str = self.message.delivery_tag
        claim = self.lease.claim_of(self.receipt)
        self._tries = claim.tries
        self._deferrals = claim.deferrals
        self._is_due = False
        self._request_dict.update(
            argsrepr=self._argsrepr,
            kwargsrepr=self._kwargsrepr,
            retries=claim.deferrals,
            verdict=None,
        )

    def _check(self) -> None:
        """Refuse now what Celery looks at only when a child is free: there it ends the worker."""
        match self.time_limits:
            case [hard, soft] if _limit(hard) and _limit(soft):
                pass
            case odd:
                raise InvalidTaskError(f"invalid timelimit value {odd!r}"[:500])
        if self.expires:
            self.expires.astimezone(UTC)  # or it is out of every clock's range
        if _nested(self.request_dict, _LEVELS):
            raise InvalidTaskError(f"headers of more than {_LEVELS} levels")

    @property
    def request_dict(self) -> dict[str, Any]:
        """What a child is told besides the body, in which it reads the arguments.

        Celery's own has them too, as objects: a list nested some hundred times in itself overflows
        the pickler then, which ends the whole worker.
        """
        told = self._request_dict.items()
        return {key: value for key, value in told if key not in {"args", "kwargs"}}

    @property
    def is_plain(self) -> bool:
        """Whether it may be in a batch: small, its first try, nothing but arguments to heed."""
        told = self._request_dict
        _, _, embedded = self._payload
        heeded = (
            self._tries,
            self._deferrals,
            *self.time_limits,
            *(embedded.values() if isinstance(embedded, dict) else (embedded,)),
            *(told.get(name) for name in _HEEDED),
        )
        return (
            self.lease.may_batch(self.receipt)
            and self.task.coalesces
            and is_job_id(self.id)
            and not any(heeded)
            and self.verdict() is None
        )

    @property
    def receipts(self) -> tuple[str]:
        """What its message is known by."""
        return (self.receipt,)

    @property
    def content(self) -> tuple[str, Any, str | None, str | None]:
        """Its job's id, and its arguments as a child decodes them: body, type and encoding."""
        return str(self.id), self._body, self._content_type, self._content_encoding

    def execute_using_pool(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's own: it asks :meth:`revoked`, and hands the job to a child."""
        self._is_due = True
        with let_go_in_any_case([self]):
            return self._celerys_execute_using_pool(*args, **kwargs)
        raise TaskRevokedError(self.id)  # by which Celery learns that no child was needed

    def revoked(self) -> bool:
        """Whether not to run it: a job begins here.

        Celery's own would answer a revoked or expired job itself, whatever the ledger says. Celery
        also asks when such a message comes, long before a child may be free for it.
        """
        if not self._is_due:
            return False
        verdict = self.verdict()
        self._request_dict["verdict"] = verdict and failure(verdict).error
        if verdict and self._tries >= self.lease.attempt_limit + _HOPELESS_TRIES:
            self._give_up(verdict)
        elif not self.lease.start(self.receipt):
            self.settled()
        return bool(self.acknowledged)

    def verdict(self) -> InterviewAccessError | None:
        """Why it is to be settled without being done, if it is."""
        if self._tries >= self.lease.attempt_limit:
            return JobFailedError(
                f"The job ended its worker's process {self._tries} times, by its size perhaps, "
                "or went over its time limit; it is not tried again.",
                {"attempts": self._tries},
            )
        if self.id in state.revoked:
            return JobCancelledException.of(str(self.id))
        began = self._tries or self._deferrals
        if self.expires and not began and datetime.now(UTC) > self.expires.astimezone(UTC):
            return JobExpiredException.of(str(self.id), self.expires.isoformat())
        return None

    def _give_up(self, error: InterviewAccessError) -> None:
        """Not even settling it as failed can be done: the last word is the operators'."""
        if is_job_id(self.id):
            try:
                self.task.backend.store_failure(self.id, error)
            except Reject as rejected:
                self._again(rejected)
                return
        self.send_event("task-failed", exception=safe_repr(error), traceback="")
        self._bury(error.sentence)

    def acknowledge(self) -> None:
        """Done with, and said at once: Celery's own waits for a turn of the main loop."""
        if not self.acknowledged:
            self.lease.acknowledge({self.receipt: str(self.id)})
            self.settled()

    def reject(self, requeue: bool = False) -> None:
        """Back to its queue, or to the dead letters."""
        if not self.acknowledged:
            if requeue:
                self.lease.give_back(self.receipt)
                self.settled()
            else:
                self._bury("It was rejected without a reason.")

    def on_success(self, failed__retval__runtime: Any, **kwargs: Any) -> None:
        """Celery's own; the database can be reached."""
        failed, told, _ = failed__retval__runtime
        with let_go_in_any_case([self]):
            if failed or told is not None:
                if not failed:
                    self.lease.no_trouble()
                self._celerys_on_success(failed__retval__runtime, **kwargs)
            else:
                # A success that tells nothing is none: Celery could not even begin.
                self._give_up(JobFailedError("It cannot be run: its body makes no call."))

    def let_go(self) -> None:
        """Whatever went wrong with it here, it comes again."""
        if not self.acknowledged:
            self.lease.defer(self.receipt, _AGAIN_SECONDS, in_order=False)
            self.settled()

    def on_end(self, end: End, seconds: float) -> None:
        """It was done among others, and so was its acknowledgement where it is done with."""
        with let_go_in_any_case([self]):
            match end:
                case Retry():
                    self._on_retry(end)
                case InterviewAccessError():
                    self.send_event("task-failed", exception=safe_repr(end), traceback="")
                case result:
                    self.send_event("task-succeeded", result=safe_repr(result), runtime=seconds)

    def _on_retry(self, retry: Retry) -> None:
        """The job asks for another try: deferred within Redis, never sent anew."""
        if isinstance(retry.exc, TransientStorageError) and retry.exc.unreachable:
            self.lease.trouble("the database cannot be reached")
        self.lease.defer(self.receipt, float(retry.when or 0))
        self.settled()
        self.send_event("task-retried", exception=safe_repr(retry.exc), traceback="")

    def on_timeout(self, soft: bool, timeout: float) -> None:  # noqa: ARG002 - Celery's names
        """Told after :meth:`on_failure` has let go of it."""
        logger.error("job %s: over its time limit of %s s: its child is ended", self.id, timeout)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """The child failed the job as the ledger says, or said what to do, or is gone."""
        with let_go_in_any_case([self]):
            self._on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)

    def _on_failure(self, exc_info: Any, *, send_failed_event: bool, return_ok: bool) -> None:
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if isinstance(error, Retry):
            self._on_retry(error)
        elif isinstance(error, Reject) and error.requeue:
            self._again(error)
        elif isinstance(error, Reject):
            self._bury(str(error.reason))
            if send_failed_event:
                self.send_event("task-failed", exception=str(error.reason), traceback="")
        elif return_ok and isinstance(error, InterviewAccessError):
            self.lease.no_trouble()
            self.acknowledge()
            if send_failed_event:
                self.send_event("task-failed", exception=safe_repr(error), traceback="")
        elif isinstance(error, _PASSING):
            self._on_child_lost(error)
        else:
            # Celery stumbled over what the message says beside the job, as it would each time.
            reason = f"It cannot be run: {type(error).__name__}: {error}"[:500]
            self._give_up(JobFailedError(reason))

    def _again(self, rejected: Reject) -> None:
        """Done, perhaps: its result could not be stored, and can be when it comes again."""
        logger.warning("job %s: goes back: %s", self.id, rejected.reason)
        self.lease.trouble("results cannot be stored")
        self.lease.defer(self.receipt, _AGAIN_SECONDS)
        self.settled()

    def _on_child_lost(self, error: BaseException) -> None:
        """Nobody knows how far the job came. The ledger does, when it is tried again."""
        if isinstance(error, Terminated) and self.id in state.revoked:
            self.reject(requeue=True)
            return
        logger.error("job %s: try %d ended with its child: %r", self.id, self._tries + 1, error)
        self.lease.defer(self.receipt, _AGAIN_SECONDS, in_order=False)
        self.settled()
        self.send_event("task-retried", exception=safe_repr(error), traceback="")

    def _announce_revoked(
        self,
        reason: str,  # noqa: ARG002 - Celery's name
        terminated: bool,
        signum: object,
        expired: bool,
    ) -> None:
        """Its child is being ended by an operator's command, which :meth:`on_failure` will hear."""
        self.send_event("task-revoked", terminated=terminated, signum=signum, expired=expired)

    def _announce_cancelled(self, emit_retry: bool = True) -> None:  # noqa: ARG002 - Celery's name
        """Its child is being ended because the worker is: no verdict, and no try."""
        self.reject(requeue=True)

    def _bury(self, reason: str) -> None:
        self.lease.bury(self.receipt, reason, job_id=str(self.id), task=str(self.name))
        self.settled()

    def settled(self) -> None:
        """Redis was told what becomes of its message: it is none of this worker's any more."""
        state.task_ready(self)
        self.acknowledged = True
        self.message.channel.qos.settled(self.receipt)


def _seconds_until_due(message: Any) -> float:
    """How long a message is to wait; none where its header makes no sense, which Celery tells."""
    eta = message.headers.get("eta")
    if not isinstance(eta, str):
        return 0.0
    try:
        due = datetime.fromisoformat(eta)
    except ValueError:
        return 0.0
    return ((due if due.tzinfo else due.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()


class JobConsumer(Consumer):  # type: ignore[misc] # Celery ships no types
    """Celery's consumer, which throws nothing away and survives the loss of its connection."""

    on_task_request: Callable[[Any], object]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Without gossip, which each worker hears of all others and nobody asks for.

        It trips over a connection that is lost, and logs a trace of 150 lines each time.
        """
        super().__init__(*args, **(kwargs | {"without_gossip": True}))
        self._begin = self.on_task_request
        self._collected: list[JobRequest] = []
        self._events_due = 0.0
        if self.hub:
            self.on_task_request = self._collect

    def _collect(self, request: JobRequest) -> None:
        """A job that was claimed; others that were claimed with it follow."""
        self._collected.append(request)
        self.hub.call_soon(self._begin_collected)

    def _begin_collected(self) -> None:
        """Give the jobs of one claim to children, and back what these cannot start on now."""
        collected, self._collected = self._collected, []
        if not collected:
            return
        children = max(collected[0].message.channel.qos.room() + len(collected), 1)
        pieces = divided(collected, children, self._begin)
        collected[0].lease.divide([piece.receipts for piece in pieces], children)
        for piece in reversed(pieces[children:]):
            piece.reject(requeue=True)
        for piece in pieces[:children]:
            self._begin(piece)

    def on_send_event_buffered(self) -> None:
        """Celery's own sends at once, before it gives a child the job; events can wait for that."""
        now = monotonic()
        if self.hub and now >= self._events_due:
            self._events_due = now + _EVENTS_SECONDS
            self.hub.call_later(_EVENTS_SECONDS, self._flush_events)

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Celery's own, without its ten lines each time on a setting that celeryconfig sets."""
        with warnings.catch_warnings(action="ignore", category=PendingDeprecationWarning):
            super().on_connection_error_after_connected(exc)

    def on_close(self) -> None:
        """Celery's own; but a job that a child has is not forgotten, and one without goes back.

        Celery forgets both where the child has not told yet that it has begun: the broker would
        deliver them again. The lease outlives the connection, and would hold them for as long as
        the worker lives, whatever the child says in the end.
        """
        self._flush_events()
        self._collected.clear()  # they have not begun, and go back when the lease is opened
        pool = getattr(self.pool, "_pool", None)
        cache: dict[int, Any] = getattr(pool, "_cache", {})
        unheard = {number: job for number, job in cache.items() if not job.accepted()}
        waiting = list(getattr(pool, "outbound_buffer", ()))
        for job in unheard.values():
            job._accepted = True  # noqa: SLF001 - what Celery asks before it forgets
        super().on_close()
        for number, job in unheard.items():
            job._accepted = False  # noqa: SLF001 - see above
            if job in waiting or number not in cache:
                job.discard()
                job._accept_callback.__self__.reject(requeue=True)  # noqa: SLF001 - its request's

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Celery's own, but for messages that are not due, and for those that it stumbles over.

        The first wait in Redis: Celery keeps them in the worker's memory, thousands of them
        perhaps, and holds them for as long as they have to wait. The others are buried: headers
        that make no sense raise whatever they raise in there, and that would end the worker, or,
        as a KeyError, pass for a connection that was lost.
        """
        handle = super().create_task_handler(*args, **kwargs)
        if self.event_dispatcher:
            self.event_dispatcher.buffer_limit = _EVENTS_TOGETHER

        def on_task_received(message: Any) -> None:
            try:
                seconds = _seconds_until_due(message)
                if seconds > 0:
                    message.channel.lease.defer(message.delivery_tag, seconds, in_order=False)
                    message.channel.qos.settled(message.delivery_tag)
                    return
                handle(message)
            except (RedisError, OSError):
                raise
            except Exception as error:  # noqa: BLE001 - whatever its headers may cause
                self._bury(message, f"It cannot be read: {type(error).__name__}: {error}")

        return on_task_received

    def on_unknown_message(self, body: object, message: Any) -> None:  # noqa: ARG002 - Celery's name
        """No task is named."""
        self._bury(message, "It is no Celery task: it names none.")

    def on_unknown_task(self, body: object, message: Any, exc: object) -> None:  # noqa: ARG002
        """A task is named that this worker does not have."""
        self._bury(message, f"There is no task {message.headers.get('task')!r} here.")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:  # noqa: ARG002
        """Its content type is refused, or its headers are."""
        self._bury(message, f"It cannot be read: {type(exc).__name__}: {exc}")

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Its body is not what its content type says."""
        self._bury(message, f"Its body cannot be decoded: {type(exc).__name__}: {exc}")

    def _bury(self, message: Any, reason: str) -> None:
        headers = message.headers if isinstance(message.headers, dict) else {}
        job_id, task = str(headers.get("id", "")), str(headers.get("task", ""))
        lease = lease_of_this_process()
        if lease is None or message.acknowledged:
            return
        try:
            if is_job_id(headers.get("id")):  # or its poller would wait for ever
                error = JobFailedError(reason[:500], {"task": task[:255]})
                self.app.backend.store_failure(job_id, error)
        except Reject as rejected:
            logger.warning("a message goes back: %s", rejected.reason)
            lease.defer(message.delivery_tag, _AGAIN_SECONDS, in_order=False)
        else:
            logger.error("job %s: buried: %s", job_id[:255], reason[:500])
            lease.bury(message.delivery_tag, reason[:500], job_id=job_id[:255], task=task[:255])
        message.channel.qos.settled(message.delivery_tag)
