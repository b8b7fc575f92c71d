-- Move delayed messages that are due back to their queues.
--
-- Keys: prefix
-- Result: 1 if more are due, otherwise 0

local time = now()
while bytes_left > 0 do
    local name = redis.call('ZRANGEBYSCORE', due, '-inf', time, 'LIMIT', 0, 1)[1]
    if not name then return 0 end
    local value = redis.call('HGET', delayed, name)
    if value then
        put(value)
        redis.call('HDEL', delayed, name)
    end
    redis.call('ZREM', due, name)
end
return 1
