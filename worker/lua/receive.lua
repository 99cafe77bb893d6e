-- Takes a callback's body in: called by the webhook. From here the answer cannot be lost, and no deadline applies.
--
-- ARGV  1 digest of the callback's token  2 hash of the body  3 body  4 content type
--       5 message template of a settling  6 pause before it is pushed again (ms)
-- Returns { "stored" | "repeated" | "full", alias, poll }: taken in, the same body again, or too many different ones
--      or { "unknown" }: no such token
--
-- Even a repeated body writes, so that a WAITAOF behind this call waits for what another webhook has just stored.

local digest, hash, body, content_type, template, pause_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
-- Khipu sends one; whoever holds the URL may not fill the memory with others.
local MOST_BODIES = 4
local key = 'callback:' .. digest
local c = fields(key, 'login', 'alias', 'poll', 'attempt', 'generation', 'definition', 'bank', 'key', 'bodies')

local function store()
  local id = token(c.alias, c.poll, c.attempt)
  redis.call('HSET', key, 'body:' .. hash, 1, 'bodies', (c.bodies or 0) + 1)
  redis.call('HSET', 'answer:' .. id, 'login', c.login, 'generation', c.generation, 'definition', c.definition,
    'bank', c.bank, 'key', c.key, 'content_type', content_type, 'body:' .. hash, body)
  redis.call('HSETNX', 'answer:' .. id, 'received_at', whole(now))
  redis.call('ZADD', 'answers', whole(now + pause_ms), id)
  redis.call('ZADD', 'received', 'NX', whole(now), id)
  push_settling(template, c.login, c.alias, c.poll, c.attempt)
end

-- The account's next step is now its answer, which `answers` keeps.
local function void_deadline()
  local a = fields('account:' .. c.alias, 'state', 'poll', 'attempt', 'login')
  if not is_begun(a, c.login, c.poll, c.attempt) then return end
  redis.call('HSET', 'account:' .. c.alias, 'answered', 1)
  redis.call('ZREM', 'due:' .. c.login, c.alias)
  recount(c.alias)
  place(c.login)
end

local function receive()
  redis.call('HINCRBY', key, 'seen', 1)
  if redis.call('HEXISTS', key, 'body:' .. hash) == 1 then return 'repeated' end
  if tonumber(c.bodies or 0) >= MOST_BODIES then return 'full' end
  store()
  void_deadline()
  return 'stored'
end

if not c.alias then
  count('callback unknown')
  return { 'unknown' }
end
local result = receive()
count('callback ' .. result)
return { result, c.alias, c.poll }
