"""The queue's protocol in Redis: which worker session has claimed which message.

At any moment a message's bytes are in exactly one place: its queue, one session's claims, the
delayed messages, the isolated ones, or the dead letters. Each move is one script, so that no crash
and no lost reply can separate its halves. A script that moves a claimed message does nothing unless
the caller still has it claimed. This module knows nothing of Celery and never parses a message.

Keys, beside the queues that kombu's producers write:

- ``leases``: sorted set, worker session by its heartbeat counter
- ``held:SESSION``: hash, delivery tag to origin queue, NUL and the message
- ``deferred`` and ``due``: delayed messages, and the time (ms) at which each is due
- ``isolated``: list of poison candidates, each with its origin queue: messages with attempts
- ``tries``: hash, digest of a message to its attempts, those that ended its pool process or worker
- ``deferrals``: hash, digest of a message to its retries, those that its job asked for
- ``dead``: stream of the dead letters
- ``clock``: hash, the time (ms) when messages were last delayed or checked, and the sum of the
  steps by which the server's clock was set back
- ``job:ID``: the announcement that a producer wrote with a job's message

No script judges a session by a clock: observers compare heartbeat counters. Scripts that move
several messages stop after ``_BYTES_PER_SCRIPT`` and report that there is more, so that Redis
serves others in between. All carry the flag ``allow-oom``: a full server refuses every other way of
taking a message off a queue and keeping it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import OutOfMemoryError

from worker.broker.scripts import claims_script

PREFIX = "interview-access:"
"""Prefix of every key of this protocol."""

DEAD = f"{PREFIX}dead"
"""The stream of dead letters.

Fields: job_id, task, reason, in_ledger, time, attempts, size, queue, message."""

ANY_SIZE = 2**53

_ANNOUNCEMENT_SECONDS = 86_400
"""How long a job's announcement outlives the job: as long as its result."""


class Claim(NamedTuple):
    """One message that a session has claimed.

    Attributes:
        tag: Its delivery tag: a number of this process, as text.
        queue: Key of the list that it came from.
        message: Its bytes, as the producer wrote them; of a message over the limit its two ends.
        size: Of the whole message in bytes.
        attempts: How often it ended its pool process or its worker.
        retries: How often its job asked for a retry.
    """

    tag: str
    queue: str
    message: bytes
    size: int
    attempts: int
    retries: int


class Claimed(NamedTuple):
    """What a claim returned.

    Attributes:
        claims: The messages, now claimed by the session.
        large_wait: Whether large messages wait in the low-priority lane.
        isolated: Poison candidates that wait.
        has_more: Whether a next claim may take more: the queues were not read to their ends, or
            messages were moved to a lane.
    """

    claims: list[Claim]
    large_wait: bool
    isolated: int
    has_more: bool = False


class Heartbeat(NamedTuple):
    """What a session learns when it renews its lease.

    Attributes:
        alive: False if the lease was lost: what the session had claimed was requeued.
        has_messages: Whether any are queued, delayed, isolated or claimed by the session.
        claimed: How many messages the session has claimed.
        sessions: All sessions, each with its heartbeat counter.
    """

    alive: bool
    has_messages: bool
    claimed: int
    sessions: dict[str, float]


class Action(StrEnum):
    """What becomes of a delivery's message."""

    ACKNOWLEDGE = "acknowledge"
    """Remove it: its result is stored."""
    REQUEUE = "requeue"
    """Put it back on its queue, uncounted."""
    DELAY = "delay"
    """Put it back on its queue after the delay, uncounted."""
    RETRY = "retry"
    """Put it back on its queue after the delay, counted as a retry."""
    FAILED_ATTEMPT = "failed-attempt"
    """Isolate it after the delay, counted as an attempt that ended its pool process."""
    DEAD_LETTER = "dead-letter"
    """Move it to the dead letters."""


@dataclass(frozen=True, slots=True)
class Disposition:
    """How one delivery is settled.

    Attributes:
        delay: Seconds, for the actions that have one.
        job_id: Of its job, where it has one.
        task: Name of its task, for a dead letter.
        reason: Why it is a dead letter.
        in_ledger: For a dead letter, whether the ledger holds its job's final result; None if the
            ledger was not queried.
        attempts: For a dead letter, how often its job was executed.
    """

    action: Action
    delay: float = 0.0
    job_id: str = ""
    task: str = ""
    reason: str = ""
    in_ledger: bool | None = None
    attempts: int = 0


class Claims:
    """The scripts, typed. Each raises what redis-py raises; none is sent twice.

    A *session* is one worker process on one connection, identified by a random name. A delivery tag
    is valid only together with the session that claimed it.
    """

    def __init__(self, client: Redis, *, prefix: str = PREFIX) -> None:
        """Connects at the first call.

        Args:
            client: Without retries: a claim that is sent twice claims twice.
            prefix: Of the keys.
        """
        self._client = client
        self._prefix = prefix

        def script(name: str) -> Any:
            return client.register_script(claims_script(name))

        self._open = script("open")
        self._renew = script("renew")
        self._claimed_tags = script("claimed_tags")
        self._claim = script("claim")
        self._settle = script("settle")
        self._wake = script("wake")
        self._take_over = script("take_over")
        self._close = script("close")
        self._put = script("put")
        self._requeue_dead_letter = script("requeue_dead_letter")

    def open(
        self, session: str, formers: Sequence[str] = (), wanted: Iterable[str] = ()
    ) -> set[str]:
        """Begin a session, and take over the claims of this process's former sessions.

        Claims that are not wanted are requeued, uncounted: those whose reply was lost, above all.
        What a former session still sends has no effect.

        Returns:
            The tags among the wanted ones that are still claimed.
        """
        arguments = (session, len(formers), *formers, *wanted)
        while (reply := self._run(self._open, *arguments))[0]:
            pass
        return {tag.decode() for tag in reply[1:]}

    def heartbeat(self, session: str, queues: Sequence[str] = ()) -> Heartbeat:
        """Renew a lease that was not taken over, late or not, and look for messages.

        Args:
            session: The session.
            queues: Keys of lists.
        """
        leases, held = f"{self._prefix}leases", f"{self._prefix}held:{session}"
        others = f"{self._prefix}due", f"{self._prefix}isolated"
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(leases, {session: 1}, xx=True, incr=True)
            pipeline.zrange(leases, 0, -1, withscores=True)
            pipeline.exists(held, *others, *queues)
            counter, sessions, found = pipeline.execute(raise_on_error=False)
        if isinstance(counter, OutOfMemoryError):  # a script may write on a full server
            counter = self._run(self._renew, session)
        for reply in counter, sessions, found:
            if isinstance(reply, Exception):
                raise reply
        counters = {name.decode(): float(score) for name, score in sessions}
        claimed: Any = self._client.hlen(held) if found else 0
        return Heartbeat(counter is not None, bool(found), claimed, counters)

    def claimed_tags(self, session: str) -> set[str]:
        """The tags of all that a session has claimed, as Redis knows it."""
        return {tag.decode() for tag in self._run(self._claimed_tags, session)}

    def claim(
        self,
        session: str,
        queues: Sequence[str],
        *,
        first_tag: int,
        room: int,
        size: int,
        small: int = ANY_SIZE,
        largest: int = ANY_SIZE,
        large_size: int = 0,
        lanes: int = 1,
        read_lanes: bool = True,
        isolated_room: int = 1,
        max_bytes: int = ANY_SIZE,
    ) -> Claimed | None:
        """Move messages from queues to a session's claims.

        Args:
            session: The session.
            queues: Keys of lists, the most urgent first, those of the several queues in turn.
            first_tag: Number of the first delivery; the others follow. Never used before by this
                process.
            room: Messages at most.
            size: Bytes after which no more is claimed.
            small: Size in bytes up to which a message is small; larger ones have claims of their
                own.
            largest: Bytes of the largest message that is claimed. Larger ones are moved to the
                low-priority lane, so that others pass them; the large ones of that lane come first.
            large_size: Bytes up to which large messages are claimed together; the first may be
                larger.
            lanes: Number of queues: the last list of each is its low-priority lane.
            read_lanes: Whether to claim from these lanes at all.
            isolated_room: Poison candidates at most, 0 or 1.
            max_bytes: Bytes of a message above which only its two ends are returned.

        Returns:
            The claims, or None if the lease is lost.
        """
        reply = self._run(
            self._claim,
            *(session, room, size, small, largest, lanes, int(read_lanes)),
            *(isolated_room, first_tag, max_bytes, large_size),
            queues=tuple(queues),
        )
        if reply is None:
            return None
        claims = []
        for at in range(3, len(reply), 6):
            tag, queue, message, size, attempts, retries = reply[at : at + 6]
            if size and not message:
                message = self._fetch(session, tag.decode())
            if message is None:
                return None
            claims.append(
                Claim(tag.decode(), queue.decode(), message, size, int(attempts), int(retries))
            )
        return Claimed(claims, bool(reply[0]), int(reply[1]), bool(reply[2]))

    def _fetch(self, session: str, tag: str) -> bytes | None:
        """Read a claimed message that a claim's reply omits; None if the lease is lost."""
        value: Any = self._client.hget(self._prefix + f"held:{session}", tag)
        return None if value is None else bytes(value.partition(b"\0")[2])

    def settle(self, session: str, dispositions: Mapping[str, Disposition]) -> None:
        """Apply dispositions, by delivery tag. One whose delivery is not claimed has no effect."""
        fields = (
            (
                *(tag, one.action.value, round(one.delay * 1000), one.job_id, one.task),
                *(one.reason, "" if one.in_ledger is None else int(one.in_ledger), one.attempts),
            )
            for tag, one in dispositions.items()
        )
        self._run(self._settle, session, _ANNOUNCEMENT_SECONDS, *chain.from_iterable(fields))

    def wake(self) -> bool:
        """Put delayed messages that are due back on their queues. Returns whether more are due."""
        return bool(self._run(self._wake))

    def take_over(self, session: str, counter: float) -> int:
        """Requeue what a session has claimed whose heartbeat counter is still ``counter``.

        Each message counts an attempt: its worker ended while it was claimed.

        Returns:
            1 if there is more, 0 if not, -1 if the session is alive or was taken over already.
        """
        return int(self._run(self._take_over, session, counter))

    def close(self, session: str) -> None:
        """End a session: all that it has claimed is requeued, uncounted."""
        while self._run(self._close, session):
            pass

    def put(self, queue: str, message: bytes) -> None:
        """Put a message at the consuming end of a queue, on a full server too."""
        self._run(self._put, queue.encode() + b"\0" + message)

    def requeue_dead_letter(self, letter_id: str, queue: str) -> int:
        """Move a dead letter to its origin queue, or to ``queue`` if it names none.

        Its attempts and retries start anew. Returns 0 if there is no such letter.
        """
        return int(self._run(self._requeue_dead_letter, letter_id, queue))

    def _run(self, script: Any, *arguments: object, queues: Sequence[str] = ()) -> Any:
        return script(keys=(self._prefix, *queues), args=arguments)
