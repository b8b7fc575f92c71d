"""Which messages a lease claims: large ones, poison candidates, the lane, probes in an outage."""

from __future__ import annotations

import logging

import pytest
from redis import Redis

from tests.broker.leases import ACKNOWLEDGE, PROCESSES, claim, dispatched, lose, settle
from tests.support.sessions import KEYS, LANE, QUEUE, ManualClock, SteppedLease
from worker.broker.claim_policy import BATCH_BYTES, HUGE_BYTES, SMALL_BYTES, CircuitBreaker
from worker.broker.claims import PREFIX
from worker.broker.delivery import Delivery


def test_one_poison_candidate_runs_at_a_time(lease: SteppedLease, redis: Redis) -> None:
    """A worker claims a second poison candidate only after it has settled the first one."""
    redis.lpush(QUEUE, "poison 1", "poison 2")
    claim(lease)
    lose(redis, lease)
    lease.beat()
    redis.lpush(QUEUE, "message")
    first = dispatched(lease)
    assert [one.claim.message for one in first] == [b"poison 1"]
    assert [one.claim.message for one in claim(lease)] == [b"message"]
    assert claim(lease) == []
    settle(lease, ACKNOWLEDGE, *first)
    assert [one.claim.message for one in claim(lease)] == [b"poison 2"]


def claim_while_more(lease: SteppedLease) -> list[Delivery]:
    """Claim as the consumer does: again, if the claim only moved messages to the lane."""
    deliveries = claim(lease)
    while not deliveries and lease.has_more:
        deliveries = claim(lease)
    return deliveries


def sizes_claimed(lease: SteppedLease, claims: int) -> list[list[int]]:
    """Return the sizes of the messages that each of several claims takes."""
    return [[one.claim.size for one in claim_while_more(lease)] for _ in range(claims)]


def test_large_messages_take_all_pool_processes(lease: SteppedLease, redis: Redis) -> None:
    """Large messages take every pool process as long as no small message arrives."""
    redis.lpush(QUEUE, *[b"." * BATCH_BYTES] * (PROCESSES + 1))
    assert sizes_claimed(lease, PROCESSES + 1) == [*[[BATCH_BYTES]] * PROCESSES, []]


def test_a_small_message_is_claimed_before_the_last_large_one(
    lease: SteppedLease, redis: Redis
) -> None:
    """The last free pool process takes a waiting small message, also from behind large ones."""
    redis.lpush(QUEUE, *[b"." * BATCH_BYTES] * 40, b"small")
    sizes = sizes_claimed(lease, PROCESSES + 3)
    assert sizes[: PROCESSES - 1] == [[BATCH_BYTES]] * (PROCESSES - 1)
    assert [taken for taken in sizes[PROCESSES - 1 :] if taken] == [[5]]


def test_a_small_message_reserves_a_pool_process_for_a_second(
    lease: SteppedLease, redis: Redis
) -> None:
    """For a second after a small message, large messages leave one pool process free."""
    redis.lpush(QUEUE, b"small")
    settle(lease, ACKNOWLEDGE, *claim(lease))
    redis.lpush(QUEUE, *[b"." * BATCH_BYTES] * PROCESSES)
    assert sizes_claimed(lease, PROCESSES) == [*[[BATCH_BYTES]] * (PROCESSES - 1), []]
    lease.clock.now += 1
    assert sizes_claimed(lease, 1) == [[BATCH_BYTES]]


def test_the_last_pool_process_takes_no_huge_message(lease: SteppedLease, redis: Redis) -> None:
    """Huge messages leave one pool process to other jobs."""
    huge = HUGE_BYTES + 1
    redis.lpush(QUEUE, *[b"." * huge] * PROCESSES)
    assert sizes_claimed(lease, PROCESSES) == [*[[huge]] * (PROCESSES - 1), []]


def test_a_huge_message_is_not_starved(lease: SteppedLease, redis: Redis) -> None:
    """A huge message takes the next free pool process if no other huge job runs."""
    huge = HUGE_BYTES + 1
    redis.lpush(QUEUE, *[b"." * BATCH_BYTES] * PROCESSES)
    running = [claim_while_more(lease) for _ in range(PROCESSES)]
    redis.lpush(QUEUE, b"." * huge, *[b"." * BATCH_BYTES] * PROCESSES)
    settle(lease, ACKNOWLEDGE, *running[0])
    assert sizes_claimed(lease, 1) == [[huge]]


def test_the_last_pool_process_takes_no_poison_candidate(lease: SteppedLease, redis: Redis) -> None:
    """A poison candidate counts as a huge job."""
    redis.lpush(QUEUE, *[b"." * (HUGE_BYTES + 1)] * (PROCESSES - 1))
    running = [claim(lease) for _ in range(PROCESSES - 1)]
    redis.lpush(f"{PREFIX}isolated", f"{QUEUE}\0poison")
    assert claim(lease) == []
    settle(lease, ACKNOWLEDGE, *running[0])
    assert [one.claim.message for one in claim(lease)] == [b"poison"]


def test_large_messages_are_claimed_up_to_a_number_of_bytes(
    lease: SteppedLease, redis: Redis
) -> None:
    """A claim of large messages is one batch of at most BATCH_BYTES, which counts as one job."""
    size = BATCH_BYTES // 3
    redis.lpush(QUEUE, *[b"." * size] * 4, b"small")
    first = dispatched(lease)
    assert [one.claim.size for one in first] == [size] * 3
    assert [one.claim.size for one in claim(lease)] == [size]
    assert [one.claim.size for one in claim(lease)] == [5]


def test_small_messages_are_claimed_up_to_a_number_of_bytes(
    lease: SteppedLease, redis: Redis
) -> None:
    """A claim of small messages takes BATCH_BYTES for each free pool process."""
    redis.lpush(QUEUE, *[b"." * SMALL_BYTES] * 10)
    deliveries = lease.claim(KEYS, 1, PROCESSES, free=2)
    assert deliveries is not None
    assert sum(one.claim.size for one in deliveries) == 2 * BATCH_BYTES


def test_the_lane_is_read_once_a_second_without_room(lease: SteppedLease, redis: Redis) -> None:
    """A claim without room for large messages reads the lane, which is slow, once a second."""
    redis.lpush(QUEUE, "small")
    settle(lease, ACKNOWLEDGE, *claim(lease))
    redis.lpush(LANE, *[b"." * BATCH_BYTES] * PROCESSES)
    running = [claim(lease)[0] for _ in range(PROCESSES - 1)]
    assert claim(lease) == []
    redis.rpush(LANE, "small")
    assert claim(lease) == []
    lease.clock.now += 1
    assert [one.claim.message for one in claim(lease)] == [b"small"]
    settle(lease, ACKNOWLEDGE, running[0])
    assert [one.claim.size for one in claim(lease)] == [BATCH_BYTES]


def test_an_oversized_message_is_not_transferred(
    redis: Redis, client: Redis, clock: ManualClock
) -> None:
    """The worker receives only both ends of an oversized message."""
    lease = SteppedLease(clock, max_bytes=200_000)
    lease.open(client)
    redis.lpush(QUEUE, b"." * 200_001)
    (delivery,) = claim(lease)
    assert delivery.claim.size == 200_001
    assert len(delivery.claim.message) == 131_072
    lease.close()
    assert redis.lrange(QUEUE, 0, -1) == [b"." * 200_001]


def test_an_outage_stops_claims_and_one_job_probes(lease: SteppedLease, redis: Redis) -> None:
    """After the back-off one job is claimed, and further ones once it has succeeded."""
    redis.lpush(QUEUE, "a", "b", "c")
    lease.policy.breaker.record_failure("PostgreSQL is away")
    assert claim(lease) == []
    lease.clock.now += 1
    probe = dispatched(lease)
    assert [one.claim.message for one in probe] == [b"a"]
    assert claim(lease) == []
    lease.policy.breaker.record_success()
    settle(lease, ACKNOWLEDGE, *probe)
    assert len(claim(lease)) == 2


def test_a_job_that_began_before_an_outage_is_no_probe(lease: SteppedLease, redis: Redis) -> None:
    """A job that began before the outage does not prevent another job from probing."""
    redis.lpush(QUEUE, "long")
    dispatched(lease)
    lease.clock.now += 1
    lease.policy.breaker.record_failure("PostgreSQL is away")
    lease.clock.now += 1
    redis.lpush(QUEUE, "probe", "other")
    assert [one.claim.message for one in claim(lease)] == [b"probe"]
    assert claim(lease) == []


def test_the_back_off_grows(clock: ManualClock) -> None:
    """The back-off doubles up to 30 s; failures while the circuit is open do not extend it."""
    breaker = CircuitBreaker(clock)
    waits = []
    for _ in range(7):
        assert not breaker.is_open
        breaker.record_failure("PostgreSQL is away")
        breaker.record_failure("another job of the same batch")
        start = clock.now
        while breaker.is_open:
            clock.now += 1
        waits.append(clock.now - start)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    breaker.record_success()
    assert not breaker.is_probing


def test_the_end_of_an_outage_is_logged_once(
    clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The first success after failures is logged, no other."""
    breaker = CircuitBreaker(clock)
    with caplog.at_level(logging.INFO):
        breaker.record_success()
        breaker.record_failure("PostgreSQL is away")
        breaker.record_success()
        breaker.record_success()
    logged = [one.getMessage() for one in caplog.records]
    assert logged[1:] == ["circuit closed, jobs are claimed: failures=1"]
