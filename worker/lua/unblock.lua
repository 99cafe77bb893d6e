-- Lifts a login's block and removes its letter, or ends its rest; one account goes first.
--
-- ARGV  1 stream  2 login  3 "operator" | "bank" | "key"  4 fingerprint of the new credential (not for the operator)
--       the last one: who asks
-- Returns { "unblocked" }, { "rest ended" } (there was no block), or { "refused", why }
--
-- The operator forgives what failed. A worker that holds a credential of the kind that failed, another one that has not
-- failed itself, lifts the block with it, unless the block is for an operator alone. The one that failed here does not,
-- even where it was forgiven for another login.

local actor = take_actor()
local stream, login, by, fingerprint = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = 'login:' .. login
local l = fields(key, 'blocked', 'fingerprint', 'manual', 'letter', 'failed_bank', 'failed_key', 'rests_until')

local function forgive()
  for _, failed in ipairs({ l.failed_bank or '', l.failed_key or '' }) do
    redis.call('HDEL', 'failed', failed)
    redis.call('ZREM', 'failures:' .. login, failed)
  end
end

local function why_not()
  if not l.blocked then return 'not blocked' end
  if by == 'operator' then return nil end
  if l.manual then return 'only an operator may unblock' end
  if by ~= l.blocked then return 'the other credential failed' end
  local has_failed = fingerprint == l.fingerprint or redis.call('HEXISTS', 'failed', fingerprint) == 1
  if fingerprint == '' or has_failed then return 'it failed' end
  return nil
end

local function tell_accounts()
  for _, alias in ipairs(redis.call('SMEMBERS', 'aliases:' .. login)) do
    local a = fields('account:' .. alias, 'state', 'due')
    if WAITS[a.state] then watch(alias, tonumber(a.due)) end
    if not NEEDS_LETTER[a.state] then
      publish_account(stream, alias, 'account.resumed.v1', { by = by == 'operator' and 'unblock' or 'new credential' })
    end
  end
end

local reason = why_not()
if reason == 'not blocked' and by == 'operator' and is_resting(l) then
  end_rest(login)
  place(login)
  return recorded(actor, 'unblock', login, { 'rest ended' })
end
if reason then
  -- Workers try again and again with what they hold: nobody's order.
  if by ~= 'operator' then return { 'refused', reason } end
  local is_known = redis.call('SISMEMBER', 'logins', login) == 1
  return recorded(actor, 'unblock', is_known and login or '?', { 'refused', reason })
end
if by == 'operator' then forgive() else redis.call('HSET', key, by, fingerprint) end
if l.letter then redis.call('LREM', 'balances.dead.do-not-retry', 1, l.letter) end
redis.call('HDEL', key, 'blocked', 'fingerprint', 'blocked_at', 'manual', 'letter', 'code', 'type', 'description',
  'failed_bank', 'failed_key')
redis.call('HDEL', 'blocked', login)
redis.call('HSET', key, 'probing', 1)
-- Another key or token says nothing about the log-on.
if by ~= 'key' and is_resting(l) then end_rest(login) end
recount_login(login)
tell_accounts()
place(login)
return recorded(actor, 'unblock', login, { 'unblocked' })
