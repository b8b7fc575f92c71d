"""A snapshot of the queue: what waits, where, for how long, and who works on it.

Two round trips to Redis and one statement of PostgreSQL read it, however long the queue is, so that
it can be read for every scrape of metrics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from interview_access.contracts import QUEUE, Announcement, announcement_key
from kombu.transport.redis import PRIORITY_STEPS
from pydantic import ValidationError
from redis import Redis

from worker.broker.claims import DEAD, PAUSED, PREFIX
from worker.broker.scripts import script
from worker.broker.transport import list_key
from worker.execution.decoding import find_identity
from worker.operations.pause import READ_BYTES, Pause

ISOLATED = f"{PREFIX}isolated"
"""Key of the list of poison candidates; before each message are its origin queue and a NUL."""

_ENDS_BYTES = 64 * 1024  # of each end of a message: its headers are in one of them
_ANNOUNCEMENT_BYTES = 65_536  # that are read: producers may write more
_MOST_SESSIONS = 1_000
_LANE_FIELDS = 4


@dataclass(frozen=True, slots=True)
class WaitingJob:
    """The job that is claimed next from a lane, the oldest one unless jobs were requeued.

    Attributes:
        job_id: Its ID; empty if it cannot be read.
        task: Name of its task; empty likewise.
        size: Bytes of its message.
        sent_at: When it was sent, by its announcement; None if its producer wrote none.
    """

    job_id: str
    task: str
    size: int
    sent_at: datetime | None


@dataclass(frozen=True, slots=True)
class Lane:
    """One list of waiting messages.

    Attributes:
        name: ``priority-0`` is claimed first, unless a job is ``isolated``. ``priority-9`` is also
            where workers put large jobs that others shall pass.
        key: Its key in Redis.
        waiting: Number of messages.
        oldest: The job that is claimed next; None if the lane is empty.
    """

    name: str
    key: str
    waiting: int
    oldest: WaitingJob | None


@dataclass(frozen=True, slots=True)
class Session:
    """A worker session.

    Attributes:
        name: Its random name.
        heartbeats: Number of its heartbeats, one each second or eighth of ``GRANT_LEASE_SECONDS``.
            It grows as long as the worker lives.
        claimed: Number of messages that it has claimed.
        node: Node name of its worker; empty if unknown, as of an earlier release.
    """

    name: str
    heartbeats: int
    claimed: int
    node: str


@dataclass(frozen=True, slots=True)
class DeadLetterTotals:
    """The dead letters.

    Attributes:
        count: Number of dead letters.
        size: Bytes of memory that they take, estimated by Redis; 0 if it does not tell.
        oldest_at: When the oldest was dead-lettered.
    """

    count: int
    size: int
    oldest_at: datetime | None


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """The queue at one moment. All times are timezone-aware.

    Attributes:
        at: The time of Redis.
        pause: Who paused the queue; None if it is not paused.
        lanes: The lists of waiting messages, in the order in which workers claim from them.
        delayed: Number of messages that wait for an ETA or a retry.
        next_due_at: When the first of them is due.
        workers: Number of worker sessions. That of a dead worker counts until its lease expires.
        sessions: The first thousand of them.
        dead_letters: The dead letters.
    """

    at: datetime
    pause: Pause | None
    lanes: tuple[Lane, ...]
    delayed: int
    next_due_at: datetime | None
    workers: int
    sessions: tuple[Session, ...]
    dead_letters: DeadLetterTotals

    @property
    def waiting(self) -> int:
        """Number of messages in all lanes."""
        return sum(lane.waiting for lane in self.lanes)

    @property
    def claimed(self) -> int:
        """Number of messages that the sessions have claimed."""
        return sum(session.claimed for session in self.sessions)

    @property
    def oldest_sent_at(self) -> datetime | None:
        """When the oldest of the lanes' next jobs was sent; None if that is unknown."""
        known = [one.oldest.sent_at for one in self.lanes if one.oldest and one.oldest.sent_at]
        return min(known, default=None)


@dataclass(frozen=True, slots=True)
class MessageCounts:
    """The numbers of messages, and whether workers claim them.

    Attributes:
        lanes: Number of waiting messages by lane, in the order in which workers claim from them.
        delayed: Number of messages that wait for an ETA or a retry.
        dead_letters: Number of dead letters.
        workers: Number of worker sessions. That of a dead worker counts until its lease expires.
        pause: Who paused the queue; None if it is not paused.
    """

    lanes: Mapping[str, int]
    delayed: int
    dead_letters: int
    workers: int
    pause: Pause | None


def lane_keys(queue: str = QUEUE) -> dict[str, str]:
    """Return the keys of a queue's lanes by name, in the order in which workers claim from them."""
    by_priority = {f"priority-{step}": list_key(queue, step) for step in PRIORITY_STEPS}
    return {"isolated": ISOLATED, **by_priority}


def inspect(redis: Redis) -> QueueSnapshot:
    """Read a snapshot of the queue.

    Args:
        redis: Client of the queue's Redis.

    Raises:
        redis.RedisError: if Redis is unavailable or refuses.
    """
    keys = lane_keys()
    reply: Any = redis.register_script(script("inspect_queue"))(
        [PREFIX, *keys.values()], [_ENDS_BYTES, READ_BYTES, _MOST_SESSIONS]
    )
    time, offset, pause, delayed, next_due, dead, dead_size, oldest, workers, sessions = reply[:10]
    lanes = _rows(reply[10:], _LANE_FIELDS)
    identities = [find_identity(first + last) for _, _, first, last in lanes]
    known = announcements(redis, [job_id for job_id, _ in identities if job_id])
    return QueueSnapshot(
        at=_time(float(time)),
        pause=Pause.read(pause),
        lanes=tuple(
            Lane(name, key, waiting, _waiting_job(*identity, size, known) if waiting else None)
            for (name, key), (waiting, size, *_), identity in zip(
                keys.items(), lanes, identities, strict=True
            )
        ),
        delayed=delayed,
        next_due_at=_time(float(next_due) - float(offset or 0)) if next_due else None,
        workers=workers,
        sessions=tuple(_sessions(sessions)),
        dead_letters=DeadLetterTotals(
            dead, dead_size, _time(float(oldest.partition(b"-")[0])) if oldest else None
        ),
    )


def count_messages(redis: Redis) -> MessageCounts:
    """Count messages with commands that read none, for users that may read none.

    Args:
        redis: Client of the queue's Redis.

    Raises:
        redis.RedisError: if Redis is unavailable or refuses.
    """
    keys = lane_keys()
    with redis.pipeline(transaction=False) as pipeline:
        for key in keys.values():
            pipeline.llen(key)
        pipeline.zcard(f"{PREFIX}due")
        pipeline.xlen(DEAD)
        pipeline.zcard(f"{PREFIX}leases")
        pipeline.get(PAUSED)
        *waiting, delayed, dead_letters, workers, pause = pipeline.execute()
    lanes = dict(zip(keys, waiting, strict=True))
    return MessageCounts(lanes, delayed, dead_letters, workers, Pause.read(pause or b""))


def announcements(redis: Redis, job_ids: Sequence[str]) -> dict[str, Announcement]:
    """Read the announcements of jobs, by job ID, in one round trip.

    One that does not follow the contract is left out.

    Args:
        redis: Client of the queue's Redis.
        job_ids: Any job IDs.
    """
    if not job_ids:
        return {}
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in job_ids:
            pipeline.getrange(announcement_key(job_id), 0, _ANNOUNCEMENT_BYTES - 1)
        texts = pipeline.execute()
    found: dict[str, Announcement] = {}
    for job_id, text in zip(job_ids, texts, strict=True):
        with suppress(ValidationError):
            if text:
                found[job_id] = Announcement.model_validate_json(text)
    return found


def _waiting_job(
    job_id: str, task: str, size: int, known: Mapping[str, Announcement]
) -> WaitingJob:
    announced = known.get(job_id)
    sent_at = announced.sent_at if announced else None
    return WaitingJob(job_id, task, size, sent_at and _aware(sent_at))


def _sessions(flat: Sequence[Any]) -> Iterator[Session]:
    for name, heartbeats, claimed, node in _rows(flat, 4):
        yield Session(name.decode(), int(float(heartbeats)), claimed, node.decode(errors="replace"))


def _rows(flat: Sequence[Any], width: int) -> list[Sequence[Any]]:
    return [flat[at : at + width] for at in range(0, len(flat), width)]


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _time(milliseconds: float) -> datetime:
    longest = timedelta(days=366 * 1_000)  # a delay may be longer than Python's years
    return datetime.fromtimestamp(0, UTC) + min(timedelta(milliseconds=milliseconds), longest)
