-- Publishes a paid answer, once per operation, whatever its token says: called by a worker.
--
-- ARGV  1 stream  2 login  3 alias  4 poll  5 attempt  6 generation
--       7 operation id  8 source  9 fetched_at (ms)
--       10 data: the event's JSON object, left open: no "}" and neither `late` nor `changed`
--       11 fingerprint of the balances  12 next slot (ms)  13 revision that slot was computed for
--       14 interval that begins with it (ms)  15 newest moment that the bank gives (ms, '' for none)
--       16 "drift" where the answer has unknown fields  17 … the AccountIds of the answer
-- Returns { "published" | "late" | "repeated", "true" | "false" (changed) }
--      or { "foreign" }: another account's AccountId or operation; nothing was published and nothing changed
--
-- A current token goes back to `scheduled` and frees its place; any other only publishes, as late, and frees
-- the place if it still holds it.

local stream, login, alias, poll, attempt, generation = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local operation, source, fetched_at, data, fingerprint = ARGV[7], ARGV[8], tonumber(ARGV[9]), ARGV[10], ARGV[11]
local next_slot, revision, interval = tonumber(ARGV[12]), ARGV[13], ARGV[14]
local as_of, drift, ids_from = ARGV[15], ARGV[16], 17
local key, pins = 'account:' .. alias, 'pins:' .. alias .. ':' .. generation
local held = token(alias, poll, attempt)
local a = fields(key, 'state', 'poll', 'attempt', 'login', 'generation', 'revision', 'slot', 'latest_poll',
  'latest_attempt', 'latest_fingerprint', 'begun_at', 'overdue', 'institution')
local defined = a.state ~= 'retired' and a.generation == generation
local current = defined and is_begun(a, login, poll, attempt)

local function is_foreign()
  local owner = redis.call('GET', 'operation:' .. operation)
  if owner and owner ~= alias then return true end
  if redis.call('EXISTS', pins) == 0 then return false end
  for i = ids_from, #ARGV do
    if redis.call('SISMEMBER', pins, ARGV[i]) == 0 then return true end
  end
  return false
end

local keep_ms = config_ms('retention_ms') + DAY_MS

-- The pins of what is no longer defined go with the stream's memory.
local function pin()
  for i = ids_from, #ARGV do redis.call('SADD', pins, ARGV[i]) end
  if not defined then redis.call('PEXPIRE', pins, whole(keep_ms)) end
end

-- Whether this answer is newer than the newest one seen of this definition.
local function is_newer()
  if not defined then return false end
  local p, q = tonumber(poll), tonumber(a.latest_poll or 0)
  return p > q or (p == q and tonumber(attempt) > tonumber(a.latest_attempt or 0))
end

-- Sets `latest` and returns whether the balances changed.
local function remember(text)
  redis.call('HSET', key, 'latest_poll', poll, 'latest_attempt', attempt, 'latest_fingerprint', fingerprint)
  redis.call('HSET', 'latest', alias, text)
  if as_of ~= '' then redis.call('HSET', key, 'as_of', as_of) end
end

local function count_answer(result)
  count('answer ' .. result)
  if drift == 'drift' then count('drift field') end
end

local function publish_once()
  if not redis.call('SET', 'operation:' .. operation, alias, 'NX', 'PX', whole(keep_ms)) then
    return 'repeated', false
  end
  pin()
  local newer = is_newer()
  local changed = newer and a.latest_fingerprint ~= fingerprint
  local text = string.format('%s,"late":%s,"changed":%s}', data, tostring(not current), tostring(changed))
  if newer then remember(text) end
  publish(stream, operation, source, 'balance.observed.v1', alias, fetched_at, text)
  return current and 'published' or 'late', changed
end

local function schedule_next()
  -- An answer of an older revision was timed by an older schedule: `slot` is what the new one said when it came.
  local due = tonumber(a.slot)
  if revision == a.revision then
    due = next_slot
    redis.call('HSET', key, 'interval', interval)
  end
  redis.call('HSET', key, 'last_ok', whole(fetched_at), 'last_outcome', 'ok')
  redis.call('HSET', 'last_ok', a.institution, whole(fetched_at))
  start_over(alias, login, due)
  redis.call('HDEL', 'login:' .. login, 'probing', 'probe')
  if a.overdue then publish_account(stream, alias, 'account.resumed.v1', { by = 'answer' }) end
end

if is_foreign() then
  count_answer('foreign')
  return { 'foreign' }
end
local result, changed = publish_once()
count_answer(result)
if current then
  remember_end(alias, poll, attempt, a.begun_at, 'ok')
  count_end(alias, a.begun_at, 'ok|none|ok')
  schedule_next()
  note_success(login, source)
elseif defined then
  recount(alias)
end
if not is_dispatched(a, login, poll, attempt) then free(login, held) end
place(login)
return { result, tostring(changed) }
