-- Lays a pause over an account, whatever its state: an operator's command.
--
-- ARGV  1 alias; the last one: who asks
-- Returns { "paused" } (also when it was) or { "refused", state }
--
-- State and due time live on underneath. A token that has not begun is void; a poll that has begun ends as it would.

local actor, alias = take_actor(), ARGV[1]
local key = 'account:' .. alias
local a = fields(key, 'state', 'login', 'paused')

if not a.state or a.state == 'retired' then
  return recorded(actor, 'pause', alias, { 'refused', a.state or 'unknown' })
end
if not a.paused then
  redis.call('HSET', key, 'paused', whole(now))
  void(alias, a.login)
  unwatch(alias)
  redis.call('ZREM', 'due:' .. a.login, alias)
  recount(alias)
  place(a.login)
end
return recorded(actor, 'pause', alias, { 'paused' })
