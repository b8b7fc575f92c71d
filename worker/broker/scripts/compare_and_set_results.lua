#!lua flags=allow-oom
-- Set each key that has the expected value to a value of its own, and publish that.
--
-- Keys: results
-- Arguments: the expected value ('' also matches a key of another type), then for each key its new
-- value and seconds to keep it
-- Result: 1 for each key that was set, 0 for each other

local replaced = {}
for number, key in ipairs(KEYS) do
    local stored, value, seconds = redis.pcall('GET', key), ARGV[2 * number], ARGV[2 * number + 1]
    if type(stored) ~= 'string' then stored = '' end
    replaced[number] = stored == ARGV[1] and 1 or 0
    if replaced[number] == 1 then
        redis.call('SETEX', key, seconds, value)
        redis.call('PUBLISH', key, value)
    end
end
return replaced
