-- Begin a session and transfer the wanted claims of this process's former sessions to it.
--
-- Keys: prefix
-- Arguments: session, node name of its worker or '', number of former sessions, each of these, tag
-- of each wanted claim
-- Result: 1 if there is more to transfer, otherwise 0 and the tags that the session has claimed
-- Invariant: other claims of the former sessions are requeued without counting an attempt, and a
-- former session without claims ends, so that its late commands have no effect.

local session, node, formers = arguments[1], arguments[2], arguments[3]
local wanted, kept = {}, {0}
for index = 4 + formers, #arguments do wanted[arguments[index]] = true end
redis.call('ZADD', leases, 'NX', 1, session)
if node ~= '' then redis.pcall('HSET', nodes, session, node) end
for index = 4, 3 + formers do
    local former = arguments[index]
    for _, tag in ipairs(redis.call('HKEYS', claims_of(former))) do
        if bytes_left <= 0 then
            kept[1] = 1
            return kept
        elseif wanted[tag] then
            local value = redis.call('HGET', claims_of(former), tag)
            bytes_left = bytes_left - #value
            redis.call('HSET', claims_of(session), tag, value)
            redis.call('HDEL', claims_of(former), tag)
        else
            requeue(former, tag, false)
        end
    end
    redis.call('ZREM', leases, former)
end
-- Includes those of sessions that a worker of an earlier release has ended.
for _, name in ipairs(redis.pcall('HKEYS', nodes)) do
    if not redis.call('ZSCORE', leases, name) then redis.pcall('HDEL', nodes, name) end
end
for _, tag in ipairs(redis.call('HKEYS', claims_of(session))) do kept[#kept + 1] = tag end
return kept
