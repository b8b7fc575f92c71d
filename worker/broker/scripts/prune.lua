-- Delete old dead letters, those over a limit of bytes, and old counts of attempts and retries.
--
-- Keys: prefix
-- Arguments: seconds to keep a dead letter (-1: forever), bytes of all dead letters at most
-- Result: 1 if there may be more to delete, otherwise 0; the numbers of dead letters that were
-- deleted for their age and for their bytes
-- Invariant: the oldest dead letters are deleted first.

local kept_seconds, most_bytes = arguments[1] + 0, arguments[2] + 0
local dead, dropped = prefix .. 'dead', prefix .. 'dropped'
local most_entries = 1000
local seconds = redis.call('TIME')[1] + 0
local oldest = kept_seconds < 0 and 0 or (seconds - kept_seconds) * 1000
-- Reads the sizes of the stream's nodes, not their contents: 26 ms for 188 MB of 300,000 entries.
local used = redis.call('MEMORY', 'USAGE', dead, 'SAMPLES', 0) or 0
local aged, excess = 0, 0
while bytes_left > 0 and aged + excess < most_entries do
    local entry = redis.call('XRANGE', dead, '-', '+', 'COUNT', 1)[1]
    if not entry then break end
    if string.match(entry[1], '^%d+') + 0 < oldest then
        aged = aged + 1
    elseif used > most_bytes then
        excess = excess + 1
    else
        break
    end
    for _, field in ipairs(entry[2]) do
        used, bytes_left = used - #field, bytes_left - #field
        has_garbage = has_garbage or #field > fetched_bytes
    end
    redis.call('XDEL', dead, entry[1])
end
if aged > 0 then redis.call('HINCRBY', dropped, 'age', aged) end
if excess > 0 then redis.call('HINCRBY', dropped, 'bytes', excess) end
local counts =
    redis.call('ZRANGEBYSCORE', counted, '-inf', seconds - counts_seconds, 'LIMIT', 0, most_entries)
for _, digest in ipairs(counts) do
    redis.call('HDEL', attempt_counts, digest)
    redis.call('HDEL', retry_counts, digest)
    redis.call('ZREM', counted, digest)
end
collect()
local has_more = bytes_left <= 0 or aged + excess == most_entries or #counts == most_entries
return {has_more and 1 or 0, aged, excess}
