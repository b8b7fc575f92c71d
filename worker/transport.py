"""Celery's Redis transport, made lossless: no message is ever in a worker's memory only.

kombu pops a message and notes it as unacknowledged afterwards, counts from then on a clock that
nobody renews, and takes what it cannot read for an error of its own. Here a message is claimed,
acknowledged and given back by the scripts of :mod:`worker.claims`, under the lease of
:mod:`worker.lease`. What is changed of kombu, and what breaks without it:

- ``Channel.basic_consume`` opens the lease, or takes it over after a reconnect. Only consumers that
  acknowledge are changed: control messages and their replies go kombu's own way.
- ``Channel._brpop_start`` waits with ``BLMOVE queue queue``, which moves nothing. ``BRPOP`` has the
  message in the reply alone: a worker killed before it reads that loses it.
- ``Channel._brpop_read`` claims after the wait, also where the wait was refused (Redis full), and
  buries what is no message. kombu's own ends the worker over one bad message, and each in turn.
- ``QoS`` keeps nothing in Redis: kombu's ``unacked`` keys are shared with stock workers, and their
  ``visibility_timeout`` would run a long job twice.
- ``Channel._queue_bind`` goes without where Redis is full, and waits where it is read-only. kombu's
  own ends the worker in both, when it starts or reconnects: a full queue is drained by nobody.
- ``Transport.register_with_event_loop`` tells the lease that the main loop comes round, and looks
  after large messages: all children but one may have one, and those that are met while they do
  stand aside, as of the lowest priority, so that small ones pass them.

An idle worker is woken by the default priority of one queue at a time; at its other queues and
priorities it looks once a second. So a message of another priority, or on one of several queues,
waits for a second at most where nothing else goes on, for the price of a script a second; one of
the lowest priority for two while a large one stands aside.
"""

from __future__ import annotations

import inspect
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any, ClassVar

from celery.utils.log import get_logger
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from worker.claims import Claim
from worker.lease import Lease

logger = get_logger(__name__)

_WAIT_SECONDS = 1.0
_EMPTY_REST_SECONDS = 0.05  # where others were quicker, or the message at hand must wait
_REFUSED_REST_SECONDS = 1.0
_UNLIMITED_ROOM = 100  # messages in one claim of a consumer that set itself no limit

_LEASE_OPTIONS = ("lease_seconds", "attempt_limit", "stop_grace", "batch_size")

_SEAMS = {
    kombu_redis.Channel: {
        "_brpop_start": ["self", "timeout"],
        "_brpop_read": ["self", "options"],
        "basic_consume": ["self", "queue", "args", "kwargs"],
        "_q_for_pri": ["self", "queue", "pri"],
        "_queue_bind": ["self", "exchange", "routing_key", "pattern", "queue"],
        "_flush_brpop_reauth": ["self"],
        "_get_pool": ["self", "asynchronous"],
    },
    kombu_redis.QoS: {
        "append": ["self", "message", "delivery_tag"],
        "ack": ["self", "delivery_tag"],
        "reject": ["self", "delivery_tag", "requeue"],
        "restore_visible": ["self", "start", "num", "interval"],
        "restore_unacked_once": ["self", "stderr"],
        "can_consume": ["self"],
    },
    kombu_redis.Transport: {"register_with_event_loop": ["self", "connection", "loop"]},
    kombu_redis.MultiChannelPoller: {"_register_BRPOP": ["self", "channel"]},
}


def missing_seam() -> str | None:
    """What of kombu this transport stands on that the installed one does not have, if anything."""
    for owner, methods in _SEAMS.items():
        for name, wanted in methods.items():
            method = getattr(owner, name, None)
            got = list(inspect.signature(method).parameters) if method else None
            if got != wanted:
                return f"kombu's {owner.__name__}.{name}({', '.join(wanted)})"
    return None


class _Process:
    """The lease of this process; a child that was forked off has none."""

    lease: Lease | None = None
    channel: Any = None  # by which it consumes
    pid = 0


def lease_of_this_process() -> Lease | None:
    """The lease, where this process consumes jobs."""
    return _Process.lease if _Process.pid == os.getpid() else None


class QoS(kombu_redis.QoS):  # type: ignore[misc] # kombu ships no types
    """Counts what is in hand; Redis knows by the claims."""

    def append(self, message: Any, delivery_tag: str) -> None:
        """Nothing to note in Redis: the message was claimed before it came here."""
        if lease_of_this_process() is None:
            super().append(message, delivery_tag)
        else:
            virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Done with, by whichever connection it came."""
        lease = lease_of_this_process()
        if lease is None:
            super().ack(delivery_tag)
        else:
            lease.acknowledge({delivery_tag: ""})
            self.settled(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Back to its queue, or to the dead letters: nothing is thrown away."""
        lease = lease_of_this_process()
        if lease is None:
            super().reject(delivery_tag, requeue=requeue)
            return
        if requeue:
            lease.give_back(delivery_tag)
        else:
            lease.bury(delivery_tag, "It was rejected without a reason.")
        self.settled(delivery_tag)

    def settled(self, delivery_tag: str) -> None:
        """The lease was told what becomes of a message; it is in hand no more."""
        virtual.QoS.ack(self, delivery_tag)

    def can_consume(self) -> bool:
        """Not while the lease wants no more: draining, resting, or with a suspect in hand."""
        lease = self.channel.lease
        if lease is None:
            return bool(super().can_consume())
        return bool(lease.may_claim()) and self.room() > 0

    def room(self) -> int:
        """How many children's work more may be in hand; that of lost connections is, too."""
        return int(self.children) - int(self.channel.lease.in_hand)

    @property
    def children(self) -> int:
        """How many children there are to give work to."""
        return int(self.prefetch_count or _UNLIMITED_ROOM)

    def restore_visible(self, *args: object, **kwargs: object) -> None:
        """Leaves the jobs of stock workers, by whose clock they are restored, alone."""

    def restore_unacked_once(self, stderr: object = None) -> None:  # noqa: ARG002 - kombu's name
        """What is held outlives its connection: the lease gives back what has not begun."""
        self._on_collect.cancel()


class _Lossless:
    """What a channel does otherwise than kombu's."""

    QoS = QoS
    lease: Lease | None = None
    lease_seconds = 8.0
    attempt_limit = 5
    stop_grace = 25.0
    batch_size = 1
    from_transport_options: ClassVar[tuple[str, ...]]
    _rest_until = 0.0
    _refused = False

    def basic_consume(self: Any, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        """Consume, under the lease where messages are acknowledged."""
        if not no_ack and self.lease is None:
            self._open_lease()
        return super().basic_consume(queue, no_ack, *args, **kwargs)  # type: ignore[misc]

    def _queue_bind(self: Any, exchange: str, *args: Any) -> None:
        """Kombu's own: where the answers to remote commands go."""
        with _refusal_is_loss():
            try:
                super()._queue_bind(exchange, *args)  # type: ignore[misc]
            except OutOfMemoryError as error:
                logger.warning("Redis is full, and remote commands may have no answer: %s", error)

    def _open_lease(self: Any) -> None:
        lease = lease_of_this_process()
        if lease is None:
            lease = Lease(
                Redis(connection_pool=self._get_pool()),
                seconds=self.lease_seconds,
                attempt_limit=self.attempt_limit,
                grace=self.stop_grace,
                batch_size=self.batch_size,
            )
            _Process.lease, _Process.pid = lease, os.getpid()
        with _refusal_is_loss():
            lease.open()
        self.lease = lease
        _Process.channel = self

    def _brpop_start(self: Any, timeout: float | None = None) -> None:
        if self.lease is None:
            super()._brpop_start(timeout)  # type: ignore[misc]
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or time.monotonic() < self._rest_until:
            return
        queue = queues[0]
        self._queue_cycle.rotate(queue)
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = time.monotonic()
        wait = _WAIT_SECONDS / len(queues)
        connection.send_command("BLMOVE", queue, queue, "RIGHT", "RIGHT", wait)

    def _brpop_read(self: Any, **options: Any) -> bool:
        if self.lease is None:
            return bool(super()._brpop_read(**options))  # type: ignore[misc]
        connection, seen = self.client.connection, True
        try:
            seen = self.client.parse_response(connection, "BLMOVE", **options) is not None
        except ReadOnlyError as error:
            connection.disconnect()
            raise RedisConnectionError(str(error)) from error
        except ResponseError as error:
            # A full server refuses to wait; a claim makes room.
            if not self._refused:
                logger.warning("Redis refuses to wait for jobs; looking once a second: %s", error)
            self._refused = True
        except self.connection_errors:
            connection.disconnect()
            raise
        else:
            self._refused = False
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if self._closing or not self._claim():
            if seen and not self._closing:
                rest = _REFUSED_REST_SECONDS if self._refused else _EMPTY_REST_SECONDS
                self._rest_until = time.monotonic() + rest
            raise Empty
        return True

    def look_aside(self: Any) -> None:
        """Claim what :meth:`_brpop_start` waits for on no list."""
        if not self._closing and not self.closed and self.qos.can_consume():
            self._claim()

    def _claim(self: Any) -> bool:
        queues = self._queue_cycle.consume(len(self.active_queues))
        keys = [self._q_for_pri(queue, pri) for pri in self.priority_steps for queue in queues]
        try:
            claims = self.lease.claim(keys, len(queues), self.qos.children)
        except ResponseError as error:
            raise RedisConnectionError(str(error)) from error
        if claims is None:
            raise RedisConnectionError("the lease was lost; the worker begins another")
        for claim in claims:
            self._deliver(claim)
        return bool(claims)

    def _deliver(self: Any, claim: Claim) -> None:
        try:
            message = _message(claim)
            self.Message(message, channel=self)
        except Exception as error:  # noqa: BLE001 - whatever a message of any bytes may cause
            logger.error("a message is no Celery message, and is buried: %r", error)  # noqa: TRY400
            self.lease.bury(claim.receipt, f"It is no Celery message: {_told(error)}")
            return
        queue = claim.queue.rsplit(self.sep, 1)[0]
        self.connection._deliver(message, queue)  # noqa: SLF001 - kombu's way in


class Channel(_Lossless, kombu_redis.Channel):  # type: ignore[misc] # kombu ships no types
    """A channel to one Redis."""

    from_transport_options = (
        *kombu_redis.Channel.from_transport_options,
        *_LEASE_OPTIONS,
    )


class SentinelChannel(_Lossless, kombu_redis.SentinelChannel):  # type: ignore[misc] # no types
    """A channel to whichever Redis the Sentinels name."""

    from_transport_options = (
        *kombu_redis.SentinelChannel.from_transport_options,
        *_LEASE_OPTIONS,
    )


class Transport(kombu_redis.Transport):  # type: ignore[misc] # kombu ships no types
    """Lossless, to one Redis."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Kombu's own; and the lease hears of every turn of the loop."""
        super().register_with_event_loop(connection, loop)
        loop.on_tick.add(_turn)


class SentinelTransport(kombu_redis.SentinelTransport, Transport):  # type: ignore[misc] # no types
    """Lossless, to whichever Redis the Sentinels name."""

    Channel = SentinelChannel


@contextmanager
def _refusal_is_loss() -> Iterator[None]:
    """A server that takes no writes is as good as none; another may be found by its name."""
    try:
        yield
    except ResponseError as error:
        time.sleep(_REFUSED_REST_SECONDS)
        raise RedisConnectionError(str(error)) from error


def _turn() -> None:
    """The main loop has come round: a large job that stood aside may begin now."""
    lease, channel = lease_of_this_process(), _Process.channel
    if lease is not None:
        lease.heard()
        if channel.lease is lease and lease.may_claim_large(channel.qos.children):
            channel.look_aside()


def _message(claim: Claim) -> dict[str, Any]:
    """The message as kombu takes it, known by its receipt: two may come under one tag of theirs."""
    # kombu's own asks of each object whether it stands for a value of another type.
    decode = loads if b"__type__" in claim.message else json.loads
    message: Any = decode(bytes_to_str(claim.message))
    if not isinstance(message, dict):
        raise TypeError(f"expected a JSON object, got {type(message).__name__}")
    properties = message.get("properties")
    if not isinstance(properties, dict):
        raise TypeError("expected properties, an object")
    if not isinstance(message.get("body"), str):
        raise TypeError("expected a body, a string")
    if not isinstance(message.get("headers"), dict):
        raise TypeError("expected headers, an object")
    if not isinstance(properties.get("delivery_info"), dict):
        properties["delivery_info"] = {}
    properties["delivery_tag"] = claim.receipt
    return message


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]
