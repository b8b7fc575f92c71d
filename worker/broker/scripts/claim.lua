-- Move messages from queues to a session's claims.
--
-- Keys: prefix, then lists, the most urgent first; the last list of each queue is its low-priority
-- lane
-- Arguments: session, messages at most, bytes after which no more is claimed, bytes of the largest
-- small message, bytes of the largest message that is claimed, number of queues, 1 to claim from
-- the lanes, poison candidates at most (0 or 1), the first delivery tag, bytes of a message above
-- which only its two ends are returned, bytes of large messages that are claimed together
-- Result: false if the session has ended; 'paused' if an operator has paused the queue; otherwise
-- whether large messages wait in the lanes,
-- the number of isolated messages, whether a next claim may take more, and for each claim its tag,
-- queue, message, size, attempts and retries
-- Invariant: a message that does not fit stays on its list, moves to its queue's lane, or is
-- isolated if it has attempts.

local session, room, bytes = arguments[1], arguments[2], arguments[3]
local small, largest = arguments[4] + 0, arguments[5] + 0
local queues, read_lanes = arguments[6], arguments[7] == '1'
local isolated_room, tag, max_bytes = arguments[8] + 0, arguments[9], arguments[10] + 0
local large_bytes, has_large = arguments[11] + 0, false
local bytes_before = bytes_left
if not redis.call('ZSCORE', leases, session) then return false end
-- A user without permission to read this key claims as before.
if redis.pcall('EXISTS', paused) == 1 then return 'paused' end
local claimed, done, first_lane = {0, 0, 0}, false, #KEYS - queues + 1

local function next_of(list)
    local message = redis.pcall('LINDEX', list, -1)
    return type(message) == 'string' and message
end

-- The message leaves its list first, so that Redis does not hold it twice. It returns to it if it
-- cannot be claimed: the tag is in use, the key is not a hash, an ACL denies the command.
local function take(list, queue, message, digest)
    local value = queue .. '\0' .. message
    redis.call('LTRIM', list, 0, -2)  -- RPOP would return the message once more
    local stored = redis.pcall('HSETNX', claims_of(session), tag, value)
    if stored ~= 1 then
        redis.call('RPUSH', list, list == isolated and value or message)
        if stored ~= 0 then error(stored) end
        done = true
        return
    end
    local attempts = redis.call('HGET', attempt_counts, digest) or 0
    local retries = redis.call('HGET', retry_counts, digest) or 0
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

-- Large and small messages are never claimed together; the first large one may exceed the budget.
local function fits(message)
    if #message <= small then return not has_large end
    return #message <= largest and (#claimed == 3 or (has_large and #message <= large_bytes))
end

if isolated_room > 0 then
    local value = next_of(isolated)
    if value and not string.find(value, '\0', 1, true) then
        dead_letter('', value, '', '', 'It names no origin queue.', '', executions_of(value))
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
        if not digest or redis.call('HEXISTS', attempt_counts, digest) == 1 then break end
        take(KEYS[index], KEYS[index], message, digest)
    end
end
for index = 2, #KEYS do
    local list, lane = KEYS[index], first_lane + (index - 2) % queues
    while not done and bytes_left > 0 and (read_lanes or index < first_lane) do
        local message = next_of(list)
        if not message then break end
        local digest = digest_of(message)
        if redis.call('HEXISTS', attempt_counts, digest) == 1 then
            bytes_left = bytes_left - #message
            redis.call('LPUSH', isolated, list .. '\0' .. message)
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
