"""The Redis commands of the clients, their order, and the parsing of replies.

Does no I/O: each conversation is a generator that yields commands or pauses, and is sent the
replies, so that the blocking client and the asyncio one send the same commands. The envelope is
Celery's message protocol 2, as kombu's Redis transport reads it
(https://docs.celeryq.dev/en/stable/internals/protocol.html).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import inf
from typing import Any, TypeVar
from uuid import UUID, uuid4

from pydantic import ValidationError
from redis.exceptions import ConnectionError as LostConnectionError
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.exceptions import TimeoutError as SilenceError

from interview_access import errors
from interview_access.contracts import (
    CANCEL_JOB,
    CONTROL_QUEUE,
    GRANT_ACCESS,
    GRANT_COHORT_ACCESS,
    JOB_ID_RULE,
    JOB_STATUS,
    PROGRESS,
    QUEUE,
    Announcement,
    GrantAccessRequest,
    GrantCohortAccessRequest,
    GrantJob,
    JobProgress,
    JobStatus,
    as_text,
    as_texts,
    describe,
    is_job_id,
    unreadable_request_digest,
)
from interview_access.errors import (
    InterviewAccessError,
    InvalidGrantRequestException,
    JobFailedError,
    JobIdReusedException,
    NoAnswerInTimeError,
    QueueUnavailableError,
    StorageUnavailableException,
    error_class,
    shortened,
)

T = TypeVar("T")

ANNOUNCED_DAYS = 30
"""Retention of the announcement of a job that no worker starts."""

_LOST = LostConnectionError, SilenceError, OSError  # Redis might have executed the commands
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25  # seconds between two polls of a result
_PAUSE_GROWTH = 1.1  # adds at most a tenth to the time waited
_ASK_SECONDS = 5.0  # between two control requests while no result is stored
_LAST_ASK_SECONDS = 1.0  # before the deadline, if none was sent before
_CANCEL_PAUSE = 0.2  # seconds between two polls of a job that is being cancelled
_TRY_AGAIN_WITHIN = 4.0  # seconds: a later retry could exceed the client's limit of 10 s
_JOBS_AT_ONCE, _BYTES_AT_ONCE = 500, 4_000_000  # in one MULTI, which blocks Redis for others


@dataclass(frozen=True, slots=True)
class Commands:
    """Redis commands of one round trip; several are sent in one MULTI.

    Attributes:
        results: Whether they go to the results' server instead of the queue's.
        provided: Keys and their expected values (None: the key must not exist), watched until EXEC;
            if one differs, nothing is executed and WatchError is thrown.
    """

    commands: tuple[tuple[Any, ...], ...]
    results: bool = False
    provided: Mapping[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """A pause between two polls."""

    seconds: float


Conversation = Generator[Commands | Pause, Any, T]
"""Yields commands and pauses, is sent the list of replies, and returns the result of the call.

Exceptions of redis-py are thrown into it; it translates them into errors of this package.
"""


@dataclass(frozen=True, slots=True)
class GrantMessage:
    """A grant-access job, ready to be sent.

    Attributes:
        is_new: Whether its ID was generated, so that no other request can have it.
        envelope: The bytes on the queue.
        announcement: The value of its announcement key.
    """

    job_id: str
    is_new: bool
    envelope: bytes
    announcement: Announcement

    @classmethod
    def of(
        cls,
        user_id: str | UUID,
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
    ) -> GrantMessage:
        """Build the message of a job for one user; the worker validates it.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters; by default a random UUID.
            countdown: Seconds before which it is not started.
            expires: Seconds, or a datetime (UTC if naive), after which it is not started.

        Raises:
            ValueError: if `job_id`, `countdown` or `expires` is invalid.
            InvalidGrantRequestException: if an argument cannot be encoded as JSON.
        """
        asked = {"user_id": as_text(user_id), "interview_ids": as_texts(interview_ids)}
        return cls._asking(GRANT_ACCESS, asked, job_id, countdown, expires)

    @classmethod
    def of_cohort(
        cls,
        user_ids: Iterable[str | UUID],
        interview_ids: Iterable[str | UUID],
        *,
        job_id: str | None = None,
        countdown: float | None = None,
        expires: float | datetime | None = None,
    ) -> GrantMessage:
        """Build the message of a cohort job; see :meth:`of`."""
        asked = {"user_ids": as_texts(user_ids), "interview_ids": as_texts(interview_ids)}
        return cls._asking(GRANT_COHORT_ACCESS, asked, job_id, countdown, expires)

    @classmethod
    def _asking(
        cls,
        task: str,
        kwargs: Mapping[str, object],
        job_id: str | None,
        countdown: float | None,
        expires: float | datetime | None,
    ) -> GrantMessage:
        is_new = job_id is None
        job_id = str(uuid4()) if job_id is None else job_id
        _check_job_id(job_id)
        now = datetime.now(UTC)
        eta = None if countdown is None else _later(now, countdown, "countdown")
        expires_at = None if expires is None else _expiry(now, expires)
        kwargsrepr = ", ".join(f"{name}={_shown(value)}" for name, value in kwargs.items())
        try:
            envelope = _envelope(
                task, job_id, QUEUE, kwargs, kwargsrepr, eta=eta, expires_at=expires_at
            )
            digest = unreadable_request_digest(task, (), kwargs)
        except (TypeError, ValueError, RecursionError):
            request = GrantAccessRequest if task == GRANT_ACCESS else GrantCohortAccessRequest
            request.read((), kwargs)  # raises with the argument that JSON cannot encode
            raise
        return cls(
            job_id,
            is_new,
            envelope,
            Announcement(
                task=task,
                digest=digest,
                sent_at=now,
                eta=eta,
                expires_at=expires_at,
            ),
        )

    @property
    def key(self) -> str:
        """Key of its announcement."""
        return announcement_key(self.job_id)

    @property
    def commands(self) -> tuple[tuple[Any, ...], ...]:
        """The commands of one MULTI: announce the job, unless it is announced, and enqueue it."""
        known = self.announcement
        delay = known.eta - known.sent_at if known.eta else timedelta()
        kept = max(delay, timedelta()) + timedelta(days=ANNOUNCED_DAYS)
        text = known.model_dump_json(exclude_none=True).encode()
        return (
            ("SET", self.key, text, "NX", "EX", int(kept.total_seconds())),
            ("LPUSH", QUEUE, self.envelope),
        )


def grant_messages(jobs: Iterable[object]) -> Iterator[GrantMessage]:
    """Build the messages of many jobs, in their order; a job given twice has one message.

    Raises:
        ValueError: as from GrantMessage.of, naming the job by its position.
        InvalidGrantRequestException: likewise; or if a job is not a GrantJob, or has the ID of
            another request among them.
    """
    first_of: dict[str, GrantMessage] = {}
    for position, job in enumerate(jobs):
        try:
            if not isinstance(job, GrantJob):
                raise InvalidGrantRequestException.of([("the job", "a GrantJob", describe(job))])
            message = GrantMessage.of(
                job.user_id,
                job.interview_ids,
                job_id=job.job_id,
                countdown=job.countdown,
                expires=job.expires,
            )
            first = first_of.setdefault(message.job_id, message)
            if first.announcement.digest != message.announcement.digest:
                taken = f"{shortened(message.job_id)} of a request before"
                raise InvalidGrantRequestException.of([("job id", "one of its own", taken)])
        except InvalidGrantRequestException as error:
            raise InvalidGrantRequestException(
                f"jobs[{position}]: {error.sentence}", {**error.details, "position": position}
            ) from None
        except ValueError as error:
            raise ValueError(f"jobs[{position}]: {error}") from None
        yield first


def announcement_key(job_id: str) -> str:
    """Name the key of a job's announcement, on the server of the queue."""
    return f"interview-access:job:{job_id}"


def result_key(job_id: str) -> str:
    """Name the key of a job's state and result, as Celery does."""
    return f"celery-task-meta-{job_id}"


def reply_key(request_id: str) -> str:
    """Name the key of the reply to a control request, on the server of the queue."""
    return f"interview-access:reply:{request_id}"


def _check_job_id(job_id: object) -> None:
    if not is_job_id(job_id):
        raise ValueError(f"job id: expected {JOB_ID_RULE}, got {describe(job_id)}")


# --- Conversations ------------------------------------------------------------------------------


def enqueue(message: GrantMessage) -> Conversation[str]:
    """Send the job, unless another request has its ID."""
    try:
        yield from _send([message], {} if message.is_new else {message.key: None})
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"Job {message.job_id} might not have been queued: {_reason(error)}. "
            "Expected a Redis that can be reached and written to. "
            "Sending the job again under the same id is safe.",
            {"job_id": message.job_id},
        ) from error
    return message.job_id


def enqueue_many(messages: Sequence[GrantMessage]) -> Conversation[list[str]]:
    """Send jobs; none is sent if another request has one of their IDs.

    An error on the way, also an ID that is used meanwhile, lists which jobs were sent.
    """
    each_once = {message.job_id: message for message in messages}
    job_ids = list(each_once)
    batches = list(_batches(each_once.values()))
    sent = under_way = 0
    try:
        known: dict[str, bytes | None] = {}
        for batch in batches:
            known |= yield from _announced(batch)
        _refuse_other_requests(each_once.values(), known)
        for batch in batches:
            yield from _forget_undone([one for one in batch if known[one.key]])
            under_way = len(batch)
            yield from _send(batch, {message.key: known[message.key] for message in batch})
            sent, under_way = sent + under_way, 0
    except JobIdReusedException as error:
        raise error.with_account(job_ids, sent=sent) from None
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"Not all jobs have been queued: {_reason(error)}. "
            "Expected a Redis that can be reached and written to."
        ).with_account(
            job_ids, sent=sent, perhaps_sent=0 if isinstance(error, ResponseError) else under_way
        ) from error
    return [message.job_id for message in messages]


def _batches(messages: Iterable[GrantMessage]) -> Iterator[list[GrantMessage]]:
    """Partition messages by number and bytes; a message over the limit is a batch of its own."""
    batch: list[GrantMessage] = []
    size = 0
    for message in messages:
        size += len(message.envelope)
        if batch and (len(batch) == _JOBS_AT_ONCE or size > _BYTES_AT_ONCE):
            yield batch
            batch, size = [], len(message.envelope)
        batch.append(message)
    if batch:
        yield batch


def _send(
    messages: Sequence[GrantMessage], known: Mapping[str, bytes | None]
) -> Conversation[None]:
    """Send jobs atomically, unless another request has one of their IDs, also under races.

    Args:
        messages: Of different jobs.
        known: The announcements read before, by key, of the jobs whose IDs others may have.
    """
    give_up = time.monotonic() + _TRY_AGAIN_WITHIN
    try:
        yield from _send_where_free(messages, known, give_up)
    except _LOST as lost:
        if time.monotonic() > give_up:
            raise
        # The announcements show whether the first attempt was executed.
        known = {**dict.fromkeys(message.key for message in messages), **known}
        try:
            yield from _send_where_free(messages, known, give_up)
        except (RedisError, OSError) as error:
            raise lost from error


def _send_where_free(
    messages: Sequence[GrantMessage], known: Mapping[str, bytes | None], give_up: float
) -> Conversation[None]:
    commands = tuple(command for message in messages for command in message.commands)
    ours = {command[1]: command[2] for command in commands if command[0] == "SET"}
    while True:
        try:
            yield Commands(commands, provided=known)
        except WatchError as error:
            if isinstance(error.__context__, _LOST):
                raise error.__context__ from None  # redis-py wraps lost connections
            if time.monotonic() > give_up:
                raise
            (texts,) = yield Commands((("MGET", *known),))
            known = dict(zip(known, texts, strict=True))
            if known == ours:
                return  # an attempt before was executed, and its reply was lost
            _refuse_other_requests(messages, known)
            yield from _forget_undone([one for one in messages if known.get(one.key)])
        else:
            return


def _forget_undone(messages: Sequence[GrantMessage]) -> Conversation[None]:
    """Delete stored `StorageUnavailableException` results, which are not final, before a resend."""
    keys = [result_key(message.job_id) for message in messages]
    if not keys:
        return
    (results,) = yield Commands((("MGET", *keys),), results=True)
    for key, stored in zip(keys, results, strict=True):
        if stored and StorageUnavailableException.__name__.encode() in stored:
            with suppress(WatchError):  # another state was stored meanwhile
                yield Commands((("DEL", key),), results=True, provided={key: stored})


def _announced(messages: Sequence[GrantMessage]) -> Conversation[dict[str, bytes | None]]:
    """Read the announcements of jobs, by key."""
    keys = [message.key for message in messages]
    (texts,) = yield from _replies(Commands((("MGET", *keys),)))
    return dict(zip(keys, texts, strict=True))


def result(
    job_id: str, *, timeout: float, on_progress: Callable[[JobProgress], None] | None
) -> Conversation[dict[str, Any]]:
    """Poll a job's result until it is final, or until the deadline.

    If nothing is stored, a control request is sent, at once if the job is not announced either: a
    result that has expired in Redis is in the ledger.
    """
    _check_job_id(job_id)
    deadline = time.monotonic() + timeout
    pause, ask_at = _FIRST_PAUSE, 0.0
    while True:
        stored, announced = yield from _look(job_id, by=deadline)
        state = stored["status"] if stored else "PENDING"
        if stored and state in {"SUCCESS", "FAILURE", "REVOKED"}:
            return _answer(stored)
        if stored and state == PROGRESS and on_progress:
            with suppress(ValidationError):  # of another application's task
                on_progress(JobProgress.model_validate(stored["result"]))
        left = deadline - time.monotonic()
        if announced and not ask_at:
            ask_at = max(min(time.monotonic() + _ASK_SECONDS, deadline - _LAST_ASK_SECONDS), 1.0)
        if not stored and left > 0 and time.monotonic() >= ask_at:
            ask_at = time.monotonic() + _ASK_SECONDS
            known = yield from _known(job_id, timeout=min(left, _ASK_SECONDS))
            if known and known.final:
                return _answer_of(known)
            left = deadline - time.monotonic()
        if left <= 0:
            unheard_of = "it is queued" if announced else "nothing is stored of it"
            so_far = f"its state is {state}" if stored else unheard_of
            raise NoAnswerInTimeError(
                f"Job {job_id} had no result within {timeout:g} s ({so_far}). "
                "It might still run: poll it again by its ID.",
                {"job_id": job_id, "state": state},
            )
        yield Pause(min(pause, left))
        pause = min(_PAUSE_GROWTH * pause, _LONGEST_PAUSE)


def status(job_id: str, *, timeout: float) -> Conversation[JobStatus]:
    """Request a job's status from the workers."""
    _check_job_id(job_id)
    return (yield from _ask(JOB_STATUS, job_id, timeout))


def cancel(job_id: str, *, timeout: float) -> Conversation[JobStatus]:
    """Cancel a job, and wait until it has stopped or finished."""
    _check_job_id(job_id)
    deadline = time.monotonic() + timeout
    known = yield from _ask(CANCEL_JOB, job_id, timeout)
    while known.state == "running" and deadline - time.monotonic() > _CANCEL_PAUSE:
        yield Pause(_CANCEL_PAUSE)
        try:
            known = yield from _ask(CANCEL_JOB, job_id, max(deadline - time.monotonic(), 0))
        except NoAnswerInTimeError:
            break  # the cancellation is recorded all the same
    return known


def _known(job_id: str, *, timeout: float) -> Conversation[JobStatus | None]:
    """Request a job's status; None if no worker replies."""
    try:
        return (yield from _ask(JOB_STATUS, job_id, timeout))
    except QueueUnavailableError as error:
        if not isinstance(error.__cause__, ResponseError):
            raise  # another attempt would take as long again
    except InterviewAccessError:
        pass
    return None  # a full Redis refuses control requests, but still stores results


def _ask(task: str, job_id: str, timeout: float) -> Conversation[JobStatus]:
    deadline = time.monotonic() + timeout
    request_id = str(uuid4())
    expires_at = datetime.now(UTC) + timedelta(seconds=timeout)
    envelope = _envelope(
        task,
        request_id,
        CONTROL_QUEUE,
        {"job_id": job_id},
        f"job_id={shortened(job_id)}",
        eta=None,
        expires_at=expires_at,
        reply_to=reply_key(request_id),
    )
    try:
        yield from _replies(Commands((("LPUSH", CONTROL_QUEUE, envelope),)), by=deadline)
        pause = _FIRST_PAUSE
        while True:
            (reply,) = yield from _replies(Commands((("GET", reply_key(request_id)),)), by=deadline)
            if reply is not None:
                return JobStatus.model_validate(_answer(json.loads(reply)))
            left = deadline - time.monotonic()
            if left <= 0:
                break
            yield Pause(min(pause, left))
            pause = min(_PAUSE_GROWTH * pause, _LONGEST_PAUSE)
        yield from _replies(Commands((("LREM", CONTROL_QUEUE, 0, envelope),)), by=deadline)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"The control request for job {job_id} failed: {_reason(error)}. "
            "Expected a Redis that can be reached and written to. Sending it again is safe.",
            {"job_id": job_id},
        ) from error
    raise NoAnswerInTimeError(
        f"No worker replied about job {job_id} within {timeout:g} s. Expected a worker that runs "
        "on this Redis: only a worker can report a job's state. Send the request again.",
        {"job_id": job_id},
    )


def _look(job_id: str, *, by: float) -> Conversation[tuple[dict[str, Any] | None, bool]]:
    """Read a job's stored result, and whether the job is announced."""
    result, announcement = ("GET", result_key(job_id)), ("EXISTS", announcement_key(job_id))
    try:
        (stored,) = yield from _replies(Commands((result,), results=True), by=by)
        if stored is not None:
            meta = json.loads(stored)
            if meta.get("queue") != CONTROL_QUEUE:  # else a reply to a control request
                return meta, True
        (announced,) = yield from _replies(Commands((announcement,)), by=by)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"The result of job {job_id} cannot be read from Redis ({_reason(error)}). "
            "The job itself is not affected: poll it again.",
            {"job_id": job_id},
        ) from error
    return None, bool(announced)


def _replies(step: Commands, *, by: float = inf) -> Conversation[list[Any]]:
    """Send commands, a second time if the connection was lost and the deadline ``by`` permits it.

    All commands sent this way are idempotent, or sent under a job ID.
    """
    give_up = min(time.monotonic() + _TRY_AGAIN_WITHIN, by)
    try:
        return (yield step)  # type: ignore[no-any-return] # what is sent to a conversation
    except _LOST:
        if time.monotonic() > give_up:
            raise
    return (yield step)  # type: ignore[no-any-return] # what is sent to a conversation


# --- Values in Redis ------------------------------------------------------------------------------


def _envelope(
    task: str,
    job_id: str,
    queue: str,
    kwargs: Mapping[str, object],
    kwargsrepr: str,
    *,
    eta: datetime | None,
    expires_at: datetime | None,
    reply_to: str | None = None,
) -> bytes:
    """Encode a message of Celery's protocol 2, with its body in plain JSON.

    Args:
        task: The task's name.
        job_id: The ID of its result.
        queue: Its queue.
        kwargs: The task's arguments.
        kwargsrepr: The arguments as events and log lines show them; Celery's own would have the
            first thousand characters of the IDs.
        eta: Time before which it is not started.
        expires_at: Time after which it is not started.
        reply_to: The key of the reply to a control request.
    """
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    headers = {
        "lang": "py",
        "task": task,
        "id": job_id,
        "root_id": job_id,
        "parent_id": None,
        "group": None,
        "retries": 0,
        "timelimit": [None, None],
        "eta": eta and eta.isoformat(),
        "expires": expires_at and expires_at.isoformat(),
        "argsrepr": "()",
        "kwargsrepr": kwargsrepr,
        "origin": "interview-access-client",
    }
    envelope = {
        "body": json.dumps([[], kwargs, embed]),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "correlation_id": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "delivery_tag": str(uuid4()),
            "priority": 0,
            **({"reply_to": reply_to} if reply_to else {}),
        },
    }
    return json.dumps(envelope).encode()


def _answer(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stored result, or raise the stored error."""
    if stored["status"] == "SUCCESS":
        return dict(stored["result"])
    error: Any = stored["result"] if isinstance(stored["result"], dict) else {}
    name, message = error.get("exc_type"), error.get("exc_message")
    kind = error_class(name) if error.get("exc_module") == errors.__name__ else None
    match message:
        case [str(sentence), dict(details)] if kind and kind.__name__ == name:
            raise kind(sentence, details)
    reason = message[0] if isinstance(message, list) and message else message
    text = f"{name}: {reason}"
    raise JobFailedError(
        f"The job failed: {shortened(text, quoted=False, at_most=500)}",
        {"exc_type": shortened(str(name), quoted=False)},
    )


def _answer_of(known: JobStatus) -> dict[str, Any]:
    """Return the result in a status, or raise its error."""
    if known.error:
        raise error_class(known.error.type)(known.error.sentence, known.error.details)
    return known.result or {}


def _digest_in(announcement: bytes | None) -> str | None:
    """Read the digest in an announcement, if it has one."""
    try:
        return Announcement.model_validate_json(announcement).digest if announcement else None
    except ValidationError:
        return None  # of a producer that does not follow the contract


def _refuse_other_requests(
    messages: Iterable[GrantMessage], known: Mapping[str, bytes | None]
) -> None:
    """Raise JobIdReusedException if other requests have some of the IDs."""
    refused: list[tuple[GrantMessage, str]] = []
    for message in messages:
        first = _digest_in(known.get(message.key))
        if first and first != message.announcement.digest:
            refused.append((message, first))
    if refused:
        (message, first), *others = refused
        raise JobIdReusedException.of(
            message.job_id,
            first,
            str(message.announcement.digest),
            others=[other.job_id for other, _ in others],
        )


def _shown(value: object) -> str:
    return shortened(value) if isinstance(value, str) else f"<{describe(value)}>"


def _later(now: datetime, seconds: float, name: str) -> datetime:
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(seconds, bool):
            return now + timedelta(seconds=seconds)
    raise ValueError(f"{name}: expected a number of seconds, got {describe(seconds)}")


def _expiry(now: datetime, when: float | datetime) -> datetime:
    if isinstance(when, datetime):
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    return _later(now, when, "expires")


def _reason(error: BaseException) -> str:
    return str(error).rstrip(".") or type(error).__name__
