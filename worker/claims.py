"""The queue's protocol in Redis: who has which message, and since when.

A message's bytes are at any moment in exactly one place: its queue, one worker's claims, the
deferred ones, or the dead letters. Every move between them is one script, so that no kill and no
lost reply can come between two halves of it; a script that moves a claimed message does nothing
unless the caller still holds it. Knows nothing of Celery, and never looks into a message.

Keys, all of them ours, beside the queues that kombu's producers write:

- ``leases``: sorted set, a worker's incarnation by the time (ms) until which it has spoken
- ``held:INCARNATION``: hash, receipt to the queue's key and the message's bytes
- ``started:INCARNATION``: set of the receipts among these whose job has begun
- ``deferred`` and ``due``: messages that wait for another try, and the time (ms) of each
- ``tries``: hash, digest of a message to its tries that began and have not ended in order
- ``deferrals``: hash, likewise to how often its job asked for another try
- ``dead``: stream of the dead letters
- ``job:ID``: the announcement that a producer wrote with a job's message

Times are the server's own, for clients' clocks are of no account. All scripts carry the flag
``allow-oom``: a full server refuses every other way of taking a message off a queue and keeping it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from redis import Redis

PREFIX = "interview-access:"
"""Of every key of ours."""

DEAD = f"{PREFIX}dead"
"""The stream of dead letters: job_id, task, reason, time, attempts, size, queue, message."""

_ANY_SIZE = 2**53
_ANNOUNCED_SECONDS = 86_400
"""For how long a job's announcement outlives it: as long as its result does."""

_SCRIPT = """#!lua flags=allow-oom
local prefix, arguments = KEYS[1], ARGV
local leases, due, deferred = prefix .. 'leases', prefix .. 'due', prefix .. 'deferred'
local tries, deferrals = prefix .. 'tries', prefix .. 'deferrals'

local function now()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function held(incarnation) return prefix .. 'held:' .. incarnation end
local function started(incarnation) return prefix .. 'started:' .. incarnation end

local function parts(value)
    local stop = string.find(value, '\\0', 1, true)
    return string.sub(value, 1, stop - 1), string.sub(value, stop + 1)
end

-- What a message is known by in tries and deferrals. Of a long one its ends tell enough, where its
-- job's id and its delivery tag are: to go through 5 MB would keep the server from all others.
local function digest_of(message)
    if #message > 8192 then
        message = #message .. string.sub(message, 1, 4096) .. string.sub(message, -4096)
    end
    return redis.sha1hex(message)
end

-- No field is left at zero.
local function untry(message)
    local digest = digest_of(message)
    if redis.call('HINCRBY', tries, digest, -1) <= 0 then
        redis.call('HDEL', tries, digest)
    end
end

local function forget(message)
    local digest = digest_of(message)
    redis.call('HDEL', tries, digest)
    redis.call('HDEL', deferrals, digest)
end

local function bury(queue, message, job_id, task, reason)
    local digest = digest_of(message)
    local attempts = (redis.call('HGET', tries, digest) or 0)
        + (redis.call('HGET', deferrals, digest) or 0)
    local time = redis.call('TIME')
    redis.call('XADD', prefix .. 'dead', '*', 'job_id', job_id, 'task', task, 'reason', reason,
        'time', string.format('%d.%03d', time[1], math.floor(time[2] / 1000)),
        'attempts', attempts, 'size', #message, 'queue', queue, 'message', message)
    forget(message)
end

-- To the end of the queue that is taken from. What has become another type takes no message.
local function put(queue, message)
    if type(redis.pcall('RPUSH', queue, message)) ~= 'number' then
        bury(queue, message, '', '', 'Its queue is no list any more.')
    end
end

-- Takes a message out of a worker's claims. A try that ends in order is none.
local function release(incarnation, receipt, in_order)
    local value = redis.call('HGET', held(incarnation), receipt)
    if not value then return nil end
    local queue, message = parts(value)
    redis.call('HDEL', held(incarnation), receipt)
    if redis.call('SREM', started(incarnation), receipt) == 1 and in_order then untry(message) end
    return queue, message
end

-- Put first: an error ends a script, and what it did before stands.
local function give_back(incarnation, receipt, in_order)
    local value = redis.call('HGET', held(incarnation), receipt)
    if not value then return 0 end
    put(parts(value))
    release(incarnation, receipt, in_order)
    return 1
end
"""

_OPEN = """
local incarnation, lease, formers = arguments[1], arguments[2], arguments[3]
local wanted, kept = {}, {}
for index = 4 + formers, #arguments do wanted[arguments[index]] = true end
redis.call('ZADD', leases, now() + lease, incarnation)
for index = 4, 3 + formers do
    local former = arguments[index]
    for _, receipt in ipairs(redis.call('HKEYS', held(former))) do
        if wanted[receipt] then
            local value = redis.call('HGET', held(former), receipt)
            redis.call('HSET', held(incarnation), receipt, value)
            redis.call('HDEL', held(former), receipt)
            if redis.call('SREM', started(former), receipt) == 1 then
                redis.call('SADD', started(incarnation), receipt)
            end
            kept[#kept + 1] = receipt
        else
            give_back(former, receipt, true)
        end
    end
    redis.call('ZREM', leases, former)
end
return kept
"""

_RENEW = """
local incarnation, lease, time = arguments[1], arguments[2], now()
local alive = redis.call('ZSCORE', leases, incarnation) and 1 or 0
if alive == 1 then redis.call('ZADD', leases, time + lease, incarnation) end
return {alive, redis.call('ZRANGEBYSCORE', leases, '-inf', time, 'WITHSCORES')}
"""

_CLAIM = """
local incarnation, room, bytes, alone = arguments[1], arguments[2], arguments[3], arguments[4]
local small, large_room = arguments[5] + 0, arguments[6] + 0
local queues, look_aside, receipt = arguments[7], arguments[8] == '1', arguments[9]
if not redis.call('ZSCORE', leases, incarnation) then return false end
local claimed, done, first_aside = {0}, false, #KEYS - queues + 1

local function next_of(list)
    local message = redis.pcall('LINDEX', list, -1)
    return type(message) == 'string' and message
end

local function take(list, message)
    local digest = digest_of(message)
    local tried = redis.call('HGET', tries, digest) or 0
    local suspect = tried + 0 >= alone + 0
    if suspect and (#claimed > 1 or redis.call('HLEN', held(incarnation)) > 0)
        or redis.call('HSETNX', held(incarnation), receipt, list .. '\\0' .. message) == 0
    then
        done = true
        return
    end
    redis.call('LTRIM', list, 0, -2)  -- RPOP would bring it once more
    local deferred_before = redis.call('HGET', deferrals, digest) or 0
    for _, value in ipairs({receipt, list, message, tried, deferred_before}) do
        claimed[#claimed + 1] = value
    end
    receipt = string.format('%d', receipt + 1)
    bytes = bytes - #message
    done = suspect or #message > small or #claimed > room * 5 or bytes <= 0
end

for index = first_aside, #KEYS do
    local message = look_aside and not done and large_room > 0 and next_of(KEYS[index])
    if message and #message > small then take(KEYS[index], message) end
end
for index = 2, #KEYS do
    local list, aside = KEYS[index], first_aside + (index - 2) % queues
    while not done and (look_aside or index < first_aside) do
        local message = next_of(list)
        if not message then break end
        if #message <= small then
            take(list, message)
        elseif index >= first_aside then
            break
        elseif large_room <= 0 then
            redis.call('RPOPLPUSH', list, KEYS[aside])
        elseif #claimed > 1 then
            done = true
        else
            take(list, message)
        end
    end
end
for index = first_aside, #KEYS do
    local count = redis.pcall('LLEN', KEYS[index])
    if type(count) == 'number' and count > 0 then claimed[1] = 1 end
end
return claimed
"""

_START = """
local incarnation, mine = arguments[1], {}
for index = 2, #arguments do
    local receipt = arguments[index]
    local value = redis.call('HGET', held(incarnation), receipt)
    if value then
        if redis.call('SADD', started(incarnation), receipt) == 1 then
            local _, message = parts(value)
            redis.call('HINCRBY', tries, digest_of(message), 1)
        end
        mine[#mine + 1] = receipt
    end
end
return mine
"""

_ACKNOWLEDGE = """
local count = 0
for index = 3, #arguments, 2 do
    local queue, message = release(arguments[1], arguments[index], false)
    if queue then
        forget(message)
        redis.call('EXPIRE', prefix .. 'job:' .. arguments[index + 1], arguments[2])
        count = count + 1
    end
end
return count
"""

_RETURN = """
local count = 0
for index = 2, #arguments do
    count = count + give_back(arguments[1], arguments[index], true)
end
return count
"""

_DEFER = """
local incarnation, receipt, delay, in_order = arguments[1], arguments[2], arguments[3], arguments[4]
local queue, message = release(incarnation, receipt, in_order == '1')
if not queue then return 0 end
if in_order == '1' then redis.call('HINCRBY', deferrals, digest_of(message), 1) end
local name = incarnation .. ':' .. receipt
redis.call('HSET', deferred, name, queue .. '\\0' .. message)
redis.call('ZADD', due, now() + delay, name)
return 1
"""

_WAKE = """
local names = redis.call('ZRANGEBYSCORE', due, '-inf', now(), 'LIMIT', 0, arguments[1])
for _, name in ipairs(names) do
    local value = redis.call('HGET', deferred, name)
    if value then
        local queue, message = parts(value)
        put(queue, message)
        redis.call('HDEL', deferred, name)
    end
    redis.call('ZREM', due, name)
end
return #names
"""

_BURY = """
local incarnation, receipt, job_id, task, reason = unpack(arguments)
local value = redis.call('HGET', held(incarnation), receipt)
if not value then return 0 end
local queue, message = parts(value)
bury(queue, message, job_id, task, reason)
release(incarnation, receipt, false)
return 1
"""

_SWEEP = """
local incarnation, deadline, at_most = arguments[1], arguments[2], arguments[3]
local score = redis.call('ZSCORE', leases, incarnation)
if not score or score + 0 ~= deadline + 0 or score + 0 > now() then return -1 end
local receipts = redis.call('HKEYS', held(incarnation))
for index = 1, math.min(#receipts, at_most) do
    give_back(incarnation, receipts[index], false)
end
local left = math.max(#receipts - at_most, 0)
if left == 0 then
    redis.call('DEL', started(incarnation))
    redis.call('ZREM', leases, incarnation)
end
return left
"""

_CLOSE = """
local incarnation = arguments[1]
for _, receipt in ipairs(redis.call('HKEYS', held(incarnation))) do
    give_back(incarnation, receipt, true)
end
return redis.call('ZREM', leases, incarnation)
"""

_PUT = """
put(KEYS[2], arguments[1])
return 1
"""

_REQUEUE = """
local letter = redis.call('XRANGE', prefix .. 'dead', arguments[1], arguments[1])[1]
if not letter then return 0 end
local fields = {}
for index = 1, #letter[2], 2 do fields[letter[2][index]] = letter[2][index + 1] end
forget(fields.message)
redis.call('RPUSH', fields.queue or arguments[2], fields.message)
return redis.call('XDEL', prefix .. 'dead', arguments[1])
"""


class Claim(NamedTuple):
    """One message in a worker's hands.

    Attributes:
        receipt: What it is known by while it is held; a number of this process's, as text.
        queue: The key of the list that it came from.
        message: Its bytes, as the producer wrote them.
        tries: Tries that began and did not end in order: their worker died, or was killed.
        deferrals: How often its job asked for another try.
    """

    receipt: str
    queue: str
    message: bytes
    tries: int
    deferrals: int


class Claimed(NamedTuple):
    """What a worker was given.

    Attributes:
        claims: Messages, now in its hands.
        large_wait: Whether large messages stand aside.
    """

    claims: list[Claim]
    large_wait: bool


class Renewal(NamedTuple):
    """What a worker learns when it renews its lease.

    Attributes:
        alive: False where the lease is lost: whatever it held is another's by now.
        expired: Other workers' leases that have run out, by incarnation, each with its deadline.
    """

    alive: bool
    expired: dict[str, float]


class Claims:
    """The scripts, typed. Each raises what redis raises; none is sent twice.

    An *incarnation* is one worker's time on one connection, a random name. A receipt counts only
    together with the incarnation that holds it.
    """

    def __init__(self, client: Redis, *, lease: float, prefix: str = PREFIX) -> None:
        """Connects at the first call.

        Args:
            client: Without retries: a claim sent twice claims twice.
            lease: Seconds for which a worker has spoken when it renews.
            prefix: Of the keys.
        """
        self._lease = round(lease * 1000)
        self._prefix = prefix
        self._open = client.register_script(_SCRIPT + _OPEN)
        self._renew = client.register_script(_SCRIPT + _RENEW)
        self._claim = client.register_script(_SCRIPT + _CLAIM)
        self._start = client.register_script(_SCRIPT + _START)
        self._acknowledge = client.register_script(_SCRIPT + _ACKNOWLEDGE)
        self._return = client.register_script(_SCRIPT + _RETURN)
        self._defer = client.register_script(_SCRIPT + _DEFER)
        self._wake = client.register_script(_SCRIPT + _WAKE)
        self._bury = client.register_script(_SCRIPT + _BURY)
        self._sweep = client.register_script(_SCRIPT + _SWEEP)
        self._close = client.register_script(_SCRIPT + _CLOSE)
        self._put = client.register_script(_SCRIPT + _PUT)
        self._requeue = client.register_script(_SCRIPT + _REQUEUE)

    def open(
        self, incarnation: str, formers: Sequence[str] = (), wanted: Iterable[str] = ()
    ) -> list[str]:
        """Begin a lease, and take over what this process's ``formers`` held.

        What of it is not ``wanted`` goes back to its queue, uncounted: the replies of claims that
        were lost, above all. Whatever a former incarnation still sends is without effect.

        Returns:
            The receipts among the wanted ones that are held still.
        """
        arguments = (incarnation, self._lease, len(formers), *formers, *wanted)
        return _texts(self._run(self._open, *arguments))

    def renew(self, incarnation: str) -> Renewal:
        """Go on with a lease that has not been swept, late or not."""
        alive, expired = self._run(self._renew, incarnation, self._lease)
        names = _texts(expired[::2])
        return Renewal(bool(alive), dict(zip(names, map(float, expired[1::2]), strict=True)))

    def claim(
        self,
        incarnation: str,
        queues: Sequence[str],
        *,
        receipt: int,
        room: int,
        size: int,
        alone_after: int,
        small: int = _ANY_SIZE,
        large_room: int = 1,
        asides: int = 1,
        look_aside: bool = True,
    ) -> Claimed | None:
        """Take messages off queues into a worker's claims.

        Args:
            incarnation: The worker's.
            queues: Keys of lists, the most urgent first, those of the several queues in turn.
            receipt: Number of the first; the others follow. Never used before by this process.
            room: Messages at most.
            size: Bytes after which no more is taken.
            alone_after: Tries after which a message is claimed by a worker that holds no other,
                and with no other, so that what it does to its worker is done to it alone. It waits
                at the end of its queue until there is such a worker, and what is behind it waits.
            small: Bytes of a message up to which it may come with others; a larger one is claimed
                by itself.
            large_room: Large messages at most. Where there is none, those that are met are put
                aside, so that small ones pass them; with room, what stands aside comes first.
            asides: How many queues there are: the last list of each is where its large ones stand
                aside.
            look_aside: Whether to look at these lists at all.

        Returns:
            The claims, or None where the lease is lost.
        """
        reply = self._run(
            self._claim,
            *(incarnation, room, size, alone_after, small, large_room, asides),
            *(int(look_aside), receipt),
            queues=tuple(queues),
        )
        if reply is None:
            return None
        claims = [
            Claim(
                reply[at].decode(),
                reply[at + 1].decode(),
                reply[at + 2],
                int(reply[at + 3]),
                int(reply[at + 4]),
            )
            for at in range(1, len(reply), 5)
        ]
        return Claimed(claims, large_wait=bool(reply[0]))

    def start(self, incarnation: str, *receipts: str) -> list[str]:
        """Count a try of each message that is held still; a second call for one counts none.

        Returns:
            The receipts that are held still: only their jobs may begin.
        """
        return _texts(self._run(self._start, incarnation, *receipts))

    def acknowledge(
        self, incarnation: str, *receipts: str, job_ids: Mapping[str, str] | None = None
    ) -> int:
        """Done with: the messages are gone for good, and their jobs' announcements by and by.

        Args:
            incarnation: The worker's.
            receipts: Of the messages.
            job_ids: Their jobs, by receipt, where they are known.

        Returns:
            How many were held.
        """
        pairs = ((receipt, (job_ids or {}).get(receipt, "")) for receipt in receipts)
        return int(
            self._run(
                self._acknowledge, incarnation, _ANNOUNCED_SECONDS, *chain.from_iterable(pairs)
            )
        )

    def give_back(self, incarnation: str, *receipts: str) -> int:
        """To the end of their queues that is taken from, uncounted. Returns how many were held."""
        return int(self._run(self._return, incarnation, *receipts))

    def defer(
        self, incarnation: str, receipt: str, *, seconds: float, in_order: bool = True
    ) -> int:
        """Back to its queue in a while.

        Not ``in_order``, it asked for nothing: a try that began counts as one that ended its
        worker, and one that did not begin as none.
        """
        return int(
            self._run(self._defer, incarnation, receipt, round(seconds * 1000), int(in_order))
        )

    def wake(self, at_most: int = 1000) -> int:
        """Put deferred messages that are due back on their queues. Returns how many."""
        return int(self._run(self._wake, at_most))

    def bury(
        self, incarnation: str, receipt: str, *, reason: str, job_id: str = "", task: str = ""
    ) -> int:
        """To the dead letters."""
        return int(self._run(self._bury, incarnation, receipt, job_id, task, reason))

    def sweep(self, incarnation: str, deadline: float, at_most: int = 100) -> int:
        """Give back what a worker held whose lease ran out at ``deadline`` and was not renewed.

        Returns:
            How many it holds still; -1 where the lease was renewed, or others swept it all.
        """
        return int(self._run(self._sweep, incarnation, deadline, at_most))

    def close(self, incarnation: str) -> None:
        """End a lease: all that is held goes back, uncounted."""
        self._run(self._close, incarnation)

    def put(self, queue: str, message: bytes) -> None:
        """Put a message on a queue, the next to be taken, on a full server too."""
        self._run(self._put, message, queues=(queue,))

    def requeue(self, letter_id: str, queue: str) -> int:
        """A dead letter back to the queue it came from, or to ``queue`` where it names none.

        Its tries begin anew. Returns 0 where there is no such letter.
        """
        return int(self._run(self._requeue, letter_id, queue))

    def _run(self, script: Any, *arguments: object, queues: Sequence[str] = ()) -> Any:
        return script(keys=(self._prefix, *queues), args=arguments)


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode() for value in values]
