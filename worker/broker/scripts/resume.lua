-- End the pause of the queue, on a full server too.
--
-- Keys: prefix
-- Arguments: bytes of the pause that are returned
-- Result: the pause that ended ('' if the key had another type), or nil if there was none

if redis.call('EXISTS', paused) == 0 then return false end
local stored = redis.pcall('GETRANGE', paused, 0, arguments[1] - 1)
redis.call('DEL', paused)
return type(stored) == 'string' and stored or ''
