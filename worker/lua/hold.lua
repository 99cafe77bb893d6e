-- Takes note of a jump of the server's clock: called by beat, which measured it by a clock of its own.
--
-- ARGV  1 jump (ms, negative: back)  2 the jumps that were known when it was measured (ms)
--       3 since when the clock may show the new time (ms, by the new time)
-- Returns { "held", for how long (ms) } or { "known" }: another beat was first; also a repeated call
--
-- For one lease nothing is claimed: what runs ends by itself, and does not lapse because of the jump. Every moment that
-- the timetable waits for moves by the jump, so that all waits and leases last as long as they should; but for what was
-- written since the jump. `clock:offset` is the tests' and jumps never.

local jump, known, since = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]) + now - real_now()

local function is_new(moved_at)
  return moved_at and tonumber(moved_at) >= since and tonumber(moved_at) <= now
end

local function move_field(key, name)
  local at = redis.call('HGET', key, name)
  if at then redis.call('HSET', key, name, whole(at + jump)) end
end

local function move_score(key, member)
  local at = redis.call('ZSCORE', key, member)
  if at then redis.call('ZADD', key, whole(at + jump), member) end
end

local function move_all(key)
  for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do move_score(key, member) end
end

local institutions = {}

local function move_account(alias, login)
  local key = 'account:' .. alias
  institutions[institution_of(redis.call('HGET', key, 'source'))] = true
  if is_new(redis.call('HGET', key, 'moved_at')) then return end
  for _, name in ipairs({ 'due', 'overdue_at', 'moved_at', 'begun_at' }) do move_field(key, name) end
  move_score('due:' .. login, alias)
  move_score('overdue:at', alias)
end

-- The holder first: its account may be another login's by now, or nobody's.
local function move_place(login)
  local key = 'login:' .. login
  local holder = redis.call('HGET', key, 'holder')
  local alias = holder and string.match(holder, '^%S+')
  if alias and not is_new(redis.call('HGET', 'account:' .. alias, 'moved_at')) then move_field(key, 'until') end
end

-- How far the rates are used up, who failed lately, and when breakers let a probe out.
local function move_institution(institution)
  for _, kind in ipairs({ 'licences:', 'failing:' }) do
    local members = redis.call('ZRANGE', kind .. institution, 0, -1, 'WITHSCORES')
    for i = 1, #members, 2 do
      if not is_new(members[i + 1]) then move_score(kind .. institution, members[i]) end
    end
  end
  for _, name in ipairs({ 'opened_at', 'next_probe' }) do move_field('breaker:' .. institution, name) end
end

local function move_rest(login)
  local key = 'login:' .. login
  if is_new(redis.call('HGET', key, 'rested_at')) then return end
  for _, name in ipairs({ 'rests_until', 'rested_at' }) do move_field(key, name) end
  move_score('resting', login)
end

-- Who was held back is looked at anew; a rest lasts as long as it should.
local function move(login)
  redis.call('HDEL', 'login:' .. login, 'not_before', 'held_by')
  move_place(login)
  move_rest(login)
  for _, alias in ipairs(redis.call('SMEMBERS', 'aliases:' .. login)) do move_account(alias, login) end
  move_all('failures:' .. login)
  place(login)
end

if (redis.call('HGET', 'config', 'jumped') or '0') ~= known then return { 'known' } end
for _, login in ipairs(redis.call('SMEMBERS', 'logins')) do move(login) end
for institution in pairs(institutions) do move_institution(institution) end
-- Nobody holds a slot any more: who waited for one is looked at anew.
redis.call('DEL', 'slots')
-- Those that live say so again within seconds.
move_all('workers')
-- What is counted by its age keeps its age.
for _, key in ipairs({ 'awaiting', 'received', 'begins' }) do move_all(key) end
redis.call('HSET', 'config', 'jumped', whole(known + jump), 'hold_until', whole(now + lease_ms()),
  'trim_from', whole(now + config_ms('retention_ms')))
count('clock jump')
return { 'held', lease_ms() }
