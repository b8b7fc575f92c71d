#!lua flags=allow-oom
-- What the scripts on claims share; worker/broker/scripts puts it before each of them.
--
-- At any moment a message is in exactly one place: its queue, one session's claims, the delayed
-- messages, the isolated ones or the dead letters. A script ends after it has moved
-- 4 MiB of messages (one 100,000-ID job), at least one message, so that Redis serves other clients.
--
-- Four keys have names of earlier releases: deferred (delayed messages), tries (attempts),
-- deferrals (retries) and held:SESSION (claims).
local prefix, arguments = KEYS[1], ARGV
local leases, due, delayed = prefix .. 'leases', prefix .. 'due', prefix .. 'deferred'
local attempt_counts, retry_counts = prefix .. 'tries', prefix .. 'deferrals'
local nodes = prefix .. 'nodes'  -- a user without permission for this key needs none
local isolated, counted, paused = prefix .. 'isolated', prefix .. 'counted', prefix .. 'paused'
local bytes_left = 4 * 1024 * 1024
-- Bytes of each end that are returned of a message over the limit: its job ID is in one of them.
local ends = 64 * 1024
-- Bytes of a message above which a claim's result omits it, and it is read by a separate command:
-- Redis keeps the arguments of a script's commands until it ends, one copy beside the result's.
local fetched_bytes = 1024 * 1024
local counts_seconds = 30 * 86400  -- after the last attempt or retry was counted
local has_garbage = false

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

local function claims_of(session) return prefix .. 'held:' .. session end

local function parts(value)
    has_garbage = has_garbage or #value > fetched_bytes
    local stop = string.find(value, '\0', 1, true)
    return string.sub(value, 1, stop - 1), string.sub(value, stop + 1)
end

-- Free what Lua has of large messages: it collects little at a time, long after the script.
local function collect()
    if has_garbage then collectgarbage() end
end

-- Identify a message in the counts. The ends of a long one suffice, for they hold its job ID and
-- delivery tag: hashing 5 MB would block the server.
local function digest_of(message)
    if #message > 8192 then
        message = #message .. string.sub(message, 1, 4096) .. string.sub(message, -4096)
    end
    return redis.sha1hex(message)
end

local function count(hash, message)
    local digest = digest_of(message)
    redis.call('HINCRBY', hash, digest, 1)
    redis.call('ZADD', counted, redis.call('TIME')[1], digest)
    for _, key in ipairs({hash, counted}) do redis.call('EXPIRE', key, counts_seconds) end
end

local function forget(message)
    local digest = digest_of(message)
    local attempts = redis.call('HDEL', attempt_counts, digest)
    local retries = redis.call('HDEL', retry_counts, digest)
    if attempts + retries > 0 then redis.call('ZREM', counted, digest) end
end

local function executions_of(message)
    local digest = digest_of(message)
    local attempts = redis.call('HGET', attempt_counts, digest) or 0
    return attempts + (redis.call('HGET', retry_counts, digest) or 0)
end

-- An empty in_ledger denotes that the ledger was not queried.
local function dead_letter(queue, message, job_id, task, reason, in_ledger, attempts)
    local time = redis.call('TIME')
    redis.call('XADD', prefix .. 'dead', '*', 'job_id', job_id, 'task', task, 'reason', reason,
        'in_ledger', in_ledger,
        'time', string.format('%d.%03d', time[1], math.floor(time[2] / 1000)),
        'attempts', attempts, 'size', #message, 'queue', queue, 'message', message)
    forget(message)
end

-- Requeue at the consuming end, or isolate a message that has attempts. A key that is not a list
-- accepts no message.
local function put(value)
    local queue, message = parts(value)
    bytes_left = bytes_left - #message
    if redis.call('HEXISTS', attempt_counts, digest_of(message)) == 1 then
        redis.call('LPUSH', isolated, value)
    elseif type(redis.pcall('RPUSH', queue, message)) ~= 'number' then
        dead_letter(queue, message, '', '', 'Its queue is not a list.', '', executions_of(message))
    end
end

local function delay(name, value, milliseconds)
    redis.call('HSET', delayed, name, value)
    redis.call('ZADD', due, now() + milliseconds, name)
end

-- Written before it is removed: an error ends a script, and what it did before stays.
local function requeue(session, tag, is_attempt)
    local value = redis.call('HGET', claims_of(session), tag)
    if not value then return end
    if is_attempt then
        local _, message = parts(value)
        count(attempt_counts, message)
    end
    put(value)
    redis.call('HDEL', claims_of(session), tag)
end
