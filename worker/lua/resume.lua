-- Takes the pause off an account, which goes on where it stood; a wait is not shortened: an operator's command.
--
-- ARGV  1 alias; the last one: who asks
-- Returns { "resumed" } or { "refused", state }

local actor, alias = take_actor(), ARGV[1]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login', 'paused', 'due', 'answered', 'poll', 'attempt')

if a.state and redis.call('HEXISTS', 'config', 'paused_at') == 1 then
  return recorded(actor, 'resume', alias, { 'refused', 'everything paused' })
end
if not a.paused then return recorded(actor, 'resume', alias, { 'refused', a.state or 'unknown' }) end
redis.call('HDEL', key, 'paused')
local holder = redis.call('HGET', 'login:' .. a.login, 'holder')
local is_left = a.state == 'awaiting' and not a.answered and holder ~= token(alias, a.poll, a.attempt)
if a.state == 'scheduled' or a.state == 'waiting' or is_left then step(alias, a.login, a.state, tonumber(a.due)) end
recount(alias)
place(a.login)
return recorded(actor, 'resume', alias, { 'resumed' })
