-- Leaves a poll to its callback: called by a worker after a 202, and after a failure that may hide one.
--
-- ARGV  1 login  2 alias  3 poll  4 attempt  5 LifeSpan (ms since the epoch, '' for none)
--       6 life_span (ms), where Khipu gave none  7 callback_grace (ms)  8 login_hold (ms)
--       9 "drift" where the 202 was not what Khipu's contract says
-- Returns { "awaiting", deadline } — also when the same token repeats its call — or { "stale" }
--
-- The login stays held until the answer, at most for login_hold: the bank's session may well be open. After a
-- rest it stays so until the deadline: nobody logs on again before it is known how this one ended.

local login, alias, poll, attempt, promised = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local life_span_ms, grace_ms, hold_ms = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
-- No LifeSpan is believed beyond this; and a callback's token lives as long again after its deadline.
local LONGEST_MS = 2 * DAY_MS
local key = 'account:' .. alias
local a = fields(key, 'state', 'poll', 'attempt', 'login', 'due', 'callback')

local function hold_end(due)
  local has_rested = redis.call('HEXISTS', 'login:' .. login, 'rests_until') == 1
  return has_rested and due or math.min(now + hold_ms, due)
end

local function deadline()
  local until_ms = promised or now + life_span_ms
  return math.max(now, math.min(until_ms, now + LONGEST_MS)) + grace_ms
end

if is_own(a, login, poll, attempt) and a.state == 'awaiting' then
  return { 'awaiting', a.due }
end
if not is_begun(a, login, poll, attempt) then
  count('stale accept')
  return { 'stale' }
end
if ARGV[9] == 'drift' then count('drift field') end
local due = deadline()
redis.call('HSET', key, 'state', 'awaiting', 'due', whole(due), 'moved_at', whole(now))
recount(alias)
-- Where the answer is there already, the place may be another account's by now.
if redis.call('HGET', 'login:' .. login, 'holder') == token(alias, poll, attempt) then
  redis.call('HSET', 'login:' .. login, 'until', whole(hold_end(due)))
end
if a.callback then redis.call('PEXPIRE', 'callback:' .. a.callback, whole(due - now + LONGEST_MS)) end
place(login)
return { 'awaiting', whole(due) }
