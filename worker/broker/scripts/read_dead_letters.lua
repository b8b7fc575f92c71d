#!lua flags=no-writes
-- Read a page of dead letters, with each field cut.
--
-- Keys: the stream
-- Arguments: first ID, last ID, entries at most, bytes after which the page ends, bytes of a field,
-- bytes of the message
-- Result: entries as XRANGE returns them

local first, last, page, bytes = ARGV[1], ARGV[2], ARGV[3] + 0, ARGV[4] + 0
local limits, entries = {message = ARGV[6] + 0}, {}
while #entries < page and bytes > 0 do
    local entry = redis.call('XRANGE', KEYS[1], first, last, 'COUNT', 1)[1]
    if not entry then break end
    local fields = entry[2]
    for index = 1, #fields, 2 do
        bytes = bytes - #fields[index + 1]
        local limit = limits[fields[index]] or ARGV[5] + 0
        fields[index + 1] = string.sub(fields[index + 1], 1, limit)
    end
    entries[#entries + 1] = entry
    first = '(' .. entry[1]
end
return entries
