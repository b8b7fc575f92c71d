"""The queue's scripts: a random walk checks them against a model; then each promise by itself."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError

from devstack.servers import LocalStack
from tests.support.stores import until
from worker.broker.claims import ANY_SIZE, DEAD, PREFIX, Action, Claim, Claimed, Claims, Disposition

SEEDS = int(os.environ.get("CLAIMS_SEEDS", "8"))
STEPS = 300
DATABASE = 13
"""Number of the Redis database."""

URGENT, JOBS, LANE = "jobs\x06\x163", "jobs", "jobs\x06\x169"
QUEUES = (URGENT, JOBS, LANE)
"""By priority; the last one is the low-priority lane."""
MESSAGES = (b"", b"\0", b"\xff\xfe\0'", b'it\'s "so" \\0 ]]', b'{"id": "1"}', b'{"id": "2"}')
"""So few that many in one walk are equal."""

LEASES, DUE, DEFERRED = f"{PREFIX}leases", f"{PREFIX}due", f"{PREFIX}deferred"
ISOLATED, TRIES, DEFERRALS = f"{PREFIX}isolated", f"{PREFIX}tries", f"{PREFIX}deferrals"
CLOCK = f"{PREFIX}clock"
BYTES_PER_SCRIPT = "local bytes_left = 4 * 1024 * 1024"
FETCHED_BYTES = "local fetched_bytes = 1024 * 1024"
LATER = 3_600

State = dict[str, Any]


class EditedRedis(Redis):
    """A client that edits each script before it registers it."""

    def __init__(self, edits: Mapping[str, str], **options: Any) -> None:
        super().__init__(**options)
        self._edits = edits
        self.edited: set[str] = set()
        self._scripts_run = 0

    def register_script(self, script: Any) -> Any:
        """Register the edited script."""
        for right, wrong in self._edits.items():
            if right in script:
                self.edited.add(right)
                script = script.replace(right, wrong)
        return super().register_script(script)

    def evalsha(self, *args: Any, **options: Any) -> Any:
        """Run a script; one that is broken may be repeated for ever."""
        self._scripts_run += 1
        assert self._scripts_run < 100 * STEPS
        return super().evalsha(*args, **options)


@pytest.fixture
def path(stack: LocalStack) -> str:
    """The server's socket."""
    return stack.broker_url.removeprefix("redis+socket://")


@pytest.fixture
def redis(path: str) -> Iterator[Redis]:
    """An empty database."""
    with Redis(unix_socket_path=path, db=DATABASE) as redis:
        redis.flushdb()
        yield redis


def look(redis: Redis) -> State:
    """The contents of the database, by key."""
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
    """The contents of the keys whose names start so, by the rest of the name."""
    start = PREFIX + name
    return {key.removeprefix(start): state[key] for key in state if key.startswith(start)}


def message_of(value: bytes) -> bytes:
    """The message of a value that also names its origin queue."""
    return value.partition(b"\0")[2]


def claimed(state: State, session: str) -> dict[str, bytes]:
    """The messages that a session has claimed, by delivery tag."""
    values = state.get(f"{PREFIX}held:{session}", {})
    return {tag.decode(): message_of(value) for tag, value in values.items()}


def counters(state: State) -> dict[str, float]:
    """The heartbeat counters, by session."""
    return {name.decode(): counter for name, counter in state.get(LEASES, [])}


def counts(state: State, key: str) -> dict[bytes, int]:
    """What a hash counts, by digest."""
    return {digest: int(count) for digest, count in state.get(key, {}).items()}


def digest_of(message: bytes) -> bytes:
    """The digest of a short message."""
    return hashlib.sha1(message).hexdigest().encode()  # noqa: S324 - no security


def messages(state: State) -> Counter[bytes]:
    """All messages, with the number of places that each is in."""
    everywhere = Counter[bytes]()
    for queue in QUEUES:
        everywhere.update(state.get(queue, []))
    for values in (*of(state, "held:").values(), state.get(DEFERRED, {})):
        everywhere.update(map(message_of, values.values()))
    everywhere.update(map(message_of, state.get(ISOLATED, [])))
    everywhere.update(letter[b"message"] for _, letter in state.get(DEAD, []))
    return everywhere


class Worker:
    """What one worker process knows; Redis may know better.

    Attributes:
        sessions: All that it ever had; the last is current.
        claimed: The tags of claims whose reply it received, and that it has not settled.
        next_tag: Never used before.
    """

    def __init__(self) -> None:
        self.sessions: list[str] = []
        self.claimed: set[str] = set()
        self.next_tag = 1


class Walk:
    """Workers, producers and operators act in a random order; a model predicts each effect."""

    def __init__(self, redis: Redis, client: Redis, seed: int) -> None:
        """Begin with two workers and no message.

        Args:
            redis: Looks at the database.
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
        self._state: State = look(redis)
        for _ in range(2):
            self.join()
        self.check()

    def go(self, steps: int) -> None:
        """Take random steps, check after each, then execute what is left."""
        walks = (
            *(self.publish, self.publish, self.publish, self.claim, self.claim, self.claim),
            *(self.settle, self.settle, self.settle, self.wake, self.requeue_dead_letter),
            *(self.heartbeat, self.heartbeat, self.take_over, self.take_over, self.take_over),
            *(self.claim_unheard, self.claim_twice, self.reconnect, self.die, self.close),
        )
        for _ in range(steps):
            self._random.choice(walks)()
            self.check()
        self.finish()

    def check(self) -> None:
        """Each unfinished message is in one place, and each place has a worker that looks there."""
        self._state = look(self._redis)
        assert messages(self._state) == self._unfinished
        assert of(self._state, "held:").keys() <= counters(self._state).keys()
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
            assert self._claims.requeue_dead_letter(name.decode(), JOBS) == 1

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
        """A worker continues in a new session with the claims that it knows of and still has."""
        worker = self._random.choice(self._living)
        formers = worker.sessions[-self._random.randint(1, 2) :]
        kept = {tag for name in formers for tag in claimed(self._state, name)} & worker.claimed
        assert self._open(worker, formers) == kept
        worker.claimed = kept
        assert not counters(look(self._redis)).keys() & set(formers)

    def _open(self, worker: Worker, formers: Sequence[str]) -> set[str]:
        self._names += 1
        worker.sessions.append(f"session-{self._names}")
        return self._claims.open(worker.sessions[-1], formers, worker.claimed)

    def claim(self) -> None:
        """A worker claims messages."""
        worker = self._random.choice(self._living)
        worker.claimed.update(claim.tag for claim in self._claimed(worker))

    def claim_unheard(self) -> None:
        """A claim's reply is lost, or it is late: from a dead worker or a former session."""
        self._claimed(self._random.choice(self._everyone), late=True)

    def claim_twice(self) -> None:
        """A claim is sent twice, as by a client that repeats it when no reply comes."""
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
        after = look(self._redis)
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
        """Jobs end in one way or another; late settlements among them."""
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
        after = look(self._redis)
        assert claimed(after, session) == before
        written = after.get(DEAD, [])[len(self._state.get(DEAD, [])) :]
        assert letters == [(one[b"message"], int(one[b"attempts"])) for _, one in written]

    def _some(self) -> tuple[str, list[str]]:
        """Deliveries of a worker, or, as in a late command, of any session of any worker."""
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
        """A worker dies, and another starts."""
        self._living.remove(self._random.choice(self._living))
        self.join()

    def close(self) -> None:
        """A worker stops in order, late perhaps, and another starts."""
        worker = self._random.choice(self._everyone)
        self._claims.close(worker.sessions[-1])
        assert worker.sessions[-1] not in counters(look(self._redis))
        if worker in self._living:
            self._living.remove(worker)
            self.join()

    # --- Time ------------------------------------------------------------------------------------

    def heartbeat(self) -> None:
        """A worker renews its lease, a late one too; some observe all counters and act later."""
        name = self._random.choice(self._random.choice(self._everyone).sessions)
        before = counters(self._state)
        heartbeat = self._claims.heartbeat(name)
        assert heartbeat.alive == (name in before)
        assert heartbeat.claimed == len(claimed(self._state, name))
        assert heartbeat.sessions == before | ({name: before[name] + 1} if name in before else {})
        assert counters(look(self._redis)) == heartbeat.sessions
        if self._random.random() < 0.5:
            self._seen.update(heartbeat.sessions)

    def take_over(self) -> None:
        """A worker takes over a session, in one step of several, as it observed it once."""
        if not self._seen:
            return
        name = self._random.choice(sorted(self._seen))
        before = claimed(self._state, name)
        reply = self._claims.take_over(name, self._seen[name])
        after = look(self._redis)
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
        """Some of the delayed messages are due."""
        names = self._state.get(DUE, [])
        due = {name for name, _ in self._random.sample(names, min(len(names), 2))}
        for name in due:
            self._redis.zadd(DUE, {name: 0})
        more = self._claims.wake()
        left = {name for name, _ in look(self._redis).get(DUE, [])}
        assert left >= {name for name, _ in names} - due
        assert len(left) < len(names) or not due
        assert more or not left & due
        for name in left & due:
            self._redis.zadd(DUE, {name: time.time() * 1_000 + LATER * 1_000})

    # --- The end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """One worker executes all that is left, and no key of a message remains."""
        for name, _ in self._state.get(DUE, []):
            self._redis.zadd(DUE, {name: 0})
        self._claims.open("the last")
        for name, counter in self._claims.heartbeat("the last").sessions.items():
            if name != "the last":
                while self._claims.take_over(name, counter) > 0:
                    pass
        while self._claims.wake():
            pass
        for name, _ in look(self._redis).get(DEAD, []):
            self._claims.requeue_dead_letter(name.decode(), JOBS)
        tag = 0
        while got := self._claims.claim("the last", QUEUES, first_tag=tag + 1, room=4, size=1_000):
            if not got.claims and not got.isolated:
                break
            tag += len(got.claims)
            self._unfinished -= Counter(claim.message for claim in got.claims)
            done = Disposition(Action.ACKNOWLEDGE)
            self._claims.settle("the last", {claim.tag: done for claim in got.claims})
        assert not self._unfinished
        assert look(self._redis).keys() <= {LEASES, DEAD, CLOCK}
        assert not look(self._redis).get(DEAD)


def few_bytes(bytes_left: int) -> dict[str, str]:
    """The edit after which a script moves so few bytes at once."""
    return {BYTES_PER_SCRIPT: f"local bytes_left = {bytes_left}"}


def all_fetched() -> dict[str, str]:
    """The edit after which a claim's reply omits every message."""
    return {FETCHED_BYTES: "local fetched_bytes = 0"}


def walk(redis: Redis, path: str, seed: int, edits: Mapping[str, str]) -> None:
    """Walk on an empty database, with edited scripts."""
    redis.flushdb()
    with EditedRedis(edits, unix_socket_path=path, db=DATABASE) as client:
        walk = Walk(redis, client, seed)
        if stale := edits.keys() - client.edited:
            pytest.fail(f"no script has {stale}")
        walk.go(STEPS)


@pytest.mark.parametrize(
    "edits", [few_bytes(10) | all_fetched(), few_bytes(4_000_000)], ids=["few bytes", "many bytes"]
)
@pytest.mark.parametrize("seed", range(SEEDS // 2))
def test_each_message_is_in_one_place(
    redis: Redis, path: str, seed: int, edits: Mapping[str, str]
) -> None:
    """Freezes, deaths, lost replies, late commands: no message is lost or duplicated."""
    walk(redis, path, seed, edits)


BREAKS = {
    # Shared by the scripts
    "a message put back is lost": ("redis.pcall('RPUSH', queue, message)", "redis.pcall('TIME')"),
    "an isolated message is lost": ("redis.call('LPUSH', isolated, value)", "redis.call('TIME')"),
    "a requeued message stays claimed": (
        "    put(value)\n    redis.call('HDEL', claims_of(session), tag)",
        "    put(value)",
    ),
    "a requeued message is dropped": (
        "    put(value)\n    redis.call('HDEL'",
        "    redis.call('HDEL'",
    ),
    "a delayed message is not kept": ("redis.call('HSET', delayed, name, value)", ""),
    "a delayed message has no time": ("redis.call('ZADD', due, now() + milliseconds, name)", ""),
    "a dead letter is not written": ("redis.call('XADD', prefix .. 'dead', '*'", "tostring('*'"),
    "a dead letter keeps its counts": (
        "'message', message)\n    forget(message)",
        "'message', message)",
    ),
    "retries are not forgotten": ("    redis.call('HDEL', retry_counts, digest)\n", ""),
    "two messages have one digest": ("redis.sha1hex(message)", "redis.sha1hex(#message)"),
    # Open
    "a session has no lease": ("redis.call('ZADD', leases, 'NX', 1, session)\n", ""),
    "a former session stays alive": ("    redis.call('ZREM', leases, former)\n", ""),
    "a handover copies": ("            redis.call('HDEL', claims_of(former), tag)\n", ""),
    "a handover loses": ("            redis.call('HSET', claims_of(session), tag, value)\n", ""),
    "a handover includes what is not wanted": ("elseif wanted[tag] then", "elseif true then"),
    "a handover drops what is not wanted": (
        "requeue(former, tag, false)",
        "redis.call('HDEL', claims_of(former), tag)",
    ),
    "a handover counts attempts": ("requeue(former, tag, false)", "requeue(former, tag, true)"),
    "a handover ends too early": ("            kept[1] = 1\n", ""),
    # Claim
    "a session without lease claims": (
        "if not redis.call('ZSCORE', leases, session) then return false end\n",
        "",
    ),
    "a claim replaces another": (
        "redis.pcall('HSETNX', claims_of(session), tag, value)",
        "redis.call('HSET', claims_of(session), tag, value) and 1",
    ),
    "a message that cannot be claimed is lost": (
        "redis.call('RPUSH', list, list == isolated and value or message)",
        "",
    ),
    "a poison candidate that cannot be claimed loses its queue": (
        "list == isolated and value or message",
        "message",
    ),
    "a claim leaves the message": ("    redis.call('LTRIM', list, 0, -2)  -- RPOP", "    -- RPOP"),
    "a claim records the wrong queue": (
        "local value = queue .. '\0' .. message",
        "local value = list .. '\0' .. message",
    ),
    "a claim exceeds its room": ("#claimed > room * 6", "#claimed > room * 12"),
    "a poison candidate is claimed with others": (
        "take(isolated, queue, message, digest_of(message))\n        done = true",
        "take(isolated, queue, message, digest_of(message))",
    ),
    "a poison candidate is claimed from its queue": (
        "if redis.call('HEXISTS', attempt_counts, digest) == 1 then",
        "if false then",
    ),
    "a poison candidate is claimed from the lane": (
        "if not digest or redis.call('HEXISTS', attempt_counts, digest) == 1 then break end",
        "if not digest then break end",
    ),
    "a claim loses a poison candidate": (
        "redis.call('LPUSH', isolated, list .. '\0' .. message)",
        "redis.call('TIME')",
    ),
    "a claim copies a poison candidate": (
        "'\0' .. message)\n            redis.call('LTRIM', list, 0, -2)",
        "'\0' .. message)\n            list = isolated",
    ),
    "a large message is thrown away": (
        "redis.call('RPOPLPUSH', list, KEYS[lane])",
        "redis.call('RPOP', list)",
    ),
    "isolated messages are not reported": ("claimed[2] = redis.call('LLEN', isolated)", ""),
    # Settle
    "another session's claim is settled": (
        "local session, announced_seconds = arguments[1]",
        "local session, announced_seconds = redis.call('ZRANGE', leases, 0, 0)[1] or ''",
    ),
    "a settled message stays claimed": (
        "        redis.call('HDEL', claims_of(session), tag)\n    end",
        "    end",
    ),
    "one settlement in two is applied": (
        "for index = 3, #arguments, 8 do",
        "for index = 3, #arguments, 16 do",
    ),
    "an acknowledged message keeps its counts": ("            forget(message)\n", ""),
    "a requeue by settlement loses": (
        "        elseif action == 'requeue' then\n            put(value)",
        "        elseif action == 'requeue' then",
    ),
    "a retry is not counted": ("if action == 'retry' then count(retry_counts, message) end", ""),
    "a retry is counted as an attempt": (
        "count(retry_counts, message)",
        "count(attempt_counts, message)",
    ),
    "a failed attempt is not counted": ("count(attempt_counts, message) end", "end"),
    "any delay is counted": ("if action == 'retry' then", "do"),
    # Wake
    "a woken message stays delayed": ("        redis.call('HDEL', delayed, name)\n", ""),
    "a woken message is lost": ("        put(value)\n        redis", "        redis"),
    "a woken message is still due": (
        "redis.call('ZREM', due, name)",
        "redis.call('ZINCRBY', due, 1e9, name)",
    ),
    "a message is woken early": ("'-inf', time, 'LIMIT'", "'-inf', '+inf', 'LIMIT'"),
    "the end of a wake is reported too early": (
        "    redis.call('ZREM', due, name)\nend\nreturn 1",
        "    redis.call('ZREM', due, name)\nend\nreturn 0",
    ),
    # Take over and close
    "a living session is taken over": (" or score + 0 ~= counter + 0", ""),
    "a takeover ends too early": (
        "return 1 end\n    requeue(session, tag, true)",
        "break end\n    requeue(session, tag, true)",
    ),
    "a takeover counts no attempt": ("requeue(session, tag, true)", "requeue(session, tag, false)"),
    "a session that ended stays": ("redis.call('ZREM', leases, session)\nreturn 0", "return 0"),
    "a close counts attempts": (
        "requeue(session, tag, false)\nend\nredis",
        "requeue(session, tag, true)\nend\nredis",
    ),
    "a close forgets claims": ("    requeue(session, tag, false)\nend\nredis", "end\nredis"),
    # Dead letters
    "a requeued dead letter stays": (
        "return redis.call('XDEL', prefix .. 'dead', arguments[1])",
        "return 1",
    ),
    "a requeued dead letter is lost": ("redis.call('RPUSH', fields.queue", "tostring(fields.queue"),
    "a requeued dead letter keeps counts": ("forget(fields.message)\n", ""),
}
"""Edits of the scripts, each of which breaks one promise."""


@pytest.mark.parametrize(("right", "wrong"), BREAKS.values(), ids=BREAKS)
def test_the_walk_finds_what_is_broken(redis: Redis, path: str, right: str, wrong: str) -> None:
    """A script that is broken in one place fails one of a few walks."""
    edits = {right.replace("\0", "\\0"): wrong.replace("\0", "\\0")} | few_bytes(10)

    def finds(seed: int) -> bool:
        try:
            walk(redis, path, seed, edits)
        except (AssertionError, ResponseError):
            return True
        return False

    assert any(map(finds, range(SEEDS)))


# --- Each promise by itself ----------------------------------------------------------------------


@pytest.fixture
def protocol(redis: Redis) -> Claims:
    """The scripts, with the sessions ``ann`` and ``bob``."""
    protocol = Claims(redis)
    protocol.open("ann")
    protocol.open("bob")
    return protocol


def claim(protocol: Claims, first_tag: int, *, by: str = "ann", **limits: Any) -> Claimed:
    """What a session that is alive claims."""
    limits = {"room": 100, "size": 1_000} | limits
    got = protocol.claim(by, QUEUES, first_tag=first_tag, **limits)
    assert got is not None
    return got


def take(protocol: Claims, first_tag: int = 1, *, by: str = "ann", **limits: Any) -> list[Claim]:
    """The messages of such a claim."""
    return claim(protocol, first_tag, by=by, **limits).claims


def settle(protocol: Claims, action: Action, *tags: str, by: str = "ann", **fields: Any) -> None:
    """Settle deliveries in the same way."""
    protocol.settle(by, {tag: Disposition(action, **fields) for tag in tags})


def counter(protocol: Claims, session: str) -> float:
    """A session's heartbeat counter, as another session observes it."""
    return protocol.heartbeat("observer").sessions[session]


def take_over(protocol: Claims, session: str = "ann") -> None:
    """Take a session over whose counter has stood still."""
    observed = counter(protocol, session)
    while protocol.take_over(session, observed) > 0:
        pass


def delay(protocol: Claims, action: Action, tag: str) -> None:
    """Settle a delivery of ``ann`` by an action that has a delay, and end the delay."""
    settle(protocol, action, tag)
    protocol.wake()


def letters(redis: Redis) -> list[tuple[str, dict[bytes, bytes]]]:
    """The dead letters, each with its ID."""
    return [(name.decode(), fields) for name, fields in look(redis).get(DEAD, [])]


def test_equal_bytes_are_two_messages(redis: Redis, protocol: Claims) -> None:
    """Two messages with the same bytes, Celery's delivery tag included, are settled separately."""
    redis.lpush(JOBS, "same", "same")
    assert [claim.tag for claim in take(protocol)] == ["1", "2"]
    settle(protocol, Action.ACKNOWLEDGE, "1")
    assert claimed(look(redis), "ann") == {"2": b"same"}
    settle(protocol, Action.REQUEUE, "2")
    assert redis.lrange(JOBS, 0, -1) == [b"same"]


def test_messages_are_claimed_by_priority_and_age(redis: Redis, protocol: Claims) -> None:
    """A claim goes through the queues in their order, and through each from its oldest message."""
    redis.lpush(JOBS, "1", "2")
    redis.lpush(URGENT, "3", "4")
    claims = take(protocol, room=3)
    assert [(claim.queue, claim.message) for claim in claims] == [
        (URGENT, b"3"),
        (URGENT, b"4"),
        (JOBS, b"1"),
    ]


Return = Callable[[Claims], object]

RETURNS: dict[str, Return] = {
    "requeued": lambda protocol: settle(protocol, Action.REQUEUE, "1"),
    "closed": lambda protocol: protocol.close("ann"),
    "reopened": lambda protocol: protocol.open("ann again", ["ann"]),
    "delayed": lambda protocol: delay(protocol, Action.DELAY, "1"),
    "retried": lambda protocol: delay(protocol, Action.RETRY, "1"),
}
"""Ways in which a message comes back without an attempt."""

ATTEMPTS: dict[str, Return] = {
    "taken over": take_over,
    "pool process ended": lambda protocol: delay(protocol, Action.FAILED_ATTEMPT, "1"),
}
"""Ways in which it comes back with an attempt."""


@pytest.mark.parametrize("comes_back", RETURNS.values(), ids=RETURNS)
def test_a_requeued_message_is_next(redis: Redis, protocol: Claims, comes_back: Return) -> None:
    """A message that comes back without an attempt is the next one of its own queue."""
    redis.lpush(URGENT, "first", "second")
    take(protocol, room=1)
    comes_back(protocol)
    assert redis.lrange(URGENT, 0, -1) == [b"second", b"first"]


@pytest.mark.parametrize("comes_back", ATTEMPTS.values(), ids=ATTEMPTS)
def test_a_message_with_attempts_is_isolated(
    redis: Redis, protocol: Claims, comes_back: Return
) -> None:
    """A message whose worker or pool process ended waits apart, with its origin queue."""
    redis.lpush(URGENT, "first", "second")
    take(protocol, room=1)
    comes_back(protocol)
    assert redis.lrange(URGENT, 0, -1) == [b"second"]
    assert redis.lrange(ISOLATED, 0, -1) == [f"{URGENT}\0first".encode()]
    assert take(protocol, 2, by="bob") == [Claim("2", URGENT, b"first", 5, 1, 0)]


@pytest.mark.parametrize("comes_back", RETURNS.values(), ids=RETURNS)
def test_attempts_outlast_every_other_return(
    redis: Redis, protocol: Claims, comes_back: Return
) -> None:
    """A poison candidate that is requeued or delayed stays isolated, its attempts counted."""
    redis.lpush(JOBS, "poison")
    take(protocol)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    (poison,) = take(protocol, 2)
    assert poison.attempts == 1
    protocol.open("carl", ["ann"], ["2"])
    protocol.open("ann", ["carl"])
    (poison,) = take(protocol, 1)
    comes_back(protocol)
    assert redis.llen(ISOLATED) == 1
    assert [claim.attempts for claim in take(protocol, 9, by="bob")] == [1]


def test_an_isolated_message_is_claimed_alone(redis: Redis, protocol: Claims) -> None:
    """Poison candidates come one at a time and block no others."""
    redis.lpush(JOBS, "poison 1", "poison 2")
    take(protocol)
    take_over(protocol)
    protocol.open("ann")
    redis.lpush(JOBS, "a", "b")
    assert claim(protocol, 1) == Claimed(
        [Claim("1", JOBS, b"poison 1", 8, 1, 0)], large_wait=False, isolated=1, has_more=True
    )
    assert [one.message for one in take(protocol, 2, isolated_room=0)] == [b"a", b"b"]
    assert [one.message for one in take(protocol, 4, by="bob")] == [b"poison 2"]
    assert redis.llen(ISOLATED) == 0


@pytest.mark.parametrize("lane", [JOBS, LANE])
def test_a_copy_of_a_message_with_attempts_is_isolated(
    redis: Redis, protocol: Claims, lane: str
) -> None:
    """A claim takes a message with attempts from no queue, whatever its size, but isolates it."""
    redis.lpush(JOBS, "poison", "a")
    take(protocol, room=1)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    take(protocol, 2, room=1)
    redis.lpush(lane, "poison")
    assert [one.message for one in take(protocol, 3, small=4, isolated_room=0)] == [b"a"]
    take(protocol, 4, small=4, isolated_room=0)
    assert redis.lrange(ISOLATED, 0, -1) == [f"{lane}\0poison".encode()]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (10, 1), (11, 2), (21, 3)])
def test_a_claim_ends_at_its_size(redis: Redis, protocol: Claims, size: int, count: int) -> None:
    """No more is claimed after so many bytes; at least one message is."""
    redis.lpush(JOBS, *["0123456789"] * 4)
    assert len(take(protocol, size=size)) == count


def test_of_an_oversized_message_the_ends_are_returned(redis: Redis, protocol: Claims) -> None:
    """A message over the limit is claimed whole, but only its two ends reach the worker."""
    message = b"head" + b"." * 200_000 + b"tail"
    redis.lpush(JOBS, message)
    (one,) = take(protocol, max_bytes=200_007)
    assert (one.size, len(one.message)) == (200_008, 2 * 65_536)
    assert one.message.startswith(b"head.")
    assert one.message.endswith(b".tail")
    settle(protocol, Action.REQUEUE, "1")
    assert redis.lrange(JOBS, 0, -1) == [message]
    (one,) = take(protocol, 2, max_bytes=200_008)
    assert one.message == message


def test_settlements_have_effect_once(redis: Redis, protocol: Claims) -> None:
    """A repeated settlement, and one of a delivery that is not claimed, has no effect."""
    redis.lpush(JOBS, *"abcd")
    take(protocol)
    for _ in range(2):
        settle(protocol, Action.ACKNOWLEDGE, "1", "3", "99")
        settle(protocol, Action.REQUEUE, "1", "3")
        settle(protocol, Action.DEAD_LETTER, "1", "2", by="bob")
    assert claimed(look(redis), "ann") == {"2": b"b", "4": b"d"}
    assert messages(look(redis)) == Counter([b"b", b"d"])


def test_each_disposition_of_one_call_is_applied(redis: Redis, protocol: Claims) -> None:
    """One call settles deliveries in different ways."""
    redis.lpush(JOBS, *"abcdef")
    take(protocol)
    protocol.settle(
        "ann", {str(at): Disposition(action, LATER) for at, action in enumerate(Action, 1)}
    )
    state = look(redis)
    assert [*Action] == [
        *(Action.ACKNOWLEDGE, Action.REQUEUE, Action.DELAY),
        *(Action.RETRY, Action.FAILED_ATTEMPT, Action.DEAD_LETTER),
    ]
    assert state[JOBS] == [b"b"]
    assert {message_of(value) for value in state[DEFERRED].values()} == {b"c", b"d", b"e"}
    assert counts(state, DEFERRALS) == {digest_of(b"d"): 1}
    assert counts(state, TRIES) == {digest_of(b"e"): 1}
    assert [letter[b"message"] for _, letter in state[DEAD]] == [b"f"]


def test_retries_and_attempts_are_counted_apart(redis: Redis, protocol: Claims) -> None:
    """A requeue or a delay counts nothing, a retry a retry, a lost process or worker an attempt."""
    redis.lpush(JOBS, "a")
    counted = []
    steps = [
        Action.REQUEUE,
        Action.RETRY,
        Action.DELAY,
        Action.FAILED_ATTEMPT,
        Action.RETRY,
        Action.REQUEUE,
    ]
    for tag, action in enumerate(steps, 1):
        (one,) = take(protocol, tag)
        counted.append((one.attempts, one.retries))
        settle(protocol, action, str(tag))
        protocol.wake()
    assert counted == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 1), (1, 2)]
    take(protocol, 7)
    take_over(protocol)
    (one,) = take(protocol, 8, by="bob")
    assert (one.attempts, one.retries) == (2, 2)


def test_an_acknowledged_message_leaves_no_counts(redis: Redis, protocol: Claims) -> None:
    """Counts do not survive the message, for another one may have the same bytes."""
    redis.lpush(JOBS, "a")
    take(protocol)
    delay(protocol, Action.RETRY, "1")
    take(protocol, 2)
    delay(protocol, Action.FAILED_ATTEMPT, "2")
    take(protocol, 3)
    settle(protocol, Action.ACKNOWLEDGE, "3")
    assert look(redis).keys() == {LEASES, CLOCK}


def test_an_announcement_expires_after_its_job(redis: Redis, protocol: Claims) -> None:
    """What a producer announced of a job is kept for as long as the job's result."""
    redis.set(f"{PREFIX}job:j", "announced")
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.ACKNOWLEDGE, "1", job_id="j")
    assert 86_000 < redis.ttl(f"{PREFIX}job:j") <= 86_400


@pytest.mark.parametrize("in_ledger", [False, True])
def test_a_dead_letter_is_complete_and_can_be_requeued(
    redis: Redis, protocol: Claims, in_ledger: bool
) -> None:
    """It has the message, queue, size, attempts, and whether the ledger knows its job's result."""
    redis.lpush(URGENT, b"\xff\0'")
    take(protocol)
    delay(protocol, Action.FAILED_ATTEMPT, "1")
    take(protocol, 2)
    delay(protocol, Action.RETRY, "2")
    take(protocol, 3)
    settle(
        *(protocol, Action.DEAD_LETTER, "3"),
        reason="because",
        job_id="j",
        task="t",
        in_ledger=in_ledger,
        attempts=2,
    )
    ((name, letter),) = letters(redis)
    seconds: Any = redis.time()
    assert abs(float(letter.pop(b"time")) - seconds[0]) < 60
    assert letter == {
        b"job_id": b"j",
        b"task": b"t",
        b"reason": b"because",
        b"in_ledger": b"1" if in_ledger else b"0",
        b"attempts": b"2",
        b"size": b"3",
        b"queue": URGENT.encode(),
        b"message": b"\xff\0'",
    }
    assert protocol.requeue_dead_letter(name, JOBS) == 1
    assert protocol.requeue_dead_letter(name, JOBS) == 0
    assert take(protocol, 4) == [Claim("4", URGENT, b"\xff\0'", 3, 0, 0)]


def test_a_dead_letter_without_queue_is_requeued_as_told(redis: Redis, protocol: Claims) -> None:
    """A dead letter of an earlier version has no queue."""
    name: Any = redis.xadd(DEAD, {"message": "a"})
    assert protocol.requeue_dead_letter(name.decode(), JOBS) == 1
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


def take_small(
    protocol: Claims, first_tag: int, *, largest: int, read_lanes: bool = True
) -> tuple[list[bytes], bool]:
    """The messages that are claimed where more than 4 bytes are large; do large ones wait?"""
    got = claim(protocol, first_tag, small=4, largest=largest, read_lanes=read_lanes)
    return [claim.message for claim in got.claims], got.large_wait


def test_small_messages_pass_large_ones_without_room(redis: Redis, protocol: Claims) -> None:
    """Without room for a large message those that are met move to the lane, in their order."""
    redis.lpush(JOBS, "large 1", "a", "large 2", "b", "large 3")
    assert take_small(protocol, 1, largest=4) == ([b"a", b"b"], True)
    assert redis.lrange(LANE, 0, -1) == [b"large 3", b"large 2", b"large 1"]
    assert redis.llen(JOBS) == 0


def test_the_lane_comes_first(redis: Redis, protocol: Claims) -> None:
    """With room again the message that waited longest is claimed, before later ones of any size."""
    redis.lpush(JOBS, "large 1", "large 2", "a")
    take_small(protocol, 1, largest=4)
    redis.lpush(JOBS, "b", "large 3")
    assert take_small(protocol, 2, largest=ANY_SIZE) == ([b"large 1"], True)
    assert take_small(protocol, 3, largest=ANY_SIZE) == ([b"large 2"], False)
    assert take_small(protocol, 4, largest=ANY_SIZE) == ([b"b"], False)
    assert take_small(protocol, 5, largest=ANY_SIZE) == ([b"large 3"], False)


def test_a_message_that_is_too_large_is_passed(redis: Redis, protocol: Claims) -> None:
    """A large message up to the limit is claimed; a larger one moves to the lane, and stays."""
    redis.lpush(JOBS, "very large", "large")
    assert take_small(protocol, 1, largest=5) == ([b"large"], True)
    assert take_small(protocol, 2, largest=5) == ([], True)
    assert redis.lrange(LANE, 0, -1) == [b"very large"]


def test_a_claim_reports_what_it_left_unread(redis: Redis, protocol: Claims) -> None:
    """A script that has moved its bytes ends; the messages behind are for the next one."""
    redis.lpush(JOBS, *[b"." * 1_500_000] * 4, "a")
    got = claim(protocol, 1, small=4, largest=4)
    assert (got.claims, got.has_more) == ([], True)
    got = claim(protocol, 1, small=4, largest=4)
    assert [one.message for one in got.claims] == [b"a"]
    assert not claim(protocol, 2, small=4, largest=4).has_more


def test_a_claim_reports_large_messages_that_it_left(redis: Redis, protocol: Claims) -> None:
    """Those that do not fit into this claim's bytes are for another pool process."""
    redis.lpush(LANE, "large 1", "large 2")
    got = claim(protocol, 1, small=4, large_size=7)
    assert ([one.message for one in got.claims], got.has_more) == ([b"large 1"], True)
    got = claim(protocol, 2, small=4, large_size=8)
    assert ([one.message for one in got.claims], got.has_more) == ([b"large 2"], False)


def test_a_claim_reports_that_it_moved_messages_to_the_lane(redis: Redis, protocol: Claims) -> None:
    """A message may have come meanwhile: nothing else announces it."""
    redis.lpush(JOBS, "large")
    assert claim(protocol, 1, small=4, largest=4).has_more
    assert not claim(protocol, 1, small=4, largest=4).has_more


def test_small_messages_of_the_lane_come_last(redis: Redis, protocol: Claims) -> None:
    """A producer may publish small messages at the lane's priority."""
    redis.lpush(LANE, "z")
    redis.lpush(JOBS, "a")
    assert take_small(protocol, 1, largest=4) == ([b"a", b"z"], False)


def test_the_lane_is_not_read_without_need(redis: Redis, protocol: Claims) -> None:
    """A claim can leave the lane out; it still reports that messages wait there."""
    redis.lpush(LANE, "large 1", "z")
    redis.lpush(JOBS, "a", "large 2", "b")
    got = take_small(protocol, 1, largest=4, read_lanes=False)
    assert got == ([b"a", b"b"], True)
    assert redis.lrange(LANE, 0, -1) == [b"large 2", b"z", b"large 1"]


def test_large_messages_are_claimed_together(redis: Redis, protocol: Claims) -> None:
    """As many as fit into their bytes, of the lane and of the queue, and no small one."""
    redis.lpush(LANE, "large 1", "large 2")
    redis.lpush(JOBS, "large 3", "large 4", "a", "large 5")
    got = claim(protocol, 1, small=4, large_size=21)
    assert [claim.message for claim in got.claims] == [b"large 1", b"large 2", b"large 3"]
    got = claim(protocol, 4, small=4, large_size=21)
    assert [claim.message for claim in got.claims] == [b"large 4"]


def test_a_large_message_is_the_last_of_its_claim(redis: Redis, protocol: Claims) -> None:
    """Small messages before it are claimed without it, and it without those behind it."""
    redis.lpush(JOBS, "a", "large", "b")
    assert take_small(protocol, 1, largest=ANY_SIZE) == ([b"a"], False)
    assert take_small(protocol, 2, largest=ANY_SIZE) == ([b"large"], False)
    assert take_small(protocol, 3, largest=4) == ([b"b"], False)


def test_long_messages_are_told_apart_by_their_ends(redis: Redis, protocol: Claims) -> None:
    """Long messages that differ in length or at either end are counted separately."""
    filling = b"." * 20_000
    redis.lpush(JOBS, b"a" + filling, b"b" + filling, b"a" + filling + b"b", b"a" + filling + b".")
    take(protocol, room=1)
    delay(protocol, Action.RETRY, "1")
    assert [claim.retries for claim in take(protocol, 2, size=1_000_000)] == [1, 0, 0, 0]


def test_a_lost_lease_is_reported(redis: Redis, protocol: Claims) -> None:
    """A session that was taken over learns it from a claim and a heartbeat, and gets nothing."""
    redis.lpush(JOBS, "a")
    take_over(protocol)
    assert protocol.claim("ann", QUEUES, first_tag=1, room=1, size=1) is None
    assert not protocol.heartbeat("ann").alive
    assert redis.lrange(JOBS, 0, -1) == [b"a"]


def test_a_late_heartbeat_prevents_the_takeover(redis: Redis, protocol: Claims) -> None:
    """A takeover has no effect after the counter that it names."""
    redis.lpush(JOBS, "a")
    take(protocol)
    observed = counter(protocol, "ann")
    assert protocol.heartbeat("ann").alive
    before = look(redis)
    assert protocol.take_over("ann", observed) == -1
    assert look(redis) == before


def test_a_session_of_an_earlier_version_is_taken_over(redis: Redis, protocol: Claims) -> None:
    """The first version wrote a deadline in ms where the counter is, and a set of what it began."""
    deadline = 1_795_000_000_123
    redis.zadd(LEASES, {"old": deadline})
    redis.hset(f"{PREFIX}held:old", "7", f"{JOBS}\0a")
    redis.sadd(f"{PREFIX}started:old", "7")
    observed = counter(protocol, "old")
    assert observed == deadline
    assert protocol.take_over("old", observed) == 0
    assert [one.attempts for one in take(protocol, by="bob")] == [1]
    assert look(redis).keys() == {LEASES, TRIES, f"{PREFIX}held:bob"}


LARGE = b"." * 2_000_000
"""A large message: two of them and a little more fill one script."""


def test_a_large_session_is_taken_over_in_steps(redis: Redis, protocol: Claims) -> None:
    """A script moves a few MB at once; another worker may continue what one has begun."""
    redis.lpush(JOBS, *[LARGE + bytes([letter]) for letter in b"abcde"])
    assert len(take(protocol, size=100_000_000)) == 5
    observed = counter(protocol, "ann")
    assert protocol.take_over("ann", observed) == 1
    assert len(claimed(look(redis), "ann")) == 2
    assert counter(protocol, "ann") == observed
    assert protocol.take_over("ann", observed) == 0
    assert protocol.take_over("ann", observed) == -1
    assert redis.llen(ISOLATED) == 5
    assert counters(look(redis)).keys() == {"bob"}


def test_large_delayed_messages_wake_in_steps(redis: Redis, protocol: Claims) -> None:
    """A script moves a few MB at once and reports that there is more."""
    redis.lpush(JOBS, *[LARGE] * 4)
    take(protocol, size=100_000_000)
    settle(protocol, Action.DELAY, *"1234")
    assert protocol.wake()
    assert redis.llen(JOBS) == 3
    assert not protocol.wake()
    assert redis.llen(JOBS) == 4


class CountedRedis(Redis):
    """A client that counts its commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = 0

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Count and send a command."""
        self.commands += 1
        return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # redis-py's


@pytest.mark.parametrize(
    "moves",
    [
        lambda protocol: protocol.close("ann"),
        lambda protocol: protocol.open("ann again", ["ann"]),
        lambda protocol: protocol.open("ann again", ["ann"], [*"1234567"]),
    ],
    ids=["closed", "reopened", "continued"],
)
def test_large_claims_move_in_steps(
    redis: Redis, path: str, moves: Callable[[Claims], object]
) -> None:
    """A close or a new session moves a few MB in each script until all is moved."""
    redis.lpush(JOBS, *[LARGE] * 7)
    with CountedRedis(unix_socket_path=path, db=DATABASE) as client:
        protocol = Claims(client)
        protocol.open("ann")
        protocol.open("to have the scripts loaded", [])
        protocol.close("to have the scripts loaded")
        take(protocol, size=100_000_000)
        client.commands = 0
        moves(protocol)
        assert client.commands == 3
    again = claimed(look(redis), "ann again")
    assert redis.llen(JOBS) + len(again) == 7
    assert "ann" not in counters(look(redis))


def test_delays_survive_a_workers_end(redis: Redis, protocol: Claims) -> None:
    """A delayed message waits for its time, whatever becomes of the worker that delayed it."""
    redis.lpush(JOBS, "a", "b")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=LATER)
    settle(protocol, Action.DELAY, "2", delay=0.05)
    take_over(protocol)
    until(lambda: protocol.wake() or redis.llen(JOBS) == 1)
    assert redis.lrange(JOBS, 0, -1) == [b"b"]
    assert [*look(redis)[DEFERRED].values()] == [f"{JOBS}\0a".encode()]


def due_in(redis: Redis) -> float:
    """Seconds until the one delayed message is due, by the server's clock."""
    seconds: Any = redis.time()
    ((_, due),) = look(redis)[DUE]
    offset: Any = redis.hget(CLOCK, "offset") or 0
    return float((due - int(offset)) / 1_000 - seconds[0])


def test_a_clock_is_compared_with_the_time_of_the_delay(redis: Redis, protocol: Claims) -> None:
    """A step back after a message was delayed is noticed, however long before nothing was."""
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=60)
    last: Any = redis.hget(CLOCK, "last")
    seconds: Any = redis.time()
    assert 0 <= seconds[0] - int(last) // 1_000 < 60


@pytest.mark.parametrize("name", ["due", "isolated", "held:ann"])
def test_a_heartbeat_reports_what_no_queue_holds(redis: Redis, protocol: Claims, name: str) -> None:
    """Delayed and isolated messages are reported, and what the session has claimed."""
    assert not protocol.heartbeat("ann", [JOBS]).has_messages
    redis.hset(f"{PREFIX}{name}", "1", "only that the key exists is looked at")
    assert protocol.heartbeat("ann", [JOBS]).has_messages


@pytest.mark.parametrize("step", [-600, 600])
def test_a_step_of_the_servers_clock_keeps_delays(
    redis: Redis, protocol: Claims, step: int
) -> None:
    """After a step back delays keep their length; a step forward can only shorten them."""
    redis.lpush(JOBS, "a")
    take(protocol)
    settle(protocol, Action.DELAY, "1", delay=60)
    protocol.wake()
    before: Any = redis.hget(CLOCK, "last")
    # As if the clock had been so much ahead, or behind, until now.
    redis.hset(CLOCK, "last", int(before) - step * 1_000)
    redis.zincrby(DUE, -step * 1_000, look(redis)[DUE][0][0])
    protocol.wake()
    assert redis.llen(JOBS) == (step > 0)
    if step < 0:
        assert due_in(redis) == pytest.approx(60, abs=5)


def test_the_servers_clock_does_not_judge_sessions(redis: Redis, protocol: Claims) -> None:
    """A step of the server's clock makes no session seem dead."""
    before = protocol.heartbeat("ann").sessions
    redis.hset(CLOCK, "last", int(time.time() + 600) * 1_000)
    protocol.wake()
    assert protocol.heartbeat("bob").sessions == before | {"bob": before["bob"] + 1}


def test_a_full_server_drains(redis: Redis, protocol: Claims) -> None:
    """All that moves a message works on a server that accepts no other write."""
    redis.lpush(JOBS, *"abcdef")
    protocol.open("gone")
    take(protocol, by="gone", room=1)
    observed = counter(protocol, "gone")
    redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(ResponseError, match="maxmemory"):
            redis.lpush(JOBS, "g")
        protocol.open("carl", ["bob"])
        assert protocol.heartbeat("ann").alive
        assert len(take(protocol)) == 5
        settle(protocol, Action.ACKNOWLEDGE, "1")
        settle(protocol, Action.RETRY, "2")
        assert not protocol.wake()
        settle(protocol, Action.DEAD_LETTER, "3", reason="because")
        settle(protocol, Action.REQUEUE, "4")
        delay(protocol, Action.FAILED_ATTEMPT, "5")
        assert protocol.take_over("gone", observed) == 0
        protocol.put(JOBS, b"h")
        ((name, _),) = letters(redis)
        assert protocol.requeue_dead_letter(name, JOBS) == 1
        protocol.close("carl")
    finally:
        redis.config_set("maxmemory", 0)
    assert messages(look(redis)) == Counter({bytes([letter]): 1 for letter in b"acdefh"})


def test_a_large_message_is_claimed_whole(redis: Redis, protocol: Claims) -> None:
    """A message that the claim's reply omits is returned like any other."""
    message = bytes(range(256)) * 8_192
    redis.lpush(JOBS, message, "a")
    large, small = take(protocol, size=4_000_000)
    assert (large.message, large.size) == (message, len(message))
    assert small.message == b"a"


def test_a_lease_lost_before_the_message_is_read_claims_nothing(
    redis: Redis, protocol: Claims, path: str
) -> None:
    """A session that is taken over while it reads a large message learns that its lease is lost."""
    message = b"a" * 2_000_000

    class FrozenRedis(Redis):
        """A client that freezes before it reads, for long enough to lose its lease."""

        def hget(self, *arguments: Any) -> Any:
            take_over(protocol)
            return super().hget(*arguments)

    redis.lpush(JOBS, message)
    with FrozenRedis(unix_socket_path=path, db=DATABASE) as client:
        claims = Claims(client)
        assert claims.claim("ann", QUEUES, first_tag=1, room=1, size=1) is None
    assert redis.lrange(ISOLATED, 0, -1) == [f"{JOBS}\0".encode() + message]


@pytest.mark.parametrize(
    ("key", "values"),
    [(JOBS, [b"b", b"a"]), (ISOLATED, [b"jobs\0b", b"jobs\0a"])],
    ids=["queue", "isolated"],
)
def test_a_message_that_cannot_be_claimed_stays(
    redis: Redis, protocol: Claims, key: str, values: list[bytes]
) -> None:
    """Where the key of a session's claims is of another type, its messages stay in their order."""
    redis.rpush(key, *values)
    redis.set(f"{PREFIX}held:ann", "not a hash")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        take(protocol)
    assert redis.lrange(key, 0, -1) == values


@pytest.mark.parametrize("comes_back", RETURNS.values(), ids=RETURNS)
def test_a_queue_of_another_type_loses_nothing(
    redis: Redis, protocol: Claims, comes_back: Return
) -> None:
    """A message whose queue's key became another type becomes a dead letter."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "not a list")
    comes_back(protocol)
    ((_, letter),) = letters(redis)
    assert (letter[b"message"], letter[b"reason"]) == (b"a", b"Its queue is not a list.")
    assert letter[b"in_ledger"] == b"0"
    assert take(protocol, 2, by="bob") == []


@pytest.mark.parametrize("comes_back", (RETURNS | ATTEMPTS).values(), ids=RETURNS | ATTEMPTS)
def test_a_message_without_destination_stays(
    redis: Redis, protocol: Claims, comes_back: Return
) -> None:
    """Where the dead letters' key is of another type too, the move fails and nothing is lost."""
    redis.lpush(JOBS, "a")
    take(protocol)
    redis.set(JOBS, "not a list")
    redis.set(DEAD, "not a stream")
    redis.set(ISOLATED, "not a list")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        comes_back(protocol)
    state = look(redis)
    values = [*state.get(f"{PREFIX}held:ann", {}).values(), *state.get(DEFERRED, {}).values()]
    assert values == [f"{JOBS}\0a".encode()]
