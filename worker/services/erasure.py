"""What Redis holds of one person: results, announcements, dead letters, unfinished messages."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import Any

from celery.backends.redis import RedisBackend
from interview_access.contracts import QUEUE, announcement_key
from interview_access.errors import shortened
from redis import Redis

from tasks.erasure import names
from worker.broker.claims import PREFIX
from worker.broker.dead_letters import DeadLetter, DeadLetters, decoded

_PRIORITIES = ("", "\x06\x163", "\x06\x166", "\x06\x169")
_PAGE = 20  # messages, of which each may have 7 MB
_UNREADABLE = "(unreadable)"


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
    """Delete the announcements of finished jobs, which have their actors and reasons.

    Args:
        redis: Client of the queue's Redis.
        job_ids: The jobs.

    Raises:
        redis.RedisError: if Redis failed.
    """
    if job_ids:
        redis.delete(*map(announcement_key, job_ids))


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
    for key in (*(QUEUE + priority for priority in _PRIORITIES), f"{PREFIX}isolated"):
        start = 0
        while page := redis.lrange(key, start, start + _PAGE - 1):
            yield from page  # type: ignore[misc] # redis-py's types are those of both clients
            start += _PAGE
    for name in (f"{PREFIX}deferred".encode(), *redis.scan_iter(f"{PREFIX}held:*")):
        fields: Any = redis.hscan_iter(name, count=_PAGE)
        for _, value in fields:
            yield value.partition(b"\0")[2]


def _is_naming(message: bytes, user_id: str) -> bool:
    envelope = decoded(message)
    if envelope is None:
        return json.dumps(user_id).encode() in message
    return names(envelope, user_id)


def _job_id(message: bytes) -> str:
    with suppress(LookupError, TypeError):
        return shortened(str(decoded(message)["headers"]["id"]), quoted=False)
    return _UNREADABLE
