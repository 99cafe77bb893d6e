-- Pauses everything at once, what is defined later included: an operator's command.
--
-- ARGV  1 who asks
-- Returns { "paused" } (also when it was)
--
-- One switch: claim dispatches nothing while it is on. Tokens that have not begun are void; polls that have begun end as
-- they would. Accounts that are paused by themselves stay so when the switch is off again.

redis.call('HSETNX', 'config', 'paused_at', whole(now))
for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do void_holder(login) end
-- Nobody is overdue meanwhile.
for _, alias in ipairs(redis.call('SMEMBERS', 'overdue')) do redis.call('ZADD', 'overdue:at', whole(now), alias) end
redis.call('DEL', 'overdue')
return recorded(take_actor(), 'pause', '*', { 'paused' })
