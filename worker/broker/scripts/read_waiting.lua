-- Read messages of a list, or delayed ones, without moving them.
--
-- Keys: prefix, the list or the delayed messages
-- Arguments: bytes of a message above which only its two ends are returned; for a list the index of
-- the first message, which is negative to read from the end on, and messages at most; for delayed
-- messages their names
-- Result: number of messages or names that were read; for each message its name (for a list its
-- digest), queue, size and bytes

local max_bytes, list, result = arguments[1] + 0, KEYS[2], {0}
local small_bytes = 16 * 1024

local function add(name, queue, message)
    bytes_left = bytes_left - #message
    local size = #message
    if size > max_bytes then
        message = string.sub(message, 1, ends) .. string.sub(message, -ends)
    end
    for _, field in ipairs({name, queue, size, message}) do result[#result + 1] = field end
end

if list == delayed then
    for at = 2, #arguments do
        if bytes_left <= 0 then break end
        local value = redis.call('HGET', delayed, arguments[at])
        if value then add(arguments[at], parts(value)) end
        result[1] = result[1] + 1
    end
else
    -- Each LRANGE walks from an end of the list; large messages are read one by one.
    local index, most, some = arguments[2] + 0, arguments[3] + 0, 1
    while result[1] < most and bytes_left > 0 do
        some = math.min(some, most - result[1])
        local before, first = bytes_left, index < 0 and index - some + 1 or index
        local values = redis.pcall('LRANGE', list, first, first + some - 1)
        if values.err or #values == 0 then break end
        for _, value in ipairs(values) do
            local queue, message = list, value
            if list == isolated and string.find(value, '\0', 1, true) then
                queue, message = parts(value)
            end
            add(digest_of(message), queue, message)
        end
        index = index < 0 and index - #values or index + #values
        result[1] = result[1] + #values
        some = before - bytes_left < small_bytes * some and 16 or 1
    end
end
return result
