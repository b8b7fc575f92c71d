"""Claims: which worker session has claimed which message of a queue in Redis.

At any moment a message is in exactly one place: its queue, one session's claims, the delayed
messages, the isolated ones, or the dead letters. One script makes each move, so that no crash and
no lost reply leaves half of it. A script that moves a claimed message has no effect unless the
caller's session still has the claim. This module does not depend on Celery and parses no message.

Keys, beside the queues that producers write:

- ``leases``: sorted set, worker session by its heartbeat counter
- ``nodes``: hash, worker session to the node name of its worker, for logs and operators only
- ``held:SESSION``: hash, the claims of a session: delivery tag to origin queue, NUL and the message
- ``deferred`` and ``due``: delayed messages, and the time (ms) at which each is due
- ``isolated``: list of poison candidates (messages with attempts), each with its origin queue
- ``tries``: hash, digest of a message to its attempts that ended a pool process or a worker
- ``deferrals``: hash, digest of a message to its retries
- ``counted``: sorted set, digest of a message to the time (s) when it was last counted in either
- ``dead``: stream of the dead letters
- ``dropped``: hash, number of dead letters deleted for their ``age`` and for the limit of ``bytes``
- ``clock``: hash, the time (ms) when messages were last delayed or checked, and the sum of the
  steps by which the server's clock was set back
- ``job:ID``: the announcement that a producer wrote with a job's message
- ``database``: the database of the worker that started last
- ``paused``: who paused the queue, when and why; while it exists nothing is claimed
- ``replies`` and ``relay``: of the control service and the outbox relay

``held``, ``deferred``, ``tries`` and ``deferrals`` are names of earlier releases.

No script compares times of sessions: workers observe heartbeat counters. Scripts that move several
messages end after 4 MiB and report that there is more, so that Redis serves other clients; the
script that settles does not. All have the flag ``allow-oom``: a full Redis refuses every other
command that moves a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

from interview_access.contracts import KEY_PREFIX
from redis import Redis
from redis.exceptions import NoPermissionError, OutOfMemoryError, ResponseError

from worker.broker.scripts import claims_script

PREFIX = KEY_PREFIX
"""Prefix of every key of this protocol."""

DEAD = f"{PREFIX}dead"
"""The stream of dead letters.

Fields: job_id, task, reason, in_ledger, time, attempts, size, queue, message."""

PAUSED = f"{PREFIX}paused"
"""Key of the pause of an operator (``worker/operations/pause.py``)."""

ANY_SIZE = 2**53

ANNOUNCEMENT_SECONDS = 86_400
"""Seconds for which a job's announcement is kept after the job, as long as its result."""

_PAUSE_BYTES = 1_024  # that are read of a pause


class Claim(NamedTuple):
    """One message that a session has claimed.

    Attributes:
        tag: Its delivery tag: a number of this process, as text.
        queue: Key of the list that it came from.
        message: Its bytes as the producer wrote them; the two ends of a message over the limit.
        size: Bytes of the whole message.
        attempts: Attempts that ended the pool process or the worker.
        retries: Retries of its job.
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
        large_wait: Whether large messages are in a low-priority lane.
        isolated: Number of isolated messages.
        has_more: Whether the next claim may take more: the queues were not read to their ends, or
            messages were moved to a lane.
        is_paused: Whether an operator has paused the queue; nothing was claimed then.
    """

    claims: list[Claim]
    large_wait: bool
    isolated: int
    has_more: bool = False
    is_paused: bool = False


class Heartbeat(NamedTuple):
    """The state of the queues when a session renews its lease.

    Attributes:
        alive: Whether the session has its lease; if not, its claims were requeued.
        has_messages: Whether any are queued, delayed, isolated or claimed by the session, or
            might be, because the queue is paused.
        claimed: Number of messages that the session has claimed.
        sessions: Heartbeat counters of all sessions.
        pause: The pause of an operator as it is stored; empty if there is none.
    """

    alive: bool
    has_messages: bool
    claimed: int
    sessions: dict[str, float]
    pause: bytes = b""


class Action(StrEnum):
    """What is done with a delivery's message."""

    ACKNOWLEDGE = "acknowledge"
    """Remove it: its result is stored."""
    REQUEUE = "requeue"
    """Requeue it without counting it."""
    DELAY = "delay"
    """Requeue it after the delay without counting it."""
    RETRY = "retry"
    """Requeue it after the delay and count a retry."""
    FAILED_ATTEMPT = "failed-attempt"
    """Isolate it after the delay and count an attempt that ended its pool process."""
    DEAD_LETTER = "dead-letter"
    """Move it to the dead letters."""


@dataclass(frozen=True, slots=True)
class Disposition:
    """How one delivery is settled.

    Attributes:
        delay: Seconds, for the actions that have one.
        job_id: ID of its job, if it has one.
        task: Name of its task, for a dead letter.
        reason: Why it is a dead letter.
        in_ledger: For a dead letter, whether the ledger has its job's outcome; None if the ledger
            was not queried.
        attempts: For a dead letter, the number of its job's executions.
    """

    action: Action
    delay: float = 0.0
    job_id: str = ""
    task: str = ""
    reason: str = ""
    in_ledger: bool | None = None
    attempts: int = 0


class Claims:
    """The scripts as typed methods. No script is retried. Each method raises redis.RedisError.

    A *session* is one worker process on one connection, identified by a random name. A delivery tag
    is valid only together with the session that claimed it.
    """

    def __init__(self, client: Redis, *, prefix: str = PREFIX) -> None:
        """Connect at the first call.

        Args:
            client: A client without retries: a claim that is sent twice claims twice.
            prefix: Prefix of the keys.
        """
        self._client = client
        self._prefix = prefix
        self._pause: tuple[str, ...] = (f"{prefix}paused",)

        def script(name: str) -> Any:
            return client.register_script(claims_script(name))

        self._open = script("open")
        self._renew = script("renew")
        self._claim = script("claim")
        self._settle = script("settle")
        self._wake = script("wake")
        self._take_over = script("take_over")
        self._close = script("close")
        self._put = script("put")
        self._prune = script("prune")
        self._requeue_dead_letter = script("requeue_dead_letter")

    def open(
        self,
        session: str,
        formers: Sequence[str] = (),
        wanted: Iterable[str] = (),
        *,
        node: str = "",
    ) -> set[str]:
        """Begin a session, and transfer claims of this process's former sessions to it.

        Other claims of theirs, such as those whose reply was lost, are requeued without counting an
        attempt. Late commands of a former session have no effect.

        Args:
            session: The new session.
            formers: The former sessions.
            wanted: Delivery tags to transfer.
            node: Node name of its worker.

        Returns:
            The wanted tags that are still claimed.
        """
        arguments = (session, node, len(formers), *formers, *wanted)
        while (reply := self._run(self._open, *arguments))[0]:
            pass
        return {tag.decode() for tag in reply[1:]}

    def heartbeat(self, session: str, queues: Sequence[str] = ()) -> Heartbeat:
        """Renew the lease of a session that was not taken over, and look for messages.

        Args:
            session: The session.
            queues: Keys of the lists to check.
        """
        leases, held = f"{self._prefix}leases", f"{self._prefix}held:{session}"
        others = f"{self._prefix}due", f"{self._prefix}isolated"
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(leases, {session: 1}, xx=True, incr=True)
            pipeline.zrange(leases, 0, -1, withscores=True)
            pipeline.exists(held, *others, *queues, *self._pause)
            counter, sessions, found = pipeline.execute(raise_on_error=False)
        if self._pause and isinstance(found, NoPermissionError):
            self._pause = ()  # its user may not read this key
            return self.heartbeat(session, queues)
        if isinstance(counter, OutOfMemoryError):  # a script may write on a full server
            counter = self._run(self._renew, session)
        for reply in counter, sessions, found:
            if isinstance(reply, Exception):
                raise reply
        counters = {name.decode(): float(score) for name, score in sessions}
        claimed: Any = 0
        pause: Any = b""
        if found:
            with self._client.pipeline(transaction=False) as pipeline:
                pipeline.hlen(held)
                for key in self._pause:
                    pipeline.getrange(key, 0, _PAUSE_BYTES - 1)
                claimed, pause = [*pipeline.execute(raise_on_error=False), b""][:2]
        if isinstance(claimed, Exception):
            raise claimed
        if isinstance(pause, ResponseError):  # a key of another type pauses, too
            pause = str(pause).encode()
        return Heartbeat(counter is not None, bool(found), claimed, counters, pause)

    def claimed_tags(self, session: str) -> set[str]:
        """Return the delivery tags of a session's claims, as stored in Redis."""
        tags: Any = self._client.hkeys(f"{self._prefix}held:{session}")
        return {tag.decode() for tag in tags}

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
            queues: Keys of lists by priority, the most urgent first; within a priority one list of
                each queue.
            first_tag: Number of the first delivery tag; others follow. This process must not have
                used them before.
            room: Messages at most.
            size: Bytes after which no more is claimed.
            small: Bytes of the largest small message. Small and large ones are never claimed
                together.
            largest: Bytes of the largest message that is claimed. Larger ones are moved to the
                low-priority lane of their queue, so that others pass them. Large messages of that
                lane are claimed first.
            large_size: Bytes of large messages that are claimed together; the first one may be
                larger.
            lanes: Number of queues: the last list of each is its low-priority lane.
            read_lanes: Whether to claim from these lanes.
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
        if reply == b"paused":
            return Claimed([], large_wait=False, isolated=0, is_paused=True)
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
        """Apply dispositions. One for a delivery that is not claimed has no effect.

        Args:
            session: The session that has claimed the deliveries.
            dispositions: By delivery tag.
        """
        fields = (
            (
                *(tag, one.action.value, round(one.delay * 1000), one.job_id, one.task),
                *(one.reason, "" if one.in_ledger is None else int(one.in_ledger), one.attempts),
            )
            for tag, one in dispositions.items()
        )
        self._run(self._settle, session, ANNOUNCEMENT_SECONDS, *chain.from_iterable(fields))

    def wake(self) -> bool:
        """Requeue delayed messages that are due. Returns whether more are due."""
        return bool(self._run(self._wake))

    def take_over(self, session: str, counter: float) -> int:
        """Requeue the claims of a session whose heartbeat counter has not changed.

        An attempt of each message is counted: its worker ended while it was claimed.

        Args:
            session: The session.
            counter: Its heartbeat counter, as observed.

        Returns:
            1 if it has more claims, 0 if not, -1 if the counter has changed or the session ended.
        """
        return int(self._run(self._take_over, session, counter))

    def describe(self, session: str) -> tuple[str, int]:
        """Return the node name of a session's worker, empty if unknown, and its claims' number."""
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.hget(f"{self._prefix}nodes", session)
            pipeline.hlen(f"{self._prefix}held:{session}")
            node, claimed = pipeline.execute(raise_on_error=False)
        if isinstance(claimed, Exception):
            raise claimed
        return (node.decode(errors="replace") if isinstance(node, bytes) else ""), claimed

    def close(self, session: str) -> None:
        """End a session: requeue its claims without counting an attempt."""
        while self._run(self._close, session):
            pass

    def put(self, queue: str, message: bytes) -> None:
        """Put a message at the consuming end of a queue, also on a full Redis."""
        self._run(self._put, queue.encode() + b"\0" + message)

    def requeue_dead_letters(self, letters: Sequence[tuple[str, str]]) -> list[bool]:
        """Move dead letters to their origin queues, with their attempts and retries reset.

        Args:
            letters: Of each its ID in the stream, and the queue if it names none.

        Returns:
            For each whether it existed.
        """
        with self._client.pipeline(transaction=False) as pipeline:
            for letter in letters:
                self._requeue_dead_letter(keys=(self._prefix,), args=letter, client=pipeline)
            return list(map(bool, pipeline.execute()))

    def prune(self, *, dead_letter_seconds: int | None, dead_letter_bytes: int) -> Sequence[int]:
        """Delete a page of old dead letters, of those over a limit, and of old counts.

        Args:
            dead_letter_seconds: Seconds to keep a dead letter; None: forever.
            dead_letter_bytes: Memory of all dead letters at most, in bytes.

        Returns:
            1 if there may be more to delete, otherwise 0; the number of dead letters deleted for
            their age; that for the limit of bytes.
        """
        seconds = -1 if dead_letter_seconds is None else dead_letter_seconds
        pruned: Sequence[int] = self._run(self._prune, seconds, dead_letter_bytes)
        return pruned

    def _run(self, script: Any, *arguments: object, queues: Sequence[str] = ()) -> Any:
        return script(keys=(self._prefix, *queues), args=arguments)
