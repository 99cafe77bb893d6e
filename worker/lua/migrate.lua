-- Brings an older version's state to this program's: `balances migrate`, while no other process runs.
--
-- ARGV  1 who asks
-- Returns { "migrated" | "current", version } or { "refused", version }: that of a newer program
--
-- What was written before there were versions is version 1 without its number.

local actor = take_actor()
local found = redis.call('HGET', 'config', 'version')

if found == STATE_VERSION then return { 'current', found } end
if found then return recorded(actor, 'migrate', '?', { 'refused', found }) end
for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do
  local blocked = redis.call('HGET', 'login:' .. login, 'blocked')
  if blocked then redis.call('HSET', 'blocked', login, blocked) end
  for _, alias in ipairs(redis.call('SMEMBERS', 'aliases:' .. login)) do
    redis.call('SADD', 'institutions', redis.call('HGET', 'account:' .. alias, 'institution'))
    recount(alias)
  end
end
redis.call('HSET', 'config', 'version', STATE_VERSION)
return recorded(actor, 'migrate', 'state', { 'migrated', STATE_VERSION })
