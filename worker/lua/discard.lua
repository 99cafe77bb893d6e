-- Throws an account's dead letter away and pauses the account: an operator's command.
--
-- ARGV  1 alias
-- Returns { "discarded" } or { "refused", state }

local alias = ARGV[1]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login')

if not NEEDS_LETTER[a.state] then return { 'refused', a.state or 'unknown' } end
remove_letter(alias)
redis.call('HSET', key, 'paused', whole(now))
start_over(alias, a.login, now)
place(a.login)
return { 'discarded' }
