"""What a client says to Redis, in which order, and how it reads what comes back.

Knows no connection: each conversation is a generator that yields commands or pauses, and is sent
the replies, so that the blocking client and the asyncio one say the very same. The envelope is
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
"""For how long an id is known of a job that no worker begins."""

_LOST = LostConnectionError, SilenceError, OSError  # whether Redis did as it was told is not known
_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.25  # seconds between two looks at a result
_PAUSE_GROWTH = 1.1  # so that a look comes late by a tenth of the time waited, at most
_ASK_SECONDS = 5.0  # between two questions to the workers while nothing is stored
_LAST_ASK_SECONDS = 1.0  # before the end of a wait in which they were not asked yet
_CANCEL_PAUSE = 0.2  # seconds between two looks at a job that is to stop
_TRY_AGAIN_WITHIN = 4.0  # seconds: a try that begins later could end after the 10 s that we promise
_JOBS_AT_ONCE, _BYTES_AT_ONCE = 500, 4_000_000  # in one MULTI: others wait for Redis meanwhile


@dataclass(frozen=True, slots=True)
class Commands:
    """Redis commands of one round trip, in one MULTI where there are several.

    Attributes:
        results: Whether for the server of the results, and not that of the queue.
        provided: Keys, and the value (None: no value) that each must have until they are done;
            they are not done, and WatchError is thrown, where one has another.
    """

    commands: tuple[tuple[Any, ...], ...]
    results: bool = False
    provided: Mapping[str, bytes | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pause:
    """Seconds to let pass."""

    seconds: float


Conversation = Generator[Commands | Pause, Any, T]
"""Yields what is to be done, is sent the list of replies, and returns what came of it.

What Redis raises is thrown into it; it leaves as an error of this package.
"""


@dataclass(frozen=True, slots=True)
class GrantMessage:
    """A grant-access job, ready to be sent.

    Attributes:
        is_new: Whether its id was made for it, so that no other request can have it.
        envelope: The bytes that a worker takes off the queue.
        announcement: What makes its id known.
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
        """The message that asks for one user's access to interviews, not judged.

        Args:
            user_id: 1 to 36 characters.
            interview_ids: UUIDs.
            job_id: 1 to 255 printable characters; a random UUID without one.
            countdown: Seconds before which it is not begun.
            expires: Seconds, or a datetime (UTC where it has no zone), after which it is not begun.

        Raises:
            ValueError: the job id, the countdown or the expiry is none.
            InvalidGrantRequestException: an argument cannot be written as JSON.
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
        """The message that asks for many users' access to each of many interviews, likewise."""
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
        told = ", ".join(f"{name}={_shown(value)}" for name, value in kwargs.items())
        try:
            envelope = _envelope(task, job_id, QUEUE, kwargs, told, eta=eta, expires_at=expires_at)
            digest = unreadable_request_digest(task, (), kwargs)
        except (TypeError, ValueError, RecursionError):
            request = GrantAccessRequest if task == GRANT_ACCESS else GrantCohortAccessRequest
            request.read((), kwargs)  # names what JSON has no word for
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
        """Where it is announced."""
        return announcement_key(self.job_id)

    @property
    def commands(self) -> tuple[tuple[Any, ...], ...]:
        """Announce the job, unless its id is known, and enqueue it: for one MULTI."""
        known = self.announcement
        delay = known.eta - known.sent_at if known.eta else timedelta()
        kept = max(delay, timedelta()) + timedelta(days=ANNOUNCED_DAYS)
        text = known.model_dump_json(exclude_none=True).encode()
        return (
            ("SET", self.key, text, "NX", "EX", int(kept.total_seconds())),
            ("LPUSH", QUEUE, self.envelope),
        )


def grant_messages(jobs: Iterable[object]) -> Iterator[GrantMessage]:
    """The messages of many jobs, in step with them; one job given twice has one message.

    Raises:
        ValueError: as GrantMessage.of, naming the job by its position.
        InvalidGrantRequestException: likewise; or it is no GrantJob, or has another request's id.
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
    """Where in Redis a job is announced; beside its queue."""
    return f"interview-access:job:{job_id}"


def result_key(job_id: str) -> str:
    """Where in Redis Celery stores a job's state and result."""
    return f"celery-task-meta-{job_id}"


def reply_key(request_id: str) -> str:
    """Name the key of the reply to a control request, on the server of the queue."""
    return f"interview-access:reply:{request_id}"


def _check_job_id(job_id: object) -> None:
    if not is_job_id(job_id):
        raise ValueError(f"job id: expected {JOB_ID_RULE}, got {describe(job_id)}")


# --- Conversations ------------------------------------------------------------------------------


def enqueue(message: GrantMessage) -> Conversation[str]:
    """Send the job, but not under an id that is known of another request."""
    try:
        yield from _send([message], {} if message.is_new else {message.key: None})
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"Job {message.job_id} may not be queued: Redis did not take it ({_reason(error)}). "
            "Expected a Redis that can be reached and written to. "
            "Sending the job again under the same id is safe.",
            {"job_id": message.job_id},
        ) from error
    return message.job_id


def enqueue_many(messages: Sequence[GrantMessage]) -> Conversation[list[str]]:
    """Send jobs, none of them where an id is known of another request.

    What fails on the way, also an id that another takes meanwhile, tells which were sent.
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
            f"Not all jobs are queued: Redis did not take them ({_reason(error)}). "
            "Expected a Redis that can be reached and written to."
        ).with_account(
            job_ids, sent=sent, perhaps_sent=0 if isinstance(error, ResponseError) else under_way
        ) from error
    return [message.job_id for message in messages]


def _batches(messages: Iterable[GrantMessage]) -> Iterator[list[GrantMessage]]:
    """As many as are sent at once; a message that is larger than that by itself goes alone."""
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
    """Send jobs, all or none, where no other request has an id of theirs, whoever else tries.

    Args:
        messages: Of different jobs.
        known: Of each whose id others may have, by its key: the announcement that seems to stand.
    """
    give_up = time.monotonic() + _TRY_AGAIN_WITHIN
    try:
        yield from _send_where_free(messages, known, give_up)
    except _LOST as lost:
        if time.monotonic() > give_up:
            raise
        # By what is announced the second try sees whether the first came through.
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
                raise error.__context__ from None  # redis-py has this word for it while it watches
            if time.monotonic() > give_up:
                raise
            (texts,) = yield Commands((("MGET", *known),))
            known = dict(zip(known, texts, strict=True))
            if known == ours:
                return  # a try before came through, and only its answer was lost
            _refuse_other_requests(messages, known)
            yield from _forget_undone([one for one in messages if known.get(one.key)])
        else:
            return


def _forget_undone(messages: Sequence[GrantMessage]) -> Conversation[None]:
    """Forget that a job was given up, which is no answer: it is sent again, to be done."""
    keys = [result_key(message.job_id) for message in messages]
    if not keys:
        return
    (results,) = yield Commands((("MGET", *keys),), results=True)
    for key, stored in zip(keys, results, strict=True):
        if stored and StorageUnavailableException.__name__.encode() in stored:
            with suppress(WatchError):  # another state stands there by now
                yield Commands((("DEL", key),), results=True, provided={key: stored})


def _announced(messages: Sequence[GrantMessage]) -> Conversation[dict[str, bytes | None]]:
    """What is known of the ids, by their keys."""
    keys = [message.key for message in messages]
    (texts,) = yield from _replies(Commands((("MGET", *keys),)))
    return dict(zip(keys, texts, strict=True))


def result(
    job_id: str, *, timeout: float, on_progress: Callable[[JobProgress], None] | None
) -> Conversation[dict[str, Any]]:
    """Poll a job's result until it stands, or the time is over.

    Where nothing is stored of the job the workers are asked, at once if it was not even announced:
    a result that Redis has dropped is in the ledger.
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
            with suppress(ValidationError):  # of a task that is none of ours
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
                f"Job {job_id} had no answer within {timeout:g} s ({so_far}). "
                "It may still run: poll it again by its id.",
                {"job_id": job_id, "state": state},
            )
        yield Pause(min(pause, left))
        pause = min(_PAUSE_GROWTH * pause, _LONGEST_PAUSE)


def status(job_id: str, *, timeout: float) -> Conversation[JobStatus]:
    """Ask the workers what is known of a job."""
    _check_job_id(job_id)
    return (yield from _ask(JOB_STATUS, job_id, timeout))


def cancel(job_id: str, *, timeout: float) -> Conversation[JobStatus]:
    """Have a job cancelled, and wait until it has stopped, or finished before it could be."""
    _check_job_id(job_id)
    deadline = time.monotonic() + timeout
    known = yield from _ask(CANCEL_JOB, job_id, timeout)
    while known.state == "running" and deadline - time.monotonic() > _CANCEL_PAUSE:
        yield Pause(_CANCEL_PAUSE)
        try:
            known = yield from _ask(CANCEL_JOB, job_id, max(deadline - time.monotonic(), 0))
        except NoAnswerInTimeError:
            break  # it was asked to stop all the same
    return known


def _known(job_id: str, *, timeout: float) -> Conversation[JobStatus | None]:
    """What the workers know of a job, where one answers."""
    try:
        return (yield from _ask(JOB_STATUS, job_id, timeout))
    except QueueUnavailableError as error:
        if not isinstance(error.__cause__, ResponseError):
            raise  # to look once more would take as long again
    except InterviewAccessError:
        pass
    return None  # a Redis that takes no questions, being full, may still get results


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
            f"The workers cannot be asked about job {job_id}: Redis says: {_reason(error)}. "
            "Expected a Redis that can be reached and written to. Asking again is safe.",
            {"job_id": job_id},
        ) from error
    raise NoAnswerInTimeError(
        f"No worker answered about job {job_id} within {timeout:g} s. Expected a worker that runs "
        "on this Redis: only a worker can report a job's state. Ask again.",
        {"job_id": job_id},
    )


def _look(job_id: str, *, by: float) -> Conversation[tuple[dict[str, Any] | None, bool]]:
    """What is stored of a job's result, and whether the job is announced."""
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
            "The job itself is not touched by this: poll it again.",
            {"job_id": job_id},
        ) from error
    return None, bool(announced)


def _replies(step: Commands, *, by: float = inf) -> Conversation[list[Any]]:
    """The replies, after a second try where the first lost its connection and there is time ``by``.

    What was done twice takes effect once: by the job's id, or by what it asks.
    """
    give_up = min(time.monotonic() + _TRY_AGAIN_WITHIN, by)
    try:
        return (yield step)  # type: ignore[no-any-return] # what is sent to a conversation
    except _LOST:
        if time.monotonic() > give_up:
            raise
    return (yield step)  # type: ignore[no-any-return] # what is sent to a conversation


# --- What stands in Redis -------------------------------------------------------------------------


def _envelope(
    task: str,
    job_id: str,
    queue: str,
    kwargs: Mapping[str, object],
    told: str,
    *,
    eta: datetime | None,
    expires_at: datetime | None,
    reply_to: str | None = None,
) -> bytes:
    """A message of Celery's, version 2, with its body in plain JSON.

    Args:
        task: The task's name.
        job_id: What its result is stored under.
        queue: Where it is put.
        kwargs: The task's arguments.
        told: The arguments for people: Celery's own would carry the first thousand characters of
            ids into every event and log.
        eta: Not before.
        expires_at: Not after.
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
        "kwargsrepr": told,
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
    """The result that Celery stored, or its error, raised."""
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
    """The result that the ledger holds, or its error, raised."""
    if known.error:
        raise error_class(known.error.type)(known.error.sentence, known.error.details)
    return known.result or {}


def _digest_in(announcement: bytes | None) -> str | None:
    """The digest of an announced request, where it is told."""
    try:
        return Announcement.model_validate_json(announcement).digest if announcement else None
    except ValidationError:
        return None  # a foreign producer's, and none of the contract's


def _refuse_other_requests(
    messages: Iterable[GrantMessage], known: Mapping[str, bytes | None]
) -> None:
    """Raise where ids are known of other requests."""
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
