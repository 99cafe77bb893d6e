-- Throws an account's dead letter away and pauses the account: an operator's command.
--
-- ARGV  1 alias; the last one: who asks
-- Returns { "discarded" } or { "refused", state }

local actor, alias = take_actor(), ARGV[1]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login')

if not NEEDS_LETTER[a.state] then
  return recorded(actor, 'discard', alias, { 'refused', a.state or 'unknown' })
end
remove_letter(alias)
redis.call('HSET', key, 'paused', whole(now))
start_over(alias, a.login, now)
place(a.login)
return recorded(actor, 'discard', alias, { 'discarded' })
