#!lua flags=no-writes,allow-oom
-- Find the commands that the user's ACL denies.
--
-- Arguments: commands with their arguments, separated by spaces
-- Result: those that are denied

local denied = {}
for _, command in ipairs(ARGV) do
    local words = {}
    for word in string.gmatch(command, '[^ ]+') do words[#words + 1] = word end
    if not redis.acl_check_cmd(unpack(words)) then denied[#denied + 1] = command end
end
return denied
