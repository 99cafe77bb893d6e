-- Lets an account wait: called by a worker after a failed attempt, and by beat after a lapsed one.
--
-- ARGV  1 login  2 alias  3 poll  4 attempt  5 countdown (ms)  6 tries  7 waits  8 losses  9 code
--       10 "answer" where a callback's answer is what failed: once one is there, no deadline applies any more
--       11 what the end is counted as  12 its cause, where that may be more than the account's own ('' for none)
--       13 for how long the whole login rests (ms, '' where it does not)
-- Returns { "postponed", due } — also when the same token repeats its call — or { "stale" }

local login, alias, poll, attempt, countdown_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local key = 'account:' .. alias
local a = fields(key, 'state', 'poll', 'attempt', 'login', 'due', 'begun_at', 'answered', 'source')

local held, rest_ms = token(alias, poll, attempt), tonumber(ARGV[13])
local postponed = is_begun(a, login, poll, attempt) and (not a.answered or ARGV[10] == 'answer')

if not postponed and ARGV[10] == 'answer' then
  note_late_answer(login, held, ARGV[12], rest_ms)
  place(login)
end
if is_own(a, login, poll, attempt) and a.state == 'waiting' then
  return { 'postponed', a.due }
end
if postponed then
  redis.call('HSET', key, 'tries', ARGV[6], 'waits', ARGV[7], 'losses', ARGV[8], 'last_outcome', ARGV[9])
  remember_end(alias, poll, attempt, a.begun_at, ARGV[9])
  count_end(alias, a.begun_at, ARGV[11])
  step(alias, login, 'waiting', now + countdown_ms)
  note_failure(login, a.source, held, ARGV[12], rest_ms)
else
  count('stale postpone')
end
if not is_dispatched(a, login, poll, attempt) then free(login, held) end
place(login)
return postponed and { 'postponed', whole(now + countdown_ms) } or { 'stale' }
