#!lua flags=allow-oom
-- Remove the next control request. A plain RPOP would return a request of any size.
--
-- Keys: the control queue
-- Arguments: bytes of a request at most
-- Result: the request, its size if it is larger, or nil if there is none

local request = redis.call('RPOP', KEYS[1])
if request and #request > ARGV[1] + 0 then return #request end
return request
