-- List the delivery tags that a session has claimed.
--
-- Keys: prefix
-- Arguments: session
-- Result: the tags

return redis.call('HKEYS', claims_of(arguments[1]))
