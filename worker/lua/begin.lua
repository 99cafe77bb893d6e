-- Begins a poll, once per token: called by a worker that holds its message.
--
-- ARGV  1 login  2 alias  3 poll  4 attempt  5 caller: "worker id", one delivery of the message; may repeat its call
--       6 scheme that its credentials were chosen for
--       7 fingerprint of its bank credential  8 fingerprint of its key or token ('' for none, "missing" for one it lacks)
--       9 digest of the callback token it would send ('' where it cannot be called back)
-- Returns { "begun", now, lease_ms, generation, definition, retry, limits, tries, waits, losses, last_outcome, generic }
--      or { "refused", kind, times }: that credential already failed; still dispatched, sent again later
--      or { "scheme", scheme }: the login's scheme is another one; nothing was begun
--      or { "held", why, wait_ms }: over a limit; the account is back where it stood before the claim, its place free
--      or { "stale" }: another token, or already begun; also a repeated call where the login was blocked, its place
--         freed, or the poll accepted meanwhile
--
-- This is where a request is licensed: `rate`, the daily budgets and the breakers are measured here, the moment before it
-- is sent, so that no queue in between can bunch what claim has spaced.

local login, alias, poll, attempt, caller = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local fingerprints = { bank = ARGV[7], key = ARGV[8] }
local key, login_key = 'account:' .. alias, 'login:' .. login
local held = token(alias, poll, attempt)
local a = fields(key, 'state', 'poll', 'attempt', 'login', 'caller', 'generation', 'definition', 'tries', 'waits',
  'losses', 'last_outcome', 'institution', 'mode', 'counted', 'source', 'due')
local l = fields(login_key, 'blocked', 'holder', 'begun', 'scheme', 'generic', 'rests_until')
local institution = a.source and institution_of(a.source)

local function begun()
  local c = fields('config', 'retry', 'limits')
  return { 'begun', whole(now), whole(redis.call('HGET', login_key, 'until') - now), a.generation,
    a.definition, c.retry, c.limits, a.tries, a.waits, a.losses, a.last_outcome or '', l.generic or '0' }
end

-- The digest is here before the request leaves: the callback can arrive before its 202 has been read.
local function expect_callback(digest)
  if digest == '' or cjson.decode(a.definition).mode ~= 'callback' then return end
  redis.call('HSET', key, 'callback', digest)
  redis.call('HSET', 'callback:' .. digest, 'login', login, 'alias', alias, 'poll', poll, 'attempt', attempt,
    'generation', a.generation, 'definition', a.definition, 'bank', fingerprints.bank, 'key', fingerprints.key)
  redis.call('PEXPIRE', 'callback:' .. digest, whole(5 * DAY_MS))
end

local function refuse(kind)
  local l = fields(login_key, 'refusals', 'refused_by')
  if l.refused_by == caller then return { 'refused', kind, tonumber(l.refusals) } end
  local times = redis.call('HINCRBY', login_key, 'refusals', 1)
  redis.call('HSET', login_key, 'refused_by', caller, 'until', whole(now + config_ms('lease_margin_ms')))
  place(login)
  return { 'refused', kind, times }
end

local function count_begun()
  count_as(alias, a.institution, a.counted, 'polling')
  redis.call('HINCRBY', 'attempts', a.institution .. '|' .. (a.mode or 'sync'), 1)
  local worker = string.match(caller, '^(%S+) ')
  if worker then redis.call('ZADD', 'begins', whole(now), worker) end
end

local limits = limits_in_force()

-- Which limit this request would break, and until when (ms); nil for none.
local function limit_reached()
  if is_resting(l) then return 'rest', tonumber(l.rests_until) end
  local spent = spent_budget(login, limits)
  if spent then return spent, tomorrow(a.due) end
  if is_breaker_open(institution) then
    local b = fields('breaker:' .. institution, 'probe', 'next_probe')
    if b.probe ~= held then return 'breaker', math.max(tonumber(b.next_probe), now) end
  end
  local free_at = limits.rate and licence_at(institution, limits.rate) or now
  if free_at > now then return 'rate', free_at end
  return nil
end

local function give_back(why, not_before)
  void(alias, login)
  free(login, held)
  if why ~= 'rest' then hold_back(login, not_before, why) end
  place(login)
  return { 'held', why, whole(not_before - now) }
end

local function license()
  if limits.rate then use_licence(institution, held) end
  spend(login, limits)
end

local polling = is_own(a, login, poll, attempt) and a.state == 'polling'
if polling and a.caller == caller and l.holder == held and not l.blocked then
  return begun()
end
if not is_dispatched(a, login, poll, attempt) then
  -- A token that nobody will begin gives its place back; one that was begun does not, whatever became of its account.
  if not l.begun then free(login, held) end
  place(login)
  count('stale begin')
  return { 'stale' }
end
if l.scheme ~= ARGV[6] then return { 'scheme', l.scheme } end
for _, kind in ipairs({ 'key', 'bank' }) do
  local offered = fingerprints[kind]
  if offered == 'missing' or redis.call('HEXISTS', 'failed', offered) == 1 then return refuse(kind) end
end

local why, not_before = limit_reached()
if why then return give_back(why, not_before) end

license()
redis.call('HSET', key, 'state', 'polling', 'caller', caller, 'begun_at', whole(now), 'last_at', whole(now),
  'moved_at', whole(now), 'releases', redis.call('GET', 'releases') or '0')
if attempt == '1' then redis.call('HSET', key, 'first_at', whole(now)) end
redis.call('HSET', login_key, 'begun', 1, 'bank', fingerprints.bank, 'key', fingerprints.key,
  'until', whole(now + lease_ms()))
redis.call('HDEL', login_key, 'refusals', 'refused_by')
expect_callback(ARGV[9])
unwatch(alias)
count_begun()
place(login)
return begun()
