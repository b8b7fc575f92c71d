-- Pause the queue unless it is paused, on a full server too.
--
-- Keys: prefix
-- Arguments: the pause, bytes of a pause that are returned
-- Result: the pause that exists, or nil if this one was stored

if redis.call('EXISTS', paused) == 1 then
    local stored = redis.pcall('GETRANGE', paused, 0, arguments[2] - 1)
    return type(stored) == 'string' and stored or ''
end
redis.call('SET', paused, arguments[1])
return false
