"""The queue's protocol in Redis: which worker session has claimed which message.

At any moment a message's bytes are in exactly one place: its queue, one session's claims, the
delayed messages, the isolated ones, or the dead letters. Each move is one script, so that no crash
and no lost reply can separate its halves. A script that moves a claimed message does nothing unless
the caller still has it claimed. This module knows nothing of Celery and never parses a message.

Keys, beside the queues that kombu's producers write:

- ``leases``: sorted set, worker session by its heartbeat counter
- ``held:SESSION``: hash, delivery tag to origin queue, NUL and the message
- ``deferred`` and ``due``: delayed messages, and the time (ms) at which each is due
- ``isolated``: list of poison candidates, each with its origin queue: messages with attempts
- ``tries``: hash, digest of a message to its attempts, those that ended its pool process or worker
- ``deferrals``: hash, digest of a message to its retries, those that its job asked for
- ``dead``: stream of the dead letters
- ``clock``: hash, the time (ms) when messages were last delayed or checked, and the sum of the
  steps by which the server's clock was set back
- ``job:ID``: the announcement that a producer wrote with a job's message

No script judges a session by a clock: observers compare heartbeat counters. Scripts that move
several messages stop after ``_BYTES_PER_SCRIPT`` and report that there is more, so that Redis
serves others in between. All carry the flag ``allow-oom``: a full server refuses every other way of
taking a message off a queue and keeping it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import OutOfMemoryError

PREFIX = "interview-access:"
"""Prefix of every key of this protocol."""

DEAD = f"{PREFIX}dead"
"""The stream of dead letters.

Fields: job_id, task, reason, in_ledger, time, attempts, size, queue, message."""

ANY_SIZE = 2**53
_BYTES_PER_SCRIPT = 4 * 1024 * 1024
"""Bytes of messages that one script moves, at least one message; a 100,000-ID job has 4 MB."""

_ENDS_BYTES = 64 * 1024
"""Bytes of each end that are returned of a message over the limit: its job ID is in one of them."""

_FETCHED_BYTES = 1024 * 1024
"""Bytes of a message above which a claim's reply omits it, and it is read by a separate command:
Redis keeps the arguments of a script's commands until it ends, one copy beside the reply's."""

_ANNOUNCEMENT_SECONDS = 86_400
"""How long a job's announcement outlives the job: as long as its result."""

_COUNTS_SECONDS = 30 * 86_400
"""How long attempts and retries are kept after the last one was counted."""

_SCRIPT = f"""#!lua flags=allow-oom
local prefix, arguments = KEYS[1], ARGV
local leases, due, deferred = prefix .. 'leases', prefix .. 'due', prefix .. 'deferred'
local tries, deferrals = prefix .. 'tries', prefix .. 'deferrals'
local isolated = prefix .. 'isolated'
local bytes_left, ends = {_BYTES_PER_SCRIPT}, {_ENDS_BYTES}
local fetched_bytes, has_garbage = {_FETCHED_BYTES}, false

-- Return the server's time in ms. After a step of its clock, back or in a failover, delays keep the
-- length that was meant.
local function now()
    local clock, parts = prefix .. 'clock', redis.call('TIME')
    local time = parts[1] * 1000 + math.floor(parts[2] / 1000)
        + (redis.call('HGET', clock, 'offset') or 0)
    local last = tonumber(redis.call('HGET', clock, 'last') or 0)
    if time < last - 1000 then
        redis.call('HINCRBY', clock, 'offset', last - time)
        time = last
    end
    redis.call('HSET', clock, 'last', time)
    return time
end

local function held(session) return prefix .. 'held:' .. session end

local function parts(value)
    has_garbage = has_garbage or #value > fetched_bytes
    local stop = string.find(value, '\\0', 1, true)
    return string.sub(value, 1, stop - 1), string.sub(value, stop + 1)
end

-- Free what Lua has of large messages: it collects little at a time, long after the script.
local function collect()
    if has_garbage then collectgarbage() end
end

-- Identifies a message in tries and deferrals. The ends of a long one suffice, for they hold its
-- job ID and delivery tag: hashing 5 MB would block the server.
local function digest_of(message)
    if #message > 8192 then
        message = #message .. string.sub(message, 1, 4096) .. string.sub(message, -4096)
    end
    return redis.sha1hex(message)
end

local function count(hash, message)
    redis.call('HINCRBY', hash, digest_of(message), 1)
    redis.call('EXPIRE', hash, {_COUNTS_SECONDS})
end

local function forget(message)
    local digest = digest_of(message)
    redis.call('HDEL', tries, digest)
    redis.call('HDEL', deferrals, digest)
end

local function dead_letter(queue, message, job_id, task, reason, in_ledger, attempts)
    local time = redis.call('TIME')
    redis.call('XADD', prefix .. 'dead', '*', 'job_id', job_id, 'task', task, 'reason', reason,
        'in_ledger', in_ledger,
        'time', string.format('%d.%03d', time[1], math.floor(time[2] / 1000)),
        'attempts', attempts, 'size', #message, 'queue', queue, 'message', message)
    forget(message)
end

-- Back to the consuming end of its queue, or to the isolated messages if it has attempts. A key
-- that has become another type than a list accepts no message.
local function put(value)
    local queue, message = parts(value)
    bytes_left = bytes_left - #message
    if redis.call('HEXISTS', tries, digest_of(message)) == 1 then
        redis.call('LPUSH', isolated, value)
    elseif type(redis.pcall('RPUSH', queue, message)) ~= 'number' then
        dead_letter(queue, message, '', '', 'Its queue is not a list.', '0', '0')
    end
end

local function delay(name, value, milliseconds)
    redis.call('HSET', deferred, name, value)
    redis.call('ZADD', due, now() + milliseconds, name)
end

-- Written before it is removed: an error ends a script, and what it did before stays.
local function requeue(session, tag, is_attempt)
    local value = redis.call('HGET', held(session), tag)
    if not value then return end
    if is_attempt then
        local _, message = parts(value)
        count(tries, message)
    end
    put(value)
    redis.call('HDEL', held(session), tag)
end
"""

_OPEN = """
local session, formers = arguments[1], arguments[2]
local wanted, kept = {}, {0}
for index = 3 + formers, #arguments do wanted[arguments[index]] = true end
redis.call('ZADD', leases, 'NX', 1, session)
for index = 3, 2 + formers do
    local former = arguments[index]
    for _, tag in ipairs(redis.call('HKEYS', held(former))) do
        if bytes_left <= 0 then
            kept[1] = 1
            return kept
        elseif wanted[tag] then
            local value = redis.call('HGET', held(former), tag)
            bytes_left = bytes_left - #value
            redis.call('HSET', held(session), tag, value)
            redis.call('HDEL', held(former), tag)
        else
            requeue(former, tag, false)
        end
    end
    redis.call('ZREM', leases, former)
end
for _, tag in ipairs(redis.call('HKEYS', held(session))) do kept[#kept + 1] = tag end
return kept
"""

_RENEW = """
return redis.call('ZADD', leases, 'XX', 'INCR', 1, arguments[1])
"""

_CLAIMED_TAGS = """
return redis.call('HKEYS', held(arguments[1]))
"""

_CLAIM = """
local session, room, bytes = arguments[1], arguments[2], arguments[3]
local small, largest = arguments[4] + 0, arguments[5] + 0
local queues, read_lanes = arguments[6], arguments[7] == '1'
local isolated_room, tag, max_bytes = arguments[8] + 0, arguments[9], arguments[10] + 0
local large_bytes, has_large = arguments[11] + 0, false
local bytes_before = bytes_left
if not redis.call('ZSCORE', leases, session) then return false end
local claimed, done, first_lane = {0, 0, 0}, false, #KEYS - queues + 1

local function next_of(list)
    local message = redis.pcall('LINDEX', list, -1)
    return type(message) == 'string' and message
end

-- The message leaves its list first, so that Redis does not hold it twice. It returns to it if it
-- cannot be claimed: the tag is in use, the key is not a hash, an ACL denies the command.
local function take(list, queue, message, digest)
    local value = queue .. '\\0' .. message
    redis.call('LTRIM', list, 0, -2)  -- RPOP would return the message once more
    local stored = redis.pcall('HSETNX', held(session), tag, value)
    if stored ~= 1 then
        redis.call('RPUSH', list, list == isolated and value or message)
        if stored ~= 0 then error(stored) end
        done = true
        return
    end
    local attempts = redis.call('HGET', tries, digest) or 0
    local retries = redis.call('HGET', deferrals, digest) or 0
    local size = #message
    if size > max_bytes then
        message = string.sub(message, 1, ends) .. string.sub(message, -ends)
    elseif size > fetched_bytes then
        message = ''
    end
    has_garbage = has_garbage or size > fetched_bytes
    for _, field in ipairs({tag, queue, message, size, attempts, retries}) do
        claimed[#claimed + 1] = field
    end
    tag = string.format('%d', tag + 1)
    bytes = bytes - size
    if size > small then has_large, large_bytes = true, large_bytes - size end
    done = #claimed > room * 6 or bytes <= 0 or (has_large and large_bytes <= 0)
end

-- Large and small messages are claimed apart; the first large one may be as large as any.
local function fits(message)
    if #message <= small then return not has_large end
    return #message <= largest and (#claimed == 3 or (has_large and #message <= large_bytes))
end

if isolated_room > 0 then
    local value = next_of(isolated)
    if value and not string.find(value, '\\0', 1, true) then
        dead_letter(isolated, value, '', '', 'It names no origin queue.', '0', '0')
        redis.call('LTRIM', isolated, 0, -2)
    elseif value then
        local queue, message = parts(value)
        take(isolated, queue, message, digest_of(message))
        done = true
    end
end
for index = first_lane, #KEYS do
    while read_lanes and not done and largest > small do
        local message = next_of(KEYS[index])
        local is_wanted = message and #message > small and #message <= largest
        done = is_wanted and not fits(message)
        local digest = is_wanted and not done and digest_of(message)
        if not digest or redis.call('HEXISTS', tries, digest) == 1 then break end
        take(KEYS[index], KEYS[index], message, digest)
    end
end
for index = 2, #KEYS do
    local list, lane = KEYS[index], first_lane + (index - 2) % queues
    while not done and bytes_left > 0 and (read_lanes or index < first_lane) do
        local message = next_of(list)
        if not message then break end
        local digest = digest_of(message)
        if redis.call('HEXISTS', tries, digest) == 1 then
            bytes_left = bytes_left - #message
            redis.call('LPUSH', isolated, list .. '\\0' .. message)
            redis.call('LTRIM', list, 0, -2)
        elseif #message > small and index >= first_lane then
            break
        elseif #message > small and #message > largest then
            bytes_left = bytes_left - #message
            redis.call('RPOPLPUSH', list, KEYS[lane])
        elseif fits(message) then
            take(list, list, message, digest)
        else
            done = true
        end
    end
end
for index = first_lane, #KEYS do
    local length = redis.pcall('LLEN', KEYS[index])
    if type(length) == 'number' and length > 0 then claimed[1] = 1 end
end
claimed[2] = redis.call('LLEN', isolated)
if done or bytes_left < bytes_before then claimed[3] = 1 end
collect()
return claimed
"""

_SETTLE = """
local session, announced_seconds = arguments[1], arguments[2]
for index = 3, #arguments, 8 do
    local tag, action, milliseconds, job_id, task, reason, in_ledger, attempts =
        unpack(arguments, index, index + 7)
    local value = redis.call('HGET', held(session), tag)
    if value then
        local queue, message = parts(value)
        if action == 'acknowledge' then
            forget(message)
            redis.call('EXPIRE', prefix .. 'job:' .. job_id, announced_seconds)
        elseif action == 'requeue' then
            put(value)
        elseif action == 'dead-letter' then
            dead_letter(queue, message, job_id, task, reason, in_ledger, attempts)
        else
            if action == 'retry' then count(deferrals, message) end
            if action == 'failed-attempt' then count(tries, message) end
            delay(session .. ':' .. tag, value, milliseconds)
        end
        redis.call('HDEL', held(session), tag)
    end
end
collect()
return 1
"""

_WAKE = """
local time = now()
while bytes_left > 0 do
    local name = redis.call('ZRANGEBYSCORE', due, '-inf', time, 'LIMIT', 0, 1)[1]
    if not name then return 0 end
    local value = redis.call('HGET', deferred, name)
    if value then
        put(value)
        redis.call('HDEL', deferred, name)
    end
    redis.call('ZREM', due, name)
end
return 1
"""

_TAKE_OVER = """
local session, counter = arguments[1], arguments[2]
local score = redis.call('ZSCORE', leases, session)
if not score or score + 0 ~= counter + 0 then return -1 end
for _, tag in ipairs(redis.call('HKEYS', held(session))) do
    if bytes_left <= 0 then return 1 end
    requeue(session, tag, true)
end
-- Rolling upgrade: nothing else deletes this key of an older worker.
redis.call('DEL', prefix .. 'started:' .. session)
redis.call('ZREM', leases, session)
return 0
"""

_CLOSE = """
local session = arguments[1]
for _, tag in ipairs(redis.call('HKEYS', held(session))) do
    if bytes_left <= 0 then return 1 end
    requeue(session, tag, false)
end
redis.call('ZREM', leases, session)
return 0
"""

_PUT = """
put(arguments[1])
return 1
"""

_REQUEUE_DEAD_LETTER = """
local letter = redis.call('XRANGE', prefix .. 'dead', arguments[1], arguments[1])[1]
if not letter then return 0 end
local fields = {}
for index = 1, #letter[2], 2 do fields[letter[2][index]] = letter[2][index + 1] end
forget(fields.message)
redis.call('RPUSH', fields.queue or arguments[2], fields.message)
return redis.call('XDEL', prefix .. 'dead', arguments[1])
"""


class Claim(NamedTuple):
    """One message that a session has claimed.

    Attributes:
        tag: Its delivery tag: a number of this process, as text.
        queue: Key of the list that it came from.
        message: Its bytes, as the producer wrote them; of a message over the limit its two ends.
        size: Of the whole message in bytes.
        attempts: How often it ended its pool process or its worker.
        retries: How often its job asked for a retry.
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
        large_wait: Whether large messages wait in the low-priority lane.
        isolated: Poison candidates that wait.
        has_more: Whether a next claim may take more: the queues were not read to their ends, or
            messages were moved to a lane.
    """

    claims: list[Claim]
    large_wait: bool
    isolated: int
    has_more: bool = False


class Heartbeat(NamedTuple):
    """What a session learns when it renews its lease.

    Attributes:
        alive: False if the lease was lost: what the session had claimed was requeued.
        has_messages: Whether any are queued, delayed, isolated or claimed by the session.
        claimed: How many messages the session has claimed.
        sessions: All sessions, each with its heartbeat counter.
    """

    alive: bool
    has_messages: bool
    claimed: int
    sessions: dict[str, float]


class Action(StrEnum):
    """What becomes of a delivery's message."""

    ACKNOWLEDGE = "acknowledge"
    """Remove it: its result is stored."""
    REQUEUE = "requeue"
    """Put it back on its queue, uncounted."""
    DELAY = "delay"
    """Put it back on its queue after the delay, uncounted."""
    RETRY = "retry"
    """Put it back on its queue after the delay, counted as a retry."""
    FAILED_ATTEMPT = "failed-attempt"
    """Isolate it after the delay, counted as an attempt that ended its pool process."""
    DEAD_LETTER = "dead-letter"
    """Move it to the dead letters."""


@dataclass(frozen=True, slots=True)
class Disposition:
    """How one delivery is settled.

    Attributes:
        delay: Seconds, for the actions that have one.
        job_id: Of its job, where it has one.
        task: Name of its task, for a dead letter.
        reason: Why it is a dead letter.
        in_ledger: For a dead letter, whether the ledger holds its job's final result; None if the
            ledger was not queried.
        attempts: For a dead letter, how often its job was executed.
    """

    action: Action
    delay: float = 0.0
    job_id: str = ""
    task: str = ""
    reason: str = ""
    in_ledger: bool | None = None
    attempts: int = 0


class Claims:
    """The scripts, typed. Each raises what redis-py raises; none is sent twice.

    A *session* is one worker process on one connection, identified by a random name. A delivery tag
    is valid only together with the session that claimed it.
    """

    def __init__(self, client: Redis, *, prefix: str = PREFIX) -> None:
        """Connects at the first call.

        Args:
            client: Without retries: a claim that is sent twice claims twice.
            prefix: Of the keys.
        """
        self._client = client
        self._prefix = prefix

        def script(body: str) -> Any:
            return client.register_script(_SCRIPT + body)

        self._open = script(_OPEN)
        self._renew = script(_RENEW)
        self._claimed_tags = script(_CLAIMED_TAGS)
        self._claim = script(_CLAIM)
        self._settle = script(_SETTLE)
        self._wake = script(_WAKE)
        self._take_over = script(_TAKE_OVER)
        self._close = script(_CLOSE)
        self._put = script(_PUT)
        self._requeue_dead_letter = script(_REQUEUE_DEAD_LETTER)

    def open(
        self, session: str, formers: Sequence[str] = (), wanted: Iterable[str] = ()
    ) -> set[str]:
        """Begin a session, and take over the claims of this process's former sessions.

        Claims that are not wanted are requeued, uncounted: those whose reply was lost, above all.
        What a former session still sends has no effect.

        Returns:
            The tags among the wanted ones that are still claimed.
        """
        arguments = (session, len(formers), *formers, *wanted)
        while (reply := self._run(self._open, *arguments))[0]:
            pass
        return {tag.decode() for tag in reply[1:]}

    def heartbeat(self, session: str, queues: Sequence[str] = ()) -> Heartbeat:
        """Renew a lease that was not taken over, late or not, and look for messages.

        Args:
            session: The session.
            queues: Keys of lists.
        """
        leases, held = f"{self._prefix}leases", f"{self._prefix}held:{session}"
        others = f"{self._prefix}due", f"{self._prefix}isolated"
        with self._client.pipeline(transaction=False) as pipeline:
            pipeline.zadd(leases, {session: 1}, xx=True, incr=True)
            pipeline.zrange(leases, 0, -1, withscores=True)
            pipeline.exists(held, *others, *queues)
            counter, sessions, found = pipeline.execute(raise_on_error=False)
        if isinstance(counter, OutOfMemoryError):  # a script may write on a full server
            counter = self._run(self._renew, session)
        for reply in counter, sessions, found:
            if isinstance(reply, Exception):
                raise reply
        counters = {name.decode(): float(score) for name, score in sessions}
        claimed: Any = self._client.hlen(held) if found else 0
        return Heartbeat(counter is not None, bool(found), claimed, counters)

    def claimed_tags(self, session: str) -> set[str]:
        """The tags of all that a session has claimed, as Redis knows it."""
        return {tag.decode() for tag in self._run(self._claimed_tags, session)}

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
            queues: Keys of lists, the most urgent first, those of the several queues in turn.
            first_tag: Number of the first delivery; the others follow. Never used before by this
                process.
            room: Messages at most.
            size: Bytes after which no more is claimed.
            small: Size in bytes up to which a message is small; larger ones have claims of their
                own.
            largest: Bytes of the largest message that is claimed. Larger ones are moved to the
                low-priority lane, so that others pass them; the large ones of that lane come first.
            large_size: Bytes up to which large messages are claimed together; the first may be
                larger.
            lanes: Number of queues: the last list of each is its low-priority lane.
            read_lanes: Whether to claim from these lanes at all.
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
        """Apply dispositions, by delivery tag. One whose delivery is not claimed has no effect."""
        fields = (
            (
                *(tag, one.action.value, round(one.delay * 1000), one.job_id, one.task),
                *(one.reason, "" if one.in_ledger is None else int(one.in_ledger), one.attempts),
            )
            for tag, one in dispositions.items()
        )
        self._run(self._settle, session, _ANNOUNCEMENT_SECONDS, *chain.from_iterable(fields))

    def wake(self) -> bool:
        """Put delayed messages that are due back on their queues. Returns whether more are due."""
        return bool(self._run(self._wake))

    def take_over(self, session: str, counter: float) -> int:
        """Requeue what a session has claimed whose heartbeat counter is still ``counter``.

        Each message counts an attempt: its worker ended while it was claimed.

        Returns:
            1 if there is more, 0 if not, -1 if the session is alive or was taken over already.
        """
        return int(self._run(self._take_over, session, counter))

    def close(self, session: str) -> None:
        """End a session: all that it has claimed is requeued, uncounted."""
        while self._run(self._close, session):
            pass

    def put(self, queue: str, message: bytes) -> None:
        """Put a message at the consuming end of a queue, on a full server too."""
        self._run(self._put, queue.encode() + b"\0" + message)

    def requeue_dead_letter(self, letter_id: str, queue: str) -> int:
        """Move a dead letter to its origin queue, or to ``queue`` if it names none.

        Its attempts and retries start anew. Returns 0 if there is no such letter.
        """
        return int(self._run(self._requeue_dead_letter, letter_id, queue))

    def _run(self, script: Any, *arguments: object, queues: Sequence[str] = ()) -> Any:
        return script(keys=(self._prefix, *queues), args=arguments)
