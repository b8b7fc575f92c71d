-- Apply dispositions to claimed messages.
--
-- Keys: prefix
-- Arguments: session, seconds to keep an announcement, then for each delivery its tag, action,
-- delay in ms, job ID, task, reason, whether the ledger has its result, attempts
-- Result: 1
-- Invariant: a delivery that the session has not claimed is skipped.

local session, announced_seconds = arguments[1], arguments[2]
for index = 3, #arguments, 8 do
    local tag, action, milliseconds, job_id, task, reason, in_ledger, attempts =
        unpack(arguments, index, index + 7)
    local value = redis.call('HGET', claims_of(session), tag)
    if value then
        local queue, message = parts(value)
        if action == 'acknowledge' then
            forget(message)
            redis.call('EXPIRE', prefix .. 'job:' .. job_id, announced_seconds)
        elseif action == 'requeue' then
            put(value)
        elseif action == 'dead-letter' then
            dead_letter(queue, message, job_id, task, reason, in_ledger, attempts)
        else
            if action == 'retry' then count(retry_counts, message) end
            if action == 'failed-attempt' then count(attempt_counts, message) end
            delay(session .. ':' .. tag, value, milliseconds)
        end
        redis.call('HDEL', claims_of(session), tag)
    end
end
collect()
return 1
