"""Enqueue jobs: each announcement and its message are written atomically, also under races.

A job ID belongs to the request that was announced first. A transaction that would enqueue another
request under it is refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from pydantic import ValidationError
from redis.exceptions import RedisError, ResponseError, WatchError

from interview_access.contracts import Announcement, result_key
from interview_access.errors import (
    JobIdReusedException,
    QueueUnavailableError,
    StorageUnavailableException,
)
from interview_access.protocol.commands import Commands, Exchange
from interview_access.protocol.limits import LimitsReader
from interview_access.protocol.messages import JobMessage, enqueue_commands
from interview_access.protocol.retrying import (
    LOST_CONNECTION,
    RETRY_WITHIN,
    reason_of,
    replies_to,
)

_BATCH_JOBS, _BATCH_BYTES = 500, 4_000_000  # in one MULTI, which blocks Redis for other clients


def enqueue(message: JobMessage, limits: LimitsReader, *, is_new_id: bool = False) -> Exchange[str]:
    """Enqueue a job.

    Args:
        message: The job's message.
        limits: The workers' limits.
        is_new_id: Whether the ID was generated, so that no other request can have it.

    Returns:
        The job's ID.

    Raises:
        InvalidGrantRequestException: if the job requests more grants than the workers allow.
        JobIdReusedException: if another request has its ID.
        QueueUnavailableError: if Redis did not accept it in time; it might have been queued.
    """
    give_up = time.monotonic() + RETRY_WITHIN
    try:
        yield from limits.check([message.job], by=give_up)
        yield from _send([message], {} if is_new_id else {message.key: None}, give_up)
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"Job {message.job_id} might not have been queued: {reason_of(error)}. "
            "Expected a Redis that can be reached and written to. "
            "Sending the job again under the same ID is safe.",
            {"job_id": message.job_id},
        ) from None
    return message.job_id


def enqueue_many(messages: Sequence[JobMessage], limits: LimitsReader) -> Exchange[list[str]]:
    """Enqueue jobs in batches, after all their IDs were looked up.

    Args:
        messages: In order; a job that is given twice is sent once.
        limits: The workers' limits.

    Returns:
        The jobs' IDs, in step with the messages.

    Raises:
        InvalidGrantRequestException: if a job requests more grants than the workers allow; it names
            the job's position. Nothing was sent.
        JobIdReusedException: if another request has one of the IDs. Nothing was sent, unless it was
            announced during the call.
        QueueUnavailableError: if Redis did not accept all jobs in time. The details of both list
            which jobs were sent.
    """
    each_once = {message.job_id: message for message in messages}
    job_ids = list(each_once)
    batches = list(_batches(each_once.values()))
    sent = under_way = 0
    try:
        known: dict[str, bytes | None] = {}
        if messages:
            by = time.monotonic() + RETRY_WITHIN
            yield from limits.check([message.job for message in messages], by=by, is_many=True)
        for batch in batches:
            known |= yield from _announcements(batch)
        _refuse_other_requests(each_once.values(), known)
        for batch in batches:
            yield from _delete_retryable_results([one for one in batch if known[one.key]])
            under_way = len(batch)
            give_up = time.monotonic() + RETRY_WITHIN
            yield from _send(batch, {one.key: known[one.key] for one in batch}, give_up)
            sent, under_way = sent + under_way, 0
    except JobIdReusedException as error:
        raise error.with_sent_jobs(job_ids, sent=sent) from None
    except (RedisError, OSError) as error:
        raise QueueUnavailableError(
            f"Not all jobs have been queued: {reason_of(error)}. "
            "Expected a Redis that can be reached and written to."
        ).with_sent_jobs(
            job_ids, sent=sent, perhaps_sent=0 if isinstance(error, ResponseError) else under_way
        ) from None
    return [message.job_id for message in messages]


def _batches(messages: Iterable[JobMessage]) -> Iterator[list[JobMessage]]:
    """Partition messages by number and bytes; a message over the limit is a batch of its own."""
    batch: list[JobMessage] = []
    size = 0
    for message in messages:
        size += len(message.envelope)
        if batch and (len(batch) == _BATCH_JOBS or size > _BATCH_BYTES):
            yield batch
            batch, size = [], len(message.envelope)
        batch.append(message)
    if batch:
        yield batch


def _send(
    messages: Sequence[JobMessage], known: Mapping[str, bytes | None], give_up: float
) -> Exchange[None]:
    """Send jobs in one transaction, and retry once if the connection was lost.

    Args:
        messages: Of different jobs.
        known: Expected announcements, by key, of the jobs whose IDs others may have.
        give_up: Monotonic time in seconds after which they are not sent again.
    """
    try:
        yield from _send_if_free(messages, known, give_up)
    except LOST_CONNECTION as lost:
        if time.monotonic() > give_up:
            raise
        # The announcements show whether the first attempt was executed.
        known = {**dict.fromkeys(message.key for message in messages), **known}
        try:
            yield from _send_if_free(messages, known, give_up)
        except (RedisError, OSError) as error:
            raise lost from error


def _send_if_free(
    messages: Sequence[JobMessage], known: Mapping[str, bytes | None], give_up: float
) -> Exchange[None]:
    commands = enqueue_commands(messages)
    announced_by_this_call = {command[1]: command[2] for command in commands if command[0] == "SET"}
    while True:
        try:
            yield Commands(commands, expected=known)
        except WatchError:
            if time.monotonic() > give_up:
                raise
            (texts,) = yield Commands((("MGET", *known),))
            known = dict(zip(known, texts, strict=True))
            if known == announced_by_this_call:
                return  # an attempt before was executed, and its reply was lost
            _refuse_other_requests(messages, known)
            yield from _delete_retryable_results([one for one in messages if known.get(one.key)])
        else:
            return


def _delete_retryable_results(messages: Sequence[JobMessage]) -> Exchange[None]:
    """Delete stored `StorageUnavailableException` results, which are not final, before a resend."""
    keys = [result_key(message.job_id) for message in messages]
    if not keys:
        return
    (results,) = yield Commands((("MGET", *keys),), results=True)
    for key, stored in zip(keys, results, strict=True):
        if stored and StorageUnavailableException.__name__.encode() in stored:
            with suppress(WatchError):  # another state was stored meanwhile
                yield Commands((("DEL", key),), results=True, expected={key: stored})


def _announcements(messages: Sequence[JobMessage]) -> Exchange[dict[str, bytes | None]]:
    """Read the announcements of jobs, by key."""
    keys = [message.key for message in messages]
    (texts,) = yield from replies_to(Commands((("MGET", *keys),)))
    return dict(zip(keys, texts, strict=True))


def _refuse_other_requests(
    messages: Iterable[JobMessage], known: Mapping[str, bytes | None]
) -> None:
    """Raise JobIdReusedException if other requests have some of the IDs."""
    refused: list[tuple[JobMessage, str]] = []
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


def _digest_in(announcement: bytes | None) -> str | None:
    """Read the digest in an announcement; None if it has none, or is not an announcement."""
    try:
        return Announcement.model_validate_json(announcement).digest if announcement else None
    except ValidationError:
        return None  # of a producer that does not follow the contract
