-- Move a dead letter to its origin queue, with its attempts and retries reset.
--
-- Keys: prefix
-- Arguments: ID of the dead letter, the queue if it names none
-- Result: 1, or 0 if it does not exist

local letter = redis.call('XRANGE', prefix .. 'dead', arguments[1], arguments[1])[1]
if not letter then return 0 end
local fields = {}
for index = 1, #letter[2], 2 do fields[letter[2][index]] = letter[2][index + 1] end
forget(fields.message)
local queue = fields.queue
if not queue or queue == '' then queue = arguments[2] end
redis.call('RPUSH', queue, fields.message)
return redis.call('XDEL', prefix .. 'dead', arguments[1])
