"""A worker session: the lease on this process's claims, their settlement, and the shutdown.

A main process has one lease. It outlives a lost connection: running jobs continue while the worker
reconnects. The effect of a job does not depend on it. If a lease expires too early, a job runs
twice, and the ledger in PostgreSQL gives both runs the same result.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from queue import Empty, SimpleQueue
from typing import TypeVar
from uuid import uuid4

from billiard.process import active_children
from celery.utils.log import get_logger
from interview_access.errors import shortened
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError, ResponseError

from worker.broker.claim_policy import BATCH_BYTES, SMALL_BYTES, ClaimPolicy
from worker.broker.claims import Action, Claims, Disposition, Heartbeat
from worker.broker.delivery import Delivery, State

T = TypeVar("T")

logger = get_logger(__name__)

_LONGEST_PAUSE = 1.0
"""Seconds between two heartbeats at most: they also enforce time limits and requeue delayed
messages."""

_HEARTBEATS = 8
"""Heartbeats in one lease TTL."""

_EXPIRED_AFTER = 2
"""Lease TTLs without a heartbeat after which a session's messages are requeued."""

_SILENT_LOOP_SECONDS = 120.0
"""Seconds without an iteration of the event loop after which the lease is not renewed."""

_EXIT_SECONDS = 2.0
"""Seconds in which the main process ends by itself after its pool processes were killed."""

_NOT_RENEWED = "lease cannot be renewed: error=%s"
"""The log line of a failure of a heartbeat after which the worker reconnects."""

_NOT_RENEWED_SECONDS = 3.0  # of failed heartbeats, after which the worker reconnects


class Lease:
    """The session of this process and the table of its deliveries. Thread-safe."""

    def __init__(
        self,
        *,
        ttl: float,
        grace: float,
        node: str = "",
        batch_size: int = 1,
        max_bytes: int = 2**53,
        orphaned_after: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Send nothing to Redis before :meth:`open`.

        Args:
            ttl: Seconds. A dead worker's messages are requeued about two TTLs after its death.
            grace: Seconds that running jobs have to finish when the worker stops.
            node: The worker's name, for logs and operators.
            batch_size: Small messages in one claim.
            max_bytes: Size of a message above which only its two ends are read.
            orphaned_after: Seconds after which a delivery without owner is requeued.
            clock: Seconds of this process's monotonic clock.
        """
        self.on_heartbeat: Callable[[], object] = lambda: None
        """Called at each heartbeat by the lease's thread, also while Redis is unreachable."""
        self._deliveries: dict[str, Delivery] = {}
        self.policy = ClaimPolicy(self._all, clock)
        self._batch_size = batch_size
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._grace = grace
        self._node = node
        self._orphaned_after = orphaned_after
        self._clock = clock
        self._claims: Claims | None = None
        self._client: Redis | None = None
        self._sessions: list[str] = []  # the last is current; others until they are taken over
        self._server: str | None = None
        self._next_tag = 1
        self._queues: Sequence[str] = ()
        self.has_more = False
        """Whether another claim may find messages: the last one did not read the queues to their
        ends, or a heartbeat has found some since."""
        self.is_paused = False
        """Whether the last claim found the queue paused."""
        self._seen_pause = b""  # as the last heartbeat has read it
        self.lock = threading.RLock()
        """Held while deliveries change their owner."""
        self._thread: threading.Thread | None = None
        self._wake_up: SimpleQueue[None] = SimpleQueue()  # an Event deadlocks in nested handlers
        self._closed = False
        self._drained_by: float | None = None
        self._loop_turned = self._clock()
        self._observed: dict[str, tuple[float, float]] = {}
        """By session of another worker: its heartbeat counter, and when it was first observed."""
        self._observed_at = 0.0
        self._expired: dict[str, tuple[str, int]] = {}
        """By session that is being taken over: its node name, and its claims before."""
        self._failures: dict[str, tuple[Exception, float]] = {}
        """By log line: the first of the consecutive errors of a heartbeat's step, and when."""
        self._was_loop_stuck = False
        self._renewed_at = -inf
        self._reconnecting_at = -inf
        self.losses = 0
        """Sessions of this worker that expired: others requeued their claims."""
        self.takeovers = 0
        """Expired sessions of others whose messages this worker has requeued."""

    @property
    def _session(self) -> str:
        if len(self._sessions) != 1:
            raise RedisConnectionError("there is no session: the worker has not reconnected yet")
        return self._sessions[0]

    # --- Claiming -------------------------------------------------------------------------------

    def open(self, client: Redis) -> None:
        """Begin a session, or after a lost connection another one that keeps the deliveries.

        Claims whose reply was lost are requeued, as are deliveries not yet dispatched. A late
        command on the old connection has no effect, because its session has ended.

        Args:
            client: Without retries: a claim that is sent twice claims twice.
        """
        with self.lock:
            self._client, self._claims = client, Claims(client)
            self._open()
            self._failures.clear()
        self.loop_turned()
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
            self._thread.start()

    def _open(self) -> None:
        assert self._client is not None and self._claims is not None  # noqa: S101, PT018 - set by open()
        session = uuid4().hex
        self._sessions.append(session)
        server = str(self._client.info("server")["run_id"])
        kept = self._claims.open(session, self._sessions[:-1], self._deliveries, node=self._node)
        logger.info("worker session opened: session=%s node=%s", session, self._node)
        lost = self._deliveries.keys() - kept
        for tag in lost:
            if self._server not in {None, server}:
                # A restarted server or a promoted replica may have lost both the claim and the
                # message. A duplicate delivery is harmless.
                self._put_back(self._deliveries[tag])
            del self._deliveries[tag]
        if lost:
            logger.warning("claims lost, their jobs are redelivered: deliveries=%d", len(lost))
        self._sessions = [session]
        self._server = server
        self._renewed_at = self._clock()
        self._requeue_claimed()

    def _put_back(self, delivery: Delivery) -> None:
        """Requeue a message of which Redis may have lost every copy, if this process has it all."""
        assert self._claims is not None  # noqa: S101 - set by open()
        claim = delivery.claim
        if len(claim.message) == claim.size:
            self._claims.put(claim.queue, claim.message)

    def claim(
        self, queues: Sequence[str], lanes: int, processes: int, free: int = 1
    ) -> list[Delivery] | None:
        """Claim small messages for the free pool processes, or large ones for one of them.

        The last free pool process executes a large job only if no small job is queued.

        Args:
            queues: See :meth:`worker.broker.claims.Claims.claim`, as for ``lanes``.
            lanes: Likewise.
            processes: Pool processes, including busy ones.
            free: Free pool processes.

        Returns:
            The deliveries, or None if the lease is lost.

        Raises:
            RedisError: if the reply was lost: unknown messages may be claimed, call :meth:`open`.
        """
        with self.lock:
            self.has_more = False
            if not self.may_claim():
                return []
            self._queues = queues
            policy = self.policy
            room = 1 if policy.breaker.is_probing else self._batch_size
            largest = policy.largest(processes)
            claim = partial(self._claim, queues, lanes=lanes, room=room, size=BATCH_BYTES * free)
            read_lanes = policy.reads_lanes(largest)
            if largest > SMALL_BYTES and policy.is_last_free(processes):
                deliveries = claim(largest=SMALL_BYTES, read_lanes=read_lanes)
                if deliveries is None or deliveries or self.has_more:
                    return deliveries
            return claim(largest=largest, read_lanes=read_lanes)

    def _claim(
        self,
        queues: Sequence[str],
        *,
        lanes: int,
        room: int,
        size: int,
        largest: int,
        read_lanes: bool,
    ) -> list[Delivery] | None:
        first, self._next_tag = self._next_tag, self._next_tag + room
        assert self._claims is not None  # noqa: S101 - set by open()
        claimed = self._claims.claim(
            self._session,
            queues,
            first_tag=first,
            room=room,
            size=size,
            small=SMALL_BYTES,
            largest=largest,
            large_size=BATCH_BYTES,
            lanes=lanes,
            read_lanes=read_lanes,
            isolated_room=self.policy.isolated_room(largest),
            max_bytes=self._max_bytes,
        )
        if claimed is None:
            return None
        self.has_more, self.is_paused = claimed.has_more, claimed.is_paused
        deliveries = [Delivery(claim, self._clock()) for claim in claimed.claims]
        self.policy.record(claimed, deliveries, largest=largest, read_lanes=read_lanes)
        self._deliveries.update((one.claim.tag, one) for one in deliveries)
        return deliveries

    def _all(self) -> list[Delivery]:
        return list(self._deliveries.values())  # in one step: the lease's thread removes some

    def may_claim_from_lane(self, processes: int) -> bool:
        """Report whether a message in a low-priority lane, or an isolated one, may be claimed.

        Args:
            processes: Pool processes, including busy ones.
        """
        return self.policy.may_claim_from_lane(processes) and self.may_claim()

    def may_claim(self) -> bool:
        """Report whether this worker may claim more."""
        return not (self._closed or self.is_draining) and self.policy.may_claim

    @property
    def is_lost(self) -> bool:
        """Whether to reconnect: Redis is no longer the primary, or heartbeats have failed."""
        failure = self._failures.get(_NOT_RENEWED)
        if failure is None or self.is_draining:
            return False
        error, since = failure
        return isinstance(error, ReadOnlyError) or self._clock() > since + _NOT_RENEWED_SECONDS

    def loop_turned(self) -> None:
        """Record an iteration of the event loop."""
        self._loop_turned = self._clock()

    def reconnecting(self) -> None:
        """Record that the main thread waits for Redis, without an event loop."""
        self._reconnecting_at = self._clock()

    # --- Monitoring -----------------------------------------------------------------------------

    @property
    def is_held(self) -> bool:
        """Whether Redis has confirmed the lease within its TTL, and not refused it since."""
        is_recent = self.seconds_since_renewal < self._ttl
        return is_recent and not self._closed and _NOT_RENEWED not in self._failures

    @property
    def seconds_since_renewal(self) -> float:
        """Seconds since Redis has confirmed the lease; infinite before :meth:`open`."""
        return self._clock() - self._renewed_at

    @property
    def loop_seconds(self) -> float:
        """Seconds since the last iteration of the event loop."""
        return self._clock() - self._loop_turned

    @property
    def main_thread_seconds(self) -> float:
        """Seconds since the main thread was seen: in its event loop, or waiting for Redis."""
        return self._clock() - max(self._loop_turned, self._reconnecting_at)

    @property
    def claims(self) -> tuple[int, float]:
        """Number of this worker's claimed messages, and seconds since the oldest was claimed."""
        claimed = [one.claimed_at for one in self._all()]
        return len(claimed), self._clock() - min(claimed) if claimed else 0.0

    # --- Settling -------------------------------------------------------------------------------

    def settle(self, dispositions: Mapping[str, Disposition]) -> None:
        """Apply dispositions, later if Redis is unreachable. Each has effect once.

        Args:
            dispositions: By delivery tag.
        """
        with self.lock:
            for tag, disposition in dispositions.items():
                delivery = self._deliveries.get(tag)
                if delivery:
                    delivery.settle(disposition)
            try:
                self._send_settled()
            except RedisError as error:
                logger.warning("settlements delayed, Redis is unavailable: error=%s", error)

    def _send_settled(self) -> None:
        settled = {  # the oldest last: the last requeued message is claimed next
            tag: one.disposition
            for tag, one in reversed(self._deliveries.items())
            if one.state is State.SETTLED and one.disposition
        }
        if settled:
            assert self._claims is not None  # noqa: S101 - set by open()
            self._claims.settle(self._session, settled)
            for tag in settled:
                del self._deliveries[tag]

    # --- Stopping -------------------------------------------------------------------------------

    @property
    def is_draining(self) -> bool:
        """Whether the worker stops: it claims nothing and counts no attempts."""
        return self._drained_by is not None

    def drain(self, *, at_once: bool = False) -> None:
        """Stop claiming; running jobs may finish within the grace.

        May be called in a signal handler, and repeatedly: the first call starts the grace.

        Args:
            at_once: End the grace now.
        """
        if self._drained_by is None or at_once:
            self._drained_by = self._clock() + (0 if at_once else self._grace)
            self._wake_up.put(None)

    def close(self) -> None:
        """End the session: requeue what is still claimed."""
        with self.lock:
            if self._closed or not self._sessions:
                return
            self._closed = True
            self._wake_up.put(None)
            try:
                if len(self._sessions) > 1:  # the last reconnection failed
                    self._open()
                self._send_settled()
                assert self._claims is not None  # noqa: S101 - set by open()
                self._claims.close(self._session)
            except RedisError as error:
                logger.warning("jobs are requeued when the lease expires: error=%s", error)
            self._deliveries.clear()

    def _end(self) -> None:
        """Force the shutdown: requeue unfinished jobs, kill the pool and exit."""
        logger.warning(
            "grace over, running jobs are requeued: deliveries=%d", len(self._deliveries)
        )
        self.close()
        for process in active_children():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        # Celery ends the main process, and after SIGHUP restarts it, once the pool has ended.
        time.sleep(_EXIT_SECONDS)
        os._exit(0)

    # --- The heartbeat thread -------------------------------------------------------------------

    def _pause(self) -> float:
        """Return the seconds until the next heartbeat or the end of the grace."""
        pause = min(self._ttl / _HEARTBEATS, _LONGEST_PAUSE)
        if self._drained_by is not None:
            pause = min(pause, max(self._drained_by - self._clock(), 0.0))
        return pause

    def _keep(self) -> None:
        while not self._closed:
            with suppress(Empty):
                self._wake_up.get(timeout=self._pause())
            if self._drained_by is not None and self._clock() >= self._drained_by:
                self._end()
            self._beat()

    def _beat(self) -> None:
        """Enforce time limits, renew the lease, and do the work that a heartbeat finds.

        Without this thread the lease expires, so no error ends it.
        """
        self._attempt("time limits cannot be enforced: error=%s", self.on_heartbeat)
        heartbeat = self._attempt(_NOT_RENEWED, self._renew)
        if heartbeat:
            by = self._clock() + self._ttl / _HEARTBEATS
            if heartbeat.has_messages:
                self._attempt(
                    "due messages cannot be requeued: error=%s", lambda: self._requeue_due(by)
                )
            self._attempt(
                "expired leases cannot be taken over: error=%s",
                lambda: self._take_over_expired(heartbeat.sessions, by),
            )

    def _attempt(self, failure: str, step: Callable[[], T]) -> T | None:
        """Call a step of the heartbeat, and log the first of its consecutive errors.

        Args:
            failure: The log line of its errors.
            step: The step.

        Returns:
            What the step returns, or None if it failed.
        """
        try:
            result = step()
        except Exception as error:
            is_known = isinstance(error, RedisError | OSError)
            is_lost = is_known and not isinstance(error, ResponseError)
            if is_lost or failure == _NOT_RENEWED:
                # Redis may have stalled: earlier observations of other leases are void.
                self._observed.clear()
            if failure not in self._failures:
                logger.warning(failure, error, exc_info=not is_known)
                self._failures[failure] = error, self._clock()
            return None
        self._failures.pop(failure, None)
        return result

    def _renew(self) -> Heartbeat | None:
        """Renew the lease, unless it is to expire, and apply the dispositions that are left."""
        with self.lock:
            if self._closed or self._claims is None or self._is_loop_stuck():
                return None
            heartbeat = [self._claims.heartbeat(name, self._queues) for name in self._sessions][-1]
            if heartbeat.alive and len(self._sessions) == 1:
                self._renewed_at = self._clock()
                self._reconcile(heartbeat)
            else:
                self.losses += not heartbeat.alive
                self._open()
            if self.is_draining:
                self._requeue_claimed()
            self._send_settled()
        self._log_pause(heartbeat.pause)
        return heartbeat

    def _log_pause(self, pause: bytes) -> None:
        """Log the beginning and the end of a pause, once each."""
        if pause and pause != self._seen_pause:
            text = shortened(pause.decode(errors="replace"), quoted=False, at_most=500)
            logger.warning("queue paused, running jobs finish: pause=%s", text)
        elif self._seen_pause and not pause:
            logger.warning("queue resumed")
        self._seen_pause = pause

    def _is_loop_stuck(self) -> bool:
        seconds = self._clock() - self._loop_turned
        is_stuck = not self.is_draining and seconds > _SILENT_LOOP_SECONDS
        if is_stuck and not self._was_loop_stuck:
            logger.error("event loop stuck, the lease is not renewed: seconds=%.0f", seconds)
        self._was_loop_stuck = is_stuck
        return is_stuck

    def _requeue_due(self, by: float) -> None:
        """Requeue delayed messages that are due, until that time at most."""
        self.has_more = True
        assert self._claims is not None  # noqa: S101 - set by open()
        while self._claims.wake() and self._clock() < by:
            pass

    def _requeue_claimed(self) -> None:
        claimed = [one for one in self._all() if one.state is State.CLAIMED]
        for delivery in claimed:
            delivery.settle(Disposition(Action.REQUEUE))
        self._send_settled()

    def _reconcile(self, heartbeat: Heartbeat) -> None:
        """Requeue deliveries without owner: a defect lost each of them and is contained here."""
        assert self._claims is not None  # noqa: S101 - set by open()
        before = self._clock() - self._orphaned_after
        for delivery in self._all():
            if delivery.claimed_at < before and not delivery.has_owner:
                logger.error(
                    "delivery without owner is requeued: "
                    "tag=%s state=%s attempts=%d job=%r task=%r",
                    *_named(delivery),
                )
                # A dispatched job may be lost each time: its attempts are limited.
                is_dispatched = delivery.state is State.DISPATCHED
                action = Action.FAILED_ATTEMPT if is_dispatched else Action.REQUEUE
                delivery.settle(Disposition(action))
        if heartbeat.claimed == len(self._deliveries):
            return
        tags = self._claims.claimed_tags(self._session)
        if unknown := tags - self._deliveries.keys():
            logger.error("claims without delivery are requeued: count=%d", len(unknown))
            requeue = Disposition(Action.REQUEUE)
            self._claims.settle(self._session, dict.fromkeys(unknown, requeue))
        for tag in self._deliveries.keys() - tags:
            delivery = self._deliveries[tag]
            if delivery.state is not State.SETTLED:  # else the reply to its settlement was lost
                logger.error(
                    "claim lost, its message is requeued: "
                    "tag=%s state=%s attempts=%d job=%r task=%r",
                    *_named(delivery),
                )
                self._put_back(delivery)
            del self._deliveries[tag]

    def _take_over_expired(self, sessions: Mapping[str, float], by: float) -> None:
        """Requeue the messages of sessions whose heartbeat counter has not changed for two TTLs.

        Time is that of this process's monotonic clock. After a stall of Redis or of this host every
        counter appears unchanged, so observations before such a gap are discarded.
        """
        assert self._claims is not None  # noqa: S101 - set by open()
        now = self._clock()
        if now - self._observed_at > self._ttl / 2:
            self._observed.clear()
        self._observed_at = now
        self._observed = {
            name: self._observed[name]
            if name in self._observed and self._observed[name][0] == counter
            else (counter, now)
            for name, counter in sessions.items()
            if name not in self._sessions
        }
        for name in self._expired.keys() - self._observed.keys():
            del self._expired[name]  # another worker has taken it over
        for name, (counter, since) in self._observed.items():
            if now - since < _EXPIRED_AFTER * self._ttl:
                continue
            if name not in self._expired:
                self._expired[name] = self._claims.describe(name)
            while (more := self._claims.take_over(name, counter)) > 0 and self._clock() < by:
                pass
            if more > 0:
                continue
            node, claimed = self._expired.pop(name)
            if more == 0:
                self.takeovers += 1
                logger.warning(
                    "lease expired, its jobs are requeued: session=%s node=%s deliveries=%d",
                    *(name, node, claimed),
                )


def _named(delivery: Delivery) -> tuple[object, ...]:
    """Return the values of a delivery's log line."""
    state, attempts = delivery.state.value, delivery.claim.attempts
    return delivery.claim.tag, state, attempts, delivery.job_id, delivery.task
