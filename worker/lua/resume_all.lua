-- Takes off the pause that lies over everything: an operator's command. A wait is not shortened.
--
-- ARGV  1 who asks
-- Returns { "resumed" } or { "refused", "not paused" }

local actor = take_actor()

if redis.call('HDEL', 'config', 'paused_at') == 0 then return { 'refused', 'not paused' } end
let_go({ pause = true })
for _, alias in ipairs(redis.call('ZRANGE', 'overdue:at', '-inf', whole(now), 'BYSCORE')) do
  watch(alias, tonumber(redis.call('HGET', 'account:' .. alias, 'due')))
end
return recorded(actor, 'resume', '*', { 'resumed' })
