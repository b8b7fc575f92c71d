"""Celery's consumer and the bootsteps that claim, dispatch and stop.

Celery runs the event loop, the prefork pool, remote control and events. Jobs do not pass through
kombu. A separate connection waits until the queue has a message and does not remove it; a script
then claims it. ``BRPOP`` would lose a message whose worker is killed before it reads the reply.

An idle worker waits for the default priority of one queue. The heartbeat, once a second, checks its
other queues, priorities and lanes. While an operator has paused the queue, a worker claims in vain
twice a second: a wait would end at once if the queue has messages.
"""

from __future__ import annotations

import itertools
import time
import warnings
from typing import Any

import kombu
from celery import bootsteps
from celery.utils.log import get_logger
from celery.worker.consumer import Consumer
from celery.worker.consumer.tasks import Tasks
from kombu.transport.redis import PRIORITY_STEPS
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from worker.broker.lease import Lease
from worker.broker.queue_wait import QueueWait, QueueWaitRefusedError
from worker.broker.transport import Protocol, list_key
from worker.execution.dispatch import Dispatcher

logger = get_logger(__name__)

_TICK_SECONDS = 1.0
_WAIT_SECONDS = 10.0  # for a message, in one command
_LOST_SECONDS = _WAIT_SECONDS + 5.0  # after which a wait that got no reply is a lost connection
_NEXT_SECONDS = 0.001  # until the next claim, if there is more to claim
_EMPTY_SECONDS = 0.005  # until the next wait, if another worker has claimed the message
_PAUSED_SECONDS = 0.5  # until the next claim while the queue is paused
_EVENTS_TOGETHER, _EVENTS_SECONDS = 1_000, 0.05
"""Events in one message, and seconds until it is sent. Celery's 24 take a third of the loop."""
_RECONNECT = {"interval_start": 1, "interval_step": 1, "interval_max": 5}
"""Seconds between attempts to reconnect. kombu's back-off grows to 30 s without a claim."""


class _Queues(kombu.Consumer):  # type: ignore[misc] # kombu ships no types
    """The queues that the worker consumes, for remote control; kombu itself consumes nothing."""

    def consume(self, no_ack: bool | None = None) -> None:
        """Consume nothing."""


class JobProtocol(Protocol):
    """Celery's queues and routes, without a kombu consumer."""

    Consumer = _Queues


class JobConsumer(Consumer):  # type: ignore[misc] # Celery ships no types
    """Celery's consumer, which keeps running jobs when it loses its connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Disable gossip: it is unused, and its traffic grows with the number of workers."""
        super().__init__(*args, **(kwargs | {"without_gossip": True}))
        self._events_due = 0.0

    def on_close(self) -> None:
        """Send the buffered events. Celery's own method also drops the pool's jobs."""
        self._flush_events()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        """Log the cause; Celery logs its class, and warns of a setting that is set."""
        logger.warning("connection to Redis lost: error=%s", exc)
        with warnings.catch_warnings(action="ignore", category=PendingDeprecationWarning):
            super().on_connection_error_after_connected(exc)

    def ensure_connected(self, conn: Any) -> Any:
        """Connect, with a shorter back-off than Celery's."""
        connect = conn.ensure_connection

        def ensure_connection(*args: Any, callback: Any = None, **kwargs: Any) -> Any:
            def after_failure() -> None:  # and in each second until the next attempt
                self.app.lease.reconnecting()
                if callback:
                    callback()

            self.app.lease.reconnecting()
            return connect(*args, callback=after_failure, **kwargs, **_RECONNECT)

        conn.ensure_connection = ensure_connection
        return super().ensure_connected(conn)

    def cancel_active_requests(self) -> None:
        """End the grace: Celery calls this at a cold shutdown, before it waits for the pool."""
        if self.app.lease:
            self.app.lease.drain(at_once=True)

    def on_send_event_buffered(self) -> None:
        """Send events together; Celery's own method sends them in each turn of the loop."""
        now = time.monotonic()
        if self.hub and now >= self._events_due:
            self._events_due = now + _EVENTS_SECONDS
            self.hub.call_later(_EVENTS_SECONDS, self._flush_events)


class JobClaims(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
    """Consumer bootstep: waits for messages, claims them and passes them to the dispatcher."""

    requires = (Tasks,)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        settings = consumer.app.settings
        self.lease = consumer.app.lease = Lease(
            ttl=settings.grant_lease_seconds,
            grace=settings.grant_stop_grace,
            node=consumer.hostname,
            batch_size=settings.grant_batch_size,
            max_bytes=consumer.app.limits.message_bytes,
        )
        self._dispatcher = consumer.app.dispatcher = Dispatcher(
            consumer.app, consumer.pool, consumer.hostname, self.lease, consumer.app.limits
        )
        self.lease.on_heartbeat = self._dispatcher.on_heartbeat
        self._consumer = consumer
        self._hub: Any = None
        self._wait: QueueWait | None = None
        self._is_refused = False
        self._refused_until = 0.0
        self._polls_pause = False
        self._turn = itertools.count()

    def start(self, consumer: Any) -> None:
        """Open the session on a new connection."""
        channel = consumer.app.connection_for_read().channel()
        pool = channel.client.connection_pool
        self._wait = QueueWait(pool, is_refused=self._is_refused)
        try:
            self.lease.open(Redis(connection_pool=pool))
        except ResponseError as error:
            raise RedisConnectionError(str(error)) from error
        self._dispatcher.send_event = self._send_event
        self._dispatcher.on_free = self._on_free

    def register_with_event_loop(self, _: Any, hub: Any) -> None:
        """Begin to claim; called when the event loop starts, also after each reconnection."""
        self._hub = hub
        self._polls_pause = False
        dispatcher = self._consumer.event_dispatcher
        if dispatcher:
            dispatcher.buffer_limit = _EVENTS_TOGETHER
        hub.call_repeatedly(_TICK_SECONDS, self._on_tick)
        hub.call_soon(self._pump)

    def stop(self, _: Any) -> None:
        """Disconnect: the consumer stops or reconnects."""
        if self._wait:
            self._wait.close()

    def _send_event(self, kind: str, **fields: object) -> None:
        dispatcher = self._consumer.event_dispatcher
        if dispatcher and dispatcher.enabled:
            dispatcher.send(kind, **fields)

    def _on_free(self) -> None:
        """Schedule a claim on the event loop: callbacks of the pool swallow exceptions."""
        if self._hub and not self.lease.is_draining:
            self._hub.call_soon(self._pump)

    def _on_tick(self) -> None:
        self.lease.loop_turned()
        assert self._wait  # noqa: S101 - set by start()
        if self._wait.is_lost(_LOST_SECONDS):
            raise RedisConnectionError(f"no reply to a wait for {_LOST_SECONDS:.0f} s")
        if self.lease.is_lost:
            seconds = self.lease.seconds_since_renewal
            raise RedisConnectionError(f"the lease was not renewed for {seconds:.1f} s")
        if self._wait.seconds is None or self.lease.has_more or self.lease.is_paused:
            self._pump()

    def _pump(self) -> None:
        """Claim if a pool process is free, otherwise wait for the next message.

        One claim in each turn of the loop: a claim of messages that need no pool process leaves
        all of them free.
        """
        assert self._wait  # noqa: S101 - set by start()
        self.lease.loop_turned()
        is_waiting = self._wait.seconds is not None
        has_seen_some = self.lease.has_more or self.lease.is_paused or self._lane_waits
        if (has_seen_some or not is_waiting) and self._may_claim():
            self._claim()
            if self.lease.is_paused:
                self._poll_pause()
            elif self.lease.has_more:
                # call_soon runs after the next poll, which may take until the next timer.
                self._hub.call_later(_NEXT_SECONDS, self._pump)
            elif self._wait.seconds is None:
                self._start_wait(self._wait)

    def _poll_pause(self) -> None:
        """Schedule the next claim of a paused queue, which ends the pause or finds it again."""
        if not self._polls_pause:
            self._polls_pause = True
            self._hub.call_later(_PAUSED_SECONDS, self._on_pause_polled)

    def _on_pause_polled(self) -> None:
        self._polls_pause = False
        self._pump()

    def _may_claim(self) -> bool:
        return self._dispatcher.free_processes > 0 and self.lease.may_claim()

    @property
    def _lane_waits(self) -> bool:
        return self.lease.may_claim_from_lane(self._dispatcher.processes)

    @property
    def _queues(self) -> list[str]:
        return [queue.name for queue in self._consumer.task_consumer.queues]

    def _claim(self) -> int:
        """Claim and dispatch. Returns how many messages were claimed."""
        queues = self._queues
        keys = [list_key(queue, priority) for priority in PRIORITY_STEPS for queue in queues]
        with self.lease.lock:  # a heartbeat requeues what is claimed and not dispatched
            try:
                deliveries = self.lease.claim(
                    keys,
                    len(queues),
                    self._dispatcher.processes,
                    self._dispatcher.free_processes,
                )
            except ResponseError as error:
                raise RedisConnectionError(str(error)) from error
            if deliveries is None:
                raise RedisConnectionError("the lease was lost; the worker begins another session")
            self._dispatcher.dispatch(deliveries)
        return len(deliveries)

    def _start_wait(self, wait: QueueWait) -> None:
        queues = self._queues
        if time.monotonic() < self._refused_until or not queues:
            return  # until the next tick
        queue = queues[next(self._turn) % len(queues)]
        # Each of several queues is waited for within one tick.
        seconds = _WAIT_SECONDS if len(queues) == 1 else _TICK_SECONDS / len(queues)
        connection = wait.start(queue, seconds)
        self._hub.add_reader(connection, self._on_readable, connection, wait)

    def _on_readable(self, connection: Any, wait: QueueWait) -> None:
        self.lease.loop_turned()
        self._hub.remove_reader(connection)  # before read() may close it
        try:
            has_message = wait.read()
        except QueueWaitRefusedError as error:
            if not self._is_refused:
                logger.warning(
                    "Redis refuses to wait for jobs, polling once a second: error=%s", error
                )
            has_message, self._is_refused = False, True
            self._refused_until = time.monotonic() + _TICK_SECONDS
        else:
            if self._is_refused and not wait.is_refused:
                logger.info("Redis permits waiting for jobs again")
                self._is_refused = False
        if has_message is None:
            self._hub.add_reader(connection, self._on_readable, connection, wait)
            return
        if not self._may_claim():
            return  # until a pool process is free, or the next tick
        claimed = self._claim() if has_message or self._is_refused else 0
        if self.lease.is_paused:
            self._poll_pause()
        elif self.lease.has_more or self._lane_waits:
            self._pump()
        elif has_message and not claimed:  # it was claimed meanwhile
            self._hub.call_later(_EMPTY_SECONDS, self._pump)
        else:
            self._start_wait(wait)


class Drain(bootsteps.StartStopStep):  # type: ignore[misc] # Celery ships no types
    """Worker bootstep: begins the grace of a graceful shutdown.

    ``control shutdown`` and SIGHUP do not send Celery's signal ``worker_shutting_down``.
    """

    def close(self, worker: Any) -> None:
        """Stop claiming: the worker has been asked to stop."""
        if worker.app.lease:
            worker.app.lease.drain()
