-- What every script of the timetable is made of. Prepended to each of them; changes no key by being loaded.
--
-- Keys (<login> and <alias> are safe by their syntax):
--   timetable            sorted set: login → moment of its next step (ms). Written by place_as() and by nothing else.
--   due:<login>          sorted set: alias → due time (ms), for accounts that may be polled; in flight: not in it.
--   login:<login>        hash: holder ("alias poll attempt"), until (ms), begun (a worker has begun the holder's token),
--                        refusals, refused_by (caller) · scheme, token_days ('' without a token), token_expires
--                        (unix seconds, where a worker knows it) · bank, key (fingerprints last accepted) ·
--                        blocked (bank|key), fingerprint, blocked_at, code, type, description, manual, letter,
--                        failed_bank, failed_key (fingerprints to forgive) · probing, probe (alias that was tried) ·
--                        not_before (ms), held_by (rate|login budget|total budget|breaker|pause): nothing of it goes
--                        out before · generic (failures in a row that may be a bad log-on) · rests_until, rested_at
--                        (ms): after too many of those nothing of it goes out before; they stay until a balance
--   account:<alias>      hash: definition, revision, identity, schedule, generation, login, institution, source, slot,
--                        interval, min_gap (ms) · state, due, moved_at (when it came to that), paused · overdue_at (ms),
--                        overdue (since when, as the ledger was told; until it hears otherwise) · poll, attempt,
--                        caller, begun_at, first_at, releases (how many there had been when it began),
--                        callback (digest), answered · tries, waits, losses · last_ok, last_outcome, last_at ·
--                        queue, letter, code, type, description, suspended_at · latest_poll, latest_attempt,
--                        latest_fingerprint · mode · as_of (ms, the bank's own moment of the newest balance) ·
--                        counted (the set state:… that it is in)
--   aliases:<login>      set: the login's accounts          logins   set: every login ever defined
--   revisions            hash: alias → revision of every account defined now
--   callback:<digest>    hash: login, alias, poll, attempt, generation, definition, bank, key · bodies, seen,
--                        body:<hash>: what a callback's token stands for, until two days after its deadline
--   answers              sorted set: token of an answer that is not settled → when its settling is pushed again (ms)
--   answer:<token>       hash: as callback:<digest>, with content_type, received_at, body:<hash> · noted (it was
--                        counted as a failure that may be a bad log-on)
--   parked               set: aliases parked until a notification
--   overdue:at           sorted set: alias → when it will be overdue unless it is polled (ms)
--   overdue              set: aliases that are overdue now
--   history:<alias>      list, newest first: "ended (ms) poll attempt duration (ms) outcome" of the last attempts
--   pins:<alias>:<generation>   set: the AccountIds first seen
--   latest               hash: alias → the newest balance, as on the stream
--   operation:<id>       string: alias, so that an operation is published once
--   failed               hash: fingerprint → kind, of every credential that must not be sent
--   failures:<login>     sorted set: fingerprint of a bank credential → when it failed (ms)
--   salt                 string: of all fingerprints, random, made by the first worker
--   releases             string: how many releases there were; orders them, whatever the clock does
--   released:<scope>     string: number of that scope's last release
--   config               hash: version (of all this), retry, limits (JSON), *_ms, content, serial · claimed_at, looked
--                        (logins that the last claim had passed over, where more were due than it looked at) · jumped
--                        (ms, of all jumps of the clock together), hold_until, trim_from (ms) · file, file_content
--                        (digests: the accounts file that a beat read last, and what it held) · rate, daily_requests,
--                        login_budgets, probe_pauses · paused_at (ms): everything is paused
--   contents             sorted set: digests applied
--   audit                stream: actor, action, subject, outcome, at (ms), of every order that an operator gave
--   slots                hash: <institution> → when the next dispatch may go to it (ms), where `rate` is limited
--   licences:<institution>   sorted set: token → when its request was licensed (ms), of the last minute
--   budgets              hash: login → its daily_requests
--   requests:<date>      hash: login → requests licensed on that day (UTC), "*" for all of them; while a budget is set
--   failing:<institution>    sorted set: "cause login" → when it failed so (ms), since the last balance there
--   breakers             set: <institution> of every open breaker; one that nobody probes for a day is forgotten
--   breaker:<institution>    hash: cause, opened_at, probes (how many went out), next_probe (ms), probe (token in flight)
--   news                 list: what beat is to log, JSON
--   workers              sorted set: "host threads" → until when it is alive (ms, real time); 0 threads: takes no polls
--   begins               sorted set: worker → when it last began a poll (ms)
--   institutions         set: <name> of every institution ever defined
--   state:<name>:<state> set: its accounts that operators see in this state, `paused` and `blocked` over all
--   as_of:<name>         sorted set: alias → as_of, for its accounts that are being polled
--   last_ok              hash: <name> → when an account of it was last polled with success (ms)
--   awaiting             sorted set: alias whose callback is awaited → since when (ms)
--   received             sorted set: token of an answer that is not settled → when it came (ms)
--   blocked              hash: login → kind, of every blocked login
--   attempts             hash: "<name>|mode" → attempts begun
--   polls                hash: "<name>|mode|outcome|type|code" → attempts ended
--   durations            hash: "<name>|mode|bucket" (its upper bound in s, or "more") → attempts ended,
--                        "<name>|mode|sum" → their time (ms)
--   resting              sorted set: login that rests → until when (ms); its rest may be over
--   token_expires        sorted set: login → when its token ends (s)
--   counts               hash: things that happened, counted
--   clock:offset         string: ms that tests move the one clock by
-- <institution> is "country/segment/name", by which limits count; <name>, by which operators do, is its name alone: the
-- `institution` of the accounts file.

local QUEUE, ANSWERS = 'balances.polls', 'balances.answers'
local DAY_MS = 86400000
-- Of all that is described above: another shape of it is another version, with its way there in migrate.lua.
local STATE_VERSION = '1'

-- The one clock: ms since the epoch, of this server.
local function real_now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function read_clock()
  return real_now() + (tonumber(redis.call('GET', 'clock:offset')) or 0)
end

local now = read_clock()

-- A whole number as text; Lua alone would write 1.7e+12.
local function whole(n)
  return string.format('%.0f', n)
end

local function count(what)
  redis.call('HINCRBY', 'counts', what, 1)
end

local function config_ms(name)
  return tonumber(redis.call('HGET', 'config', name))
end

-- How long a running poll holds its login's place.
local function lease_ms()
  return config_ms('request_deadline_ms') + config_ms('lease_margin_ms')
end

-- Fields of a hash as a table; what is not there is nil.
local function fields(key, ...)
  local values = redis.call('HMGET', key, ...)
  local found = {}
  for i, name in ipairs({...}) do
    found[name] = values[i] or nil
  end
  return found
end

-- For how long nothing is claimed any more, after a jump of the clock (ms). More than a lease is another clock's.
local function hold_left()
  local c = fields('config', 'hold_until', 'request_deadline_ms', 'lease_margin_ms')
  if not c.hold_until then return 0 end
  local left = c.hold_until - now
  return left <= c.request_deadline_ms + c.lease_margin_ms and math.max(0, left) or 0
end

local function token(alias, poll, attempt)
  return alias .. ' ' .. poll .. ' ' .. attempt
end

-- ISO 8601 in UTC, from ms (days → civil date after Howard Hinnant's algorithm).
local function iso(ms)
  local days, rest = math.floor(ms / DAY_MS), ms % DAY_MS
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, doy - math.floor((153 * mp + 2) / 5) + 1,
    math.floor(rest / 3600000), math.floor(rest / 60000) % 60, math.floor(rest / 1000) % 60, rest % 1000)
end

-- A template cut at its placeholders, for `fill`: text, name, text, name … text. Done once, however many messages a
-- script makes of it: to search a kilobyte for placeholders costs as much as four commands.
local function cut(template)
  local pieces, from = {}, 1
  for start, name, next_start in string.gmatch(template, '()@(%l+)@()') do
    pieces[#pieces + 1] = string.sub(template, from, start - 1)
    pieces[#pieces + 1] = name
    from = next_start
  end
  pieces[#pieces + 1] = string.sub(template, from)
  return pieces
end

-- A Celery message from its cut template: @login@, @account@, @poll@, @attempt@ … filled in, nothing else.
local function fill(pieces, values)
  local filled = {}
  for i = 1, #pieces do filled[i] = i % 2 == 1 and pieces[i] or values[pieces[i]] end
  return table.concat(filled)
end

----------------------------------------------------------------------------------------------- the login's place

-- After an unblock one account probes: the one that was tried, while it can still be polled; else the first that is due.
-- An account that awaits its callback asks nothing, so it probes only where there is no other. Returns alias, due time.
local function next_probe(login, probe)
  local due = probe and redis.call('ZSCORE', 'due:' .. login, probe)
  if due then return probe, due end
  local candidates = redis.call('ZRANGE', 'due:' .. login, 0, -1, 'WITHSCORES')
  for i = 1, #candidates, 2 do
    if redis.call('HGET', 'account:' .. candidates[i], 'state') ~= 'awaiting' then
      return candidates[i], candidates[i + 1]
    end
  end
  return candidates[1], candidates[2]
end

-- The account that goes next where no place is held, and when: alias, due time (ms); nil where there is none.
local function next_account(login, probing, probe)
  if probing then return next_probe(login, probe) end
  local first = redis.call('ZRANGE', 'due:' .. login, 0, 0, 'WITHSCORES')
  return first[1], first[2]
end

-- The first deadline of an awaited callback, whatever else of the login is due before: alias, deadline (ms). It asks
-- nothing of the bank, so nothing holds it back.
local function next_deadline(login)
  local due = redis.call('ZRANGE', 'due:' .. login, 0, -1, 'WITHSCORES')
  for i = 1, #due, 2 do
    if redis.call('HGET', 'account:' .. due[i], 'state') == 'awaiting' then return due[i], tonumber(due[i + 1]) end
  end
  return nil
end

local function held_until(l)
  return math.max(tonumber(l.not_before or 0), tonumber(l.rests_until or 0))
end

-- Where the login stands in the timetable follows from its state alone; `l` is what of it place() reads.
local function place_as(login, l)
  local at
  if l.blocked then
    at = nil
  elseif l.holder then
    at = l['until']
  else
    at = select(2, next_account(login, l.probing, l.probe))
    local held = held_until(l)
    if at and held > tonumber(at) then
      local _, deadline = next_deadline(login)
      at = whole(math.min(deadline or held, held))
    end
  end
  if at then
    redis.call('ZADD', 'timetable', at, login)
  else
    redis.call('ZREM', 'timetable', login)
  end
end

-- The end of every script.
local function place(login)
  place_as(login,
    fields('login:' .. login, 'blocked', 'holder', 'until', 'probing', 'probe', 'not_before', 'rests_until'))
end

-- Frees the place if, and only if, that token holds it.
local function free(login, held)
  if redis.call('HGET', 'login:' .. login, 'holder') == held then
    redis.call('HDEL', 'login:' .. login, 'holder', 'until', 'begun', 'refusals', 'refused_by')
  end
end

----------------------------------------------------------------------------------------------- what operators count

-- Moves the account among those that operators see as `seen`; nil takes it out of all.
local function count_as(alias, institution, counted, seen)
  local set = seen and 'state:' .. institution .. ':' .. seen
  if set == counted then return end
  if counted then redis.call('SREM', counted, alias) end
  if set then
    redis.call('SADD', set, alias)
    redis.call('HSET', 'account:' .. alias, 'counted', set)
  else
    redis.call('HDEL', 'account:' .. alias, 'counted')
  end
end

local POLLED = { scheduled = true, dispatched = true, polling = true, awaiting = true, waiting = true }

-- Only what is being polled can be blamed for being old.
local function rank(alias, institution, seen, as_of)
  if as_of and POLLED[seen] then
    redis.call('ZADD', 'as_of:' .. institution, as_of, alias)
  else
    redis.call('ZREM', 'as_of:' .. institution, alias)
  end
end

-- What operators see of an account: a pause lies over a block, and that over the state; nil: it is no longer defined.
local function seen_as(a)
  if a.state == 'retired' then return nil end
  if a.paused then return 'paused' end
  return redis.call('HEXISTS', 'login:' .. a.login, 'blocked') == 1 and 'blocked' or a.state
end

-- Keeps all that is counted of the account in step with it: called wherever its state or what lies over it changed.
local function recount(alias)
  local a = fields('account:' .. alias, 'state', 'paused', 'login', 'institution', 'counted', 'answered', 'as_of')
  local seen = seen_as(a)
  count_as(alias, a.institution, a.counted, seen)
  rank(alias, a.institution, seen, a.as_of)
  if a.state == 'awaiting' and not a.answered then
    redis.call('ZADD', 'awaiting', 'NX', whole(now), alias)
  else
    redis.call('ZREM', 'awaiting', alias)
  end
end

local function recount_login(login)
  for _, alias in ipairs(redis.call('SMEMBERS', 'aliases:' .. login)) do recount(alias) end
end

-- Upper bounds in seconds: a sync answer takes 24 to 190, a callback minutes to hours.
local BUCKETS = { 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 150, 190, 300, 600, 1800, 3600, 14400, 86400 }

local function bucket_of(ms)
  for _, bound in ipairs(BUCKETS) do
    if ms <= bound * 1000 then return tostring(bound) end
  end
  return 'more'
end

-- Counts an attempt's end, once: `class` is "outcome|type|code", of which there is a bounded number.
local function count_end(alias, begun_at, class)
  local a = fields('account:' .. alias, 'institution', 'mode')
  local whose = a.institution .. '|' .. (a.mode or 'sync') .. '|'
  local ms = math.max(0, now - (tonumber(begun_at) or now))
  redis.call('HINCRBY', 'polls', whose .. class, 1)
  redis.call('HINCRBY', 'durations', whose .. bucket_of(ms), 1)
  redis.call('HINCRBY', 'durations', whose .. 'sum', whole(ms))
end

----------------------------------------------------------------------------------------------- the account's step

local BEGUN = { polling = true, awaiting = true }
-- States in which an account waits for its poll: due, or to be due, and nobody has begun.
local WAITS = { scheduled = true, waiting = true, dispatched = true }

local function is_own(account, login, poll, attempt)
  return account.login == login and account.poll == poll and account.attempt == attempt
end

-- Whether the account's own request is under way with this token: only then does its end move the account.
local function is_begun(account, login, poll, attempt)
  return is_own(account, login, poll, attempt) and BEGUN[account.state] or false
end

-- Whether the token was sent out and no worker has begun it yet.
local function is_dispatched(account, login, poll, attempt)
  return is_own(account, login, poll, attempt) and account.state == 'dispatched'
end

-- The account is overdue an interval after its due time, or after what kept it from being polled then; not before.
local function watch(alias, due)
  local interval = tonumber(redis.call('HGET', 'account:' .. alias, 'interval'))
  redis.call('SREM', 'overdue', alias)
  if not interval then return end
  local at = whole(math.max(due, now) + interval)
  redis.call('HSET', 'account:' .. alias, 'overdue_at', at)
  redis.call('ZADD', 'overdue:at', at, alias)
end

-- The account is being polled, or may not be.
local function unwatch(alias)
  redis.call('SREM', 'overdue', alias)
  redis.call('ZREM', 'overdue:at', alias)
end

-- When a new poll of the account may begin at the earliest (ms): min_gap after the last one began.
local function gap_end(a)
  local gap, begun_at = tonumber(a.min_gap or 0), tonumber(a.begun_at)
  return gap > 0 and begun_at and math.min(begun_at, now) + gap or 0
end

-- Gives the account its next step, under whatever lies over it: a paused one keeps it, out of sight of beat.
local function step(alias, login, state, due)
  local a = fields('account:' .. alias, 'paused', 'begun_at', 'min_gap')
  if state == 'scheduled' then due = math.max(due, gap_end(a)) end
  redis.call('HSET', 'account:' .. alias, 'state', state, 'due', whole(due), 'moved_at', whole(now))
  watch(alias, due)
  if not a.paused then
    redis.call('ZADD', 'due:' .. login, whole(due), alias)
  end
  recount(alias)
end

-- A new poll, no memory of what went before.
local function start_over(alias, login, due)
  redis.call('HSET', 'account:' .. alias, 'tries', 0, 'waits', 0, 'losses', 0)
  step(alias, login, 'scheduled', due)
end

-- How many of its last attempts an account remembers, for whoever asks why it is where it is.
local HISTORY = 5

local function remember_end(alias, poll, attempt, begun_at, outcome)
  local entry = { whole(now), poll, attempt, whole(now - (tonumber(begun_at) or now)), outcome }
  redis.call('LPUSH', 'history:' .. alias, table.concat(entry, ' '))
  redis.call('LTRIM', 'history:' .. alias, 0, HISTORY - 1)
end

-- Voids a token that was dispatched and has not begun. Its place stays held: only its token, or `until`, frees that.
local function void(alias, login)
  local a = fields('account:' .. alias, 'state', 'attempt', 'due')
  if a.state == 'dispatched' then
    step(alias, login, a.attempt == '1' and 'scheduled' or 'waiting', tonumber(a.due))
  end
end

-- The same for whatever token holds the login's place.
local function void_holder(login)
  local held = redis.call('HGET', 'login:' .. login, 'holder')
  local holder = held and string.match(held, '^(%S+)')
  if holder and redis.call('HGET', 'account:' .. holder, 'login') == login then void(holder, login) end
end

-- Sends word that an answer waits to be settled; many words do no harm, `answers` is the truth.
local function push_settling(template, login, alias, poll, attempt)
  redis.call('LPUSH', ANSWERS, fill(cut(template), {
    login = login, account = alias, poll = poll, attempt = attempt, retries = '0',
  }))
end

----------------------------------------------------------------------------------------------- what may go out

-- A minute of `rate`, with two seconds more for the way from the licence to the bank; dispatches are a little further
-- apart, so that what waits in the queue for a moment finds its licence all the same.
local WINDOW_MS, PACE_MS = 62000, 63000
-- So many logins that fail for one cause within so long open their institution's breaker.
local BREAKER_LOGINS, BREAKER_MS = 5, 600000
-- Beat logs the newest of what it has not logged yet.
local MOST_NEWS = 100

local function report(what)
  redis.call('RPUSH', 'news', cjson.encode(what))
  redis.call('LTRIM', 'news', -MOST_NEWS, -1)
end

-- "country/segment/institution", from the `source` of an account's events.
local function institution_of(source)
  return string.sub(source, #'/khipu/' + 1)
end

local function limits_in_force()
  local c = fields('config', 'lease_margin_ms', 'paused_at', 'rate', 'daily_requests', 'login_budgets')
  return { margin_ms = tonumber(c.lease_margin_ms), is_paused = c.paused_at ~= nil, rate = tonumber(c.rate),
    daily_requests = tonumber(c.daily_requests), has_login_budgets = (c.login_budgets or '') ~= '' }
end

-- Keeps the login's place in the timetable from being earlier; its accounts keep their states and due times.
local function hold_back(login, not_before, why)
  redis.call('HSET', 'login:' .. login, 'not_before', whole(not_before), 'held_by', why)
end

-- Lets every login go that is held back for one of these reasons.
local function let_go(reasons)
  for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do
    local why = redis.call('HGET', 'login:' .. login, 'held_by')
    if why and reasons[why] then
      redis.call('HDEL', 'login:' .. login, 'not_before', 'held_by')
      place(login)
    end
  end
end

-- Moment from which this institution has a licence left (ms).
local function licence_at(institution, rate)
  local key = 'licences:' .. institution
  -- Where the clock was put back, those of its future are as young as can be.
  for _, each in ipairs(redis.call('ZRANGE', key, '(' .. whole(now), '+inf', 'BYSCORE')) do
    redis.call('ZADD', key, whole(now), each)
  end
  redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - WINDOW_MS))
  local used = redis.call('ZCARD', key)
  if used < rate then return now end
  return redis.call('ZRANGE', key, used - rate, used - rate, 'WITHSCORES')[2] + WINDOW_MS
end

local function use_licence(institution, held)
  redis.call('ZADD', 'licences:' .. institution, whole(now), held)
  redis.call('PEXPIRE', 'licences:' .. institution, WINDOW_MS)
end

local function midnight()
  return (math.floor(now / DAY_MS) + 1) * DAY_MS
end

-- Somewhen in tomorrow's first minute, who is due for longest first: a budget that is too small starves nobody.
local function tomorrow(due)
  local share = (due - (midnight() - DAY_MS)) / DAY_MS
  return midnight() + math.floor(math.max(0, math.min(share, 1)) * 60000)
end

local function requests_key()
  return 'requests:' .. string.sub(iso(now), 1, 10)
end

-- Which daily budget has nothing left for this login: "total budget", "login budget", or nil.
local function spent_budget(login, limits)
  local total, own = limits.daily_requests, limits.has_login_budgets and redis.call('HGET', 'budgets', login)
  local used = (total or own) and fields(requests_key(), '*', login)
  if total and tonumber(used['*'] or 0) >= total then return 'total budget' end
  if own and tonumber(used[login] or 0) >= tonumber(own) then return 'login budget' end
  return nil
end

local function spend(login, limits)
  local total, own = limits.daily_requests, limits.has_login_budgets and redis.call('HGET', 'budgets', login)
  if not total and not own then return end
  local key = requests_key()
  local of_all, of_login = redis.call('HINCRBY', key, '*', 1), redis.call('HINCRBY', key, login, 1)
  redis.call('PEXPIRE', key, 2 * DAY_MS)
  if of_all == total then report({ what = 'total budget spent', ['until'] = iso(midnight()) }) end
  if own and of_login == tonumber(own) then
    report({ what = 'login budget spent', login = login, ['until'] = iso(midnight()) })
  end
end

local function probe_pause(probes)
  local pauses, written = {}, redis.call('HGET', 'config', 'probe_pauses') or '600000'
  for pause in string.gmatch(written, '%d+') do pauses[#pauses + 1] = pause end
  return tonumber(pauses[math.min(probes + 1, #pauses)])
end

local function is_under_way(held)
  local alias, poll, attempt = string.match(held, '^(%S+) (%S+) (%S+)$')
  local a = fields('account:' .. alias, 'state', 'poll', 'attempt', 'due', 'begun_at')
  if a.poll ~= poll or a.attempt ~= attempt then return false end
  -- Where a pause, a block or its login's other accounts keep it from lapsing, it is over all the same.
  if a.state == 'awaiting' then return tonumber(a.due) > now end
  if a.state ~= 'polling' then return a.state == 'dispatched' end
  return a.begun_at + lease_ms() > now
end

-- Until when an open breaker lets nothing out (ms), nil where its next probe may go.
local function next_probe_at(institution)
  local b = fields('breaker:' .. institution, 'probe', 'next_probe', 'probes')
  if b.probe and is_under_way(b.probe) then
    return math.max(tonumber(b.next_probe), now + probe_pause(0))
  end
  return tonumber(b.next_probe) > now and tonumber(b.next_probe) or nil
end

local function is_breaker_open(institution)
  return redis.call('EXISTS', 'breaker:' .. institution) == 1
end

-- The probe is out: whatever becomes of it, the next one follows no sooner than a pause after this one's end.
local function send_probe(institution, held)
  local key = 'breaker:' .. institution
  local probes = redis.call('HINCRBY', key, 'probes', 1)
  redis.call('HSET', key, 'probe', held, 'next_probe', whole(now + probe_pause(probes)))
  redis.call('PEXPIRE', key, DAY_MS)
end

local function open_breaker(institution, cause, logins)
  redis.call('SADD', 'breakers', institution)
  redis.call('HSET', 'breaker:' .. institution, 'cause', cause, 'opened_at', whole(now), 'probes', 0, 'next_probe',
    whole(now + probe_pause(0)))
  redis.call('PEXPIRE', 'breaker:' .. institution, DAY_MS)
  report({ what = 'breaker opened', institution = institution, cause = cause, logins = logins })
end

local function close_breaker(institution)
  redis.call('SREM', 'breakers', institution)
  redis.call('DEL', 'breaker:' .. institution)
  let_go({ breaker = true })
  report({ what = 'breaker closed', institution = institution })
end

local function logins_failing(institution, cause)
  local key, logins = 'failing:' .. institution, 0
  redis.call('ZREMRANGEBYSCORE', key, '-inf', whole(now - BREAKER_MS))
  for _, each in ipairs(redis.call('ZRANGE', key, 0, -1)) do
    if string.match(each, '^%S+') == cause then logins = logins + 1 end
  end
  return logins
end

local function is_resting(l)
  return l.rests_until ~= nil and tonumber(l.rests_until) > now
end

-- Nothing of the login goes out for so long (ms): no limit that is left, no pause and no order but unblock makes it
-- earlier. Its accounts keep their states and due times.
local function rest(login, for_ms)
  local key = 'login:' .. login
  local l = fields(key, 'rests_until')
  local ends = math.max(now + for_ms, is_resting(l) and tonumber(l.rests_until) or 0)
  redis.call('HSET', key, 'rests_until', whole(ends), 'rested_at', whole(now))
  redis.call('ZADD', 'resting', whole(ends), login)
  if not is_resting(l) then report({ what = 'login rests', login = login, ['until'] = iso(ends) }) end
end

-- The rest is over, but not what led to it: the next failure of that kind begins another.
local function end_rest(login)
  redis.call('HSET', 'login:' .. login, 'rests_until', whole(now), 'rested_at', whole(now))
  redis.call('ZREM', 'resting', login)
end

-- A failure that may be a bad log-on, once for each token, however many bodies its callback brings.
local function note_generic(login, held, rest_ms)
  local answer = 'answer:' .. held
  if redis.call('EXISTS', answer) == 1 and redis.call('HSETNX', answer, 'noted', 1) == 0 then return end
  redis.call('HINCRBY', 'login:' .. login, 'generic', 1)
  if rest_ms then rest(login, rest_ms) end
end

-- An answer that came too late to move its account has spent a log-on all the same.
local function note_late_answer(login, held, cause, rest_ms)
  if cause == 'generic' and redis.call('EXISTS', 'answer:' .. held) == 1 then note_generic(login, held, rest_ms) end
end

-- An attempt has failed, for a cause that is more than the account's own, or '' for none; its login rests for so long
-- (ms, nil where it does not).
local function note_failure(login, source, held, cause, rest_ms)
  local institution = institution_of(source)
  if cause == 'generic' then note_generic(login, held, rest_ms) end
  if is_breaker_open(institution) then
    local b = fields('breaker:' .. institution, 'probe', 'probes')
    if b.probe ~= held then return end
    redis.call('HSET', 'breaker:' .. institution, 'next_probe', whole(now + probe_pause(tonumber(b.probes))))
  elseif cause ~= '' and cause ~= 'generic' then
    redis.call('ZADD', 'failing:' .. institution, whole(now), cause .. ' ' .. login)
    redis.call('PEXPIRE', 'failing:' .. institution, BREAKER_MS)
    local logins = logins_failing(institution, cause)
    if logins >= BREAKER_LOGINS then open_breaker(institution, cause, logins) end
  end
end

-- An account of the login has its balance: the log-on works, and so does the institution.
local function note_success(login, source)
  local institution = institution_of(source)
  redis.call('HDEL', 'login:' .. login, 'generic')
  if redis.call('HDEL', 'login:' .. login, 'rests_until', 'rested_at') > 0 then redis.call('ZREM', 'resting', login) end
  redis.call('DEL', 'failing:' .. institution)
  if is_breaker_open(institution) then close_breaker(institution) end
end

----------------------------------------------------------------------------------------------- dead letters and events

-- The reason (code, type, description) as the letter's header carries it, JSON; `accounts` for a login's letter only.
local function with_times(reason, attempts, first_at, accounts)
  local text = cjson.encode({
    code = reason.code, type = reason.type, description = reason.description,
    attempts = attempts, first_at = iso(first_at), last_at = iso(now), accounts = accounts,
  })
  -- cjson writes an empty table as an object.
  return (string.gsub(text, '"accounts":{}', '"accounts":[]', 1))
end

local function push_letter(template, queue, login, alias, poll, attempt, reason)
  local letter = fill(cut(template), {
    login = login, account = alias, poll = poll, attempt = attempt, retries = whole(attempt - 1),
    queue = queue, reason = reason,
  })
  redis.call('LPUSH', queue, letter)
  return letter
end

local function remove_letter(alias)
  local a = fields('account:' .. alias, 'queue', 'letter')
  if a.letter then redis.call('LREM', a.queue, 1, a.letter) end
  redis.call('SREM', 'parked', alias)
  redis.call('HDEL', 'account:' .. alias, 'queue', 'letter', 'code', 'type', 'description', 'suspended_at')
end

-- Whether the clock may say what is old: beat looked at it just now, and it has not jumped for one retention.
local function may_trim()
  local c = fields('config', 'claimed_at', 'trim_from', 'retention_ms')
  return c.claimed_at and c.retention_ms and math.abs(now - c.claimed_at) < 30000 and now >= tonumber(c.trim_from or 0)
end

local function trim(stream)
  if may_trim() then
    redis.call('XTRIM', stream, 'MINID', '~', whole(real_now() - config_ms('retention_ms')))
  end
end

-- Puts one CloudEvent on the stream, which is trimmed by age and never by count.
local function publish(stream, id, source, type, subject, time_ms, data)
  trim(stream)
  redis.call('XADD', stream, '*', 'specversion', '1.0', 'id', id, 'source', source, 'type', type, 'subject', subject,
    'time', iso(time_ms), 'datacontenttype', 'application/json', 'dataschema', 'urn:balance-poller:' .. type,
    'data', data)
end

-- Tells the ledger why an account's figure grows old, or that it no longer does: either way the last word counts.
local function publish_account(stream, alias, type, about)
  local a = fields('account:' .. alias, 'source', 'poll', 'institution')
  about.account, about.institution, about.poll = alias, a.institution, tonumber(a.poll)
  publish(stream, alias .. '.' .. a.poll .. '.' .. type, a.source, type, alias, now, cjson.encode(about))
  if type ~= 'account.overdue.v1' then redis.call('HDEL', 'account:' .. alias, 'overdue') end
end

-- Brings a suspended or parked account back. Under a block the ledger hears of it with the unblock.
local function bring_back(stream, alias, login, due, by)
  remove_letter(alias)
  start_over(alias, login, due)
  if redis.call('HEXISTS', 'login:' .. login, 'blocked') == 0 then
    publish_account(stream, alias, 'account.resumed.v1', { by = by })
  end
end

local NEEDS_LETTER = { suspended = true, parked = true }

----------------------------------------------------------------------------------------------- the audit trail

-- Who asks: the last argument of every script that carries out an order.
local function take_actor()
  return table.remove(ARGV)
end

-- Writes an order down: who, what, on which account or login, and what came of it. Forgotten by age, like the stream.
local function audit(actor, action, subject, outcome)
  local who = string.sub(string.gsub(actor, '[^%w%._@ -]', '?'), 1, 80)
  trim('audit')
  redis.call('XADD', 'audit', '*', 'actor', who, 'action', action, 'subject', subject, 'outcome', outcome, 'at',
    whole(now))
end

-- The script's result, once it is written down. A name that nobody knows is not: it may be anything, a number or a key.
local function recorded(actor, action, subject, result)
  local is_unknown = result[2] == 'unknown'
  local outcome = result[1] == 'refused' and 'refused: ' .. result[2] or result[1]
  audit(actor, action, is_unknown and '?' or subject, outcome)
  return result
end
