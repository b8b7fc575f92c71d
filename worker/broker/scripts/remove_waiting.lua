-- Remove messages from the end of a list from which workers claim, or delayed ones, if they are
-- still there.
--
-- Keys: prefix, the list or the delayed messages
-- Arguments: positions of the list that are searched; seconds to keep an announcement; then for each
-- message its name (for a list its digest), job ID, and for a dead letter task, reason, whether the
-- ledger has its result, and attempts; the reason of others is ''
-- Result: number of messages that were removed
-- Invariant: a message that a worker has claimed meanwhile is not removed.

local list, positions, announced_seconds = KEYS[2], arguments[1] + 0, arguments[2]
local wanted, removed, most = {}, 0, (#arguments - 2) / 6
for at = 3, #arguments, 6 do wanted[arguments[at]] = {unpack(arguments, at + 1, at + 5)} end

local function discard(queue, message, given)
    local job_id, task, reason, in_ledger, attempts = unpack(given)
    if reason ~= '' then
        dead_letter(queue, message, job_id, task, reason, in_ledger, attempts)
    else
        forget(message)
        redis.call('EXPIRE', prefix .. 'job:' .. job_id, announced_seconds)
    end
    removed = removed + 1
end

if list == delayed then
    for name, given in pairs(wanted) do
        local value = redis.call('HGET', delayed, name)
        if value then
            local queue, message = parts(value)
            discard(queue, message, given)
            redis.call('HDEL', delayed, name)
        end
        redis.call('ZREM', due, name)
    end
    return removed
end
local index = -1
for _ = 1, positions do
    local value = redis.call('LINDEX', list, index)
    if not value or removed >= most then break end
    local queue, message = list, value
    if list == isolated and string.find(value, '\0', 1, true) then queue, message = parts(value) end
    local given = wanted[digest_of(message)]
    if given then
        discard(queue, message, given)
        redis.call('LREM', list, -1, value)
    else
        index = index - 1
    end
end
return removed
