"""What Redis holds of one person: results, announcements, dead letters, unfinished messages."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from celery.backends.redis import RedisBackend
from interview_access.contracts import ORIGIN_LENGTHS, announcement_key
from interview_access.errors import shortened
from redis import Redis

from tasks.erasure import mentions, names
from worker.broker.claims import PREFIX
from worker.broker.dead_letters import DeadLetter, DeadLetters, decoded
from worker.operations.inspection import ISOLATED, announcements, lane_keys

_PAGE = 20  # messages, of which each may have 7 MB
_ANNOUNCEMENTS = 500  # in one command of Redis
_UNREADABLE = "(unreadable)"
_ARGUMENTS = ("args", "kwargs")  # of a call, such as those that follow a job
_BODY = (*_ARGUMENTS, "embed")  # of Celery's protocol 2


def delete_results(results: RedisBackend, job_ids: Collection[str], user_id: str) -> int:
    """Delete the stored results of jobs that name a user, and return their number.

    Args:
        results: The result backend.
        job_ids: The jobs.
        user_id: The user.

    Raises:
        redis.RedisError: if Redis failed.
    """
    deleted = 0
    for job_id in job_ids:
        key = results.get_key_for_task(job_id)
        with suppress(ValueError):
            if names(json.loads(results.client.get(key) or b"null"), user_id):
                deleted += results.client.delete(key)
    return deleted


def delete_announcements(redis: Redis, job_ids: Collection[str]) -> None:
    """Delete the announcements of jobs, which have their actors and reasons.

    Args:
        redis: Client of the queue's Redis.
        job_ids: The jobs.

    Raises:
        redis.RedisError: if Redis failed.
    """
    keys = map(announcement_key, job_ids)
    while page := [*islice(keys, _ANNOUNCEMENTS)]:
        redis.delete(*page)


def announced_jobs_naming(redis: Redis, user_id: str, jobs: Collection[str]) -> set[str]:
    """Find the jobs whose announcements name a user, and those of a user's jobs that have one.

    An announcement has no ledger row if its message was lost, or is a dead letter.

    Args:
        redis: Client of the queue's Redis.
        user_id: The user.
        jobs: IDs of the user's jobs.

    Returns:
        Their job IDs.

    Raises:
        redis.RedisError: if Redis failed.
    """
    prefix = announcement_key("")
    found: set[str] = set()
    keys = redis.scan_iter(f"{prefix}*", count=_ANNOUNCEMENTS)
    while page := [*islice(keys, _ANNOUNCEMENTS)]:
        job_ids = [key.decode(errors="replace").removeprefix(prefix) for key in page]
        found |= {*jobs}.intersection(job_ids)
        for job_id, known in announcements(redis, job_ids).items():
            if mentions(known.actor, user_id) or mentions(known.reason, user_id):
                found.add(job_id)
    return found


def dead_letters_naming(redis: Redis, user_id: str) -> Iterator[DeadLetter]:
    """Yield the dead letters whose message or reason names a user.

    Args:
        redis: Client of the queue's Redis.
        user_id: The user.

    Raises:
        redis.RedisError: if Redis failed.
    """
    letters = DeadLetters(redis)
    for letter in letters:
        message = letters.message(letter.id) or b""
        if names(letter.reason, user_id) or _is_naming(message, user_id):
            yield letter


def unfinished_jobs_naming(redis: Redis, user_id: str, *, at_most: int) -> Iterator[str]:
    """Yield the job IDs of queued, delayed and running messages that name a user.

    Args:
        redis: Client of the queue's Redis.
        user_id: The user.
        at_most: Number of messages that are read.

    Raises:
        redis.RedisError: if Redis failed.
    """
    for number, message in enumerate(_unfinished(redis)):
        if number >= at_most:
            return
        if _is_naming(message, user_id):
            yield _job_id(message)


def _unfinished(redis: Redis) -> Iterator[bytes]:
    lanes = [key for key in lane_keys().values() if key != ISOLATED]
    for key in (*lanes, ISOLATED):  # this one last: messages move there from the queue
        start = 0
        while page := redis.lrange(key, start, start + _PAGE - 1):
            values: Any = page  # redis-py's types are those of both clients
            yield from map(_message, values) if key == ISOLATED else values
            start += _PAGE
    for name in (f"{PREFIX}deferred".encode(), *redis.scan_iter(f"{PREFIX}held:*")):
        fields: Any = redis.hscan_iter(name, count=_PAGE)
        for _, value in fields:
            yield _message(value)


def _message(value: bytes) -> bytes:
    """Return a message that is stored behind its origin queue and a NUL."""
    return value.partition(b"\0")[2]


def _is_naming(message: bytes, user_id: str) -> bool:
    envelope = decoded(message)
    with suppress(RecursionError):
        if envelope is not None:
            return names(envelope, user_id) or _is_in_fields(envelope, user_id)
    return json.dumps(user_id).encode() in message


def _is_in_fields(envelope: Any, user_id: str) -> bool:
    """Return whether actor, reason or a number in the arguments of a message is a user's."""
    if not isinstance(envelope, dict):
        return False
    headers, body = envelope.get("headers"), envelope.get("body")
    origin = [headers.get(name) for name in ORIGIN_LENGTHS] if isinstance(headers, dict) else []
    if any(mentions(str(one), user_id) for one in origin if isinstance(one, str | int)):
        return True
    calls = dict(zip(_BODY, body, strict=False)) if isinstance(body, list) else body
    return _has_number(calls, user_id)


def _has_number(value: Any, user_id: str, *, is_argument: bool = False) -> bool:
    """Return whether a number in the arguments of a call is a user ID.

    Other numbers of a message are those of retries, priorities and time limits.
    """
    match value:
        case bool():
            return False
        case int():
            return is_argument and str(value) == user_id
        case list():
            return any(_has_number(one, user_id, is_argument=is_argument) for one in value)
        case dict():
            return any(
                _has_number(one, user_id, is_argument=is_argument or name in _ARGUMENTS)
                for name, one in value.items()
            )
        case _:
            return False


def _job_id(message: bytes) -> str:
    with suppress(LookupError, TypeError):
        return shortened(str(decoded(message)["headers"]["id"]), quoted=False)
    return _UNREADABLE
