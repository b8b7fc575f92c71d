-- End a session: requeue its claims without counting an attempt.
--
-- Keys: prefix
-- Arguments: session
-- Result: 1 if it has more claims, otherwise 0

local session = arguments[1]
for _, tag in ipairs(redis.call('HKEYS', claims_of(session))) do
    if bytes_left <= 0 then return 1 end
    requeue(session, tag, false)
end
redis.pcall('HDEL', nodes, session)
redis.call('ZREM', leases, session)
return 0
