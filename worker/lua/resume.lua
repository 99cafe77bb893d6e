-- Takes the pause off an account, which goes on where it stood; a wait is not shortened: an operator's command.
--
-- ARGV  1 alias
-- Returns { "resumed" } or { "refused", state }

local alias = ARGV[1]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login', 'paused', 'due')

if not a.paused then return { 'refused', a.state or 'unknown' } end
redis.call('HDEL', key, 'paused')
if a.state == 'scheduled' or a.state == 'waiting' then step(alias, a.login, a.state, tonumber(a.due)) end
place(a.login)
return { 'resumed' }
