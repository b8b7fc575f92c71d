"""A random walk of workers, producers and operators over the queue's scripts, with a model."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence

from redis import Redis

from tests.support.claims import (
    CLOCK,
    DEFERRALS,
    DEFERRED,
    DUE,
    ISOLATED,
    JOBS,
    LATER,
    LEASES,
    QUEUES,
    TRIES,
    State,
    by_suffix,
    claimed,
    contents,
    counters,
    counts,
    digest_of,
    messages,
)
from worker.broker.claims import ANY_SIZE, DEAD, PREFIX, Action, Claim, Claims, Disposition

MESSAGES = (b"", b"\0", b"\xff\xfe\0'", b'it\'s "so" \\0 ]]', b'{"id": "1"}', b'{"id": "2"}')
"""Few, so that many messages of one walk have equal bytes."""


class Worker:
    """The state that one worker process keeps; Redis may have a newer one.

    Attributes:
        sessions: All of its session IDs; the last one is current.
        claimed: The tags of unsettled claims whose reply it received.
        next_tag: The next unused delivery tag.
    """

    def __init__(self) -> None:
        self.sessions: list[str] = []
        self.claimed: set[str] = set()
        self.next_tag = 1


class Walk:
    """Random actions of workers, producers and operators; a model predicts each effect."""

    def __init__(self, redis: Redis, client: Redis, seed: int) -> None:
        """Begin with two workers and no message.

        Args:
            redis: Reads the database.
            client: Runs the scripts.
            seed: Of the random choices.
        """
        self._redis = redis
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._claims = Claims(client)
        self._unfinished = Counter[bytes]()
        self._attempts = Counter[bytes]()
        self._retries = Counter[bytes]()
        self._seen: dict[str, float] = {}
        self._names = 0
        self._everyone: list[Worker] = []
        self._living: list[Worker] = []
        self._state: State = contents(redis)
        for _ in range(2):
            self.join()
        self.check()

    def go(self, steps: int) -> None:
        """Take random steps, check the invariants after each, then execute what is left."""
        walks = (
            *(self.publish, self.publish, self.publish, self.claim, self.claim, self.claim),
            *(self.settle, self.settle, self.settle, self.wake, self.requeue_dead_letter),
            *(self.heartbeat, self.heartbeat, self.take_over, self.take_over, self.take_over),
            *(self.claim_without_reply, self.claim_twice, self.reconnect, self.die, self.close),
        )
        for _ in range(steps):
            self._random.choice(walks)()
            self.check()
        self.finish()

    def check(self) -> None:
        """Check that each unfinished message is in one place, and that no place is orphaned."""
        self._state = contents(self._redis)
        assert messages(self._state) == self._unfinished
        assert by_suffix(self._state, "held:").keys() <= counters(self._state).keys()
        assert {name for name, _ in self._state.get(DUE, [])} == set(self._state.get(DEFERRED, {}))
        for key, model in ((TRIES, self._attempts), (DEFERRALS, self._retries)):
            assert counts(self._state, key) == {digest_of(one): model[one] for one in +model}

    # --- Producers and operators ---------------------------------------------------------------

    def publish(self) -> None:
        """A producer sends a message."""
        message = self._random.choice(MESSAGES)
        self._redis.lpush(self._random.choice(QUEUES), message)
        self._unfinished[message] += 1

    def requeue_dead_letter(self) -> None:
        """An operator requeues a dead letter."""
        letters = self._state.get(DEAD, [])
        if letters:
            name, letter = self._random.choice(letters)
            self._forget(letter[b"message"])
            assert self._claims.requeue_dead_letters([(name.decode(), JOBS)]) == [True]

    def _forget(self, message: bytes) -> None:
        self._attempts.pop(message, None)
        self._retries.pop(message, None)

    # --- What one worker does ------------------------------------------------------------------

    def join(self) -> None:
        """A worker starts."""
        worker = Worker()
        self._everyone.append(worker)
        self._living.append(worker)
        self._open(worker, [])

    def reconnect(self) -> None:
        """A worker opens a new session, which keeps the claims that it knows of and still has."""
        worker = self._random.choice(self._living)
        formers = worker.sessions[-self._random.randint(1, 2) :]
        kept = {tag for name in formers for tag in claimed(self._state, name)} & worker.claimed
        assert self._open(worker, formers) == kept
        worker.claimed = kept
        assert not counters(contents(self._redis)).keys() & set(formers)

    def _open(self, worker: Worker, formers: Sequence[str]) -> set[str]:
        self._names += 1
        worker.sessions.append(f"session-{self._names}")
        return self._claims.open(worker.sessions[-1], formers, worker.claimed)

    def claim(self) -> None:
        """A worker claims messages."""
        worker = self._random.choice(self._living)
        worker.claimed.update(claim.tag for claim in self._claimed(worker))

    def claim_without_reply(self) -> None:
        """A claim's reply is lost, or the claim is late: of a dead worker or a former session."""
        self._claimed(self._random.choice(self._everyone), late=True)

    def claim_twice(self) -> None:
        """A claim is sent twice, as a client does that retries after a timeout."""
        worker = self._random.choice(self._living)
        first = worker.next_tag
        worker.claimed.update(claim.tag for claim in self._claimed(worker))
        last, worker.next_tag = worker.next_tag, first
        self.check()
        self._claimed(worker)
        worker.next_tag = max(last, worker.next_tag)

    def _claimed(self, worker: Worker, *, late: bool = False) -> list[Claim]:
        session = self._random.choice(worker.sessions) if late else worker.sessions[-1]
        room = self._random.randint(1, 4)
        first, worker.next_tag = worker.next_tag, worker.next_tag + room
        got = self._claims.claim(
            session,
            QUEUES,
            first_tag=first,
            room=room,
            size=self._random.choice([1, 20, 1_000]),
            small=self._random.choice([4, 1_000]),
            largest=self._random.choice([0, 1_000, ANY_SIZE]),
            large_size=self._random.choice([0, 1_000]),
            read_lanes=self._random.random() < 0.8,
            isolated_room=self._random.choice([0, 1]),
        )
        assert (got is None) == (session not in counters(self._state))
        after = contents(self._redis)
        claims = got.claims if got else []
        assert len(claims) <= room
        for one in claims:
            value = after[f"{PREFIX}held:{session}"][one.tag.encode()]
            assert value == one.queue.encode() + b"\0" + one.message
            assert one.queue in QUEUES
            assert one.attempts == self._attempts[one.message]
            assert one.retries == self._retries[one.message]
        if any(one.attempts for one in claims):
            assert len(claims) == 1
            one = claims[0]
            assert self._state.get(ISOLATED, [b""])[-1] == one.queue.encode() + b"\0" + one.message
        if got:
            assert got.isolated == len(after.get(ISOLATED, []))
        return claims

    def settle(self) -> None:
        """A worker settles deliveries with random dispositions; some settlements are late."""
        session, tags = self._some()
        dispositions = {
            tag: Disposition(
                self._random.choice(list(Action)), LATER, attempts=self._random.randint(0, 9)
            )
            for tag in tags
        }
        before = claimed(self._state, session)
        letters = []
        for tag, disposition in dispositions.items():
            if tag not in before:
                continue
            message = before.pop(tag)
            match disposition.action:
                case Action.ACKNOWLEDGE:
                    self._unfinished -= Counter([message])
                    self._forget(message)
                case Action.RETRY:
                    self._retries[message] += 1
                case Action.FAILED_ATTEMPT:
                    self._attempts[message] += 1
                case Action.DEAD_LETTER:
                    letters.append((message, disposition.attempts))
                    self._forget(message)
        self._claims.settle(session, dispositions)
        after = contents(self._redis)
        assert claimed(after, session) == before
        written = after.get(DEAD, [])[len(self._state.get(DEAD, [])) :]
        assert letters == [(one[b"message"], int(one[b"attempts"])) for _, one in written]

    def _some(self) -> tuple[str, list[str]]:
        """Choose deliveries of a worker or, for a late command, of any session of any worker."""
        worker = self._random.choice(self._living)
        if worker.claimed and self._random.random() < 0.7:
            known = sorted(worker.claimed)
            tags = self._random.sample(known, min(len(known), self._random.randint(1, 3)))
            worker.claimed.difference_update(tags)
            return worker.sessions[-1], tags
        worker = self._random.choice(self._everyone)
        numbers = range(max(1, worker.next_tag - 12), worker.next_tag + 2)
        return self._random.choice(worker.sessions), [
            str(number) for number in self._random.sample(numbers, 2)
        ]

    def die(self) -> None:
        """A worker ends without closing its session, and another starts."""
        self._living.remove(self._random.choice(self._living))
        self.join()

    def close(self) -> None:
        """A worker closes its session, perhaps late, and another worker starts."""
        worker = self._random.choice(self._everyone)
        self._claims.close(worker.sessions[-1])
        assert worker.sessions[-1] not in counters(contents(self._redis))
        if worker in self._living:
            self._living.remove(worker)
            self.join()

    # --- Time ------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """A session renews its lease, perhaps late; a later takeover may use the counters."""
        name = self._random.choice(self._random.choice(self._everyone).sessions)
        before = counters(self._state)
        heartbeat = self._claims.heartbeat(name)
        assert heartbeat.alive == (name in before)
        assert heartbeat.claimed == len(claimed(self._state, name))
        assert heartbeat.sessions == before | ({name: before[name] + 1} if name in before else {})
        assert counters(contents(self._redis)) == heartbeat.sessions
        if self._random.random() < 0.5:
            self._seen.update(heartbeat.sessions)

    def take_over(self) -> None:
        """Take over a session in one step of several, with a counter that was observed earlier."""
        if not self._seen:
            return
        name = self._random.choice(sorted(self._seen))
        before = claimed(self._state, name)
        reply = self._claims.take_over(name, self._seen[name])
        after = contents(self._redis)
        if counters(self._state).get(name) != self._seen[name]:
            assert reply == -1
            assert after == self._state
            return
        moved = [before[tag] for tag in before.keys() - claimed(after, name)]
        self._attempts.update(moved)
        assert moved or not before
        assert (reply == 0) == (name not in counters(after))
        assert reply == 1 or not claimed(after, name)

    def wake(self) -> None:
        """Make some of the delayed messages due, and wake them."""
        names = self._state.get(DUE, [])
        due = {name for name, _ in self._random.sample(names, min(len(names), 2))}
        for name in due:
            self._redis.zadd(DUE, {name: 0})
        more = self._claims.wake()
        left = {name for name, _ in contents(self._redis).get(DUE, [])}
        assert left >= {name for name, _ in names} - due
        assert len(left) < len(names) or not due
        assert more or not left & due
        for name in left & due:
            self._redis.zadd(DUE, {name: time.time() * 1_000 + LATER * 1_000})

    # --- The end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Execute all messages that are left with one worker; no key of a message remains."""
        for name, _ in self._state.get(DUE, []):
            self._redis.zadd(DUE, {name: 0})
        self._claims.open("the last")
        for name, counter in self._claims.heartbeat("the last").sessions.items():
            if name != "the last":
                while self._claims.take_over(name, counter) > 0:
                    pass
        while self._claims.wake():
            pass
        for name, _ in contents(self._redis).get(DEAD, []):
            self._claims.requeue_dead_letters([(name.decode(), JOBS)])
        tag = 0
        while got := self._claims.claim("the last", QUEUES, first_tag=tag + 1, room=4, size=1_000):
            if not got.claims and not got.isolated:
                break
            tag += len(got.claims)
            self._unfinished -= Counter(claim.message for claim in got.claims)
            done = Disposition(Action.ACKNOWLEDGE)
            self._claims.settle("the last", {claim.tag: done for claim in got.claims})
        assert not self._unfinished
        assert contents(self._redis).keys() <= {LEASES, DEAD, CLOCK}
        assert not contents(self._redis).get(DEAD)
