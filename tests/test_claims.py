"""The queue's scripts: a random walk of a model against them, and each of their promises alone."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from tests.stores import until
from worker import claims
from worker.claims import DEAD, PREFIX, Claim, Claims
from worker.local_stack import LocalStack

SEEDS = int(os.environ.get("CLAIMS_SEEDS", "12"))
STEPS = 300

JOBS, URGENT = "jobs", "jobs\x06\x169"
QUEUES = (URGENT, JOBS)
MESSAGES = (b"", b"\0", b"\xff\xfe\0'", b'it\'s "so" \\0 ]]', b'{"id": "1"}', b'{"id": "2"}')
"""So few that many in one walk are equal."""

LEASES, DUE = f"{PREFIX}leases", f"{PREFIX}due"
NEVER_ALONE = 1_000

State = dict[str, Any]


@pytest.fixture
def redis(stack: LocalStack) -> Iterator[Redis]:
    """An empty database."""
    with Redis(unix_socket_path=stack.broker_url.removeprefix("redis+socket://"), db=13) as redis:
        redis.flushdb()
        yield redis


def look(redis: Redis) -> State:
    """All that stands in the database, key by key."""
    keys: Any = sorted(redis.keys())
    pipeline = redis.pipeline(transaction=False)
    reads: dict[bytes, Callable[[bytes], object]] = {
        b"list": lambda key: pipeline.lrange(key, 0, -1),
        b"hash": pipeline.hgetall,
        b"set": pipeline.smembers,
        b"zset": lambda key: pipeline.zrange(key, 0, -1, withscores=True),
        b"stream": pipeline.xrange,
        b"string": pipeline.get,
    }
    for key in keys:
        pipeline.type(key)
    for key, kind in zip(keys, pipeline.execute(), strict=True):
        reads[kind](key)
    return {key.decode(): value for key, value in zip(keys, pipeline.execute(), strict=True)}


def of(state: State, name: str) -> dict[str, Any]:
    """The contents of all keys of ours of that name, by what follows it."""
    start = PREFIX + name
    return {key.removeprefix(start): state[key] for key in state if key.startswith(start)}


def held(state: State, incarnation: str) -> dict[str, bytes]:
    """The messages that an incarnation holds, by receipt."""
    values = state.get(f"{PREFIX}held:{incarnation}", {})
    return {receipt.decode(): value.partition(b"\0")[2] for receipt, value in values.items()}


def leases(state: State) -> dict[str, float]:
    """All leases, each with its deadline."""
    return {name.decode(): deadline for name, deadline in state.get(LEASES, [])}


def messages(state: State) -> Counter[bytes]:
    """Every message, as often as it stands somewhere."""
    everywhere = Counter[bytes]()
    for queue in QUEUES:
        everywhere.update(state.get(queue, []))
    for values in (*of(state, "held:").values(), *of(state, "deferred").values()):
        everywhere.update(value.partition(b"\0")[2] for value in values.values())
    everywhere.update(letter[b"message"] for _, letter in state.get(DEAD, []))
    return everywhere


class Worker:
    """What one worker process knows; Redis may know better.

    Attributes:
        incarnations: All that it ever had; it speaks under the last.
        held: The receipts of which it heard, and has not told what became of them.
        next_receipt: Never used before.
    """

    def __init__(self) -> None:
        self.incarnations: list[str] = []
        self.held: set[str] = set()
        self.next_receipt = 1


class Walk:
    """Workers, producers and operators who do anything at any time, and who are looked at."""

    def __init__(self, redis: Redis, seed: int) -> None:
        """Two workers, and nothing to do."""
        self._redis = redis
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._claims = Claims(redis, lease=3_600)
        self._unfinished = Counter[bytes]()
        self._seen: dict[str, float] = {}
        self._time = 0  # long ago, and goes on: a lease that ends twice ends at two times
        self._names = 0
        self._everyone: list[Worker] = []
        self._living: list[Worker] = []
        self._state: State = look(redis)
        for _ in range(2):
            self.join()
        self.check()

    def go(self, steps: int) -> None:
        """Walk, look after every step, and do everything that is left over in the end."""
        walks = (
            *(self.publish, self.publish, self.publish, self.claim, self.claim, self.start),
            *(self.acknowledge, self.give_back, self.defer, self.wake, self.bury, self.requeue),
            *(self.renew, self.expire, self.expire, self.sweep, self.sweep, self.sweep),
            *(self.claim_unheard, self.claim_twice, self.reconnect, self.die, self.close),
        )
        for _ in range(steps):
            self._random.choice(walks)()
            self.check()
        self.finish()

    def check(self) -> None:
        """Each unfinished message is in one place, and each place is one that somebody watches."""
        self._state = look(self._redis)
        assert messages(self._state) == self._unfinished
        assert of(self._state, "held:").keys() <= leases(self._state).keys()
        for incarnation, receipts in of(self._state, "started:").items():
            assert {receipt.decode() for receipt in receipts} <= held(
                self._state, incarnation
            ).keys()
        assert {name for name, _ in self._state.get(DUE, [])} == set(
            self._state.get(f"{PREFIX}deferred", {})
        )
        for counts in (*of(self._state, "tries").values(), *of(self._state, "deferrals").values()):
            assert all(int(count) > 0 for count in counts.values())

    # --- Producers and operators ---------------------------------------------------------------

    def publish(self) -> None:
        """A producer sends a message."""
        message = self._random.choice(MESSAGES)
        self._redis.lpush(self._random.choice(QUEUES), message)
        self._unfinished[message] += 1

    def requeue(self) -> None:
        """An operator has a dead letter tried again."""
        letters = self._state.get(DEAD, [])
        if letters:
            assert self._claims.requeue(self._random.choice(letters)[0].decode(), JOBS) == 1

    # --- What one worker does ------------------------------------------------------------------

    def join(self) -> None:
        """A worker starts."""
        worker = Worker()
        self._everyone.append(worker)
        self._living.append(worker)
        self._open(worker, [])

    def reconnect(self) -> None:
        """A worker goes on under a new incarnation, with all that it knows of and holds still."""
        worker = self._random.choice(self._living)
        formers = worker.incarnations[-self._random.randint(1, 2) :]
        standing = {receipt for name in formers for receipt in held(self._state, name)}
        kept = self._open(worker, formers)
        assert sorted(kept) == sorted(worker.held & standing)
        worker.held = set(kept)

    def _open(self, worker: Worker, formers: Sequence[str]) -> list[str]:
        self._names += 1
        worker.incarnations.append(f"incarnation-{self._names}")
        return self._claims.open(worker.incarnations[-1], formers, worker.held)

    def claim(self) -> None:
        """A worker takes messages."""
        worker = self._random.choice(self._living)
        worker.held.update(claim.receipt for claim in self._claimed(worker))

    def claim_unheard(self) -> None:
        """A claim is made whose reply is lost, perhaps by one that died or is another by now."""
        self._claimed(self._random.choice(self._everyone), late=True)

    def claim_twice(self) -> None:
        """A claim is sent a second time, as a client does that did not hear the reply."""
        worker = self._random.choice(self._living)
        first = worker.next_receipt
        worker.held.update(claim.receipt for claim in self._claimed(worker))
        last, worker.next_receipt = worker.next_receipt, first
        self.check()
        self._claimed(worker)
        worker.next_receipt = max(last, worker.next_receipt)

    def _claimed(self, worker: Worker, *, late: bool = False) -> list[Claim]:
        incarnation = self._random.choice(worker.incarnations) if late else worker.incarnations[-1]
        room = self._random.randint(1, 4)
        first, worker.next_receipt = worker.next_receipt, worker.next_receipt + room
        got = self._claims.claim(
            incarnation,
            QUEUES,
            receipt=first,
            room=room,
            size=self._random.choice([1, 20, 1_000]),
            alone_after=self._random.choice([1, NEVER_ALONE]),
            small=self._random.choice([4, 1_000]),
            large_room=self._random.choice([0, 1]),
        )
        assert (got is None) == (incarnation not in leases(self._state))
        after = look(self._redis)
        claims = got.claims if got else []
        for one in claims:
            assert held(after, incarnation)[one.receipt] == one.message
        if not claims:
            assert messages(after) == messages(self._state)
        return claims

    def start(self) -> None:
        """Jobs begin, or do not because the messages are another's."""
        incarnation, receipts = self._some(settles=False)
        assert self._claims.start(incarnation, *receipts) == self._holding(incarnation, receipts)

    def acknowledge(self) -> None:
        """Jobs are done."""
        incarnation, receipts = self._some()
        done = self._holding(incarnation, receipts)
        self._unfinished.subtract(held(self._state, incarnation)[receipt] for receipt in done)
        self._unfinished += Counter()  # without what is at zero
        assert self._claims.acknowledge(incarnation, *receipts) == len(done)

    def give_back(self) -> None:
        """Jobs are not begun."""
        incarnation, receipts = self._some()
        expected = len(self._holding(incarnation, receipts))
        assert self._claims.give_back(incarnation, *receipts) == expected

    def defer(self) -> None:
        """A job asks for another try."""
        incarnation, (receipt, *_) = self._some()
        told = self._claims.defer(
            incarnation, receipt, seconds=3_600, in_order=self._random.random() < 0.5
        )
        assert told == len(self._holding(incarnation, [receipt]))

    def bury(self) -> None:
        """A job is given up."""
        incarnation, (receipt, *_) = self._some()
        told = self._claims.bury(incarnation, receipt, reason="because")
        assert told == len(self._holding(incarnation, [receipt]))

    def _some(self, *, settles: bool = True) -> tuple[str, list[str]]:
        """Whom a command names: what its worker knows of, or, late, what may be any one's."""
        worker = self._random.choice(self._living)
        if worker.held and self._random.random() < 0.7:
            known = sorted(worker.held)
            receipts = self._random.sample(known, min(len(known), self._random.randint(1, 3)))
            if settles:
                worker.held.difference_update(receipts)
            return worker.incarnations[-1], receipts
        worker = self._random.choice(self._everyone)
        numbers = range(max(1, worker.next_receipt - 12), worker.next_receipt + 2)
        receipts = [str(number) for number in self._random.sample(numbers, 2)]
        return self._random.choice(worker.incarnations), receipts

    def _holding(self, incarnation: str, receipts: Sequence[str]) -> list[str]:
        return [receipt for receipt in receipts if receipt in held(self._state, incarnation)]

    def die(self) -> None:
        """A worker dies, and another starts."""
        self._living.remove(self._random.choice(self._living))
        self.join()

    def close(self) -> None:
        """A worker ends in order, and another starts; its close may be late, too."""
        worker = self._random.choice(self._everyone)
        self._claims.close(worker.incarnations[-1])
        if worker in self._living:
            self._living.remove(worker)
            self.join()

    # --- Time ------------------------------------------------------------------------------------

    def expire(self) -> None:
        """Time goes by, in which a worker is frozen, or dead."""
        self._time += 1
        if names := sorted(leases(self._state)):
            self._redis.zadd(LEASES, {self._random.choice(names): self._time})

    def renew(self) -> None:
        """A worker renews its lease, a late one too, and sees whose has run out."""
        name = self._random.choice(self._random.choice(self._everyone).incarnations)
        renewal = self._claims.renew(name)
        assert renewal.alive == (name in leases(self._state))
        if not renewal.alive:
            assert look(self._redis) == self._state
        self._seen.update(renewal.expired)

    def sweep(self) -> None:
        """Somebody gives back what the dead held, or a part of it; he may have looked long ago."""
        if not self._seen:
            return
        name = self._random.choice(sorted(self._seen))
        before = held(self._state, name)
        at_most = self._random.choice([1, 2, 100])
        left = self._claims.sweep(name, self._seen[name], at_most)
        if leases(self._state).get(name) == self._seen[name]:
            assert left == max(len(before) - at_most, 0)
        else:
            assert left == -1
            assert look(self._redis) == self._state

    def wake(self) -> None:
        """Time goes by, and what was deferred is due."""
        names = self._state.get(DUE, [])
        due = self._random.sample(names, min(len(names), 2))
        for name, _ in due:
            self._redis.zadd(DUE, {name: 0})
        assert self._claims.wake() == len(due)

    # --- The end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """One worker does all that is left, each message as it comes, and nothing is left over."""
        for name in leases(self._state):
            self._redis.zadd(LEASES, {name: self._time})
        for name, _ in self._state.get(DUE, []):
            self._redis.zadd(DUE, {name: 0})
        self._claims.open("the last")
        for name, deadline in self._claims.renew("the last").expired.items():
            assert self._claims.sweep(name, deadline, 1_000) == 0
        self._claims.wake()
        self.check()
        for letter, _ in self._state.get(DEAD, []):
            self._claims.requeue(letter.decode(), JOBS)
        receipt = 0
        while (
            got := self._claims.claim(
                "the last", QUEUES, receipt=receipt + 1, room=4, size=1_000, alone_after=1
            )
        ) and got.claims:
            receipt += len(got.claims)
            self._unfinished.subtract(claim.message for claim in got.claims)
            assert self._claims.acknowledge("the last", *(claim.receipt for claim in got.claims))
        assert not any(self._unfinished.values())
        assert look(self._redis).keys() <= {LEASES, DEAD}
        assert not look(self._redis).get(DEAD)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_whatever_happens_each_message_is_in_one_place(redis: Redis, seed: int) -> None:
    """Freezes, deaths, lost replies, late commands: no message is lost, or there twice."""
    Walk(redis, seed).go(STEPS)


BREAKS = {
    "a claim without a lease": (
        "if not redis.call('ZSCORE', leases, incarnation) then return false end\n",
        "",
    ),
    "a claim over another": (
        "or redis.call('HSETNX', held(incarnation), receipt, list .. '\\0' .. message) == 0",
        "or redis.call('HSET', held(incarnation), receipt, list .. '\\0' .. message) < 0",
    ),
    "a claim that takes before it notes": (
        "    local suspect = tried",
        "    redis.call('RPOP', list)\n    local suspect = tried",
    ),
    "a claim that leaves": ("redis.call('LTRIM', list, 0, -2)", ""),
    "a putting aside that throws away": (
        "redis.call('RPOPLPUSH', list, KEYS[aside])",
        "redis.call('RPOP', list)",
    ),
    "a start of another's": (
        "        mine[#mine + 1] = receipt\n    end",
        "    end\n    mine[#mine + 1] = receipt",
    ),
    "a command by another incarnation": (
        "function release(incarnation, receipt, in_order)",
        """function release(_, receipt, in_order)
        local incarnation = redis.call('ZRANGE', leases, 0, 0)[1] or ''""",
    ),
    "a release that leaves": ("    redis.call('HDEL', held(incarnation), receipt)\n", ""),
    "a release that was started still": ("redis.call('SREM', started(incarnation), receipt)", "0"),
    "a release that throws away": ("    put(parts(value))\n", ""),
    "an acknowledgement of what is not held": ("count = count + 1", "end do count = count + 1"),
    "tries at zero": ("digest, -1) <= 0", "digest, -1) < 0"),
    "a handover that forgets what is unwanted": ("give_back(former, receipt, true)", ""),
    "a handover that copies": ("            redis.call('HDEL', held(former), receipt)\n", ""),
    "a handover that forgets who started": ("redis.call('SREM', started(former), receipt)", "0"),
    "a lease that comes back": ("if alive == 1 then redis.call('ZADD'", "do redis.call('ZADD'"),
    "a former lease that stays unwatched": (
        "redis.call('HSET', held(incarnation), receipt, value)",
        "redis.call('HSET', held(former .. 'x'), receipt, value)",
    ),
    "a deferral that is not kept": (
        "redis.call('HSET', deferred, name",
        "redis.call('EXISTS', name",
    ),
    "a deferral without a time": ("redis.call('ZADD', due, now() + delay, name)", ""),
    "a waking that leaves": ("        redis.call('HDEL', deferred, name)\n", ""),
    "a waking that throws away": ("        put(queue, message)\n        redis", "redis"),
    "a burial that leaves": ("release(incarnation, receipt, false)\nreturn 1", "return 1"),
    "a burial of what is not held": (
        "if not value then return 0 end\nlocal queue, message = parts(value)\nbury",
        "value = value or 'jobs\\0'\nlocal queue, message = parts(value)\nbury",
    ),
    "a sweep of the living": ("or score + 0 ~= deadline + 0 or score + 0 > now()", ""),
    "a sweep by an old look": ("or score + 0 ~= deadline + 0", ""),
    "a sweep that ends before its end": ("if left == 0 then", "do"),
    "a requeue that leaves": (
        "return redis.call('XDEL', prefix .. 'dead', arguments[1])",
        "return 1",
    ),
    "a requeue that throws away": (
        "redis.call('RPUSH', fields.queue",
        "redis.call('EXISTS', fields.queue",
    ),
    "a close that leaves": (
        "    give_back(incarnation, receipt, true)\nend\nreturn redis",
        "end\nreturn redis",
    ),
}


@pytest.mark.parametrize(("right", "wrong"), BREAKS.values(), ids=BREAKS)
def test_the_walk_finds_what_is_broken(
    redis: Redis, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    """A script that is broken in one place is found by one of a few walks."""
    (name,) = [name for name, text in vars(claims).items() if right in str(text)]
    monkeypatch.setattr(claims, name, getattr(claims, name).replace(right, wrong))

    def found(seed: int) -> bool:
        redis.flushdb()
        try:
            Walk(redis, seed).go(STEPS)
        except AssertionError:
            return True
        return False

    assert any(map(found, range(SEEDS)))


# --- Each promise alone --------------------------------------------------------------------------


@pytest.fixture
def protocol(redis: Redis) -> Claims:
    """The scripts, with workers ``ann`` and ``bob``."""
    protocol = Claims(redis, lease=3_600)
    protocol.open("ann")
    protocol.open("bob")
    return protocol


def take(
    protocol: Claims,
    *,
    by: str = "ann",
    receipt: int = 1,
    alone_after: int = NEVER_ALONE,
    **limits: Any,
) -> list[Claim]:
    """What a worker that has a lease claims."""
    limits = {"room": 100, "size": 1_000} | limits
    got = protocol.claim(by, QUEUES, receipt=receipt, alone_after=alone_after, **limits)
    assert got is not None
    return got.claims


def ended(redis: Redis, name: str, deadline: float = 1) -> float:
    """The deadline of a worker for which time has gone by."""
    redis.zadd(LEASES, {name: deadline})
    return deadline


def test_equal_bytes_are_two_messages(redis: Redis, protocol: Claims) -> None:
    """Of two messages of the same bytes, and so of the same tag, each has an end of its own."""
    redis.lpush(JOBS, "same", "same")
    assert [claim.receipt for claim in take(protocol)] == ["1", "2"]
    protocol.acknowledge("ann", "1")
    assert held(look(redis), "ann") == {"2": b"same"}
    protocol.give_back("ann", "2")
    assert redis.lrange(JOBS, 0, -1) == [b"same"]


def test_messages_are_claimed_as_they_came_the_urgent_first(redis: Redis, protocol: Claims) -> None:
    """A claim goes through the queues in their order, and through each from its oldest message."""
    redis.lpush(JOBS, "1", "2")
    redis.lpush(URGENT, "3", "4")
    claims = take(protocol, room=3)
    assert [(claim.queue, claim.message) for claim in claims] == [
        (URGENT, b"3"),
        (URGENT, b"4"),
        (JOBS, b"1"),
    ]


Return = Callable[[Redis, Claims], object]

RETURNS: dict[str, Return] = {
    "returned": lambda _, protocol: protocol.give_back("ann", "1"),
    "closed": lambda _, protocol: protocol.close("ann"),
    "reopened": lambda _, protocol: protocol.open("ann again", ["ann"]),
    "swept": lambda redis, protocol: protocol.sweep("ann", ended(redis, "ann")),
    "woken": lambda _, protocol: (protocol.defer("ann", "1", seconds=0), protocol.wake()),
}


@pytest.mark.parametrize("goes_back", RETURNS.values(), ids=RETURNS)
def test_what_goes_back_is_next(redis: Redis, protocol: Claims, goes_back: Return) -> None:
    """However a message goes back, it goes to its own queue, before all that waits there."""
    redis.lpush(URGENT, "first", "second")
    take(protocol, room=1)
    goes_back(redis, protocol)
    assert redis.lrange(URGENT, 0, -1) == [b"second", b"first"]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (10, 1), (11, 2), (21, 3)])
def test_a_claim_ends_at_its_size(redis: Redis, protocol: Claims, size: int, count: int) -> None:
    """No more is claimed once so many bytes are, and one message always is."""
    redis.lpush(JOBS, *["0123456789"] * 4)
    assert len(take(protocol, size=size)) == count


def test_a_suspect_is_claimed_alone(redis: Redis, protocol: Claims) -> None:
    """What was tried so often is taken with no other, by a worker that holds no other."""
    redis.lpush(JOBS, "suspect")
    take(protocol)
    protocol.start("ann", "1")
    protocol.sweep("ann", ended(redis, "ann"))
    redis.lpush(JOBS, "other")
    redis.lpush(URGENT, "urgent")
    assert [claim.message for claim in take(protocol, by="bob", alone_after=1)] == [b"urgent"]
    assert take(protocol, by="bob", receipt=2, alone_after=1) == []
    protocol.acknowledge("bob", "1")
    (suspect,) = take(protocol, by="bob", receipt=2, alone_after=1)
    assert (suspect.message, suspect.tries) == (b"suspect", 1)


def test_many_are_acknowledged_in_one_call(redis: Redis, protocol: Claims) -> None:
    """The reply counts those that were held, each once."""
    redis.lpush(JOBS, *"abcd")
    take(protocol)
    assert protocol.acknowledge("ann", "1", "3", "3", "99") == 2
    assert held(look(redis), "ann") == {"2": b"b", "4": b"d"}


def test_a_start_counts_once_and_answers_what_is_held(redis: Redis, protocol: Claims) -> None:
    """A try that is told twice counts once; what is another's by now is not answered."""
    redis.lpush(JOBS, "a", "b")
    take(protocol, room=1)
    assert protocol.start("ann", "1", "2") == ["1"]
    assert protocol.start("ann", "1", "1") == ["1", "1"]
    protocol.sweep("ann", ended(redis, "ann"))
    assert protocol.start("ann", "1") == []
    assert [claim.tries for claim in take(protocol, by="bob")] == [1, 0]


def test_only_tries_that_did_not_end_in_order_count(redis: Redis, protocol: Claims) -> None:
    """A return and a deferral in order are no tries; a deferral out of order and a death are."""
    redis.lpush(JOBS, "a")
    counts = []
    for receipt, in_order in enumerate([True, False, True, None, True], 1):
        (claim,) = take(protocol, receipt=receipt)
        counts.append((claim.tries, claim.deferrals))
        protocol.start("ann", claim.receipt)
        if in_order is None:
            protocol.give_back("ann", claim.receipt)
            continue
        protocol.defer("ann", claim.receipt, seconds=0, in_order=in_order)
        protocol.wake()
    assert counts == [(0, 0), (0, 1), (1, 1), (1, 2), (1, 2)]
    take(protocol, receipt=6)
    protocol.start("ann", "6")
    protocol.sweep("ann", ended(redis, "ann"))
    (claim,) = take(protocol, by="bob")
    assert (claim.tries, claim.deferrals) == (2, 3)


def test_what_was_acknowledged_begins_anew(redis: Redis, protocol: Claims) -> None:
    """No count of a message that is done stays for another of the same bytes."""
    redis.lpush(JOBS, "a")
    take(protocol)
    protocol.start("ann", "1")
    protocol.defer("ann", "1", seconds=0, in_order=False)
    protocol.wake()
    (claim,) = take(protocol, receipt=2)
    assert claim.tries == 1
    protocol.acknowledge("ann", "2")
    assert look(redis).keys() == {LEASES}


def letters(redis: Redis) -> list[tuple[str, dict[bytes, bytes]]]:
    """The dead letters, each with its id."""
    return [(name.decode(), fields) for name, fields in look(redis).get(DEAD, [])]


def test_a_dead_letter_tells_all_and_can_be_tried_again(redis: Redis, protocol: Claims) -> None:
    """It has the message, its queue, its size, its attempts, and begins anew from its own queue."""
    redis.lpush(URGENT, b"\xff\0'")
    take(protocol)
    protocol.start("ann", "1")
    protocol.defer("ann", "1", seconds=0, in_order=False)
    protocol.wake()
    take(protocol, receipt=2)
    protocol.start("ann", "2")
    protocol.defer("ann", "2", seconds=0)
    protocol.wake()
    take(protocol, receipt=3)
    protocol.start("ann", "3")
    assert protocol.bury("ann", "3", reason="because", job_id="j", task="t") == 1
    ((name, letter),) = letters(redis)
    seconds: Any = redis.time()
    assert abs(float(letter.pop(b"time")) - seconds[0]) < 60
    assert letter == {
        b"job_id": b"j",
        b"task": b"t",
        b"reason": b"because",
        b"attempts": b"3",
        b"size": b"3",
        b"queue": URGENT.encode(),
        b"message": b"\xff\0'",
    }
    assert protocol.requeue(name, JOBS) == 1
    assert protocol.requeue(name, JOBS) == 0
    assert take(protocol, receipt=4) == [Claim("4", URGENT, b"\xff\0'", 0, 0)]


def test_a_letter_that_names_no_queue_goes_where_it_is_told(redis: Redis, protocol: Claims) -> None:
    """A dead letter of an earlier version names no queue."""
    name: Any = redis.xadd(DEAD, {"message": "a"})
    assert protocol.requeue(name.decode(), JOBS) == 1
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


ASIDE = "jobs\x06\x169"
LARGE_LAST = (JOBS, ASIDE)


def take_small(
    protocol: Claims, receipt: int, *, large_room: int, look_aside: bool = True
) -> tuple[list[bytes], bool]:
    """What messages a worker gets to whom those of more than 4 bytes are large; do more wait?"""
    got = protocol.claim(
        "ann",
        LARGE_LAST,
        receipt=receipt,
        room=100,
        size=1_000,
        alone_after=NEVER_ALONE,
        small=4,
        large_room=large_room,
        look_aside=look_aside,
    )
    assert got is not None
    return [claim.message for claim in got.claims], got.large_wait


def test_small_messages_pass_large_ones_without_room(redis: Redis, protocol: Claims) -> None:
    """Without room for a large message those that are met stand aside, in their order."""
    redis.lpush(JOBS, "large 1", "a", "large 2", "b", "large 3")
    assert take_small(protocol, 1, large_room=0) == ([b"a", b"b"], True)
    assert redis.lrange(ASIDE, 0, -1) == [b"large 3", b"large 2", b"large 1"]
    assert redis.llen(JOBS) == 0


def test_what_stands_aside_comes_first(redis: Redis, protocol: Claims) -> None:
    """With room again the one that waited longest is taken, before later ones, small or large."""
    redis.lpush(JOBS, "large 1", "large 2", "a")
    take_small(protocol, 1, large_room=0)
    redis.lpush(JOBS, "b", "large 3")
    assert take_small(protocol, 2, large_room=1) == ([b"large 1"], True)
    assert take_small(protocol, 3, large_room=1) == ([b"large 2"], False)
    assert take_small(protocol, 4, large_room=1) == ([b"b"], False)
    assert take_small(protocol, 5, large_room=1) == ([b"large 3"], False)


def test_small_ones_of_the_lowest_priority_come_last(redis: Redis, protocol: Claims) -> None:
    """Where large ones stand aside there are also small ones that a producer put there."""
    redis.lpush(ASIDE, "z")
    redis.lpush(JOBS, "a")
    assert take_small(protocol, 1, large_room=0) == ([b"a", b"z"], False)


def test_what_stands_aside_is_not_looked_at(redis: Redis, protocol: Claims) -> None:
    """Where it is not to, only the other lists are looked at; that more wait is told."""
    redis.lpush(ASIDE, "large 1", "z")
    redis.lpush(JOBS, "a", "large 2", "b")
    got = take_small(protocol, 1, large_room=0, look_aside=False)
    assert got == ([b"a", b"b"], True)
    assert redis.lrange(ASIDE, 0, -1) == [b"large 2", b"z", b"large 1"]


def test_long_messages_are_told_apart_by_their_ends(redis: Redis, protocol: Claims) -> None:
    """The tries of a long message are its own, where another differs in length or at either end."""
    filling = b"." * 20_000
    redis.lpush(JOBS, b"a" + filling, b"b" + filling, b"a" + filling + b"b", b"a" + filling + b".")
    begun = take(protocol, receipt=1, room=1)
    protocol.start("ann", "1")
    protocol.defer("ann", "1", seconds=0, in_order=False)
    protocol.wake()
    assert begun[0].tries == 0
    assert [claim.tries for claim in take(protocol, receipt=2, size=1_000_000)] == [1, 0, 0, 0]


def test_a_large_message_comes_alone(redis: Redis, protocol: Claims) -> None:
    """Small ones before it are taken without it, and it without those behind."""
    redis.lpush(JOBS, "a", "large", "b")
    assert take_small(protocol, 1, large_room=1) == ([b"a"], False)
    assert take_small(protocol, 2, large_room=1) == ([b"large"], False)
    assert take_small(protocol, 3, large_room=0) == ([b"b"], False)


def test_a_lost_lease_is_told(redis: Redis, protocol: Claims) -> None:
    """Whoever was swept learns it from a claim and from a renewal, and gets nothing."""
    redis.lpush(JOBS, "a")
    protocol.sweep("ann", ended(redis, "ann"))
    claim = protocol.claim("ann", QUEUES, receipt=1, room=1, size=1, alone_after=1)
    assert claim is None
    assert not protocol.renew("ann").alive
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


def test_a_late_renewal_goes_on(redis: Redis, protocol: Claims) -> None:
    """A lease that ran out and that nobody swept is renewed, and a sweep then changes nothing."""
    redis.lpush(JOBS, "a")
    take(protocol)
    deadline = ended(redis, "ann")
    assert protocol.renew("bob").expired == {"ann": deadline}
    assert protocol.renew("ann").alive
    before = look(redis)
    assert protocol.sweep("ann", deadline) == -1
    assert protocol.sweep("ann", leases(before)["ann"]) == -1
    assert look(redis) == before
    assert protocol.renew("bob").expired == {}


def test_a_sweep_in_parts_is_ended_by_another(redis: Redis, protocol: Claims) -> None:
    """Where a sweeper is gone in the midst, the lease is seen still, and the next one goes on."""
    redis.lpush(JOBS, *"abcde")
    take(protocol)
    protocol.start("ann", "1", "2", "3")
    deadline = ended(redis, "ann")
    assert protocol.sweep("ann", deadline, 2) == 3
    assert protocol.renew("bob").expired == {"ann": deadline}
    assert protocol.sweep("ann", deadline, 2) == 1
    assert protocol.sweep("ann", deadline, 2) == 0
    assert protocol.sweep("ann", deadline, 2) == -1
    assert messages(look(redis)) == Counter({bytes([letter]): 1 for letter in b"abcde"})
    assert leases(look(redis)).keys() == {"bob"}


def test_what_is_deferred_comes_when_it_is_due(redis: Redis, protocol: Claims) -> None:
    """A deferred message is nobody's until its time, and its worker's death changes nothing."""
    redis.lpush(JOBS, "a", "b")
    take(protocol)
    protocol.defer("ann", "1", seconds=3_600)
    protocol.defer("ann", "2", seconds=0.05)
    protocol.sweep("ann", ended(redis, "ann"))
    until(lambda: protocol.wake() == 1)
    assert redis.lrange(JOBS, 0, -1) == [b"b"]
    assert [*look(redis)[f"{PREFIX}deferred"].values()] == [f"{JOBS}\0a".encode()]


@pytest.mark.parametrize("off", [-600, 600])
def test_the_clients_clock_is_of_no_account(
    redis: Redis, protocol: Claims, monkeypatch: pytest.MonkeyPatch, off: int
) -> None:
    """A client whose clock is ten minutes off ends nobody's lease and wakes nothing early."""
    redis.lpush(JOBS, "a")
    take(protocol)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + off)
    minute = Claims(redis, lease=60)
    minute.open("carl")
    minute.renew("bob")
    assert minute.renew("carl").expired == {}
    seconds: Any = redis.time()
    for name in ("bob", "carl"):
        assert seconds[0] < leases(look(redis))[name] / 1_000 <= seconds[0] + 61
    minute.defer("ann", "1", seconds=60)
    assert minute.wake() == 0


def test_a_full_server_drains(redis: Redis, protocol: Claims) -> None:
    """Where Redis takes nothing more, all that moves a message goes through all the same."""
    redis.lpush(JOBS, *"abcdef")
    protocol.open("gone")
    take(protocol, by="gone", room=1)
    deadline = ended(redis, "gone")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(ResponseError, match="maxmemory"):
            redis.lpush(JOBS, "g")
        protocol.open("carl", ["bob"])
        assert protocol.renew("ann").alive
        assert len(take(protocol)) == 5
        assert protocol.start("ann", "1") == ["1"]
        assert protocol.acknowledge("ann", "1") == 1
        assert protocol.defer("ann", "2", seconds=0) == 1
        assert protocol.wake() == 1
        assert protocol.bury("ann", "3", reason="because") == 1
        assert protocol.give_back("ann", "4") == 1
        assert protocol.sweep("gone", deadline) == 0
        protocol.put(JOBS, b"h")
        ((name, _),) = letters(redis)
        assert protocol.requeue(name, JOBS) == 1
        protocol.close("carl")
    finally:
        redis.config_set("maxmemory", 0)
    assert messages(look(redis)) == Counter({bytes([letter]): 1 for letter in b"acdefh"})


@pytest.mark.parametrize("goes_back", RETURNS.values(), ids=RETURNS)
def test_a_queue_that_is_none_any_more_loses_nothing(
    redis: Redis, protocol: Claims, goes_back: Return
) -> None:
    """What cannot go back, for its queue's key became another type, is a dead letter."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "no list")
    goes_back(redis, protocol)
    ((_, letter),) = letters(redis)
    assert (letter[b"message"], letter[b"reason"]) == (b"a", b"Its queue is no list any more.")
    assert take(protocol, by="bob") == []


@pytest.mark.parametrize("goes_back", RETURNS.values(), ids=RETURNS)
def test_what_can_go_nowhere_stays_where_it_is(
    redis: Redis, protocol: Claims, goes_back: Return
) -> None:
    """Where the dead letters' key is no stream either, the move is refused and nothing is lost."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "no list")
    redis.set(DEAD, "no stream")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        goes_back(redis, protocol)
    state = look(redis)
    values = [
        *state.get(f"{PREFIX}held:ann", {}).values(),
        *state.get(f"{PREFIX}deferred", {}).values(),
    ]
    assert values == [f"{JOBS}\0a".encode()]
