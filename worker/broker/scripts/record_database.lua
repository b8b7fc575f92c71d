#!lua flags=allow-oom
-- Record the database of a worker that starts.
--
-- Keys: database, leases
-- Arguments: the database
-- Result: the database that was recorded before or an empty string, and then each session with its
-- heartbeat counter

local before = redis.call('GET', KEYS[1]) or ''
redis.call('SET', KEYS[1], ARGV[1])
return {before, redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES')}
