"""Every delivery has one owner: a random walk through faults, on the real scripts.

Two workers, each with a real lease and dispatcher and a stepped pool, claim, dispatch, complete,
lose replies, connections and pool processes, freeze, die, drain and stop. After each walk all
messages are settled within 30 s of the workers' clock, with no worker restarted.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.worker import state as worker_state
from interview_access.contracts import GRANT_ACCESS
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from devstack.servers import LocalStack
from tests.support.pools import SteppedPool, Work, settled
from tests.support.sessions import (
    DATABASE,
    DUE,
    ISOLATED,
    KEYS,
    QUEUE,
    TTL,
    ManualClock,
    SteppedLease,
    connect,
    messages,
    sessions,
)
from worker.broker.claim_policy import SMALL_BYTES
from worker.broker.claims import DEAD, PREFIX, Action, Disposition, Heartbeat
from worker.broker.delivery import Delivery
from worker.execution.batch import Batch
from worker.execution.decoding import Limits
from worker.execution.dispatch import Dispatcher

SEEDS = int(os.environ.get("OWNERSHIP_SEEDS", "8"))
STEPS = 150
PROCESSES = 3
LIVE_SECONDS = 30
LIMITS = Limits(interview_ids=1_000, attempts=3, seconds=600.0)
TOMORROW = datetime.now(UTC) + timedelta(days=1)
YESTERDAY = datetime.now(UTC) - timedelta(days=1)

HEADERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "large": {"x": "." * SMALL_BYTES},
    "short time limit": {"timelimit": [5, None]},
    "with ETA": {"eta": TOMORROW.isoformat()},
    "expired": {"expires": YESTERDAY.isoformat()},
    "unreadable": {"eta": "soon"},
    "without ID": {"id": None},
}
"""The headers of each kind of message."""


class FaultyRedis(Redis):
    """A client whose connection can be cut, or whose next script's reply can be lost."""

    is_cut = False
    loses_reply = False

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command, unless the connection is cut; lose the reply if requested."""
        if self.is_cut:
            raise RedisConnectionError("cut")
        reply = super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py's
        if self.loses_reply and args[0] == "EVALSHA":
            self.loses_reply = False
            raise RedisConnectionError("reply lost")
        return reply


class Worker:
    """A worker's main process: its lease, dispatcher and pool, and the steps of its event loop.

    Attributes:
        is_connected: Whether its consumer has a session; if not, it connects at its next turn.
        forgotten: Number of batches that the pool has forgotten since the last heartbeat.
    """

    def __init__(self, client: FaultyRedis, app: Celery, clock: ManualClock, parts: Parts) -> None:
        self.client = client
        self.pool = SteppedPool(PROCESSES)
        self.lease = parts.lease(clock, batch_size=3)
        self.dispatcher = parts.dispatcher(
            app, self.pool, "worker@host", self.lease, LIMITS, clock=clock
        )
        self.lease.on_heartbeat = self.dispatcher.on_heartbeat
        self.is_connected = False
        self.forgotten = 0
        self.turn()

    def turn(self) -> None:
        """Connect if the connection was lost."""
        if not self.is_connected:
            with suppress(RedisError):
                self.lease.open(self.client)
                self.is_connected = True

    def claim(self) -> list[Delivery]:
        """Claim for a free pool process, as the consumer does."""
        self.turn()
        if not self.is_connected or self.dispatcher.free_processes <= 0:
            return []
        try:
            deliveries = self.lease.claim(KEYS, 1, PROCESSES)
        except RedisError:
            deliveries = None
        if deliveries is None:
            self.is_connected = False
        return deliveries or []

    def pump(self) -> list[Delivery]:
        """Claim and dispatch."""
        deliveries = self.claim()
        try:
            self.dispatcher.dispatch(deliveries)
        except RedisError:
            self.is_connected = False
        return deliveries

    def beat(self) -> None:
        """Send a heartbeat, and ignore connection errors as the heartbeat thread does."""
        with suppress(RedisError):
            self.lease.beat(0)
        self.forgotten = 0

    @contextmanager
    def events_lost(self) -> Iterator[None]:
        """Within the block the connection for events is lost."""

        def fail(*_: object, **__: object) -> None:
            raise RedisConnectionError("no event can be sent")

        send, self.dispatcher.send_event = self.dispatcher.send_event, fail
        try:
            yield
        finally:
            self.dispatcher.send_event = send


class Parts:
    """The classes that workers are made of; a test replaces one by a defective class."""

    lease: type[SteppedLease] = SteppedLease
    dispatcher: type[Dispatcher] = Dispatcher


class Ownership:
    """A random walk of two workers, their producers, their operators and faults."""

    def __init__(self, stack: LocalStack, app: Celery, parts: Parts, seed: int) -> None:
        """Begin with two workers and no message.

        Args:
            stack: The servers.
            app: Has the tasks.
            parts: The classes of the workers' parts.
            seed: Of the random choices.
        """
        self._stack = stack
        self._app = app
        self._parts = parts
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._clock = ManualClock()
        self._redis: Any = connect(stack)
        self._redis.flushdb()
        self._published = Counter[bytes]()
        self._acknowledged = Counter[bytes]()
        self._delayed: set[bytes] = set()
        self._batch_of: dict[tuple[Worker, str], Batch] = {}
        self._clients: list[FaultyRedis] = []
        self._steps: list[str] = []
        worker_state.reset_state()
        self._workers = [self._start(), self._start()]

    def _start(self) -> Worker:
        client = FaultyRedis(
            unix_socket_path=self._stack.broker_url.removeprefix("redis+socket://"),
            db=DATABASE,
            retry=Retry(NoBackoff(), 0),
        )
        self._clients.append(client)
        return Worker(client, self._app, self._clock, self._parts)

    def go(self, steps: int) -> None:
        """Take random steps and check the invariants after each; then settle all in time."""
        work = (self.publish, self.pump, self.accept, self.complete, self.beat)
        faults = (
            *(self.drop, self.pump_without_events, self.fail, self.fail, self.forget),
            *(self.cut, self.mend, self.mend, self.lose_reply, self.reconnect, self.revoke),
            *(self.kill, self.drain, self.stop, self.freeze, self.end_delays, self.end_delays),
        )
        try:
            for _ in range(steps):
                step = self._random.choice(self._random.choice((work, work, faults)))
                self._steps.append(step.__name__)
                step()
                self.check()
            self._steps.append("finish")
            self.finish()
        except BaseException as error:
            error.add_note(f"steps: {' '.join(self._steps)}")
            raise
        finally:
            self._redis.close()
            for client in self._clients:
                client.close()
            worker_state.reset_state()

    def _any(self) -> Worker:
        return self._random.choice(self._workers)

    # --- Producers and operators -----------------------------------------------------------------

    def publish(self) -> None:
        """A producer sends messages, some of them twice."""
        for _ in range(self._random.randint(1, 3)):
            kind = self._random.choice(["plain", "plain", *HEADERS])
            number = len(self._published)
            envelope = {
                "body": json.dumps([[], {}, {}]),
                "content-type": "application/json",
                "content-encoding": "utf-8",
                "headers": {"id": f"job {number}", "task": GRANT_ACCESS, **HEADERS[kind]},
                "number": number,
            }
            message = json.dumps(envelope).encode()
            copies = self._random.choice([1, 1, 1, 2])
            self._redis.lpush(QUEUE, *[message] * copies)
            self._published[message] += copies
            if kind == "with ETA":
                self._delayed.add(message)

    def revoke(self) -> None:
        """An operator revokes a job and terminates its pool process."""
        batches = list(self._any().dispatcher._batches)
        requests = [one for batch in batches for one in batch.requests if one.id]
        if requests:
            request = self._random.choice(requests)
            worker_state.revoked.add(request.id)
            request.terminate(None)

    # --- One worker's work -----------------------------------------------------------------------

    def pump(self) -> None:
        """A worker claims and dispatches."""
        self._any().pump()

    def drop(self) -> None:
        """A defect drops deliveries between claim and dispatch."""
        self._any().claim()

    def pump_without_events(self) -> None:
        """The connection is lost in the middle of a dispatch."""
        worker = self._any()
        with worker.events_lost():
            worker.pump()

    def _work(self) -> tuple[Worker, Work] | tuple[None, None]:
        works = [(worker, work) for worker in self._workers for work in worker.pool.works]
        return self._random.choice(works) if works else (None, None)

    def accept(self) -> None:
        """A pool process begins."""
        _, work = self._work()
        if work:
            work.accept()

    def complete(self) -> None:
        """A pool process reports any disposition of each delivery."""
        _, work = self._work()
        if work:
            actions = [*[Action.ACKNOWLEDGE] * 4, *Action]
            self._complete(work, [self._random.choice(actions) for _ in work.deliveries])

    def _complete(self, work: Work, actions: list[Action]) -> None:
        by_job = {json.loads(message)["headers"]["id"]: message for message in self._published}
        self._acknowledged.update(
            by_job[one.job_id]
            for one, action in zip(work.deliveries, actions, strict=True)
            if action is Action.ACKNOWLEDGE
        )
        work.complete(*[settled(action, delay=60) for action in actions])

    def fail(self) -> None:
        """A pool process ends without a report."""
        _, work = self._work()
        if work:
            work.fail(RuntimeError("Worker exited prematurely"))

    def forget(self) -> None:
        """The pool forgets a batch, as Celery's pool does for some lost connections."""
        worker, work = self._work()
        if worker and work:
            work.forget()
            worker.forgotten += 1

    # --- Faults ----------------------------------------------------------------------------------

    def cut(self) -> None:
        """A worker's connections to Redis are cut."""
        self._any().client.is_cut = True

    def mend(self) -> None:
        """A worker's connections to Redis can be made again."""
        self._any().client.is_cut = False

    def lose_reply(self) -> None:
        """Redis executes a worker's next script, but the reply is lost."""
        self._any().client.loses_reply = True

    def reconnect(self) -> None:
        """A worker's event loop detects a lost connection and reconnects."""
        worker = self._any()
        worker.is_connected = False
        worker.turn()

    def kill(self) -> None:
        """A worker is killed, and another starts."""
        self._workers[self._random.randrange(2)] = self._start()

    def drain(self) -> None:
        """A worker is asked to stop."""
        self._any().lease.drain()

    def stop(self) -> None:
        """A worker closes its session, usually after a drain, and another worker starts."""
        draining = [worker for worker in self._workers if worker.lease.is_draining]
        worker = self._random.choice(draining or self._workers)
        worker.lease.close()
        self._workers[self._workers.index(worker)] = self._start()

    # --- Time ------------------------------------------------------------------------------------

    def beat(self) -> None:
        """A worker sends a heartbeat, usually in time."""
        self._clock.now += self._random.choice([1, 1, 1, 3, 11])
        self._any().beat()

    def freeze(self) -> None:
        """A worker is frozen for longer than its lease, while the other one is not."""
        worker = self._any()
        for _ in range(int(2 * TTL) + 2):
            self._clock.now += 1
            worker.beat()

    def end_delays(self) -> None:
        """All delayed messages become due."""
        for name in self._redis.zrange(DUE, 0, -1):
            self._redis.zadd(DUE, {name: 0})

    # --- Invariants ------------------------------------------------------------------------------

    def check(self) -> None:
        """Check all invariants."""
        self.each_message_is_in_one_place()
        self.each_delivery_has_one_owner()
        self.each_pool_process_is_free_or_busy()

    def each_message_is_in_one_place(self) -> None:
        """An unacknowledged message is in one place; each claim belongs to a session."""
        found = messages(self._redis)
        assert not found - self._published
        assert not self._published - self._acknowledged - found
        claiming = {key.decode().rpartition(":")[2] for key in self._redis.keys(f"{PREFIX}held:*")}
        assert claiming <= sessions(self._redis).keys()

    def each_delivery_has_one_owner(self) -> None:
        """No delivery is in two batches, and a poison candidate is alone in its batch."""
        for worker in self._workers:
            batches: list[Batch] = list(worker.dispatcher._batches)
            for batch in batches:
                claims = [one.delivery.claim for one in batch.requests]
                for claim in claims:
                    assert self._batch_of.setdefault((worker, claim.tag), batch) is batch
                is_poison = any(claim.attempts for claim in claims)
                assert len(claims) == 1 or not is_poison
            claimed = list(worker.lease._deliveries.values())
            assert sum(one.claim.attempts > 0 for one in claimed) <= 1

    def each_pool_process_is_free_or_busy(self) -> None:
        """A pool process without a batch is free."""
        for worker in self._workers:
            busy = len(worker.pool.works) + worker.forgotten
            assert worker.dispatcher.free_processes == PROCESSES - busy

    # --- After the last fault --------------------------------------------------------------------

    def finish(self) -> None:
        """All messages are settled within 30 s, with no worker restarted."""
        for worker in list(self._workers):
            worker.client.is_cut = worker.client.loses_reply = False
            if worker.lease.is_draining:
                self.stop()
        for _ in range(LIVE_SECONDS):
            self._clock.now += 1
            self.end_delays()
            for worker in self._workers:
                worker.beat()
                while worker.pump():
                    pass
                for work in list(worker.pool.works):
                    self._complete(work, [Action.ACKNOWLEDGE] * len(work.deliveries))
        self.check()
        assert not any(self._redis.llen(queue) for queue in (*KEYS, ISOLATED))
        for worker in self._workers:
            assert worker.lease.tags == set()
            assert worker.dispatcher.free_processes == PROCESSES
        left = messages(self._redis)
        dead = {letter[b"message"] for _, letter in self._redis.xrange(DEAD)}
        assert left.keys() <= self._delayed | dead
        assert not worker_state.requests
        for worker in self._workers:
            worker.lease.close()
        assert not sessions(self._redis)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_each_delivery_is_settled(stack: LocalStack, app: Celery, seed: int) -> None:
    """After any sequence of faults every message is settled in time."""
    Ownership(stack, app, Parts(), seed).go(STEPS)


# --- Defective parts -----------------------------------------------------------------------------


class WithoutReconciliation(SteppedLease):
    """A lease that does not recover deliveries without an owner."""

    def _reconcile(self, heartbeat: Heartbeat) -> None:
        """Do nothing."""


class WithoutTakeover(SteppedLease):
    """A lease that leaves the messages of dead workers where they are."""

    def _take_over_expired(self, sessions: Mapping[str, float], by: float) -> None:
        """Do nothing."""


class WithoutLateSettlement(SteppedLease):
    """A lease that forgets a delivery whose settlement could not be sent."""

    def settle(self, dispositions: Mapping[str, Disposition]) -> None:
        """Settle now or never."""
        super().settle(dispositions)
        for tag in dispositions:
            if one := self._deliveries.get(tag):
                one.disposition = None


class WithManyPoisonCandidates(SteppedLease):
    """A lease that claims any number of poison candidates at a time."""

    def _all(self) -> list[Delivery]:
        return [one for one in super()._all() if not one.claim.attempts]


class WithoutFreeing(Dispatcher):
    """A dispatcher that does not free the pool process of a lost batch."""

    def _settle_failed(self, batch: Batch, error: BaseException) -> None:
        super()._settle_failed(batch, error)
        self._batches[batch] = None


class WithoutForgotten(Dispatcher):
    """A dispatcher that never detects batches that the pool has forgotten."""

    def on_heartbeat(self) -> None:
        """Do nothing."""


class WithSecondDispatch(Dispatcher):
    """A dispatcher that dispatches a lost batch again by itself."""

    def _settle_failed(self, batch: Batch, error: BaseException) -> None:
        super()._settle_failed(batch, error)
        self._start(Batch(batch.requests, self._pool, self._hostname, self._clock()))


DEFECTIVE = [
    WithoutReconciliation,
    WithoutTakeover,
    WithoutLateSettlement,
    WithManyPoisonCandidates,
    WithoutFreeing,
    WithoutForgotten,
    WithSecondDispatch,
]


@pytest.mark.parametrize("part", DEFECTIVE)
def test_the_walk_detects_each_defect(
    stack: LocalStack, app: Celery, part: type[SteppedLease | Dispatcher]
) -> None:
    """A walk of workers with a defective part fails for at least one of a few seeds."""
    parts = Parts()
    if issubclass(part, SteppedLease):
        parts.lease = part
    else:
        parts.dispatcher = part

    def finds(seed: int) -> bool:
        try:
            Ownership(stack, app, parts, seed).go(STEPS)
        except AssertionError:
            return True
        return False

    assert any(map(finds, range(4 * SEEDS)))
