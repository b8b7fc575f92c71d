#!lua
-- Store and publish the reply to a control request, and delete the oldest replies over a limit.
--
-- Keys: the reply, the list of replies
-- Arguments: value, seconds to keep it, bytes of all outstanding replies at most
-- Result: 1, or 0 if the key of the reply exists
-- Invariant: an entry of the list holds the bytes of all replies before it, its own bytes, its
-- digest and its key; a reply that something else has replaced is not deleted.

local key, replies, value, seconds, limit = KEYS[1], KEYS[2], ARGV[1], ARGV[2], ARGV[3] + 0
local function entry(index)
    local text = redis.call('LINDEX', replies, index) or '0 0 0 '
    local before, bytes, digest, name = string.match(text, '^(%d+) (%d+) (%x+) (.*)$')
    return before + 0, bytes + 0, digest, name
end
if not redis.call('SET', key, value, 'NX', 'EX', seconds) then return 0 end
redis.call('PUBLISH', key, value)
local before, bytes = entry(-1)
local text = string.format('%.0f %d %s ', before + bytes, #value, redis.sha1hex(value))
redis.call('RPUSH', replies, text .. key)
redis.call('EXPIRE', replies, seconds)
local first, _, digest, oldest = entry(0)
while first + limit < before + bytes + #value do
    redis.call('LPOP', replies)
    local stored = redis.call('GET', oldest)
    if stored and redis.sha1hex(stored) == digest then redis.call('DEL', oldest) end
    first, _, digest, oldest = entry(0)
end
return 1
