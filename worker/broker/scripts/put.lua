-- Put a message at the consuming end of its queue, on a full server too.
--
-- Keys: prefix
-- Arguments: the queue, NUL and the message
-- Result: 1

put(arguments[1])
return 1
