#!lua flags=no-writes,allow-oom
-- Read the state of the queue. The time that it takes does not depend on the length of a list.
--
-- Keys: prefix, then the lists with waiting messages
-- Arguments: bytes of each end of a message that are returned, bytes of a pause, sessions at most
-- Result: time and the offset of delays from it, both in ms; the pause; number of delayed messages
-- and the time in ms at which the next is due; number of dead letters, their bytes and the ID of the
-- oldest; number of sessions; a list with name, heartbeat counter, number of claims and node name of
-- each; and for each list its length, and size and both ends of the message that is claimed next. Missing
-- values are ''. A key of another type counts as empty.

local prefix, ends, pause_bytes, most_sessions = KEYS[1], ARGV[1] + 0, ARGV[2], ARGV[3]

local function number(...)
    local value = redis.pcall(...)
    return type(value) == 'number' and value or 0
end
local function text(...)
    local value = redis.pcall(...)
    return type(value) == 'string' and value or ''
end
local function list(...)
    local value = redis.pcall(...)
    return type(value) == 'table' and not value.err and value or {}
end

local dead, leases = prefix .. 'dead', prefix .. 'leases'
local time = redis.call('TIME')
local next_due = list('ZRANGE', prefix .. 'due', 0, 0, 'WITHSCORES')
local oldest = list('XRANGE', dead, '-', '+', 'COUNT', 1)[1] or {}
local pause, sessions = text('GETRANGE', prefix .. 'paused', 0, pause_bytes - 1), {}
if pause == '' and number('EXISTS', prefix .. 'paused') == 1 then pause = '{}' end
for at, value in ipairs(list('ZRANGE', leases, 0, most_sessions - 1, 'WITHSCORES')) do
    sessions[#sessions + 1] = value
    if at % 2 == 0 then
        local name = sessions[#sessions - 1]
        sessions[#sessions + 1] = number('HLEN', prefix .. 'held:' .. name)
        sessions[#sessions + 1] = text('HGET', prefix .. 'nodes', name)
    end
end
local result = {
    string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)),
    text('HGET', prefix .. 'clock', 'offset'),
    pause,
    number('ZCARD', prefix .. 'due'), next_due[2] or '',
    number('XLEN', dead), number('MEMORY', 'USAGE', dead, 'SAMPLES', 5), oldest[1] or '',
    number('ZCARD', leases), sessions,
}
for index = 2, #KEYS do
    local message = text('LINDEX', KEYS[index], -1)
    local first, last = message, ''
    if #message > 2 * ends then
        first, last = string.sub(message, 1, ends), string.sub(message, -ends)
    end
    for _, value in ipairs({number('LLEN', KEYS[index]), #message, first, last}) do
        result[#result + 1] = value
    end
end
return result
