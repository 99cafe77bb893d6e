-- Adds, changes and retires definitions: called by beat and by `balances sync`, in batches.
--
-- ARGV  1 serial that the caller compared with  2 "prepare" | "set" | "retire" | "finish", in this order
--   prepare, finish: 3 retry  4 limits  5 request_deadline_ms  6 lease_margin_ms  7 retention_ms  8 rate
--           9 daily_requests  10 login_budgets ("login requests login requests …"; '' for none, like 8 and 9)
--           11 probe_pauses ("ms ms …")  12 content digest
--   set:    3 … thirteen per account: alias, definition, revision, identity, schedule, slot (ms), login, institution,
--           source, scheme, token_days ('' where the scheme has no token), interval (ms), min_gap (ms)
--   retire: 3 … aliases
--   the last one, always: who asks
-- Returns { "applied", how many changed } or { "overtaken", serial }: another apply came between; compare again
--
-- A changed identity is a new generation: own pins, own latest, own tokens. Anything else leaves the account's
-- step alone, but for the due time of a scheduled account whose schedule changed. Limits change at the end, but the very
-- first come before the first account: none is ever there without them, however an apply ends.

local actor, serial, event = take_actor(), ARGV[1], ARGV[2]
local changed = 0

-- Takes the account off its login. A request in flight keeps the login's place until it ends.
local function take_off(alias, login)
  redis.call('ZREM', 'due:' .. login, alias)
  redis.call('SREM', 'aliases:' .. login, alias)
  if redis.call('EXISTS', 'aliases:' .. login) == 0 then
    -- Nobody asks with its token any more, so nobody need be told when that ends.
    redis.call('HDEL', 'login:' .. login, 'token_expires')
    redis.call('ZREM', 'token_expires', login)
  end
  place(login)
end

-- Pins and tokens of the older generation stay for answers that are still to come, and go with the stream's memory.
local function forget(alias, generation)
  remove_letter(alias)
  redis.call('PEXPIRE', 'pins:' .. alias .. ':' .. generation, whole(config_ms('retention_ms') or 30 * DAY_MS))
  redis.call('HDEL', 'latest', alias)
  redis.call('ZREM', 'as_of:' .. redis.call('HGET', 'account:' .. alias, 'institution'), alias)
  redis.call('HDEL', 'account:' .. alias, 'latest_poll', 'latest_attempt', 'latest_fingerprint', 'last_ok',
    'last_outcome', 'as_of')
end

local function start(alias, a, d)
  local generation = d.identity == a.identity and a.generation or whole((a.generation or 0) + 1)
  redis.call('HSET', 'account:' .. alias, 'generation', generation)
  redis.call('PERSIST', 'pins:' .. alias .. ':' .. generation)
  redis.call('HSETNX', 'account:' .. alias, 'poll', 0)
  redis.call('HSETNX', 'account:' .. alias, 'attempt', 0)
  start_over(alias, d.login, tonumber(d.slot))
end

local function set(d)
  local key = 'account:' .. d.alias
  local a = fields(key, 'state', 'identity', 'generation', 'schedule', 'login', 'revision', 'due',
    'min_gap')
  if a.state ~= 'retired' and a.revision == d.revision then return end
  local is_new = not a.state or a.state == 'retired'
  local is_other = not is_new and a.identity ~= d.identity
  if is_other then
    take_off(d.alias, a.login)
    forget(d.alias, a.generation)
  end
  redis.call('HSET', key, 'definition', d.definition, 'revision', d.revision, 'identity', d.identity, 'schedule',
    d.schedule, 'slot', d.slot, 'interval', d.interval, 'login', d.login, 'institution', d.institution,
    'source', d.source, 'mode', cjson.decode(d.definition).mode, 'min_gap', d.min_gap)
  redis.call('SADD', 'institutions', d.institution)
  redis.call('HSET', 'revisions', d.alias, d.revision)
  redis.call('SADD', 'aliases:' .. d.login, d.alias)
  redis.call('SADD', 'logins', d.login)
  redis.call('HSET', 'login:' .. d.login, 'scheme', d.scheme, 'token_days', d.token_days)
  if is_new or is_other then
    start(d.alias, a, d)
  elseif a.state == 'scheduled' and a.schedule ~= d.schedule then
    step(d.alias, d.login, 'scheduled', tonumber(d.slot))
  elseif a.state == 'scheduled' and a.min_gap ~= d.min_gap then
    step(d.alias, d.login, 'scheduled', tonumber(a.due))
  end
  place(d.login)
  changed = changed + 1
end

local function retire(alias)
  local a = fields('account:' .. alias, 'state', 'login', 'generation')
  if not a.state or a.state == 'retired' then return end
  redis.call('HSET', 'account:' .. alias, 'state', 'retired')
  redis.call('HDEL', 'account:' .. alias, 'paused', 'due', 'definition', 'overdue')
  unwatch(alias)
  redis.call('HDEL', 'revisions', alias)
  forget(alias, a.generation)
  take_off(alias, a.login)
  recount(alias)
  changed = changed + 1
end

local LIMITS = { 'retry', 'limits', 'request_deadline_ms', 'lease_margin_ms', 'retention_ms', 'rate', 'daily_requests',
  'login_budgets', 'probe_pauses' }
local CONTENT = ARGV[#LIMITS + 3]

local function set_budgets()
  redis.call('DEL', 'budgets')
  for login, requests in string.gmatch(redis.call('HGET', 'config', 'login_budgets'), '(%S+) (%d+)') do
    redis.call('HSET', 'budgets', login, requests)
  end
end

local function prepare()
  if redis.call('HEXISTS', 'config', 'retry') == 0 then redis.call('HSET', 'config', 'version', STATE_VERSION) end
  for i, name in ipairs(LIMITS) do redis.call('HSETNX', 'config', name, ARGV[i + 2]) end
  set_budgets()
end

-- Who was held back by a limit that is another one now is looked at anew.
local function forget_holds(before)
  local after = fields('config', 'rate', 'daily_requests', 'login_budgets')
  if after.rate ~= before.rate then
    redis.call('DEL', 'slots')
    let_go({ rate = true })
  end
  if after.daily_requests ~= before.daily_requests or after.login_budgets ~= before.login_budgets then
    set_budgets()
    let_go({ ['login budget'] = true, ['total budget'] = true })
  end
end

local function finish()
  local before = fields('config', 'rate', 'daily_requests', 'login_budgets')
  for i, name in ipairs(LIMITS) do redis.call('HSET', 'config', name, ARGV[i + 2]) end
  forget_holds(before)
  redis.call('HSET', 'config', 'content', CONTENT)
  redis.call('HINCRBY', 'config', 'serial', 1)
  redis.call('ZADD', 'contents', whole(now), CONTENT)
  audit(actor, 'sync', 'accounts file', 'applied ' .. string.sub(CONTENT, 1, 12))
end

local at = redis.call('HGET', 'config', 'serial') or '0'
if at ~= serial then return { 'overtaken', at } end
if event == 'prepare' then
  prepare()
elseif event == 'set' then
  for i = 3, #ARGV, 13 do
    set({ alias = ARGV[i], definition = ARGV[i + 1], revision = ARGV[i + 2], identity = ARGV[i + 3],
      schedule = ARGV[i + 4], slot = ARGV[i + 5], login = ARGV[i + 6], institution = ARGV[i + 7],
      source = ARGV[i + 8], scheme = ARGV[i + 9], token_days = ARGV[i + 10], interval = ARGV[i + 11],
      min_gap = ARGV[i + 12] })
  end
elseif event == 'retire' then
  for i = 3, #ARGV do retire(ARGV[i]) end
else
  finish()
end
return { 'applied', changed }
