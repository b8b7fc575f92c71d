-- Requeue the claims of an expired session, each with an attempt counted.
--
-- Keys: prefix
-- Arguments: session, its heartbeat counter as observed
-- Result: 1 if it has more claims, 0 if not, -1 if the counter has changed or the session has ended

local session, counter = arguments[1], arguments[2]
local score = redis.call('ZSCORE', leases, session)
if not score or score + 0 ~= counter + 0 then return -1 end
for _, tag in ipairs(redis.call('HKEYS', claims_of(session))) do
    if bytes_left <= 0 then return 1 end
    requeue(session, tag, true)
end
-- Rolling upgrade: nothing else deletes this key of an older worker.
redis.call('DEL', prefix .. 'started:' .. session)
redis.pcall('HDEL', nodes, session)
redis.call('ZREM', leases, session)
return 0
