-- Renew the lease of a session that was not taken over, on a full server too.
--
-- Keys: prefix
-- Arguments: session
-- Result: its heartbeat counter, or nil if the session has ended

return redis.call('ZADD', leases, 'XX', 'INCR', 1, arguments[1])
