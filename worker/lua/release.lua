-- Brings parked accounts back after a notification: called by an operator or by the notification itself.
--
-- ARGV  1 stream  2 spread (ms between one account and the next; the first goes at once)
--       3 institution ('' for any)  4 login ('' for any)  5 … aliases (none: every parked account); filters add up
--       the last one: who asks
-- Returns the aliases released
--
-- The scope is stamped, so that a poll in flight that would park a moment later waits shortly instead.

local actor = take_actor()
local stream, spread_ms, institution, login = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
-- A poll in flight is over before this: a LifeSpan counts for two days at most, `callback_grace` for seven.
local STAMP_S = 14 * 86400
local number = redis.call('INCR', 'releases')
local released, touched = {}, {}

local function stamp(scope)
  redis.call('SET', 'released:' .. scope, number, 'EX', STAMP_S)
end

local function fits(a)
  return (institution == '' or a.institution == institution) and (login == '' or a.login == login)
end

local function bring_back_parked(alias)
  local a = fields('account:' .. alias, 'state', 'login', 'institution')
  if not a.state or a.state == 'retired' or not fits(a) then return end
  if #ARGV > 4 then stamp(alias) end
  if a.state ~= 'parked' then return end
  audit(actor, 'release', alias, 'released')
  bring_back(stream, alias, a.login, now + #released * spread_ms, 'release')
  released[#released + 1] = alias
  touched[a.login] = true
end

local function named()
  local aliases = {}
  for i = 5, #ARGV do aliases[#aliases + 1] = ARGV[i] end
  return aliases
end

local function chosen()
  if #ARGV > 4 then return named() end
  stamp((institution == '' and '*' or institution) .. '|' .. (login == '' and '*' or login))
  local parked = redis.call('SMEMBERS', 'parked')
  table.sort(parked)
  return parked
end

for _, alias in ipairs(chosen()) do bring_back_parked(alias) end
for each in pairs(touched) do place(each) end
if #released == 0 then audit(actor, 'release', '?', 'nothing was parked') end
return released
