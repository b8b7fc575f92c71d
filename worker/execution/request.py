"""One job request in the worker's main process: a delivery's message, read within bounds.

The main process decodes only the envelope, and only if it is small enough to be decoded safely; a
pool process decodes the body. The contract defines the message: Celery's message protocol 2 in
UTF-8 JSON (https://docs.celeryq.dev/en/stable/internals/protocol.html).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from celery import Celery
from celery.worker import state as worker_state
from interview_access.contracts import describe, is_job_id
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    JobCancelledException,
    JobExpiredException,
    JobFailedError,
    shortened,
)

from tasks.audit import read_time
from worker.broker.delivery import Delivery, State
from worker.execution.decoding import (
    Limits,
    UnreadableMessageError,
    body_encoding,
    check_headers,
    find_identity,
)

_LONGEST_LIMIT_SECONDS = 366 * 86_400.0
_REPRESENTATION = 200  # characters of a job's arguments in events and control replies

_RECORDING_ATTEMPTS = 2
"""Attempts after the last allowed one, which only record the failure: the first decodes the body,
the second does not. If both end the pool process, the message becomes a dead letter without a
result."""

_BRACKETED = re.compile(r"\[.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Dispatched:
    """The part of a request that a pool process receives.

    Its representation, which error reports contain, has no argument of the job.

    Attributes:
        job_id: The job's ID.
        task: The task's name.
        body: The body in the envelope, or None if it must not be decoded.
        encoding: Encoding of the body: ``""``, ``base64`` or ``gzip``.
        headers: The message's headers.
        attempts: Attempts that ended the pool process or the worker.
        retries: Retries of the job.
        failure: Predetermined failure, if the job must not be executed.
        queue: The queue from which it was claimed.
    """

    job_id: str
    task: str
    body: str | None = field(repr=False)
    encoding: str
    headers: dict[str, Any] = field(repr=False)
    attempts: int
    retries: int
    failure: InterviewAccessError | None = field(repr=False)
    queue: str

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self.attempts + self.retries + 1


class PoolBatch(Protocol):
    """The batch with which a request was dispatched."""

    @property
    def hostname(self) -> str:
        """The worker's name."""

    def revoke(self) -> None:
        """End its pool process for an operator."""


class JobRequest:
    """What a delivery's message requests, in the form that Celery's control commands read.

    Attributes:
        delivery: The claimed message and its state.
        id: The job's ID; empty if none can be read.
        name: The task's name.
        task: The task, if the worker has it.
        headers: The message's headers; empty if they cannot be read.
        failure: Predetermined failure, if the job must not be executed.
        delay: Seconds until it is due.
        time_limit: Seconds.
        batch: The batch with which it was dispatched.
        time_start: When a pool process accepted it, in seconds since the epoch.
        worker_pid: That pool process.
    """

    def __init__(self, delivery: Delivery, app: Celery, limits: Limits) -> None:
        """Read the envelope, and decide whether the job is to be executed.

        Args:
            delivery: The claimed message.
            app: The app with the tasks.
            limits: Limits of a message.
        """
        self.delivery = delivery
        self.id = ""
        self.name = ""
        self.task: Any = None
        self.headers: dict[str, Any] = {}
        self.failure: InterviewAccessError | None = None
        self.delay = 0.0
        self.time_limit = limits.seconds
        self.batch: PoolBatch | None = None
        self.time_start: float | None = None
        self.worker_pid: int | None = None
        self._claim = delivery.claim
        self._body: str | None = None
        self._encoding = ""
        self._expires: datetime | None = None
        try:
            self._read(self._envelope(limits), app)
        except InvalidGrantRequestException as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 - any bytes can raise anything; none may end the worker
            has_reason = isinstance(error, UnreadableMessageError)
            reason = str(error) if has_reason else type(error).__name__
            reason = shortened(reason, quoted=False, at_most=300)
            self.failure = JobFailedError(
                f"The message cannot be read: {reason}.", {"total": 1, "reason": reason}
            )
        if self.failure and not self.id:
            job_id, name = find_identity(self._claim.message)
            self.id, self.name = job_id, name or self.name
        self.failure = self.failure or self._predetermined(limits)
        delivery.job_id, delivery.task = self.id, self.name

    def __repr__(self) -> str:
        return f"{self.delivery} pid={self.worker_pid}"

    def _envelope(self, limits: Limits) -> dict[str, Any]:
        message = self._claim.message
        if self._claim.size > limits.message_bytes:
            expected, got = f"at most {limits.message_bytes:,} bytes", f"{self._claim.size:,}"
            raise InvalidGrantRequestException.of([("message", expected, got)])
        text = message.decode()
        limits.check(text)
        envelope = json.loads(text)
        if not isinstance(envelope, dict):
            raise UnreadableMessageError(f"expected a JSON object, got {describe(envelope)}")
        return envelope

    def _read(self, envelope: dict[str, Any], app: Celery) -> None:
        headers, properties = envelope.get("headers"), envelope.get("properties")
        for name, value in (("headers", headers), ("properties", properties)):
            if not isinstance(value, dict):
                raise UnreadableMessageError(f"{name}: expected an object, got {describe(value)}")
        assert isinstance(headers, dict)  # noqa: S101 - checked above
        if is_job_id(headers.get("id")):
            self.id = headers["id"]
        self.name = shortened(str(headers.get("task", "")), quoted=False, at_most=200)
        if not self.id:
            raise UnreadableMessageError(
                f"id: expected a job ID of 1 to 255 printable characters, got "
                f"{describe(headers.get('id'))}"
            )
        if headers.get("task") in app.tasks and not self.name.startswith("celery."):
            self.task = app.tasks[headers["task"]]
        else:
            raise UnreadableMessageError(
                f"task: expected one of this worker's, got {describe(headers.get('task'))}"
            )
        check_headers(headers)
        body = envelope.get("body")
        if not isinstance(body, str):
            raise UnreadableMessageError(f"body: expected a string, got {describe(body)}")
        self._body, self._encoding = body, body_encoding(envelope, headers, properties or {})
        self.headers = headers
        self.delay = _seconds_until(_datetime(headers, "eta"))
        self._expires = _datetime(headers, "expires")
        self.time_limit = min([self.time_limit, *_time_limits(headers)])

    def _predetermined(self, limits: Limits) -> InterviewAccessError | None:
        claim = self._claim
        if claim.attempts >= limits.attempts:
            if claim.attempts > limits.attempts:
                self._body = None
            return JobFailedError(
                f"The job's process ended in {claim.attempts} attempts (out of memory, a crash or "
                "the time limit). It is not retried: send the request under a new job ID.",
                {"total": 1, "attempts": claim.attempts},
            )
        if self._is_revoked:
            return JobCancelledException.of(self.id)
        has_begun = claim.attempts or claim.retries
        if self._expires and not has_begun and datetime.now(UTC) > self._expires:
            return JobExpiredException.of(self.id, self._expires.isoformat())
        return None

    def is_hopeless(self, limits: Limits) -> bool:
        """Report whether recording the job's failure has ended its pool process, too.

        Args:
            limits: Limits of a message.
        """
        return self._claim.attempts >= limits.attempts + _RECORDING_ATTEMPTS

    @property
    def _is_revoked(self) -> bool:
        return self.id in worker_state.revoked or any(
            self._stamps(name) & set(map(str, _listed(revoked)))
            for name, revoked in list(worker_state.revoked_stamps.items())
        )

    def _stamps(self, name: str) -> set[str]:
        return {str(stamp) for stamp in _listed(self.stamps.get(name))}

    @property
    def stamps(self) -> dict[str, Any]:
        """The message's stamps, by which operators revoke jobs."""
        stamps = self.headers.get("stamps")
        return stamps if isinstance(stamps, dict) else {}

    @property
    def queue_seconds(self) -> float | None:
        """Seconds since it was enqueued or due, before its first execution; None if unknown."""
        if self._claim.attempts or self._claim.retries:
            return None
        try:
            begun = _datetime(self.headers, "enqueued_at")
            due = _datetime(self.headers, "eta")
        except UnreadableMessageError:
            return None
        if begun is None:
            return None
        # A producer's clock may be ahead.
        return max((datetime.now(UTC) - max(begun, due or begun)).total_seconds(), 0.0)

    @property
    def dispatched(self) -> Dispatched:
        """The part that a pool process receives."""
        return Dispatched(
            self.id,
            self.name,
            self._body,
            self._encoding,
            self.headers,
            self._claim.attempts,
            self._claim.retries,
            self.failure,
            self._claim.queue,
        )

    # --- What Celery's control commands read ------------------------------------------------------

    @property
    def acknowledged(self) -> bool:
        """Whether it is settled."""
        return self.delivery.state is State.SETTLED

    @property
    def attempt(self) -> int:
        """Number of this attempt, from 1."""
        return self._claim.attempts + self._claim.retries + 1

    @property
    def arguments(self) -> dict[str, str]:
        """The producer's representation of the arguments, escaped and cut at the first list."""
        shown = {
            "args": self.headers.get("argsrepr"),
            "kwargs": self.headers.get("kwargsrepr"),
        }
        return {
            name: shortened(_BRACKETED.sub("[…", text), quoted=False, at_most=_REPRESENTATION)
            if isinstance(text, str)
            else ""
            for name, text in shown.items()
        }

    def info(self, safe: bool = False) -> dict[str, Any]:  # noqa: ARG002 - Celery's signature
        """Build the reply to ``inspect active`` and ``inspect query_task``."""
        return {
            "id": self.id,
            "name": self.name,
            **self.arguments,
            "type": self.name,
            "hostname": self.batch and self.batch.hostname,
            "time_start": self.time_start,
            "acknowledged": self.acknowledged,
            "delivery_info": {
                "routing_key": self._claim.queue,
                "redelivered": bool(self._claim.attempts),
            },
            "worker_pid": self.worker_pid,
        }

    def terminate(self, pool: Any, signal: Any = None) -> None:  # noqa: ARG002 - Celery's signature
        """End its pool process, as ``control revoke --terminate`` asks."""
        if self.batch and self.delivery.state is State.DISPATCHED:
            self.batch.revoke()


def _time_limits(headers: dict[str, Any]) -> list[float]:
    """Return the hard and the soft time limit that are set, in seconds. Both end the attempt."""
    match headers.get("timelimit") or [None, None]:
        case [hard, soft]:
            limits = [one for one in (hard, soft) if one is not None]
        case odd:
            raise UnreadableMessageError(f"timelimit: expected [hard, soft], got {describe(odd)}")
    for one in limits:
        is_number = isinstance(one, int | float) and not isinstance(one, bool)
        if not (is_number and 0 < one <= _LONGEST_LIMIT_SECONDS):
            raise UnreadableMessageError(f"timelimit: expected seconds, got {describe(one)}")
    return limits


def _datetime(headers: dict[str, Any], name: str) -> datetime | None:
    value = headers.get(name)
    if value is None:
        return None
    if moment := read_time(value):
        return moment
    raise UnreadableMessageError(f"{name}: expected a time in ISO 8601, got {describe(value)}")


def _seconds_until(moment: datetime | None) -> float:
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0) if moment else 0.0


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
