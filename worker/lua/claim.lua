-- Claims what is due: called by beat, by any number of them at once.
--
-- ARGV  1 most (logins looked at)  2 message template  3 settling template  4 pause before it is pushed again (ms)
--       5 what the caller expects the clock to say, less its jumps (ms, '' for no idea)  6 how far it may be off (ms)
-- Returns { dispatched, resent, wait_ms, lapsed, clock, jumped, news }, lapsed a list of
--   { login, alias, poll, attempt, state ("polling" | "awaiting"), tries, waits, losses, generic };
--   clock: the server's, whatever tests do, and the jumps of it that are known (ms); news: a list of JSON objects
-- Nothing is done where the clock is not what was expected, nor for one lease after a jump (hold.lua).
--
-- A login is due when its place in the timetable is: `until` of what it holds, else the due time of its next account.
-- Work goes out only while the queue has room, so that the timetable, not the queue, is the backlog. What lapsed while
-- polling (a loss) or awaiting is not judged here: it is returned, and stays as it is until beat has applied a decision.
-- A login whose next request would break a limit is held back until it would not, so that it is not looked at again and
-- again; begin, which licenses requests, has the last word.

local most, template, settling, again_ms = tonumber(ARGV[1]), cut(ARGV[2]), ARGV[3], tonumber(ARGV[4])
-- Everything is paused: the moment at which it goes on is not known, so logins are looked at so often.
local PAUSE_LOOK_MS = 60000
local NEWS_AT_ONCE = 20
local limits = limits_in_force()
local is_open = {}
for _, institution in ipairs(redis.call('SMEMBERS', 'breakers')) do
  is_open[institution] = is_breaker_open(institution)
  if not is_open[institution] then close_breaker(institution) end
end
local messages, lapsed = {}, {}
local dispatched, resent, held_back = 0, 0, 0

-- Room: as many messages as live workers have threads, less those that wait.
local function free_room()
  local threads = 0
  for _, worker in ipairs(redis.call('ZRANGE', 'workers', whole(real_now()), '+inf', 'BYSCORE')) do
    threads = threads + tonumber(string.match(worker, ' (%d+)$'))
  end
  return threads - redis.call('LLEN', QUEUE)
end

local room = free_room()

local function push(login, alias, poll, attempt)
  messages[#messages + 1] = fill(template, {
    login = login, account = alias, poll = poll, attempt = attempt, retries = whole(attempt - 1),
  })
  room = room - 1
end

local function hold(login, l, held)
  l.holder, l['until'] = held, whole(now + limits.margin_ms)
  redis.call('HSET', 'login:' .. login, 'holder', held, 'until', l['until'])
end

-- What recount() would do for each account, once for all of a claim: this is where ten thousands a second go through.
local left, joined = {}, {}

local function note(sets, set, alias)
  local aliases = sets[set]
  if aliases then aliases[#aliases + 1] = alias else sets[set] = { alias } end
end

-- Notes that the account leaves the set that it was in for the one returned.
local function move_to_dispatched(alias, account)
  local set = 'state:' .. account.institution .. ':dispatched'
  if account.counted then note(left, account.counted, alias) end
  note(joined, set, alias)
  return set
end

local function for_each_set(command, sets)
  for set, aliases in pairs(sets) do
    for i = 1, #aliases, 1000 do redis.call(command, set, unpack(aliases, i, math.min(i + 999, #aliases))) end
  end
end

-- The login's own slot of its institution's rate (ms), nil where it has come. Slots are given out in the order of the
-- timetable; one that nobody used in time has passed.
local function slot_at(l, institution)
  if l.held_by == 'rate' and now - l.not_before < PACE_MS then return nil end
  local slot = math.max(now, tonumber(redis.call('HGET', 'slots', institution) or 0))
  redis.call('HSET', 'slots', institution, string.format('%.3f', slot + PACE_MS / limits.rate))
  return slot > now and slot or nil
end

-- Until when nothing of the login may go out (ms), and why; nil where it may.
local function limit_of(login, l, institution, due)
  if limits.is_paused then return now + PAUSE_LOOK_MS, 'pause' end
  local spent = spent_budget(login, limits)
  if spent then return tomorrow(due), spent end
  if is_open[institution] then return next_probe_at(institution), 'breaker' end
  if limits.rate then return slot_at(l, institution), 'rate' end
  return nil
end

local function may_go(login, l, institution, due)
  local not_before, why = limit_of(login, l, institution, due)
  if not not_before then return true end
  hold_back(login, not_before, why)
  l.not_before = whole(not_before)
  held_back = held_back + 1
  return false
end

local function dispatch(login, l, alias, account)
  local key, poll, attempt = 'account:' .. alias, account.poll, whole(account.attempt + 1)
  if account.state == 'scheduled' then
    poll, attempt = whole(math.max(account.poll + 1, now)), '1'
  end
  if account.answered or account.callback then redis.call('HDEL', key, 'answered', 'callback') end
  if l.probing then redis.call('HSET', 'login:' .. login, 'probe', alias) end
  redis.call('HSET', key, 'state', 'dispatched', 'poll', poll, 'attempt', attempt,
    'moved_at', whole(now), 'counted', move_to_dispatched(alias, account))
  redis.call('ZREM', 'due:' .. login, alias)
  local institution = institution_of(account.source)
  if is_open[institution] then send_probe(institution, token(alias, poll, attempt)) end
  if l.held_by then redis.call('HDEL', 'login:' .. login, 'not_before', 'held_by') end
  hold(login, l, token(alias, poll, attempt))
  push(login, alias, poll, attempt)
  dispatched = dispatched + 1
end

local function return_lapsed(login, alias, a)
  lapsed[#lapsed + 1] = { login, alias, a.poll, a.attempt, a.state, a.tries, a.waits, a.losses,
    redis.call('HGET', 'login:' .. login, 'generic') or '0' }
end

-- The holder's time is over. Returns whether the place is free now.
local function lapse(login, l)
  local held = l.holder
  local alias, poll, attempt = string.match(held, '^(%S+) (%S+) (%S+)$')
  local a = fields('account:' .. alias, 'state', 'poll', 'attempt', 'tries', 'waits', 'losses', 'login', 'answered', 'due')
  if is_dispatched(a, login, poll, attempt) then
    if room > 0 then
      push(login, alias, poll, attempt)
      hold(login, l, held)
      resent = resent + 1
    end
    return false
  end
  if is_begun(a, login, poll, attempt) and not a.answered then
    if a.state == 'polling' then
      return_lapsed(login, alias, a)
      return false
    end
    -- At login_hold the place is free and the account goes on awaiting, in due:<login> at its deadline.
    step(alias, login, 'awaiting', tonumber(a.due))
  end
  free(login, held)
  l.holder = nil
  return true
end

local function serve_next(login, l)
  local alias, due
  if held_until(l) > now then
    alias, due = next_deadline(login)
  else
    alias, due = next_account(login, l.probing, l.probe)
  end
  if not alias or tonumber(due) > now then return end
  local a = fields('account:' .. alias, 'state', 'poll', 'attempt', 'tries', 'waits', 'losses', 'institution',
    'counted', 'source', 'answered', 'callback')
  if a.state == 'awaiting' then
    return_lapsed(login, alias, a)
  elseif room > 0 and may_go(login, l, institution_of(a.source), due) then
    dispatch(login, l, alias, a)
  end
end

local function serve(login)
  local l = fields('login:' .. login, 'blocked', 'holder', 'until', 'probing', 'probe', 'not_before', 'held_by',
    'rests_until')
  if not l.holder or lapse(login, l) then
    serve_next(login, l)
  end
  place_as(login, l)
end

local function due_logins(from, count)
  return redis.call('ZRANGE', 'timetable', '-inf', whole(now), 'BYSCORE', 'LIMIT', from, count)
end

-- Where more is due than one claim looks at: as many of the oldest as there is room for, not counting those that a limit
-- holds back, and then, for what lapsed, the ones after those that the last claim looked at; else a lapse would wait
-- behind logins that wait for room.
local function serve_some(oldest)
  local first, at_first = 0, math.max(0, room)
  while first < math.min(at_first + held_back, most) do
    first = first + 1
    serve(oldest[first])
  end
  room = 0
  local looked = tonumber(redis.call('HGET', 'config', 'looked')) or 0
  local from = math.max(first, looked) - dispatched - resent - held_back
  local others = due_logins(from, most - first)
  for _, login in ipairs(others) do serve(login) end
  redis.call('HSET', 'config', 'looked', #others < most - first and 0 or from + #others)
end

local function serve_due()
  local oldest = due_logins(0, most)
  if #oldest == most then return serve_some(oldest) end
  for _, login in ipairs(oldest) do serve(login) end
end

local clock, jumped = real_now(), tonumber(redis.call('HGET', 'config', 'jumped')) or 0
local expected = tonumber(ARGV[5])
if expected and math.abs(clock - jumped - expected) > tonumber(ARGV[6]) then
  return { 0, 0, 0, lapsed, clock, jumped, {} }
end
redis.call('HSET', 'config', 'claimed_at', whole(now))
local held_ms = hold_left()
if held_ms > 0 then return { 0, 0, held_ms, lapsed, clock, jumped, {} } end

serve_due()
for_each_set('SREM', left)
for_each_set('SADD', joined)
for i = 1, #messages, 1000 do
  redis.call('LPUSH', QUEUE, unpack(messages, i, math.min(i + 999, #messages)))
end
-- An answer whose settling was lost is pushed again, whatever became of its account; but never more messages
-- than answers, or a night without workers would fill the memory with them.
local lost = math.max(0, redis.call('ZCARD', 'answers') - redis.call('LLEN', ANSWERS))
for _, id in ipairs(redis.call('ZRANGE', 'answers', '-inf', whole(now), 'BYSCORE', 'LIMIT', 0, math.min(most, lost))) do
  local alias, poll, attempt = string.match(id, '^(%S+) (%S+) (%S+)$')
  push_settling(settling, redis.call('HGET', 'answer:' .. id, 'login'), alias, poll, attempt)
  redis.call('ZADD', 'answers', whole(now + again_ms), id)
end

local first = redis.call('ZRANGE', 'timetable', 0, 0, 'WITHSCORES')
local wait_ms = first[2] and math.max(0, first[2] - now) or -1
return { dispatched, resent, wait_ms, lapsed, clock, jumped, redis.call('LPOP', 'news', NEWS_AT_ONCE) or {} }
