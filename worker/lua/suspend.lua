-- Ends a poll in a dead letter, in one step: called by a worker after a failed attempt, and by beat after a lapsed one.
--
-- ARGV  1 "suspended" | "parked" | "blocked"  2 stream  3 dead-letter template  4 queue
--       5 login  6 alias  7 poll  8 attempt  9 reason: JSON object with code, type, description  10 code
--       11 short wait (ms), where a notification or a new credential has overtaken the failure
--       12 which credential ("bank" | "key")  13 its fingerprint ('' for none)  14 "refused" if no host has another
--       15 "answer" where a callback's answer is what failed: once one is there, no deadline applies any more
--       16 what the end is counted as  17 its cause, where that may be more than the account's own ('' for none)
--       18 for how long the whole login rests (ms, '' where it does not)
-- Returns { "suspended" } or { "parked" }: the account alone; also when the same token repeats its call
--      or { "blocked" }: the whole login, whatever the token says
--      or { "postponed", due }: overtaken; the account waits shortly; also when the same token repeats its call
--      or { "stale" }: another token; only counted

local mode, stream, template, queue = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local login, alias, poll, attempt = ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local reason, code, short_ms = cjson.decode(ARGV[9]), ARGV[10], tonumber(ARGV[11])
local key, login_key = 'account:' .. alias, 'login:' .. login
local held = token(alias, poll, attempt)
local a = fields(key, 'state', 'poll', 'attempt', 'login', 'institution', 'begun_at', 'first_at', 'releases', 'due',
  'answered', 'source')
local own = is_own(a, login, poll, attempt)
local is_overtaken = a.answered and mode ~= 'blocked' and ARGV[15] ~= 'answer'
local begun = is_begun(a, login, poll, attempt) and not is_overtaken
local dispatched = is_dispatched(a, login, poll, attempt)

local function explain(letter_key, accounts)
  local first_at = own and tonumber(a.first_at) or now
  local full = with_times(reason, tonumber(attempt), first_at, accounts)
  redis.call('HSET', letter_key, 'letter', push_letter(template, queue, login, alias, poll, attempt, full),
    'code', reason.code, 'type', reason.type, 'description', reason.description)
end

local function stale()
  count('stale ' .. mode)
  return { 'stale' }
end

local function wait_shortly()
  if own and a.state == 'waiting' then return { 'postponed', a.due } end
  if not begun then return stale() end
  redis.call('HSET', key, 'last_outcome', code)
  step(alias, login, 'waiting', now + short_ms)
  return { 'postponed', whole(now + short_ms) }
end

-------------------------------------------------------------------------------------------------- one account

-- Lost wake-up: a release of this account's scope came after the poll that would park it began.
local function was_released_since()
  local scopes = { '*|*', a.institution .. '|*', '*|' .. login, a.institution .. '|' .. login, alias }
  for _, scope in ipairs(scopes) do
    local number = redis.call('GET', 'released:' .. scope)
    if number and tonumber(number) > tonumber(a.releases) then return true end
  end
  return false
end

local function suspend_account()
  if own and a.state == mode then return { mode } end
  if mode == 'parked' and own and a.releases and was_released_since() then return wait_shortly() end
  if not begun then return stale() end
  explain(key, nil)
  redis.call('HSET', key, 'state', mode, 'queue', queue, 'last_outcome', code, 'suspended_at', whole(now))
  redis.call('ZREM', 'due:' .. login, alias)
  if mode == 'parked' then redis.call('SADD', 'parked', alias) end
  recount(alias)
  publish_account(stream, alias, 'account.suspended.v1', { state = mode, code = code, queue = queue })
  return { mode }
end

-------------------------------------------------------------------------------------------------- the whole login

local kind, fingerprint, is_refused = ARGV[12], ARGV[13], ARGV[14] == 'refused'
local l = fields(login_key, 'blocked', 'bank', 'key', 'letter')

-- What failed is never sent again, by any login, until it is forgiven. What was refused was not sent now.
local function remember_failed()
  if fingerprint == '' then return end
  redis.call('HSET', 'failed', fingerprint, kind)
  if kind == 'bank' and not is_refused then redis.call('ZADD', 'failures:' .. login, whole(now), fingerprint) end
end

-- Where the bank log-on fails twice in a day, or is not ours to replace, only an operator may unblock.
local function only_operator()
  if kind ~= 'bank' then return false end
  return fingerprint == '' or redis.call('ZCOUNT', 'failures:' .. login, whole(now - DAY_MS), '+inf') >= 2
end

local function aliases_of_login()
  local aliases = redis.call('SMEMBERS', 'aliases:' .. login)
  table.sort(aliases)
  return aliases
end

local function tell_accounts()
  for _, each in ipairs(aliases_of_login()) do
    unwatch(each)
    if not NEEDS_LETTER[redis.call('HGET', 'account:' .. each, 'state')] then
      publish_account(stream, each, 'account.suspended.v1', { state = 'blocked', code = code, queue = queue })
    end
  end
end

-- One letter for the login, with the reason that has to be dealt with.
local function write_block()
  if l.letter then redis.call('LREM', queue, 1, l.letter) end
  explain(login_key, aliases_of_login())
  redis.call('HSET', login_key, 'blocked', kind, 'fingerprint', fingerprint, 'blocked_at', whole(now))
  redis.call('HSET', 'blocked', login, kind)
  redis.call('HDEL', login_key, 'probing', 'probe')
end

local function block_login()
  if begun then start_over(alias, login, now) end
  if fingerprint ~= '' then redis.call('HSET', login_key, 'failed_' .. kind, fingerprint) end
  -- A failed log-on outweighs a failed key: a renewed token never lifts an E1xx.
  if not l.blocked or (l.blocked == 'key' and kind == 'bank') then write_block() end
  if not l.blocked then
    void_holder(login)
    tell_accounts()
    recount_login(login)
  end
  return { 'blocked' }
end

local function was_replaced_since()
  return fingerprint ~= '' and l[kind] and l[kind] ~= fingerprint and not is_refused
end

local function block()
  if begun then redis.call('HSET', key, 'last_outcome', code) end
  remember_failed()
  local result = was_replaced_since() and wait_shortly() or block_login()
  if only_operator() and redis.call('HGET', login_key, 'blocked') == 'bank' then
    redis.call('HSET', login_key, 'manual', 1)
  end
  return result
end

--------------------------------------------------------------------------------------------------

if begun then
  remember_end(alias, poll, attempt, a.begun_at, code)
  count_end(alias, a.begun_at, ARGV[16])
  note_failure(login, a.source, held, ARGV[17], tonumber(ARGV[18]))
elseif ARGV[15] == 'answer' then
  note_late_answer(login, held, ARGV[17], tonumber(ARGV[18]))
end
local result = mode == 'blocked' and block() or suspend_account()
if result[1] == 'blocked' or not dispatched then free(login, held) end
place(login)
return result
