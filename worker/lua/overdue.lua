-- Tells the ledger which accounts are overdue: called by beat, every few seconds.
--
-- ARGV  1 stream  2 most (accounts looked at)
-- Returns { how many were looked at, aliases that the ledger was told of }
--
-- What is paused or blocked has an event of its own, or an operator's hand on it: it is passed over, and watched again
-- when that is lifted. The ledger hears once of each spell, which ends with an answer or another event of the account.

local stream, most = ARGV[1], tonumber(ARGV[2])
local told = {}

local function is_kept_waiting(a)
  return WAITS[a.state] and not a.paused and redis.call('HEXISTS', 'login:' .. a.login, 'blocked') == 0
end

local function tell(alias, a)
  redis.call('HSET', 'account:' .. alias, 'overdue', a.due)
  publish_account(stream, alias, 'account.overdue.v1', {
    since = iso(tonumber(a.due)), interval = math.floor(a.interval / 1000),
  })
  told[#told + 1] = alias
end

local function look(alias)
  local a = fields('account:' .. alias, 'state', 'login', 'paused', 'due', 'interval', 'overdue')
  redis.call('ZREM', 'overdue:at', alias)
  if is_kept_waiting(a) then
    redis.call('SADD', 'overdue', alias)
    if not a.overdue then tell(alias, a) end
  end
end

if hold_left() > 0 or redis.call('HEXISTS', 'config', 'paused_at') == 1 then return { 0, told } end
local late = redis.call('ZRANGE', 'overdue:at', '-inf', whole(now), 'BYSCORE', 'LIMIT', 0, most)
for _, alias in ipairs(late) do look(alias) end
return { #late, told }
