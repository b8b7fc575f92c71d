"""A worker session's lease: claims, settlements, reconciliation, takeover, heartbeats."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from devstack.servers import LocalStack
from tests.broker.leases import (
    ACKNOWLEDGE,
    PROCESSES,
    REQUEUE,
    Batch,
    claim,
    dispatched,
    lose,
    settle,
)
from tests.support.sessions import (
    DUE,
    GRACE,
    ISOLATED,
    KEYS,
    LANE,
    LEASES,
    ORPHANED_AFTER,
    QUEUE,
    TTL,
    SteppedLease,
    claimed,
    connect,
    messages,
    sessions,
    unreachable,
)
from tests.support.stores import until
from worker.broker.claims import DEAD, PREFIX, Action, Claims, Disposition
from worker.broker.lease import Lease
from worker.broker.scripts import claims_script

# --- A lease that is lost ------------------------------------------------------------------------


def test_a_lost_lease_claims_nothing(lease: SteppedLease, redis: Redis) -> None:
    """A claim of a session that was taken over returns None."""
    lose(redis, lease)
    redis.lpush(QUEUE, "message")
    assert lease.claim(KEYS, 1, PROCESSES) is None
    assert redis.lrange(QUEUE, 0, -1) == [b"message"]


def test_a_lost_lease_is_followed_by_another_session(lease: SteppedLease, redis: Redis) -> None:
    """A heartbeat that finds the lease lost opens another session, which can claim."""
    former = lease.session
    lose(redis, lease)
    lease.beat()
    assert lease.session != former
    assert sessions(redis).keys() == {lease.session}
    redis.lpush(QUEUE, "message")
    assert len(claim(lease)) == 1


def test_deliveries_of_a_lost_lease_are_forgotten(lease: SteppedLease, redis: Redis) -> None:
    """A job that runs when its lease is lost is redelivered; its settlement has no effect."""
    redis.lpush(QUEUE, "message")
    (delivery,) = dispatched(lease)
    lose(redis, lease)
    lease.beat()
    assert lease.tags == set()
    settle(lease, ACKNOWLEDGE, delivery)
    assert redis.lrange(ISOLATED, 0, -1) == [f"{QUEUE}\0message".encode()]


def test_a_settlement_after_the_takeover_has_no_effect(lease: SteppedLease, redis: Redis) -> None:
    """A settlement of a lost session has no effect, also before the worker detects the loss."""
    redis.lpush(QUEUE, "message")
    deliveries = dispatched(lease)
    lose(redis, lease)
    settle(lease, ACKNOWLEDGE, *deliveries)
    assert messages(redis) == {b"message": 1}
    assert redis.llen(ISOLATED) == 1


def test_delivery_tags_are_never_reused(lease: SteppedLease, redis: Redis, client: Redis) -> None:
    """New sessions continue the delivery tags, so that late commands name no other delivery."""
    redis.lpush(QUEUE, "a", "b", "c")
    tags = [one.claim.tag for one in claim(lease)]
    lease.open(client)
    tags += [one.claim.tag for one in claim(lease)]
    lose(redis, lease)
    lease.beat()
    tags += [one.claim.tag for _ in range(3) for one in claim(lease)]
    assert len(set(tags)) == len(tags) == 7


# --- Reconnection --------------------------------------------------------------------------------


def test_a_reconnection_keeps_running_jobs(
    lease: SteppedLease, redis: Redis, stack: LocalStack
) -> None:
    """A new session keeps dispatched deliveries and requeues those that were not dispatched."""
    redis.lpush(QUEUE, "running")
    deliveries = dispatched(lease)
    redis.lpush(QUEUE, "not dispatched")
    claim(lease)
    former = lease.session
    with connect(stack) as another:
        lease.open(another)
        assert sessions(redis).keys() == {lease.session} != {former}
        assert claimed(redis, lease.session) == [b"running"]
        assert redis.lrange(QUEUE, 0, -1) == [b"not dispatched"]
        settle(lease, ACKNOWLEDGE, *deliveries)
    assert messages(redis) == {b"not dispatched": 1}


def test_a_reconnection_requeues_a_claim_without_reply(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A claim whose reply was lost is requeued without counting an attempt."""
    redis.lpush(QUEUE, "message")
    Claims(redis).claim(lease.session, KEYS, first_tag=100, room=1, size=1)
    lease.open(client)
    assert redis.lrange(QUEUE, 0, -1) == [b"message"]
    assert [one.claim.attempts for one in claim(lease)] == [0]


def test_a_late_claim_of_a_former_session_claims_nothing(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A late command on the old connection has no effect: its session has ended."""
    former = lease.session
    lease.open(client)
    redis.lpush(QUEUE, "message")
    assert Claims(redis).claim(former, KEYS, first_tag=100, room=1, size=1) is None


@pytest.mark.parametrize("is_opened", [False, True])
def test_a_session_that_could_not_be_opened_is_replaced(
    lease: SteppedLease, redis: Redis, client: Redis, *, is_opened: bool
) -> None:
    """The next heartbeat opens a new session that takes over all former ones, opened or not."""
    redis.lpush(QUEUE, "running")
    (delivery,) = dispatched(lease)
    with unreachable(client), pytest.raises(RedisConnectionError):
        lease.open(client)
    if is_opened:  # only the reply was lost
        Claims(redis).open(lease._sessions[-1])
    lease.beat()
    assert claimed(redis, lease.session) == [b"running"]
    assert sessions(redis).keys() == {lease.session}
    settle(lease, ACKNOWLEDGE, delivery)
    assert messages(redis) == {}


def test_a_message_that_the_server_lost_is_enqueued_again(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A server that lost its last second in a restart or failover gets the claimed message back."""
    redis.lpush(QUEUE, "running")
    dispatched(lease)
    redis.flushdb()
    lease._server = "another server's run ID"
    lease.open(client)
    assert redis.lrange(QUEUE, 0, -1) == [b"running"]
    assert lease.tags == set()


class CutAtPut(Redis):
    """A client whose connection is lost once, at the script that puts a message back."""

    is_cut = False

    def evalsha(self, sha: str, *arguments: Any, **options: Any) -> Any:
        """Run a script."""
        if not self.is_cut and sha == self.register_script(claims_script("put")).sha:
            self.is_cut = True
            raise RedisConnectionError("cut")
        return super().evalsha(sha, *arguments, **options)


def test_a_lost_message_is_kept_until_it_is_enqueued_again(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A connection that is lost while a failover's lost messages are put back loses none."""
    redis.lpush(QUEUE, "a", "b")
    dispatched(lease)
    redis.flushdb()
    lease._server = "another server's run ID"
    with CutAtPut(connection_pool=client.connection_pool) as cut:
        with pytest.raises(RedisConnectionError, match="cut"):
            lease.open(cut)
        lease.open(cut)
    assert sorted(redis.lrange(QUEUE, 0, -1)) == [b"a", b"b"]
    assert lease.tags == set()


# --- Settling ------------------------------------------------------------------------------------


def test_a_delivery_is_settled_once(lease: SteppedLease, redis: Redis) -> None:
    """Of two dispositions the first one applies."""
    redis.lpush(QUEUE, "message")
    (delivery,) = dispatched(lease)
    settle(lease, ACKNOWLEDGE, delivery)
    settle(lease, REQUEUE, delivery)
    assert messages(redis) == {}
    assert lease.tags == set()


def test_the_seconds_without_renewal_are_known(lease: SteppedLease, client: Redis) -> None:
    """The seconds since the last renewal grow with each failed heartbeat, until one succeeds."""
    lease.beat()
    with unreachable(client):
        for seconds in (1.0, 2.0, 3.0):
            lease.beat(1.0)
            assert lease.seconds_since_renewal == seconds
    lease.beat()
    assert lease.seconds_since_renewal == 0


def test_settlements_wait_for_redis(
    lease: SteppedLease, redis: Redis, client: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A later heartbeat sends the settlements of an outage; the first of each delivery applies."""
    redis.lpush(QUEUE, "a", "b", "c")
    one, two, three = dispatched(lease)
    with unreachable(client):
        settle(lease, ACKNOWLEDGE, one)
        settle(lease, Disposition(Action.DEAD_LETTER, reason="because"), two)
        settle(lease, REQUEUE, one, two)
        lease.beat()
    assert "lease cannot be renewed" in caplog.text
    assert claimed(redis, lease.session) == [b"a", b"b", b"c"]
    lease.beat()
    assert claimed(redis, lease.session) == [b"c"]
    letters: Any = redis.xrange(DEAD)
    ((_, letter),) = letters
    assert letter[b"message"] == b"b"
    assert lease.tags == {three.claim.tag}


def test_settlements_survive_a_reconnection(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A new session sends the settlements of an outage."""
    redis.lpush(QUEUE, "a")
    deliveries = dispatched(lease)
    with unreachable(client):
        settle(lease, ACKNOWLEDGE, *deliveries)
    lease.open(client)
    assert messages(redis) == {}


# --- Reconciliation ------------------------------------------------------------------------------


def test_claims_without_delivery_are_requeued(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat requeues claims that the worker does not know of, and logs an error."""
    redis.lpush(QUEUE, "lost", "known")
    Claims(redis).claim(lease.session, KEYS, first_tag=100, room=1, size=1)
    (known,) = claim(lease)
    lease.beat()
    assert redis.lrange(QUEUE, 0, -1) == [b"lost"]
    assert lease.tags == {known.claim.tag}
    assert errors(caplog) == ["claims without delivery are requeued: count=1"]


def test_a_lost_claim_is_requeued(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat requeues the message of a running job whose claim Redis has lost."""
    redis.lpush(QUEUE, "lost", "known")
    lost, known = claim(lease)
    redis.hdel(f"{PREFIX}held:{lease.session}", lost.claim.tag)
    lease.beat()
    assert lease.tags == {known.claim.tag}
    assert redis.lrange(QUEUE, 0, -1) == [b"lost"]
    fields = f"tag={lost.claim.tag} state=claimed attempts=0 job='' task=''"
    assert errors(caplog) == [f"claim lost, its message is requeued: {fields}"]


def test_a_settled_delivery_without_claim_is_not_requeued(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """A settlement whose reply was lost has removed the claim: the message stays settled."""
    redis.lpush(QUEUE, "settled", "running")
    settled, running = dispatched(lease)
    with unreachable(client):
        settle(lease, ACKNOWLEDGE, settled)
    redis.hdel(f"{PREFIX}held:{lease.session}", settled.claim.tag)
    lease.beat()
    assert lease.tags == {running.claim.tag}
    assert redis.llen(QUEUE) == 0


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged errors."""
    return [one.message for one in caplog.records if one.levelno >= logging.ERROR]


def test_a_delivery_that_was_never_dispatched_is_requeued(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A claimed delivery that is not dispatched within seconds is requeued, and an error logged."""
    redis.lpush(QUEUE, "dropped")
    claim(lease)
    lease.beat_for(ORPHANED_AFTER)
    assert claimed(redis, lease.session) == [b"dropped"]
    lease.beat()
    assert redis.lrange(QUEUE, 0, -1) == [b"dropped"]
    assert errors(caplog) == [
        "delivery without owner is requeued: tag=1 state=claimed attempts=0 job='' task=''"
    ]
    assert lease.tags == set()


def test_a_delivery_that_the_pool_forgot_counts_an_attempt(
    lease: SteppedLease, redis: Redis
) -> None:
    """A delivery of an abandoned batch is isolated: its job may have ended the pool process."""
    redis.lpush(QUEUE, "forgotten")
    Batch(*claim(lease), is_abandoned=True)
    lease.beat(ORPHANED_AFTER + 1)
    assert redis.llen(ISOLATED) == 1
    assert [one.claim.attempts for one in claim(lease)] == [1]


def test_a_running_delivery_is_kept(lease: SteppedLease, redis: Redis) -> None:
    """The delivery of a long job stays claimed for as long as the job runs."""
    redis.lpush(QUEUE, "long")
    dispatched(lease)
    lease.beat_for(10 * ORPHANED_AFTER)
    assert claimed(redis, lease.session) == [b"long"]


# --- Other workers' leases -----------------------------------------------------------------------


def test_a_dead_workers_messages_are_taken_over(
    lease: SteppedLease, other: SteppedLease, redis: Redis
) -> None:
    """A session that sends no heartbeat for two TTLs is taken over, its messages isolated."""
    redis.lpush(QUEUE, "message")
    claim(other)
    dead = other.session
    lease.beat()
    lease.beat_for(2 * TTL - 1)
    assert dead in sessions(redis)
    lease.beat()
    assert sessions(redis).keys() == {lease.session}
    assert [one.claim.attempts for one in claim(lease)] == [1]


def test_a_dead_worker_is_identified(
    lease: SteppedLease, client: Redis, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has each session with its worker's name, and how many deliveries were requeued."""
    caplog.set_level(logging.INFO, logger="worker.broker.lease")
    dead = SteppedLease(lease.clock, batch_size=10, node="celery@dead")
    dead.open(client)
    redis.lpush(QUEUE, "a", "b")
    claim(dead)
    lease.beat_for(2 * TTL + 2)
    opened, expired = [one.getMessage() for one in caplog.records]
    assert opened == f"worker session opened: session={dead.session} node=celery@dead"
    assert expired == (
        "lease expired, its jobs are requeued: "
        f"session={dead.session} node=celery@dead deliveries=2"
    )
    assert not redis.exists(f"{PREFIX}nodes")


def test_all_deliveries_of_an_interrupted_takeover_are_counted(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A takeover that takes several heartbeats logs the claims from before the first one."""
    redis.zadd(LEASES, {"dead": 7})
    for at in range(6):
        redis.hset(f"{PREFIX}held:dead", str(at), f"{QUEUE}\0".encode() + b"." * 2_000_000)
    lease.beat()
    lease.beat_for(2 * TTL - 1)
    lease.clock.now += 1
    lease._take_over_expired(sessions(redis), by=lease.clock.now)
    assert 0 < redis.hlen(f"{PREFIX}held:dead") < 6
    lease.beat()
    assert "session=dead node= deliveries=6" in caplog.text


def test_a_takeover_that_another_worker_ends_is_forgotten(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A session of the same name that expires later is logged with its own claims."""
    redis.zadd(LEASES, {"dead": 7})
    for at in range(6):
        redis.hset(f"{PREFIX}held:dead", str(at), f"{QUEUE}\0".encode() + b"." * 2_000_000)
    lease.beat()
    lease.beat_for(2 * TTL - 1)
    lease.clock.now += 1
    lease._take_over_expired(sessions(redis), by=lease.clock.now)
    assert 0 < redis.hlen(f"{PREFIX}held:dead") < 6
    while Claims(redis).take_over("dead", 7) > 0:
        pass
    lease.beat()
    redis.zadd(LEASES, {"dead": 9})
    redis.hset(f"{PREFIX}held:dead", "a", f"{QUEUE}\0.".encode())
    lease.beat()
    lease.beat_for(2 * TTL)
    assert "session=dead node= deliveries=1" in caplog.text


def test_a_slow_worker_is_not_taken_over(
    lease: SteppedLease, other: SteppedLease, redis: Redis
) -> None:
    """One heartbeat within two TTLs keeps the lease."""
    for _ in range(3):
        lease.beat_for(2 * TTL - 1)
        other.beat()
    assert other.session in sessions(redis)


@pytest.mark.parametrize("gap", [TTL, 100 * TTL])
def test_a_gap_restarts_the_observation_of_other_sessions(
    lease: SteppedLease, other: SteppedLease, redis: Redis, gap: float
) -> None:
    """After a stall of Redis or of this machine other sessions get another two TTLs."""
    dead = other.session
    lease.beat()
    lease.beat_for(2 * TTL - 2)
    lease.beat(gap)
    lease.beat_for(2 * TTL - 1)
    assert dead in sessions(redis)
    lease.beat()
    assert dead not in sessions(redis)


def test_an_earlier_versions_session_is_taken_over(lease: SteppedLease, redis: Redis) -> None:
    """A session of the first version expires if its deadline does not change for two TTLs."""
    deadline = 4_000_000_000_000
    redis.zadd(LEASES, {"renewed": deadline, "dead": deadline})
    redis.hset(f"{PREFIX}held:dead", "1", f"{QUEUE}\0message")
    for seconds in range(int(2 * TTL) + 1):
        redis.zadd(LEASES, {"renewed": deadline + seconds})
        lease.beat()
    assert sessions(redis).keys() == {lease.session, "renewed"}
    assert redis.lrange(ISOLATED, 0, -1) == [f"{QUEUE}\0message".encode()]


def test_two_workers_take_over_a_large_session(
    lease: SteppedLease, other: SteppedLease, redis: Redis
) -> None:
    """Simultaneous takeovers move each message once."""
    sizes = [2_000_000 + at for at in range(6)]
    redis.zadd(LEASES, {"dead": 7})
    for at, size in enumerate(sizes):
        redis.hset(f"{PREFIX}held:dead", str(at), f"{QUEUE}\0".encode() + b"." * size)
    for _ in range(int(2 * TTL) + 1):
        lease.beat(0.5)
        other.beat(0.5)
    assert sorted(len(one) - len(QUEUE) - 1 for one in redis.lrange(ISOLATED, 0, -1)) == sizes


def test_delayed_messages_are_woken_by_a_heartbeat(lease: SteppedLease, redis: Redis) -> None:
    """One heartbeat wakes all messages that are due, large ones too."""
    redis.lpush(LANE, *[b"." * 2_000_000] * 5)
    for _ in range(5):
        deliveries = lease.claim(KEYS, 1, 100)
        assert deliveries
        settle(lease, Disposition(Action.DELAY, delay=0), *deliveries)
    lease.beat()
    assert redis.llen(LANE) == 5


# --- Stopping ------------------------------------------------------------------------------------


def test_a_stuck_main_loop_loses_the_lease(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker whose event loop does not turn stops renewing its lease."""
    lease.clock.now += 121
    before = sessions(redis)
    for _ in range(2):
        lease._beat()
    assert sessions(redis) == before
    assert errors(caplog) == ["event loop stuck, the lease is not renewed: seconds=121"]
    lease.loop_turned()
    lease._beat()
    assert sessions(redis) != before


def test_a_draining_worker_claims_nothing_and_keeps_its_lease(
    lease: SteppedLease, redis: Redis
) -> None:
    """A draining worker renews its lease for its running jobs, also if its event loop has ended."""
    redis.lpush(QUEUE, "running")
    deliveries = dispatched(lease)
    redis.lpush(QUEUE, "waiting")
    lease.drain()
    assert lease.is_draining
    assert not lease.may_claim()
    assert claim(lease) == []
    before = sessions(redis)
    lease.clock.now += 1_000
    lease._beat()
    assert sessions(redis) != before
    settle(lease, ACKNOWLEDGE, *deliveries)
    assert messages(redis) == {b"waiting": 1}


def test_a_draining_worker_requeues_what_is_not_dispatched(
    lease: SteppedLease, redis: Redis
) -> None:
    """A draining worker requeues undispatched deliveries without counting an attempt."""
    redis.lpush(QUEUE, "message")
    claim(lease)
    lease.drain()
    lease.beat()
    assert redis.lrange(QUEUE, 0, -1) == [b"message"]


def test_the_grace_period_begins_with_the_first_drain(lease: SteppedLease) -> None:
    """A second warm shutdown does not extend the grace period; a cold shutdown ends it."""
    lease.drain()
    lease.clock.now += GRACE / 2
    lease.drain()
    assert lease._drained_by == pytest.approx(lease.clock.now + GRACE / 2)
    lease.drain(at_once=True)
    assert lease._drained_by == lease.clock.now


def test_a_closed_session_leaves_nothing(lease: SteppedLease, redis: Redis) -> None:
    """A close requeues what is claimed without an attempt; later settlements have no effect."""
    redis.lpush(QUEUE, "a", "b")
    deliveries = dispatched(lease)
    lease.close()
    settle(lease, ACKNOWLEDGE, *deliveries)
    lease.close()
    assert sorted(redis.lrange(QUEUE, 0, -1)) == [b"a", b"b"]
    assert redis.keys() == [QUEUE.encode()]
    assert claim(lease) == []


def test_a_close_sends_settlements_first(lease: SteppedLease, redis: Redis, client: Redis) -> None:
    """A close sends the settlements of an outage before it requeues the other deliveries."""
    redis.lpush(QUEUE, "ended", "running")
    ended, _ = dispatched(lease)
    with unreachable(client):
        settle(lease, ACKNOWLEDGE, ended)
    lease.close()
    assert messages(redis) == {b"running": 1}


def test_a_session_that_could_not_be_closed_is_taken_over(
    lease: SteppedLease, other: SteppedLease, redis: Redis, client: Redis
) -> None:
    """Another worker takes over the messages of a session that was closed during an outage."""
    redis.lpush(QUEUE, "message")
    dispatched(lease)
    with unreachable(client):
        lease.close()
    other.beat_for(2 * TTL + 1)
    assert redis.llen(ISOLATED) == 1
    assert sessions(redis).keys() == {other.session}


def test_a_close_after_a_failed_reconnection_leaves_nothing(
    lease: SteppedLease, redis: Redis, client: Redis
) -> None:
    """After a failed reconnection a close sends the settlements and ends all sessions."""
    redis.lpush(QUEUE, "ended", "running")
    ended, _ = dispatched(lease)
    with unreachable(client):
        settle(lease, ACKNOWLEDGE, ended)
        with pytest.raises(RedisConnectionError):
            lease.open(client)
    lease.close()
    assert messages(redis) == {b"running": 1}
    assert redis.lrange(QUEUE, 0, -1) == [b"running"]
    assert sessions(redis) == {}


# --- The heartbeat thread ------------------------------------------------------------------------


@pytest.fixture
def running(redis: Redis, stack: LocalStack) -> Iterator[Any]:
    """A lease whose own thread sends twenty heartbeats a second."""
    assert redis.ping()
    lease = Lease(ttl=0.4, grace=1.0)
    with connect(stack) as client:
        lease.open(client)
        yield lease
        lease.close()


@pytest.mark.usefixtures("running")
def test_the_thread_renews_the_lease(redis: Redis) -> None:
    """The heartbeat thread renews the lease without the event loop."""
    until(lambda: sessions(redis).popitem()[1] > 3)


def test_the_thread_survives_an_exception(running: Lease, redis: Redis) -> None:
    """The lease is renewed although the heartbeat's callback raises."""
    calls = []

    def fail() -> None:
        calls.append(1)
        raise AssertionError("a defect")

    running.on_heartbeat = fail
    until(lambda: len(calls) > 3)
    before = sessions(redis).popitem()[1]
    until(lambda: sessions(redis).popitem()[1] > before + 3)


def test_the_thread_survives_an_outage(
    running: Lease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """Heartbeats continue after an outage of Redis, which is logged once."""
    assert running._client
    beats = []
    running.on_heartbeat = lambda: beats.append(1)
    with unreachable(running._client):
        until(lambda: len(beats) > 5)
    before = sessions(redis).popitem()[1]
    until(lambda: sessions(redis).popitem()[1] > before)
    warnings = [one for one in caplog.records if "cannot be renewed" in one.getMessage()]
    assert len(warnings) == 1


def test_a_step_of_a_heartbeat_that_fails_prevents_no_other(
    lease: SteppedLease, other: SteppedLease, redis: Redis
) -> None:
    """Expired leases are taken over although other steps of the heartbeat fail each time."""

    def fail() -> None:
        raise AssertionError("a defect")

    redis.lpush(QUEUE, "message")
    dispatched(other)
    redis.set(DUE, "not a sorted set")
    lease.on_heartbeat = fail
    lease.beat_for(2 * TTL + 1)
    assert sessions(redis).keys() == {lease.session}
    assert redis.llen(ISOLATED) == 1


def test_an_error_of_another_step_does_not_lose_the_lease(
    lease: SteppedLease, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A heartbeat that cannot requeue delayed messages has renewed the lease."""
    redis.set(DUE, "not a sorted set")
    before = sessions(redis)[lease.session]
    lease.beat_for(2 * TTL)
    assert sessions(redis)[lease.session] == before + 16
    assert not lease.is_lost
    assert caplog.text.count("due messages cannot be requeued") == 1


def test_a_demoted_server_is_a_lost_connection(running: Lease, redis: Redis) -> None:
    """The heartbeat reports a lost connection for as long as its server is a replica."""
    assert not running.is_lost
    redis.replicaof("127.0.0.1", "1")
    try:
        until(lambda: running.is_lost)
    finally:
        redis.replicaof("NO", "ONE")
    until(lambda: not running.is_lost)


@pytest.mark.parametrize("queue", KEYS)
def test_a_heartbeat_reports_messages(lease: SteppedLease, redis: Redis, queue: str) -> None:
    """A heartbeat sets ``has_more`` only if a queue has a message."""
    claim(lease)
    lease.beat()
    assert not lease.has_more
    redis.lpush(queue, "message")
    lease.beat()
    assert lease.has_more


def test_an_idle_heartbeat_is_three_commands(lease: SteppedLease, redis: Redis) -> None:
    """Without messages a heartbeat renews the lease, reads the sessions and checks the queues."""
    claim(lease)
    lease.beat()
    redis.config_resetstat()
    lease.beat()
    statistics: Any = redis.info("commandstats")
    sent = {name: one["calls"] for name, one in statistics.items() if "config" not in name}
    assert sent == {"cmdstat_zadd": 1, "cmdstat_zrange": 1, "cmdstat_exists": 1}
